"""`rankwise search`: choose ranks, write plan.json."""

from collections.abc import Sequence
from dataclasses import asdict

from rankwise.cli import nested as dylora
from rankwise.cli import stages
from rankwise.cli.arguments import (
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
from rankwise.methods import DyLoRA
from rankwise.plan import RankPlan

TYPES = (
    ModelArguments,
    DataArguments,
    LoraArguments,
    SearchArguments,
    NestedArguments,
    FitArguments,
    OutputArguments,
)


def main(argv: Sequence[str]) -> None:
    """Choose the rank of every layer from your data, and write the plan.

    With --method dylora also the adapter at the picked rank, and the nested one that
    `rankwise truncate` cuts every other rank from.
    """
    model, data, lora, search, nested, fit, output = parse(
        "search", main.__doc__ or "", TYPES, argv
    )
    target = required(output.output_dir, "output_dir", "search")
    method = stages.search_method(search, nested)
    job = stages.load_job(model, data, fit, "search")
    stages.check_training(job)
    stages.check_search(job, lora, search, method)
    if isinstance(method, DyLoRA):
        dylora.check_nested(job, lora, search, nested, method)
    parts = (model, data, lora, search, nested, fit)
    settings = {k: v for part in parts for k, v in asdict(part).items()}
    resume = output.resume_from_checkpoint
    work = open_workspace(target, output.overwrite_output_dir, resume, settings)
    metrics = {
        "command": "search",
        **stages.describe_run(job),
        "lora": asdict(lora),
        "search": asdict(search),
        "resumed": resume,
    }
    arms = {}
    if isinstance(method, DyLoRA):
        metrics |= dylora.nested_stage(job, lora, search, nested, method, work, resume)
        arms = {search.method: metrics}
    else:
        metrics |= stages.search_stage(job, lora, search, method, work, resume)
    plan = RankPlan.load(work / "plan.json")
    metrics |= {"lora_parameters": plan.parameters}
    stages.write_results(job, work, plan, metrics, arms)
    if isinstance(method, DyLoRA):
        dylora.plot(metrics, plan, work / "curve.png")
    folder = finish(work, target)
    if isinstance(method, DyLoRA):
        dylora.report(metrics, plan, folder)
    ranks = list(plan.ranks.values())
    stages.console.print(
        f"ranks {min(ranks)} to {max(ranks)}, mean {sum(ranks) / len(ranks):.2f}, "
        f"{plan.parameters:,} parameters -> {folder / 'plan.json'}"
    )
