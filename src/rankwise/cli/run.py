"""`rankwise run`: search, retrain, train the controls, evaluate, report."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rankwise.cli import nested as dylora
from rankwise.cli import stages
from rankwise.cli.arguments import (
    ControlArguments,
    DataArguments,
    FitArguments,
    LoraArguments,
    ModelArguments,
    NestedArguments,
    OutputArguments,
    SearchArguments,
    parse,
    required,
)
from rankwise.cli.workspace import finish, open_workspace
from rankwise.errors import RankwiseError
from rankwise.methods import DyLoRA, Method
from rankwise.plan import RankPlan
from rankwise.report import print_table, verdict

TYPES = (
    ModelArguments,
    DataArguments,
    LoraArguments,
    SearchArguments,
    NestedArguments,
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
    nested: NestedArguments,
    controls: ControlArguments,
    fit: FitArguments,
    output: OutputArguments,
) -> Path:
    """The whole job, in stages that a resumed run does not repeat. Returns the output folder."""
    target = required(output.output_dir, "output_dir", command)
    method = stages.search_method(search, nested)
    wanted = _controls(controls, method)
    job = stages.load_job(model, data, fit, command)
    stages.check_training(job)
    stages.check_search(job, lora, search, method, controls.control_r)
    if isinstance(method, DyLoRA):
        dylora.check_nested(job, lora, search, nested, method)
    parts = (model, data, lora, search, nested, controls, fit)
    settings = {k: v for part in parts for k, v in asdict(part).items()}
    resume = output.resume_from_checkpoint
    work = open_workspace(target, output.overwrite_output_dir, resume, settings)

    metrics: dict[str, Any] = {"command": command, **stages.describe_run(job)}
    metrics |= {"lora": asdict(lora), "search": asdict(search), "resumed": resume}
    rows = None  # of the training set: all
    if isinstance(method, DyLoRA):
        count = 1 + len(wanted)
        ranks = f"ranks {method.r_min} to {lora.r} at once with {search.method}"
        known = nested.nested_adapter is not None
        _stage(1, count, "measuring what was trained already" if known else f"training {ranks}")
        metrics |= dylora.nested_stage(job, lora, search, nested, method, work, resume)
        # its rank was chosen on the other rows, and it is not retrained: controls get no more
        rows = stages.split_rows(job, search, method).train
    else:
        count = 2 + len(wanted)
        _stage(1, count, f"searching ranks 1 to {lora.r} with {search.method}")
        metrics |= stages.search_stage(job, lora, search, method, work, resume)
        plan = RankPlan.load(work / "plan.json")
        _stage(2, count, "training the searched ranks from scratch on all training rows")
        metrics |= stages.train_stage(job, plan, work, "plan", resume, lora.lora_dropout)
    plan = RankPlan.load(work / "plan.json")
    plans, results = {}, {}
    for i, name in enumerate(wanted, 1 + count - len(wanted)):
        if name == "random" and set(plan.ranks.values()) in ({1}, {plan.r}):
            stages.console.print("no random control: there is one plan of this size alone")
            continue
        if name == "svd":
            plans[name] = RankPlan.uniform(plan, plan.r)
            _stage(i, count, f"training LoRA of rank {lora.r}, truncated by SVD")
            results[name] = dylora.svd_stage(job, plans[name], work, resume, lora, rows)
            continue
        plans[name] = _control_plan(name, plan, controls.control_r, fit.seed)
        _stage(i, count, f"training {_label(name, plans[name])} from scratch on the same rows")
        dropout = lora.lora_dropout
        results[name] = stages.train_stage(job, plans[name], work, name, resume, dropout, rows)
    for name, figures in results.items():
        plans[name].save(work / "controls" / f"{name}.json")
        # the first control is the one that others look for under `control`
        key = "control" if "control" not in metrics else f"{name}_control"
        metrics[key] = {"name": _label(name, plans[name]), "search_seconds": 0.0, **figures}
    arms = {search.method: metrics} | {_label(n, plans[n]): f for n, f in results.items()}
    said = verdict(arms, job.task, trained_at_once=isinstance(method, DyLoRA))
    stages.write_results(job, work, plan, metrics | {"verdict": said}, arms)
    if isinstance(method, DyLoRA):
        dylora.plot(metrics, plan, work / "curve.png")
    folder = finish(work, target)
    if isinstance(method, DyLoRA):
        dylora.report(metrics, plan, folder)
    print_table(arms, job.task)
    stages.console.print(said)
    stages.console.print(f"plan.json, adapter/, metrics.json and ranks.png are in {folder}")
    return folder


def _controls(controls: ControlArguments, method: Method) -> list[str]:
    known = ["uniform", "random", *(["svd"] if isinstance(method, DyLoRA) else [])]
    wanted = [name for name in dict.fromkeys(controls.control) if name != "none"]
    if odd := [name for name in wanted if name not in known]:
        raise RankwiseError(f"--control {odd[0]!r} is unknown; take {', '.join(known)} or none")
    if controls.control_r is not None and controls.control_r < 1:
        raise RankwiseError(f"--control_r is {controls.control_r}; it has to be at least 1")
    return wanted


def _control_plan(name: str, plan: RankPlan, control_r: int | None, seed: int) -> RankPlan:
    if name == "random":
        return RankPlan.random(plan, seed)
    one = RankPlan.uniform(plan, 1).parameters
    return RankPlan.uniform(plan, control_r or max(1, round(plan.parameters / one)))


def _label(name: str, plan: RankPlan) -> str:
    if name == "svd":
        return f"LoRA r={plan.r}, truncated by SVD"
    if name == "uniform":
        return f"uniform r={plan.provenance['r']}"
    return "random plan, same size"


def _stage(number: int, count: int, text: str) -> None:
    stages.console.print(f"[bold]{number}/{count}[/bold] {text}")
