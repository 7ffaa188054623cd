"""One method on one task, from rows to an adapter with its evidence: `fit`.

Works in stages beside the output folder. A stage that a stopped run had finished is not repeated,
and one that it was in goes on from its last checkpoint.
"""

import logging
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from importlib.metadata import version
from inspect import signature
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from rankwise import tasks
from rankwise.adapter import OTHER_SIZES
from rankwise.beside import TASK
from rankwise.choose import Curve, resampled
from rankwise.decoding import Decoding, drop_partial, generate_rows
from rankwise.errors import DataError, DivergedError, RankwiseError
from rankwise.files import release, write_json
from rankwise.given import check_arguments as check_given_arguments
from rankwise.given import check_count, check_type
from rankwise.lora import swap_adapter
from rankwise.methods import DEFAULT, Kept, LoRA, Method, by_name
from rankwise.plan import RankPlan
from rankwise.reading import as_json, read_json
from rankwise.report.memory import Peak, peak_memory
from rankwise.result import Result
from rankwise.rows import TwoSets, fingerprint, two_sets
from rankwise.sharded import load_everywhere, sharding
from rankwise.trainer import (
    check_arguments,
    default_arguments,
    drop_damaged,
    labelled,
    replaced,
    run_training,
)
from rankwise.training import model_name, setting_of, weights_of, with_provenance
from rankwise.workspace import check_output, finish, is_finished, open_workspace

GENERATIONS = "generations.jsonl"  # in a run's folder

logger = logging.getLogger(__name__)

# The TrainingArguments that a result rests on, for its record.
RECORDED = (
    "learning_rate num_train_epochs max_steps per_device_train_batch_size "
    "per_device_eval_batch_size gradient_accumulation_steps weight_decay lr_scheduler_type "
    "warmup_steps max_grad_norm bf16 gradient_checkpointing train_sampling_strategy seed "
    "use_cpu save_steps"
).split()


@dataclass(frozen=True)
class Source:
    """Where a base model comes from.

    Attributes:
        name_or_path: hub id or folder.
        gguf_file: name of a GGUF file in it, loaded as float32.
        revision: branch, tag or commit on the hub.
        trust_remote_code: whether code that it brings along may run.
        attn_implementation, dtype: as transformers takes them; None is its own choice.
        load_in_4bit: whether the frozen weights are kept in 4 bits, see `rankwise.fourbit`.
    """

    name_or_path: str
    gguf_file: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    attn_implementation: str | None = None
    dtype: str | None = None
    load_in_4bit: bool = False

    def config(self) -> PretrainedConfig:
        """The model's configuration. Raises ModelError where it cannot be loaded."""
        return tasks.load_config(
            self.name_or_path,
            gguf_file=self.gguf_file,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
        )


