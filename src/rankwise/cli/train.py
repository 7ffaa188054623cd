"""`rankwise train`: train an adapter at a plan's ranks, or at one rank everywhere."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from rankwise.cli import stages
from rankwise.cli.arguments import (
    DataArguments,
    FitArguments,
    LoraArguments,
    ModelArguments,
    OutputArguments,
    PlanArguments,
    parse,
    required,
)
from rankwise.cli.workspace import finish, open_workspace
from rankwise.errors import PlanError
from rankwise.lora import check_fits, uniform
from rankwise.plan import RankPlan
from rankwise.report import print_table

TYPES = (
    ModelArguments,
    DataArguments,
    PlanArguments,
    LoraArguments,
    FitArguments,
    OutputArguments,
)


def main(argv: Sequence[str]) -> None:
    """Train a stock PEFT adapter at a plan's ranks (--plan) or at one rank everywhere (--r)."""
    model, data, which, lora, fit, output = parse("train", main.__doc__ or "", TYPES, argv)
    target = required(output.output_dir, "output_dir", "train")
    plan = _plan(which, lora)
    job = stages.load_job(model, data, fit, "train")
    stages.check_training(job)
    base = stages.fresh_model(job)
    if plan is None:
        plan = uniform(
            base,
            lora.r,
            target_modules=stages.target_modules(lora),
            lora_alpha=lora.lora_alpha,
        )
    check_fits(base, plan)
    plan.lora_config()  # refuses a plan of zeros
    del base
    settings = {k: v for part in (model, data, which, lora, fit) for k, v in asdict(part).items()}
    settings["plan"] = json.loads(plan.to_json())["modules"] | {"scaling": plan.scaling}
    resume = output.resume_from_checkpoint
    work = open_workspace(target, output.overwrite_output_dir, resume, settings)
    plan.save(work / "plan.json")
    figures = stages.train_stage(job, plan, work, "plan", resume, lora.lora_dropout)
    metrics = {"command": "train", **stages.describe_run(job), "search_seconds": 0.0}
    metrics |= {"resumed": resume, **figures}
    arms = {"plan" if which.plan else f"uniform r={lora.r}": figures}
    stages.write_results(job, work, plan, metrics, arms)
    folder = finish(work, target)
    print_table(arms, job.task)
    stages.console.print(f"adapter, metrics and ranks.png are in {folder}")


def _plan(which: PlanArguments, lora: LoraArguments) -> RankPlan | None:
    """The plan that was given, if one was; what it decides must not be given beside it."""
    if which.plan is None:
        return None
    for name in ("r", "lora_alpha", "target_modules"):
        if getattr(lora, name) != getattr(LoraArguments(), name):
            raise PlanError(f"--{name} is decided by the plan {which.plan}; give one of the two")
    return RankPlan.load(which.plan)
