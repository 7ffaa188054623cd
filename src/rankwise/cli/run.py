"""`rankwise run`: a method on your rows, beside its controls, evaluated and reported."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.cli.arguments import (
    ControlArguments,
    DataArguments,
    FitArguments,
    ModelArguments,
    OutputArguments,
    TuneArguments,
    required,
)
from rankwise.cli.job import load, parse_job, settings_of
from rankwise.decoding import Decoding
from rankwise.errors import PlanError, RankwiseError
from rankwise.hub import check_push
from rankwise.methods import DEFAULT, METHODS, Method, by_name
from rankwise.plan import RankPlan

if TYPE_CHECKING:
    from datasets import Dataset

    from rankwise.job import Job
    from rankwise.result import Result


def main(argv: Sequence[str]) -> None:
    """Fine-tune by a method on your data, and compare it with plain LoRA of the same size."""
    more = [ControlArguments(), TuneArguments(), Decoding()]
    parts = parse_job("run", main.__doc__ or "", argv, method=DEFAULT, more=more)
    run("run", *parts)


def run(
    command: str,
    method: Method,
    model: ModelArguments,
    data: DataArguments,
    fit: FitArguments,
    output: OutputArguments,
    controls: ControlArguments,
    tuning: TuneArguments | None = None,
    decoding: Decoding | None = None,
) -> Path:
    """The whole job, in stages that a resumed run does not repeat. Returns the output folder."""
    target = required(output.output_dir, "output_dir", command)
    check_push(output.push_to_hub)
    wanted = parse_controls(controls.control)
    from rankwise.workspace import check_output, finish, is_finished, open_workspace

    resume = output.resume_from_checkpoint
    check_output(target, output.overwrite_output_dir, resume)
    given = load(command, model, data, fit, decoding)
    job = given.at_rate(fit.learning_rate, method)
    from rankwise.cli.show import report, say
    from rankwise.hub import push
    from rankwise.job import check, rests_on
    from rankwise.launched import is_first
    from rankwise.report import verdict
    from rankwise.result import Result
    from rankwise.stages import run_method

    base = check(method, job)
    control_job = replace(job, train=_control_rows(method, job))
    for name, flags in wanted.values():
        try:
            check(_control(name, flags, method, None), control_job, base)
        except PlanError:  # without flags of its own, whether it can be waits for the size
            if flags:
                raise
    tuning = tuning if tuning is not None and tuning.tune else None
    settings = settings_of(method, model, data, fit, controls, *filter(None, [tuning, decoding]))
    settings["rests_on"] = rests_on(job, base)
    if resume and is_finished(target, settings):
        say("this run is finished already")
        show(Result.load(Path(target) / "metrics.json"), Path(target))
        return Path(target)
    search = Path(f"{target}.tune")
    if tuning is not None:
        job = _tuned(method, job, search, tuning)
        taken = _take_over(search)  # held to the end of this function
        if taken is None:
            say("the learning rate is chosen; another process trains with it")
            return Path(target)
    work = open_workspace(target, output.overwrite_output_dir, resume, settings)
    count = 1 + len(wanted)
    say(f"1/{count} {method.title}, learning rate {job.args.learning_rate:.3g}")
    ours = run_method(method, job, work, resume, base)
    results: list[Result] = []
    for number, (arm, (name, flags)) in enumerate(wanted.items(), 2):
        control = _control(name, flags, method, ours.lora_parameters)
        rated = given.at_rate(fit.learning_rate, control)
        rate = "" if tuning is not None else f", learning rate {rated.args.learning_rate:.3g}"
        say(f"{number}/{count} {control.title}, on the same rows{rate}")
        found = _train_control(control, method, rated, work, arm, resume, tuning, search)
        if found is not None:
            results.append(found)
    results = [*ours.controls, *results]  # its own rivals first
    ours = ours.with_controls(results, verdict(ours, results))
    report(ours, work)
    folder = finish(work, target)
    shutil.rmtree(search, ignore_errors=True)
    show(ours, folder)
    if output.push_to_hub is not None and is_first():
        say(f"uploaded to {push(folder / method.product, output.push_to_hub)}")
    return folder


def _tuned(method: Method, job: "Job", search: Path, tuning: TuneArguments) -> "Job":
    """The job at the rate that a search finds best for the method, which its record says."""
    from rankwise.cli.show import say
    from rankwise.trainer import replaced
    from rankwise.tune import tune

    if len(tuning.tune_rates) != 2:
        raise RankwiseError(
            f"--tune_rates are {tuning.tune_rates}; give the lowest and the highest"
        )
    say(f"{tuning.tune} trials of learning rates for {method.title}")
    low, high = tuning.tune_rates
    found = tune(method, job, search, tuning.tune, (low, high))
    say(f"learning rate {found.learning_rate:.3g}, by {found.metric} on {found.rows:,} rows")
    args = replaced(job.args, learning_rate=found.learning_rate)
    return replace(job, args=args, about={"tuned": asdict(found)})


def _take_over(search: Path) -> Any:
    """A lock where this process is the one, of those that shared a search, that goes on to train;
    else None."""
    from filelock import FileLock, Timeout

    lock = FileLock(search / "run.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    return lock


def parse_controls(specs: Sequence[str]) -> dict[str, tuple[str, dict[str, Any]]]:
    """The method and flags of every control, by a name for its files: `lora`, then `lora-2`, ..."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for spec in dict.fromkeys(specs):
        if spec != "none":
            name, flags = parse_control(spec)
            count = 1 + sum(name == other for other, _ in found.values())
            found[name if count == 1 else f"{name}-{count}"] = name, flags
    return found


