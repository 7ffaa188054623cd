"""DyLoRA's stage of `search` and `run`: one training, the curve over ranks, the pick."""

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.progress import Progress
from transformers import PreTrainedModel, Trainer

from rankwise import elastic, tasks, training
from rankwise.adapter import Adapter
from rankwise.cli import stages
from rankwise.cli.arguments import LoraArguments, NestedArguments, SearchArguments
from rankwise.errors import AdapterError, DataError, RankwiseError
from rankwise.files import write_json
from rankwise.lora import check_fits, uniform
from rankwise.methods import METHODS, DyLoRA
from rankwise.nested import Curve, NestedTrainer, curve, pick
from rankwise.plan import RankPlan
from rankwise.report import print_curve, save_curves
from rankwise.trainer import last_checkpoint


def check_nested(
    job: stages.Job,
    lora: LoraArguments,
    search: SearchArguments,
    nested: NestedArguments,
    method: DyLoRA,
) -> None:
    """Finds what is wrong with the DyLoRA flags before there is an output folder."""
    model = stages.fresh_model(job)
    if nested.nested_adapter is None:
        plan = training.check_nested(method, _largest_plan(model, lora))
        trained = method.trained(lora.r)
    else:
        plan, trained = _trained_before(job, model, lora, search, nested, method)
    ways = [k for k in ("tolerance", "pick_rank", "budget") if getattr(nested, k) is not None]
    if len(ways) > 1:
        raise RankwiseError(f"--{ways[0]} and --{ways[1]} both choose the rank; give one")
    if nested.pick_rank is not None and nested.pick_rank not in trained:
        raise RankwiseError(f"--pick_rank is {nested.pick_rank}; the ranks trained are {trained}")
    if nested.tolerance is not None and not nested.tolerance >= 0:
        raise RankwiseError(f"--tolerance is {nested.tolerance}; it has to be >= 0")
    if nested.elastic and nested.budget is None:
        raise RankwiseError("--elastic chooses ranks within a --budget; give one")
    if nested.elastic:
        _halves(job, stages.split_rows(job, search, method).validation)
    if nested.budget is not None:
        elastic.uniform_within(plan, nested.budget, trained)


def _trained_before(
    job: stages.Job,
    model: PreTrainedModel,
    lora: LoraArguments,
    search: SearchArguments,
    nested: NestedArguments,
    method: DyLoRA,
) -> tuple[RankPlan, list[int]]:
    """The plan and the ranks of --nested_adapter, where the other flags agree with it."""
    folder = stages.adapter_folder(nested.nested_adapter or "", "nested")
    adapter = Adapter.load(folder)
    if adapter.plan is None:
        raise AdapterError(f"{folder} holds an adapter of one rank; give a DyLoRA run")
    check_fits(model, adapter.plan)
    if lora.r not in (adapter.plan.r, LoraArguments().r):
        raise RankwiseError(f"--r is {lora.r}, but the adapter has {adapter.plan.r}; omit it")
    if method not in (adapter.method, METHODS[search.method]):
        key = next(k for k, v in vars(method).items() if v != getattr(adapter.method, k))
        raise RankwiseError(
            f"the flags give DyLoRA's {key} {getattr(method, key)!r}, but the adapter was trained "
            f"with {getattr(adapter.method, key)!r}; leave them out"
        )
    rows = training.fingerprint(stages.split_rows(job, search, method).train)
    if adapter.plan.provenance.get("train_sha256") != rows:
        raise DataError(
            f"{folder} was not trained on the rows that these flags give, so the others may be its "
            "own; give its data flags, --validation_fraction and --seed"
        )
    return adapter.plan, adapter.trained_ranks


def _largest_plan(model: PreTrainedModel, lora: LoraArguments) -> RankPlan:
    """The plan of rank r everywhere, at which DyLoRA trains."""
    return uniform(
        model,
        lora.r,
        target_modules=stages.target_modules(lora),
        lora_alpha=lora.lora_alpha,
    )