@dataclass(frozen=True)
class Job:
    """One task on one base model: what every method is given alike.

    Attributes:
        task: what is asked; its rows.
        source: the base model.
        tokenizer: the model's.
        train: encoded training rows; None where only an evaluation is wanted.
        evaluation: encoded rows that the figures come from, and that choose nothing.
        validation: encoded rows that may choose, where the task has some beside these; else None.
        split: which ones these are, "validation" or "test".
        args: TrainingArguments; the output folder is each stage's own.
        max_length: tokens of a row.
        command: for the record.
        decoding: how texts are generated, for a task of such a kind; None for the loss alone.
        trainer: more that every Trainer is given: callbacks, rows to evaluate on in between.
        about: more for the record: how the learning rate was chosen.
    """

    task: tasks.Task
    source: Source
    tokenizer: PreTrainedTokenizerBase
    train: Dataset | None
    evaluation: Dataset
    validation: Dataset | None
    split: str
    args: TrainingArguments
    max_length: int
    command: str = "fit"
    decoding: Decoding | None = field(default_factory=Decoding)
    trainer: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def train_rows(self) -> Dataset:
        """The training rows. Raises DataError where there are none."""
        if self.train is None:
            raise DataError("there are no training rows; give --task, --data_dir or --train_file")
        return self.train

    def fresh_model(self) -> PreTrainedModel:
        """The base model with a new head, the same one every time for the same seed."""
        if sharding(self.args):
            load_everywhere()
        set_seed(self.args.seed)
        about = vars(self.source) | {"device": self.args.device}
        return tasks.load_model(
            self.task, about.pop("name_or_path"), tokenizer=self.tokenizer, **about
        )

    def options(self) -> dict[str, Any]:
        """What a Trainer needs to collate batches and to compute the task's metrics."""
        return {
            "data_collator": self.task.data_collator(self.tokenizer),
            "compute_metrics": self.task.compute_metrics(),
            "preprocess_logits_for_metrics": self.task.preprocess_logits,
            **self.trainer,
        }

    def at_rate(self, rate: float | None, method: Method) -> "Job":
        """The same at a learning rate; at the method's usual one where that is None."""
        rate = method.rate_for(self.source.config()) if rate is None else rate
        return replace(self, args=replaced(self.args, learning_rate=rate))

    def arguments(self, folder: Path) -> TrainingArguments:
        """The TrainingArguments of a stage that works in this folder."""
        # a checkpoint of sharded parameters is none that another run could go on from
        keep = {"save_strategy": "no"} if sharding(self.args) else {}
        return replaced(self.args, output_dir=str(folder), **keep)


@dataclass(frozen=True)
class Fitted:
    """What `fit` made.

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

    @property
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
        output_dir: new or empty folder for the results.
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
    check_output(output_dir, overwrite_output_dir, resume_from_checkpoint)
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


def rests_on(job: Job, base: PreTrainedModel) -> dict[str, str | None]:
    """What a run stands on beside its flags, in hashes: a run only goes on where all are the same.

    Args:
        job: its rows.
        base: the base model, nothing attached yet.
    """
    rows = {
        "training rows": job.train,
        "evaluated rows": job.evaluation,
        "validation rows": job.validation,
    }
    about = {name: None if there is None else fingerprint(there) for name, there in rows.items()}
    packages = ("rankwise", "torch", "transformers", "peft")
    versions = {f"version of {name}": version(name) for name in packages}
    processes = str(job.args.world_size)
    return {**about, "base weights": weights_of(base), "processes": processes, **versions}


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


def load_job(
    task: tasks.Task,
    source: Source,
    args: TrainingArguments,
    max_length: int = 128,
    eval_split: str = "auto",
    command: str = "fit",
    decoding: Decoding | None = None,
) -> Job:
    """Encodes a task's rows for a model; everything that can be wrong with them is found here."""
    task.check_metrics()
    if args.dataloader_drop_last:
        raise DataError("dataloader_drop_last would leave rows out of the figures; leave it out")
    tokenizer = tasks.load_tokenizer(
        source.name_or_path,
        gguf_file=source.gguf_file,
        revision=source.revision,
        trust_remote_code=source.trust_remote_code,
    )
    split, rows = _evaluation_rows(task, eval_split)
    train = None if task.train is None else task.encode(task.train, tokenizer, max_length)
    evaluation = task.encode(rows, tokenizer, max_length)
    spare = task.validation if split == "test" else None
    validation = None if spare is None else task.encode(spare, tokenizer, max_length)
    return Job(
        task,
        source,
        tokenizer,
        train,
        evaluation,
        validation,
        split,
        args,
        max_length,
        command,
        decoding=decoding or Decoding(),
    )


def _evaluation_rows(task: tasks.Task, wanted: str) -> tuple[str, Dataset]:
    splits = {"test": task.test, "validation": task.validation}
    if wanted == "auto":
        wanted = "test" if task.test is not None else "validation"
    rows = splits.get(wanted)
    if rows is None:
        there = [name for name, part in splits.items() if part is not None]
        raise DataError(
            f"there is no labelled {wanted!r} split; there is {' and '.join(there) or 'none'}"
        )
    return wanted, rows


