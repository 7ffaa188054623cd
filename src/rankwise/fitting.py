"""`fit`: one method on one task, from rows to an adapter with its evidence, in Python."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import cached_property
from inspect import signature
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainingArguments

from rankwise import tasks
from rankwise.choose import Curve
from rankwise.errors import DataError, RankwiseError
from rankwise.files import release
from rankwise.given import check_arguments as check_given_arguments
from rankwise.given import check_count, check_type
from rankwise.job import Job, Source, check, load_job, recorded, rests_on
from rankwise.launched import is_first, meet, own_folder
from rankwise.methods import DEFAULT, Method
from rankwise.plan import RankPlan
from rankwise.report.table import choice, verdict
from rankwise.result import Result
from rankwise.stages import run_method
from rankwise.trainer import default_arguments, labelled
from rankwise.workspace import check_output, finish, is_finished, open_workspace

logger = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class Fitted:
    """What `fit` made; printed, it says what was chosen and what that is worth.

    Attributes:
        folder: holds `adapter/`, `plan.json`, `metrics.json`, and what other sizes are cut from.
        result: the record that `metrics.json` holds.
        plan: the adapter's ranks; None for a method without.
        curve: the quality of every size that was compared, None where none was.
        model: the base model with the adapter, ready to predict; loaded when it is first asked for.
    """

    folder: Path
    result: Result
    plan: RankPlan | None
    curve: Curve | None
    job: Job
    method: Method

    def __repr__(self) -> str:
        return f"Fitted({str(self.folder)!r}, {self.result.name!r})"

    def __str__(self) -> str:
        result, (metric, *_) = self.result, self.result.task["metrics"]
        size = result.lora_parameters or result.trainable_parameters
        said = (
            f"{result.name}: {metric} {result.metrics[metric]:.4f} on {result.rows['evaluated']:,} "
            f"{result.split} rows, {size:,} parameters, in {self.folder}"
        )
        return "\n".join(filter(None, (said, choice(result), result.verdict)))

    @cached_property
    def model(self) -> nn.Module:
        return self.method.load(self.job.fresh_model(), self.folder / self.method.product).eval()


def fit(
    method: str | Method = DEFAULT,
    data: Any = None,
    *,
    model: str | Path | Source,
    output_dir: str | Path,
    args: TrainingArguments | None = None,
    max_length: int = 128,
    eval_split: str = "auto",
    overwrite_output_dir: bool = False,
    resume_from_checkpoint: bool = False,
    **options: Any,
) -> Fitted:
    """One method on one task: trains, chooses, hands over an adapter, and measures it.

    Args:
        method: a name from `rankwise.METHODS`, or a method with its flags.
        data: a file of training rows (CSV, JSONL, Parquet), a folder with train, validation and
            test, the name of a known task, the rows themselves (a datasets.Dataset or DatasetDict,
            a DataFrame, a list of dicts), or what `tasks.load_task` gave.
        model: hub id or folder of the base model, or a `Source`.
        output_dir: new or empty folder for the results. Under torchrun the first process writes
            it; the others return what they have in folders of their own, which go when they end.
        args: TrainingArguments; None is 3 epochs of AdamW at the method's usual learning rate
            (1e-3 for LoRA's kind; `Method.rate_for`), batch 32, warmed up over 6 % of the steps.
            In one of your own give a learning rate: its default, 5e-5, is full fine-tuning's. Its
            `output_dir` is not used.
        max_length: tokens; longer rows are cut.
        eval_split: rows that the figures come from: "validation", "test", or "auto", which is test
            where it has labels.
        overwrite_output_dir: replace the results of an earlier run.
        resume_from_checkpoint: go on with a run that was stopped.
        **options: flags of the method (`r`, `target_modules`, ...); all others go to
            `tasks.load_task` (`text_column`, `label_column`, `kind`, ...).

    Raises:
        RankwiseError: anything that is wrong with rows, model, flags or folder; raised before any
            training. DivergedError: the loss became NaN or infinite.

    Example:
        >>> fitted = rankwise.fit("lora", "rows.csv", model="roberta-base", output_dir="runs/1")
        >>> fitted.result.metrics["accuracy"]
        0.87
    """
    from rankwise.training import with_options

    method, more = with_options(method, options)
    _check_options(method, more)
    check_type("model", model, (str, PathLike, Source), "the hub id or folder of a base model")
    check_count("max_length", max_length)
    if meet() or is_first():  # all processes refuse alike, before any of them has changed anything
        check_output(output_dir, overwrite_output_dir, resume_from_checkpoint)
    output_dir = own_folder(output_dir, resume_from_checkpoint)
    source = model if isinstance(model, Source) else Source(str(model))
    if args is None:
        args = default_arguments(str(output_dir), method.rate_for(source.config()))
    check_given_arguments(args)
    usual = method.rate_for(None)
    if args.learning_rate == TrainingArguments.learning_rate and usual > args.learning_rate:
        logger.warning(
            "learning_rate is TrainingArguments' own default, %g; for %s %g is usual on small "
            "models: give args=TrainingArguments(..., learning_rate=...)",
            args.learning_rate,
            method.title,
            usual,
        )
    args = labelled(args)
    task = data if isinstance(data, tasks.Task) else _task(data, args.seed, more)
    job = load_job(task, source, args, max_length, eval_split)
    base = check(method, job)
    settings: dict[str, Any] = {
        "method": method.trained_by(),
        "after": method.describe(),
        "source": vars(source),
        "task": task.describe(),
        "training": recorded(args),
        "max_length": max_length,
        "rests_on": rests_on(job, base),
    }
    if not (resume_from_checkpoint and is_finished(output_dir, settings)):
        work = open_workspace(output_dir, overwrite_output_dir, resume_from_checkpoint, settings)
        try:
            result = run_method(method, job, work, resume_from_checkpoint, base)
            rivals = list(result.controls)
            result = result.with_controls(rivals, verdict(result, rivals))
            result.save(work / "metrics.json")
            finish(work, output_dir)
        finally:
            release(work)
    folder = Path(output_dir).expanduser()
    result = Result.load(folder / "metrics.json")
    plan = folder / "plan.json"
    curve = None if result.curve is None else Curve.from_dict(result.curve)
    found = RankPlan.load(plan) if plan.is_file() else None
    return Fitted(folder, result, found, curve, job, method)


def _check_options(method: Method, options: Mapping[str, Any]) -> None:
    """Raises RankwiseError at an option that neither the method nor the task has."""
    known = [name for name in signature(tasks.load_task).parameters if name != "seed"]
    for name in options:
        if name in known:
            continue
        if name in {f.name for f in fields(TrainingArguments)}:
            raise RankwiseError(
                f"{name} is one of transformers' TrainingArguments; give "
                f"args=TrainingArguments(output_dir=..., {name}={options[name]!r})"
            )
        has = [f.name for f in fields(method)]
        near = get_close_matches(name, [*known, *has], n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(has)}"
        raise RankwiseError(f"neither {method.title} nor a task has an option {name!r}; {hint}")


def _task(data: Any, seed: int, options: Mapping[str, Any]) -> tasks.Task:
    """The task that a file, a folder or a name stands for."""
    if data is None or "task" in options or "data_dir" in options:
        return tasks.load_task(seed=seed, **options)
    if isinstance(data, dict):  # a DatasetDict
        splits = {f"{name}_file": rows for name, rows in data.items()}
        odd = sorted(set(data) - {"train", "validation", "test"})
        if odd or "train" not in data:
            raise DataError(
                f"the rows have the splits {', '.join(data)}; name them train, validation and test"
            )
        return tasks.load_task(**splits, seed=seed, **options)
    if not isinstance(data, str | Path):
        return tasks.load_task(train_file=data, seed=seed, **options)
    if Path(data).is_dir():
        return tasks.load_task(data_dir=data, seed=seed, **options)
    if Path(data).suffix:
        return tasks.load_task(train_file=data, seed=seed, **options)
    return tasks.load_task(str(data), seed=seed, **options)
