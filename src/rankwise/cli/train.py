"""`rankwise train`: train an adapter at a plan's ranks, or at one rank everywhere."""

from collections.abc import Sequence
from dataclasses import asdict

from rankwise.cli import stages
from rankwise.cli.arguments import (
    DataArguments,
    FitArguments,
    ModelArguments,
    OutputArguments,
    PlanArguments,
    SearchArguments,
    parse,
    required,
)
from rankwise.cli.workspace import finish, open_workspace
from rankwise.gates import check_fits
from rankwise.plan import RankPlan
from rankwise.report import print_table

TYPES = (
    ModelArguments,
    DataArguments,
    PlanArguments,
    SearchArguments,
    FitArguments,
    OutputArguments,
)


def main(argv: Sequence[str]) -> None:
    """Train a stock PEFT adapter at a plan's ranks (--plan) or at one rank everywhere (--r)."""
    model, data, which, search, fit, output = parse("train", main.__doc__ or "", TYPES, argv)
    target = required(output.output_dir, "output_dir", "train")
    plan = RankPlan.load(which.plan) if which.plan else None
    job = stages.load_job(model, data, fit, "train")
    stages.train_rows(job)
    base = stages.fresh_model(job)
    if plan is None:
        plan = RankPlan.uniform(
            base,
            search.r,
            target_modules=stages.target_modules(search),
            lora_alpha=search.lora_alpha,
        )
    check_fits(base, plan)
    del base
    settings = {k: v for part in (model, data, which, search, fit) for k, v in asdict(part).items()}
    resume = output.resume_from_checkpoint
    work = open_workspace(target, output.overwrite_output_dir, resume, settings)
    plan.save(work / "plan.json")
    figures = stages.train_stage(job, plan, work, "plan", resume, search.lora_dropout)
    metrics = {"command": "train", **stages.describe_run(job), "search_seconds": 0.0}
    metrics |= {"resumed": resume, **figures}
    arms = {"plan" if which.plan else f"uniform r={search.r}": figures}
    stages.write_results(job, work, plan, metrics, arms)
    folder = finish(work, target)
    print_table(arms, job.task)
    stages.console.print(f"adapter, metrics and ranks.png are in {folder}")
