"""`rankwise run`: search, retrain, train the controls, evaluate, report."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rankwise.cli import stages
from rankwise.cli.arguments import (
    ControlArguments,
    DataArguments,
    FitArguments,
    LoraArguments,
    ModelArguments,
    OutputArguments,
    SearchArguments,
    parse,
    required,
)
from rankwise.cli.workspace import finish, open_workspace
from rankwise.errors import RankwiseError
from rankwise.plan import RankPlan
from rankwise.report import print_table, verdict

TYPES = (
    ModelArguments,
    DataArguments,
    LoraArguments,
    SearchArguments,
    ControlArguments,
    FitArguments,
    OutputArguments,
)


def main(argv: Sequence[str]) -> None:
    """Choose ranks on your data, train an adapter at them, and compare it with plain LoRA."""
    run("run", *parse("run", main.__doc__ or "", TYPES, argv))


def run(
    command: str,
    model: ModelArguments,
    data: DataArguments,
    lora: LoraArguments,
    search: SearchArguments,
    controls: ControlArguments,
    fit: FitArguments,
    output: OutputArguments,
) -> Path:
    """The whole job, in stages that a resumed run does not repeat. Returns the output folder."""
    target = required(output.output_dir, "output_dir", command)
    wanted = _controls(controls)
    stages.search_method(search)
    job = stages.load_job(model, data, fit, command)
    stages.check_training(job)
    stages.check_search(job, lora, search, controls.control_r)
    settings = {
        k: v for part in (model, data, lora, search, controls, fit) for k, v in asdict(part).items()
    }
    resume = output.resume_from_checkpoint
    work = open_workspace(target, output.overwrite_output_dir, resume, settings)

    count = 2 + len(wanted)
    _stage(1, count, f"searching ranks 1 to {lora.r} with {search.method}")
    metrics: dict[str, Any] = {"command": command, **stages.describe_run(job)}
    metrics |= {"lora": asdict(lora), "search": asdict(search), "resumed": resume}
    metrics |= stages.search_stage(job, lora, search, work, resume)
    plan = RankPlan.load(work / "plan.json")
    plans = {"plan": plan} | {
        name: _control_plan(name, plan, controls.control_r, fit.seed) for name in wanted
    }
    results = {}
    for i, (name, arm) in enumerate(plans.items()):
        what = "the searched ranks" if name == "plan" else _label(name, arm)
        _stage(2 + i, count, f"training {what} from scratch on all training rows")
        results[name] = stages.train_stage(job, arm, work, name, resume, lora.lora_dropout)
    metrics |= results.pop("plan")
    for name, figures in results.items():
        plans[name].save(work / "controls" / f"{name}.json")
        # the first control is the one that others look for under `control`
        key = "control" if "control" not in metrics else f"{name}_control"
        metrics[key] = {"name": _label(name, plans[name]), "search_seconds": 0.0, **figures}
    arms = {search.method: metrics} | {_label(n, plans[n]): f for n, f in results.items()}
    said = verdict(arms, job.task)
    stages.write_results(job, work, plan, metrics | {"verdict": said}, arms)
    folder = finish(work, target)
    print_table(arms, job.task)
    stages.console.print(said)
    stages.console.print(f"plan.json, adapter/, metrics.json and ranks.png are in {folder}")
    return folder


def _controls(controls: ControlArguments) -> list[str]:
    wanted = [name for name in dict.fromkeys(controls.control) if name != "none"]
    if odd := [name for name in wanted if name not in ("uniform", "random")]:
        raise RankwiseError(f"--control {odd[0]!r} is unknown; take uniform, random or none")
    if controls.control_r is not None and controls.control_r < 1:
        raise RankwiseError(f"--control_r is {controls.control_r}; it has to be at least 1")
    return wanted


def _control_plan(name: str, plan: RankPlan, control_r: int | None, seed: int) -> RankPlan:
    if name == "random":
        return RankPlan.random(plan, seed)
    one = RankPlan.uniform(plan, 1).parameters
    return RankPlan.uniform(plan, control_r or max(1, round(plan.parameters / one)))


def _label(name: str, plan: RankPlan) -> str:
    if name == "uniform":
        return f"uniform r={plan.provenance['r']}"
    return "random plan, same size"


def _stage(number: int, count: int, text: str) -> None:
    stages.console.print(f"[bold]{number}/{count}[/bold] {text}")
