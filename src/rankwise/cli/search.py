"""`rankwise search`: choose ranks, write plan.json."""

from collections.abc import Sequence
from dataclasses import asdict

from rankwise.cli import stages
from rankwise.cli.arguments import (
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
from rankwise.plan import RankPlan

TYPES = (
    ModelArguments,
    DataArguments,
    LoraArguments,
    SearchArguments,
    FitArguments,
    OutputArguments,
)


def main(argv: Sequence[str]) -> None:
    """Choose the rank of every layer from your data, and write the plan."""
    model, data, lora, search, fit, output = parse("search", main.__doc__ or "", TYPES, argv)
    target = required(output.output_dir, "output_dir", "search")
    job = stages.load_job(model, data, fit, "search")
    stages.check_training(job)
    stages.check_search(job, lora, search)
    settings = {k: v for part in (model, data, lora, search, fit) for k, v in asdict(part).items()}
    resume = output.resume_from_checkpoint
    work = open_workspace(target, output.overwrite_output_dir, resume, settings)
    figures = stages.search_stage(job, lora, search, work, resume)
    plan = RankPlan.load(work / "plan.json")
    metrics = {
        "command": "search",
        **stages.describe_run(job),
        "lora": asdict(lora),
        "search": asdict(search),
    }
    metrics |= {"resumed": resume, **figures, "lora_parameters": plan.parameters}
    stages.write_results(job, work, plan, metrics, {})
    folder = finish(work, target)
    ranks = list(plan.ranks.values())
    stages.console.print(
        f"ranks {min(ranks)} to {max(ranks)}, mean {sum(ranks) / len(ranks):.2f}, "
        f"{plan.parameters:,} parameters -> {folder / 'plan.json'}"
    )