def check(method: Method, job: Job, base: PreTrainedModel | None = None) -> PreTrainedModel:
    """Finds what is wrong with a method on a task before there is an output folder or a step.

    Args:
        method: the one to run.
        job: its rows and model.
        base: the base model where it is loaded already.

    Returns:
        The base model, unchanged, for `run_method`.
    """
    args = method.arguments(job.args)
    base = base if base is not None else job.fresh_model()
    longest = max(map(len, job.train_rows["input_ids"]))
    most = most_positions(base)
    if most is not None and longest > most:
        raise DataError(
            f"--max_length is {job.max_length} and the longest row {longest} tokens, but the "
            f"model takes {most}; give at most that"
        )
    check_arguments(args)
    check_generation(job, most)
    setting = setting_of(method, base, split_rows(method, job), args, job.options(), **_asked(job))
    method.check(base, setting)
    return base


def _asked(job: Job) -> dict[str, Any]:
    """The task in `setting_of`'s terms."""
    return {
        "task_type": job.task.task_type,
        "metric": job.task.main_metric,
        "greater_is_better": job.task.greater_is_better,
        "score_rows": job.task.score_rows,
    }


def most_positions(model: torch.nn.Module) -> int | None:
    """Tokens that a table of absolute positions has rows for; None where there is no such table."""
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if leaf in ("position_embeddings", "wpe") and isinstance(module, torch.nn.Embedding):
            # RoBERTa counts positions from the padding's on
            return module.num_embeddings - (
                0 if module.padding_idx is None else module.padding_idx + 1
            )
    return None


def split_rows(method: Method, job: Job) -> TwoSets:
    """The rows that a method trains on, and those of them that it chooses on."""
    if not method.chooses:
        return TwoSets(job.train_rows, job.train_rows.select([]))
    if method.takes_validation and job.validation is not None:
        return TwoSets(job.train_rows, job.validation)
    return two_sets(job.train_rows, None, method.held_out_share, job.args.seed)


def run_method(
    method: Method,
    job: Job,
    folder: Path,
    resume: bool = False,
    base: PreTrainedModel | None = None,
    name: str | None = None,
    rows: Dataset | None = None,
) -> Result:
    """The stages of one method in a folder: choose, train, hand over, evaluate.

    Leaves `adapter/`, `plan.json` where the method has ranks, `result.json`, and what other sizes
    are cut from. Where `result.json` is there already, it is read and nothing else happens.

    Args:
        method: what to run.
        job: on what.
        folder: made where it is missing.
        resume: go on from the checkpoints in it.
        base: the base model where it is loaded already; used up.
        name: what tables call it; None is the method's own label.
        rows: training rows; None is all of the job's.
    """
    done = folder / "result.json"
    if _go_on(method, folder) and done.is_file():
        found = Result.load(done)
        if found.method == as_json(method.describe()):
            return found
        done.unlink()  # flags that act after training have changed: that much is done again
    job = job if rows is None else replace(job, train=rows)
    base = base if base is not None else job.fresh_model()
    plan: RankPlan | None = None
    searched: dict[str, Any] = {}
    final = method
    if method.anew:
        plan, searched = choose_stage(method, job, folder, resume, base)
        dropout = getattr(method, "lora_dropout", 0.0)
        final = LoRA(lora_dropout=dropout)
    result = _train_stage(final, job, folder, resume, base, plan)
    return _record(method, result, searched, folder, name)


def _go_on(method: Method, folder: Path) -> bool:
    """Whether what lies in a stage's folder is of this method; what is of another goes.

    A control at another size, say, because the method beside it now hands over another one.
    """
    file, now = folder / "method.json", as_json(method.trained_by())
    if file.is_file() and read_json(file) == now:
        return True
    for name in ("result.json", "plan.json"):
        (folder / name).unlink(missing_ok=True)
    for name in ("search", "training", method.product, *OTHER_SIZES):
        shutil.rmtree(folder / name, ignore_errors=True)
    write_json(file, now)
    return False