def nested_stage(
    job: stages.Job,
    lora: LoraArguments,
    search: SearchArguments,
    nested: NestedArguments,
    method: DyLoRA,
    work: Path,
    resume: bool,
) -> dict[str, Any]:
    """Trains all ranks at once, measures each, picks; writes plan.json, nested/ and the adapter.

    With --nested_adapter they are trained already.

    Returns:
        Figures as `train_stage` gives them, and `curve`, `picked_by`, and `elastic` where asked.
    """
    figures = work / "search" / "figures.json"
    if figures.exists():
        return json.loads(figures.read_text())
    folder = work / "search"
    args = stages.training_arguments(job, folder)
    data = stages.split_rows(job, search, method)
    options = {"data_collator": tasks.data_collator(job.task, job.tokenizer)}
    options |= stages.evaluation(job)
    with stages.measured(args.device) as measured:
        base = stages.fresh_model(job)
        if nested.nested_adapter is not None:
            source = stages.adapter_folder(nested.nested_adapter, "nested")
            trainer: Trainer = training.load_nested(base, source, args=args, **options)
        else:
            trainer = training.train(
                base,
                _largest_plan(base, lora),
                data.train,
                args=args,
                method=method,
                task_type=job.task.task_type,
                lora_dropout=lora.lora_dropout,
                resume_from_checkpoint=resume and last_checkpoint(folder) is not None,
                **options,
            )
    assert isinstance(trainer, NestedTrainer)
    stages.name_base(job, trainer.model)
    trainer.save_nested(work / "nested")
    stages.describe_adapter(job, work / "nested")
    started = time.perf_counter()
    plan, found = _choose(job, nested, trainer, data)
    seconds = round(time.perf_counter() - started, 3)
    plan.save(work / "plan.json")
    trainer.set_ranks(plan.ranks)
    scores = stages.evaluate(job, trainer)
    adapter = work / "arms" / "plan" / "adapter"
    shutil.rmtree(adapter, ignore_errors=True)
    Adapter.load(work / "nested").truncate(plan).save(adapter)
    stages.describe_adapter(job, adapter)
    write_json(
        figures,
        {
            "search_seconds": seconds,
            "train_seconds": measured["seconds"],
            "peak_memory_bytes": measured["bytes"],
            "peak_memory_of": measured["of"],
            **stages.sizes(plan, trainer),
            "steps": trainer.state.global_step,
            "nested_train_rows": len(data.train),
            "dylora": asdict(nested) | {"nested_adapter": nested.nested_adapter is not None},
            "eval": scores,
            **found,
        },
    )
    return json.loads(figures.read_text())


def _choose(
    job: stages.Job, nested: NestedArguments, trainer: NestedTrainer, data: training.TwoSets
) -> tuple[RankPlan, dict[str, Any]]:
    """The plan to hand back, and what it was chosen by."""
    found = curve(
        trainer,
        data.validation,
        metric=job.task.main_metric,
        greater_is_better=job.task.greater_is_better,
    )
    figures: dict[str, Any] = {"curve": found.to_dict()}
    about = trainer.plan.provenance | figures
    if nested.elastic and nested.budget is not None:
        with _progress("loss of each module at each rank", _count(trainer, found)) as counted:
            loss, check = (
                counted(elastic.validation_loss(trainer, rows))
                for rows in _halves(job, data.validation)
            )
            choice = elastic.choose(loss, trainer.plan, nested.budget, found.ranks, check)
        figures |= {"picked_by": "elastic", "elastic": _elastic_figures(choice)}
        return choice.plan.with_ranks(choice.plan.ranks, **about, budget=nested.budget), figures
    if nested.budget is not None:
        plan = elastic.uniform_within(trainer.plan, nested.budget, found.ranks)
        figures["picked_by"] = "budget"
        return plan.with_ranks(plan.ranks, **about, budget=nested.budget), figures
    b = nested.pick_rank or pick(found, nested.tolerance)
    by = "tolerance" if nested.tolerance is not None else "one standard error"
    figures["picked_by"] = "the user" if nested.pick_rank else by
    return trainer.plan.with_ranks(dict.fromkeys(trainer.plan.modules, b), **about), figures


def _halves(job: stages.Job, rows: Dataset) -> tuple[Dataset, Dataset]:
    """The validation rows that ranks by layer are chosen on, and those that say if they pay."""
    two = training.two_sets(rows, None, 0.5, job.fit.seed)
    return two.train, two.validation