def parse_control(spec: str) -> tuple[str, dict[str, Any]]:
    """`lora:r=4,lora_dropout=0.1` as a method's name and flags.

    Raises:
        RankwiseError: no such method or flag, or a value that is none.
    """
    from rankwise.cli.flags import Group, parse

    name, _, given = spec.partition(":")
    if name == "uniform":
        raise RankwiseError("--control uniform is now --control lora")
    if name not in METHODS:
        raise RankwiseError(f"--control has no {name!r}; take none, or {', '.join(METHODS)}")
    pairs = [pair for pair in given.split(",") if pair]
    if not all("=" in pair for pair in pairs):
        raise RankwiseError(f"--control {spec} is not of the form name:flag=value,...")
    keys = [pair.partition("=")[0] for pair in pairs]
    like = by_name(name)
    like.with_flags(**{key: getattr(like, key, None) for key in keys})  # refuses unknown ones
    flags = [f"--{pair}" for pair in pairs]
    (found,) = parse(f"run --control {name}", "", [Group(name, like)], flags)
    return name, {key: getattr(found, key) for key in keys}


def _control(name: str, flags: dict[str, Any], method: Method, budget: int | None) -> Method:
    """A control at the method's size and scaling, unless flags or its name say a size."""
    from rankwise.stages import with_method

    given = by_name(name, **flags)
    if getattr(given, "plan", None) is not None:  # decides all that a control takes over
        return given
    sizes = ("budget", "rank", "energy")
    sized = "r" in flags or any(getattr(given, size, None) is not None for size in sizes)
    control: Any = with_method(name, method, None if sized else budget)
    if "r" in flags and getattr(control, "lora_alpha", None) is not None:
        # alpha was the method's at its r: the scaling stays, whatever r the control has
        flags = {"lora_alpha": control.lora_alpha * flags["r"] / control.r, **flags}
    return control.with_flags(**flags)


def _train_control(
    control: Method,
    method: Method,
    job: "Job",
    work: Path,
    arm: str,
    resume: bool,
    tuning: TuneArguments | None,
    search: Path,
) -> "Result | None":
    """The control's result; None, and a line that says why, where there is none of this size."""
    from rankwise.cli.show import say
    from rankwise.files import write_text
    from rankwise.job import GENERATIONS
    from rankwise.stages import run_method

    rows = _control_rows(method, job)
    folder = work / "arms" / arm
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if tuning is not None:
            job = _tuned(control, job, search / arm, tuning)
        result = run_method(control, job, folder, resume, rows=rows)
    except PlanError as error:
        (work / "controls" / f"{arm}.json").unlink(missing_ok=True)  # of another size
        say(f"no {arm} control: {error}")
        return None
    if (folder / "plan.json").is_file():
        RankPlan.load(folder / "plan.json").save(work / "controls" / f"{arm}.json")
    if (folder / GENERATIONS).is_file():
        kept = work / "controls" / f"{arm}-{GENERATIONS}"
        write_text(kept, (folder / GENERATIONS).read_text(encoding="utf-8"))
    return result


def _control_rows(method: Method, job: "Job") -> "Dataset":
    """The rows that a control trains on: for a method that hands over what it trained, those that
    it trained on itself."""
    from rankwise.job import split_rows

    return job.train_rows if method.anew else split_rows(method, job).train


def show(result: "Result", folder: Path) -> None:
    """Prints a finished run: curve, table, verdict, and where things are."""
    from rankwise.adapter import OTHER_SIZES
    from rankwise.choose import Curve
    from rankwise.cli.show import say
    from rankwise.report import choice, print_curve, print_table

    if result.curve is not None:
        print_curve(Curve.from_dict(result.curve))
    print_table([result, *result.controls])
    for said in filter(None, (choice(result), result.verdict)):
        say(said)
    more = next((name for name in OTHER_SIZES if (folder / name).is_dir()), None)
    if more is not None:
        say(f"every other size is in {folder / more}, cut in seconds and without data:")
        curve = result.curve or {"unit": "rank", "sizes": [1]}
        flag = "rank" if curve["unit"] == "rank" else "budget"
        picked = result.lora_parameters or 0
        smaller = [size for size in curve["sizes"] if flag == "rank" or size < picked]
        size = max(smaller, default=curve["sizes"][0])
        say(f"  rankwise cut --adapter {folder} --{flag} {size} --output_dir DIR")
    made = ", ".join(p.name for p in sorted(folder.iterdir()) if not p.name.startswith("."))
    say(f"in {folder}: {made}")