def choose_stage(
    method: Method, job: Job, folder: Path, resume: bool, base: PreTrainedModel
) -> tuple[RankPlan, dict[str, Any]]:
    """Chooses ranks and writes plan.json; read, where a resumed run has it already."""
    figures, scratch = folder / "search" / "figures.json", folder / "search"
    if figures.is_file():
        return RankPlan.load(folder / "plan.json"), read_json(figures)
    args = method.arguments(job.arguments(scratch))
    with measured(args.device) as cost:
        setting = setting_of(
            method, base, split_rows(method, job), args, job.options(), **_asked(job)
        )
        kept = method.choose(base, setting, _checkpoint(method, scratch, resume))
    assert kept.plan is not None
    plan = with_provenance(kept.plan, setting)
    plan.save(folder / "plan.json")
    found = {
        "search_seconds": cost["seconds"],
        "search_peak_memory_bytes": cost["bytes"],
        "held_out": len(setting.held_out),
        **_choice(kept),
    }
    write_json(figures, found)
    return plan, found


def _choice(kept: Kept) -> dict[str, Any]:
    return {
        "curve": None if kept.curve is None else kept.curve.to_dict(),
        "figures": dict(kept.figures),
    }


def _checkpoint(method: Method, folder: Path, resume: bool) -> bool:
    """Whether there is a whole checkpoint that the method can go on from; others go.

    Else a stage starts over, and gives what it would have given.
    """
    found = drop_damaged(folder) is not None and resume and method.resumable
    if not found:
        for path in folder.glob("checkpoint-*"):
            shutil.rmtree(path)
    return found


def _train_stage(
    method: Method,
    job: Job,
    folder: Path,
    resume: bool,
    base: PreTrainedModel,
    plan: RankPlan | None,
) -> dict[str, Any]:
    """Trains, keeps, hands over and evaluates; the record's fields that come of that."""
    scratch = folder / "training"
    args = method.arguments(job.arguments(scratch))
    data = split_rows(method, job)
    with measured(args.device) as cost:
        setting = setting_of(method, base, data, args, job.options(), **_asked(job))
        given = plan if plan is not None else method.start(base, setting)
        set_seed(args.seed)
        trainer = method.trainer(method.attach(base, given, setting), given, setting)
        run_training(trainer, _checkpoint(method, scratch, resume))
    for config in getattr(trainer.model, "peft_config", {}).values():
        config.base_model_name_or_path = job.source.name_or_path
        config.revision = job.source.revision
    started = time.perf_counter()
    kept = method.keep(trainer, given, setting)
    if plan is None and kept.plan is not None:
        kept = replace(kept, plan=with_provenance(kept.plan, setting))
    seconds = round(time.perf_counter() - started, 3)
    ranked = kept.plan is not None
    head = sum(
        p.numel()
        for n, p in trainer.model.named_parameters()
        if p.requires_grad and not (ranked and "lora_" in n)
    )
    _hand_over(method, job, trainer, kept, folder)
    lora = kept.plan.parameters if kept.plan is not None else None
    found = evaluated(job, trainer)
    texts = generation(job, trainer.model, folder / GENERATIONS, resume)
    return {
        "method": method,
        "job": job,
        "plan": kept.plan,
        "rows": {
            "train": len(data.train),
            "held_out": len(data.validation),
            "evaluated": len(job.evaluation),
        },
        "metrics": found["metrics"] | texts.pop("metrics", {}),
        "resampled": found["resampled"],
        "generation": texts,
        "rivals": _rivals(method, job, trainer, kept, head),
        "trainable_parameters": (lora or 0) + head,
        "lora_parameters": lora,
        "cost": {
            "search_seconds": seconds if method.chooses else 0.0,
            "train_seconds": cost["seconds"],
            "peak_memory_bytes": cost["bytes"],
            "peak_memory_of": cost["of"],
            "steps": trainer.state.global_step,
        },
        "resumed": resume,
        **_choice(kept),
    }