def _elastic_figures(choice: elastic.Choice) -> dict[str, Any]:
    return {
        "pays": choice.pays,
        "elastic_loss": choice.elastic_loss,
        "uniform_loss": choice.uniform_loss,
        "ranks": choice.elastic.ranks,
        "uniform_rank": max(choice.uniform.ranks.values()),
        "parameters": choice.elastic.parameters,
        "uniform_parameters": choice.uniform.parameters,
    }


def _count(trainer: NestedTrainer, found: Curve) -> int:
    return len(trainer.plan.modules) * (len(found.ranks) - 1) + 3


@contextmanager
def _progress(text: str, total: int) -> Iterator[Any]:
    """A progress bar, and what wraps a loss so that each call moves it on."""
    with Progress(console=stages.console) as progress:
        bar = progress.add_task(text, total=total)

        def counted(loss: elastic.Loss) -> elastic.Loss:
            def call(ranks: Mapping[str, int]) -> float:
                value = loss(ranks)
                progress.advance(bar)
                return value

            return call

        yield counted


def svd_stage(
    job: stages.Job,
    largest: RankPlan,
    work: Path,
    resume: bool,
    lora: LoraArguments,
    rows: Dataset | None,
) -> dict[str, Any]:
    """The control that DyLoRA has to beat: LoRA of rank r, truncated to the picked size."""
    folder = work / "arms" / "svd"
    done = folder / "cut.json"
    if done.exists():
        return json.loads(done.read_text())
    figures = stages.train_stage(job, largest, work, "svd", resume, lora.lora_dropout, rows)
    budget = Adapter.load(work / "arms" / "plan" / "adapter").parameters
    counted = RankPlan.load(work / "plan.json").parameters / budget  # a fused layer stores zeros
    adapter = Adapter.load(folder / "adapter").truncate_svd(budget=budget)
    shutil.rmtree(folder / "cut", ignore_errors=True)
    adapter.save(folder / "cut")
    head = figures["trainable_parameters"] - figures["lora_parameters"]
    ranks = [factors.rank for factors in adapter.factors().values()]
    parameters = round(adapter.parameters * counted)
    figures |= {
        "eval": stages.evaluate_adapter(job, folder / "cut"),
        "lora_parameters": parameters,
        "trainable_parameters": parameters + head,
        "mean_rank": round(sum(ranks) / len(ranks), 4),
    }
    write_json(done, figures)
    return figures


def plot(metrics: dict[str, Any], plan: RankPlan, path: Path) -> None:
    """The metric against the rank, with standard errors, and the picked rank; needs matplotlib."""
    found = metrics["curve"]
    values = [scores[found["metric"]] for scores in found["metrics"]]
    save_curves(
        {"DyLoRA": (found["ranks"], values, found["standard_errors"])},
        found["metric"].replace("_", " "),
        path,
        mark=_one_rank(plan),
        spread="standard error",
    )


def report(metrics: dict[str, Any], plan: RankPlan, folder: Path) -> None:
    """Prints the curve, what was picked, and how to get another rank."""
    print_curve(metrics)
    one = _one_rank(plan)
    what = "ranks by layer" if one is None else f"rank {one}"
    drawn = "the curve is in curve.png, and " if (folder / "curve.png").is_file() else ""
    stages.console.print(
        f"picked {what} ({metrics['picked_by']}); {drawn}every other rank is in "
        f"{folder / 'nested'}:"
    )
    least = metrics["curve"]["ranks"][0]
    command = f"rankwise truncate --adapter {folder / 'nested'} --r {least} --output_dir DIR"
    stages.console.print(f"  {command}", soft_wrap=True)
    if "elastic" in metrics:
        _say_whether_it_pays(metrics["elastic"])


def _one_rank(plan: RankPlan) -> int | None:
    ranks = set(plan.ranks.values())
    return ranks.pop() if len(ranks) == 1 else None


def _say_whether_it_pays(found: dict[str, Any]) -> None:
    ours, theirs = found["elastic_loss"], found["uniform_loss"]
    how = "below" if found["pays"] else "not below, so the uniform rank was kept:"
    stages.console.print(
        f"ranks by layer: loss {ours:.4f} at {found['parameters']:,} parameters on the half of the "
        f"validation rows that they were not chosen on, {how} {theirs:.4f} of rank "
        f"{found['uniform_rank']} everywhere ({found['uniform_parameters']:,})"
    )