def _rivals(
    method: Method, job: Job, trainer: Trainer, kept: Kept, head: int
) -> list[dict[str, Any]]:
    """What else the same training could have given, measured on the same rows."""
    found = []
    for name, adapter in method.rivals(kept).items():
        with TemporaryDirectory() as scratch:
            adapter.save(Path(scratch) / "adapter")
            swap_adapter(trainer, Path(scratch) / "adapter")
        size = adapter.parameters
        about = {"name": name, **evaluated(job, trainer), "lora_parameters": size}
        ranks = {module: f.rank for module, f in adapter.factors().items()}
        found.append(about | {"trainable_parameters": size + head, "ranks": ranks})
    return found


def _hand_over(method: Method, job: Job, trainer: Trainer, kept: Kept, folder: Path) -> None:
    """The method's hand-over, into folders that hold nothing of a run that was killed in it."""
    for name in (method.product, *OTHER_SIZES):
        shutil.rmtree(folder / name, ignore_errors=True)
    method.hand_over(trainer, kept, folder)
    for name in (method.product, *OTHER_SIZES):
        if (folder / name).is_dir():
            describe_adapter(job, folder / name, method)


def describe_adapter(job: Job, folder: Path, method: Method) -> None:
    """Writes beside an adapter what its task was, for `rankwise evaluate`."""
    about = job.task.describe() | {"max_length": job.max_length, "method": method.describe()}
    about["gguf_file"] = job.source.gguf_file
    about["load_in_4bit"] = job.source.load_in_4bit
    base = job.source.name_or_path
    if not Path(base).exists():  # of a folder, PEFT's own config alone says where
        about["base"] = base
    write_json(folder / TASK, about)
    if folder.name == method.product:
        job.tokenizer.save_pretrained(str(folder))


def _record(
    method: Method, found: dict[str, Any], searched: dict[str, Any], folder: Path, name: str | None
) -> Result:
    """The record of a finished method, written beside its adapter."""
    job, plan = found["job"], found["plan"]
    if plan is not None:
        plan.save(folder / "plan.json")
        # beside the weights too, for whoever gets those alone
        plan.save(folder / method.product / "plan.json")
    if method.anew:
        found["cost"] |= {k: v for k, v in searched.items() if k.startswith("search_")}
        found |= {"curve": searched["curve"], "figures": searched["figures"]}
        found["rows"] |= {"held_out": searched["held_out"]}
    result = Result(
        name=name or method.label(plan),
        method=method.describe(),
        claim=method.claim,
        task=job.task.describe(),
        model=model_name(job.source.name_or_path),
        rows=found["rows"],
        split=job.split,
        training=recorded(job.args),
        metrics=found["metrics"],
        resampled=found["resampled"],
        trainable_parameters=found["trainable_parameters"],
        lora_parameters=found["lora_parameters"],
        ranks=None if plan is None else plan.ranks,
        cost=found["cost"],
        curve=found["curve"],
        figures=found["figures"],
        about={
            "command": job.command,
            "threads": torch.get_num_threads(),
            "resumed": found["resumed"],
            "max_length": job.max_length,
            "floor": job.task.floor(job.train_rows, job.evaluation),
            "load_in_4bit": job.source.load_in_4bit,
            "versions": {p: version(p) for p in ("rankwise", "torch", "transformers", "peft")},
            **job.about,
            **found["generation"],
        },
    )
    rivals = [replace(result, claim="", curve=None, figures={}, **r) for r in found["rivals"]]
    result = Result.from_dict(result.with_controls(rivals, "").to_dict())
    result.save(folder / "result.json")
    return result


def recorded(args: TrainingArguments) -> dict[str, Any]:
    """The TrainingArguments that a result rests on, as JSON holds them."""
    given = args.to_dict()
    return {name: given.get(name) for name in RECORDED}


def evaluate(job: Job, trainer: Trainer) -> dict[str, float]:
    """The loss and the task's metrics on the evaluation rows, by their own names.

    Raises:
        DivergedError: the loss is not finite.
    """
    return _predicted(job, trainer)[1]


def evaluated(job: Job, trainer: Trainer) -> dict[str, Any]:
    """`evaluate`'s metrics, and the main one on resamples of the rows, as a record holds them."""
    output, metrics = _predicted(job, trainer)
    sample = resampled(job.task.score_rows(output), len(job.evaluation))
    return {"metrics": metrics, "resampled": tuple(round(float(x), 6) for x in sample)}


def _predicted(job: Job, trainer: Trainer) -> tuple[Any, dict[str, float]]:
    """The predictions for the evaluation rows, and what `evaluate` says of them."""
    output: Any = trainer.predict(job.evaluation, metric_key_prefix="eval")
    raw = output.metrics or {}
    if not math.isfinite(raw["eval_loss"]):
        raise DivergedError(
            f"the loss on the {job.split} rows is {raw['eval_loss']} after training; lower "
            f"--learning_rate (now {job.args.learning_rate:g})"
        )
    names = [name for name in job.task.metrics if f"eval_{name}" in raw]
    metrics = {"loss": raw["eval_loss"]} | {name: float(raw[f"eval_{name}"]) for name in names}
    return output, metrics


def generation(job: Job, model: nn.Module, file: Path, resume: bool) -> dict[str, Any]:
    """The official figures of the texts that a model generates for the evaluation rows.

    Of a task of another kind, or a job that wants the loss alone, nothing. Texts go
    to `file`; see `rankwise.decoding.generate_rows`.

    Returns:
        "metrics", their "signatures", "decoding", and "generation_seconds".
    """
    if not job.task.generates or job.decoding is None:
        return {}
    task: Any = job.task
    _, rows = _evaluation_rows(task, job.split)
    started = time.perf_counter()
    texts = generate_rows(model, job.tokenizer, task, rows, job.decoding, file, resume)
    seconds = round(time.perf_counter() - started, 3)
    figures = task.score_texts(rows, texts)
    drop_partial(file)
    return {
        "metrics": {figure.name: figure.value for figure in figures},
        "signatures": {figure.name: figure.signature for figure in figures},
        "decoding": asdict(job.decoding),
        "generation_seconds": seconds,
    }


def check_generation(job: Job, most: int | None) -> None:
    """Raises DataError where a prompt of the evaluation rows and its text do not fit the model."""
    if not job.task.generates or most is None or job.decoding is None:
        return
    task: Any = job.task
    _, rows = _evaluation_rows(task, job.split)
    longest = max(map(len, task.prompts(job.tokenizer, rows)))
    if longest + job.decoding.max_new_tokens > most:
        raise DataError(
            f"the longest input is {longest} tokens and --max_new_tokens "
            f"{job.decoding.max_new_tokens}, but the model takes {most}; give fewer new tokens"
        )


@contextmanager
def measured(device: torch.device) -> Iterator[dict[str, Any]]:
    """Seconds and peak memory of a block."""
    found: dict[str, Any] = {}
    peak: Peak = peak_memory(device)
    started = time.perf_counter()
    yield found
    found["seconds"] = round(time.perf_counter() - started, 3)
    found["bytes"], found["of"] = peak.read(), peak.of


def with_method(name: str | Method, like: Method, budget: int | None) -> Method:
    """A control: the method of that name with the flags that it shares with another.

    Args:
        name: of the control.
        like: the method that it is compared with; `r`, `lora_alpha`, ... are taken from it.
        budget: parameters, for a control that takes a budget.
    """
    control = by_name(name)
    shared = ("r", "lora_alpha", "lora_dropout", "target_modules")
    known = control.__dataclass_fields__
    flags = {key: getattr(like, key) for key in shared if key in known and hasattr(like, key)}
    if budget is not None and "budget" in known:
        flags["budget"] = budget
    return control.with_flags(**flags)
