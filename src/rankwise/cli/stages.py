"""The stages that the subcommands are made of: rows, search, training and evaluation, report."""

import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from rich.console import Console
from safetensors import SafetensorError
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import get_reporting_integration_callbacks

from rankwise import tasks, training
from rankwise.cli.arguments import (
    DataArguments,
    FitArguments,
    LoraArguments,
    ModelArguments,
    NestedArguments,
    SearchArguments,
    required,
)
from rankwise.errors import AdapterError, DataError, DivergedError, ModelError, RankwiseError
from rankwise.files import write_json
from rankwise.lora import find_entries
from rankwise.methods import METHODS, DyLoRA, Method
from rankwise.plan import RankPlan
from rankwise.report import save_heatmap, write_card
from rankwise.report.memory import Peak, peak_memory
from rankwise.trainer import last_checkpoint

console = Console(stderr=True)


@dataclass(frozen=True)
class Job:
    """What every stage needs: flags, rows and tokenizer."""

    model: ModelArguments
    data: DataArguments
    fit: FitArguments
    task: tasks.Task
    tokenizer: PreTrainedTokenizerBase
    train: Dataset | None
    eval: Dataset
    eval_split: str


def load_job(
    model: ModelArguments, data: DataArguments, fit: FitArguments, command: str, **task: Any
) -> Job:
    """Reads and encodes the rows; everything that can be wrong with them is found here.

    Args:
        model, data, fit: the flags.
        command: for the message where a flag is missing.
        **task: overrides for `tasks.load_task` (an adapter's own labels).
    """
    name = required(model.model_name_or_path, "model_name_or_path", command)
    options: dict[str, Any] = {
        "data_dir": data.data_dir,
        "train_file": data.train_file,
        "validation_file": data.validation_file,
        "test_file": data.test_file,
        "text_column": data.text_column or None,
        "label_column": data.label_column,
        "label_names": data.label_names or None,
        "kind": data.kind,
        "max_train_samples": data.max_train_samples,
        "max_eval_samples": data.max_eval_samples,
        "seed": fit.seed,
        "trust_remote_code": model.trust_remote_code,
    }
    loaded = tasks.load_task(data.task, **(options | task))
    tasks.check_metrics(loaded)
    tokenizer = tasks.load_tokenizer(
        name,
        gguf_file=model.gguf_file,
        revision=model.model_revision,
        trust_remote_code=model.trust_remote_code,
    )
    split, rows = _eval_rows(loaded, data.eval_split)
    encoded = {
        part: tasks.encode(loaded, part_rows, tokenizer, data.max_length)
        for part, part_rows in (("train", loaded.train), ("eval", rows))
        if part_rows is not None
    }
    return Job(model, data, fit, loaded, tokenizer, encoded.get("train"), encoded["eval"], split)


def _eval_rows(task: tasks.Task, wanted: str) -> tuple[str, Dataset]:
    splits = {"test": task.test, "validation": task.validation}
    if wanted == "auto":
        wanted = "test" if task.test is not None else "validation"
    rows = splits[wanted]
    if rows is None:
        there = [name for name, part in splits.items() if part is not None]
        raise DataError(
            f"there is no labelled {wanted} split; there is {' and '.join(there) or 'none'}"
        )
    return wanted, rows


def fresh_model(job: Job) -> PreTrainedModel:
    """The base model with a new head, the same one every time for the same seed."""
    set_seed(job.fit.seed)
    return tasks.load_model(
        job.task,
        job.model.model_name_or_path or "",
        tokenizer=job.tokenizer,
        gguf_file=job.model.gguf_file,
        revision=job.model.model_revision,
        trust_remote_code=job.model.trust_remote_code,
        attn_implementation=job.model.attn_implementation,
        dtype=job.model.dtype,
    )


def search_method(search: SearchArguments, nested: NestedArguments) -> Method:
    """The method by its name, with what the flags change of it."""
    if search.method not in METHODS:
        raise RankwiseError(f"--method is {search.method!r}; there are {', '.join(METHODS)}")
    method = METHODS[search.method]
    if isinstance(method, DyLoRA):
        others = set(vars(search)) - {"method", "validation_fraction"}
        _only_defaults(search, tuple(sorted(others)), "autolora")
        if (
            nested.rank_distribution != "geometric"
            and nested.geometric_p != NestedArguments().geometric_p
        ):
            raise RankwiseError("--geometric_p is for --rank_distribution geometric; give that too")
        weights = _probabilities(nested.rank_weights) if nested.rank_weights else None
        return replace(
            method,
            r_min=nested.r_min,
            distribution=nested.rank_distribution,
            p=nested.geometric_p,
            weights=weights,
        )
    _only_defaults(nested, tuple(vars(nested)), "dylora")
    changes: dict[str, Any] = {
        "learning_rate": search.gate_learning_rate,
        "lookahead": search.lookahead,
    }
    if search.estimator is not None:
        changes["estimator"] = search.estimator
    return replace(method, **changes)


def _only_defaults(given: Any, names: tuple[str, ...], method: str) -> None:
    """Refuses flags that only another method reads."""
    for name in names:
        if getattr(given, name) != getattr(type(given)(), name):
            raise RankwiseError(f"--{name} is for --method {method}; leave it out")


def _probabilities(texts: list[str]) -> tuple[float, ...]:
    try:
        return tuple(map(float, texts))
    except ValueError as error:
        raise RankwiseError(f"--rank_weights: {error}; give numbers that sum to 1") from error


def target_modules(lora: LoraArguments) -> list[str] | str | None:
    """What `find_entries` takes: None, a list, or the one word that is not a module's name."""
    if lora.target_modules == ["all-linear"]:
        return "all-linear"
    return lora.target_modules or None


def training_arguments(job: Job, folder: Path, **changes: Any) -> TrainingArguments:
    """transformers' TrainingArguments of the flags."""
    fit = asdict(job.fit)
    extra = fit.pop("training_arguments") or {}
    if clash := sorted(
        set(extra) & {*fit, "output_dir", "save_strategy", "label_names", "eval_strategy"}
    ):
        raise RankwiseError(f"--training_arguments: {clash[0]} is set elsewhere; leave it out")
    if secret := [key for key in extra if key.endswith("token")]:
        raise RankwiseError(f"--training_arguments: {secret[0]} would be written to metrics.json")
    defaults = {f.name: f.default for f in fields(TrainingArguments)}
    for key, value in extra.items():
        if isinstance(defaults.get(key), int | float) and not isinstance(value, int | float):
            raise RankwiseError(f"--training_arguments: {key} is {value!r}; it has to be a number")
    if fit.pop("group_by_length"):
        fit["train_sampling_strategy"] = "group_by_length"
    common = {
        "output_dir": str(folder),
        "disable_tqdm": False,
        "save_total_limit": 2,
        "label_names": ["labels"],
        "dataloader_pin_memory": not job.fit.use_cpu and torch.cuda.is_available(),
    }
    try:
        args = TrainingArguments(**(common | fit | extra | changes))
        args._n_gpu = min(args.n_gpu, 1)  # several visible GPUs would mean DataParallel
        return args
    except (TypeError, ValueError) as error:
        raise RankwiseError(f"TrainingArguments: {' '.join(str(error).split())}") from error


def search_arguments(job: Job, search: SearchArguments, folder: Path) -> TrainingArguments:
    """The same with the search's own rate and length."""
    args = training_arguments(
        job,
        folder,
        learning_rate=search.search_learning_rate or job.fit.learning_rate,
        num_train_epochs=search.num_search_epochs or job.fit.num_train_epochs,
        max_steps=search.max_search_steps if search.max_search_steps > 0 else job.fit.max_steps,
    )
    if search.num_search_epochs is not None and search.max_search_steps <= 0:
        args.max_steps = -1
    return args


def search_stage(
    job: Job,
    lora: LoraArguments,
    search: SearchArguments,
    method: Method,
    work: Path,
    resume: bool,
) -> dict[str, Any]:
    """Searches ranks and writes plan.json; figures only, where a resumed run has it already."""
    figures = work / "search" / "figures.json"
    if figures.exists():
        return json.loads(figures.read_text())
    folder = work / "search"
    args = search_arguments(job, search, folder)
    with measured(args.device) as found:
        plan = training.search(
            fresh_model(job),
            train_rows(job),
            method=method,
            validation_fraction=search.validation_fraction,
            r=lora.r,
            lora_alpha=lora.lora_alpha,
            lora_dropout=lora.lora_dropout,
            target_modules=target_modules(lora),
            task_type=job.task.task_type,
            args=args,
            resume_from_checkpoint=resume and last_checkpoint(folder) is not None,
            data_collator=tasks.data_collator(job.task, job.tokenizer),
        )
    plan.save(work / "plan.json")
    write_json(
        figures,
        {
            "search_seconds": found["seconds"],
            "search_peak_memory_bytes": found["bytes"],
            "peak_memory_of": found["of"],
        },
    )
    return json.loads(figures.read_text())


def train_stage(
    job: Job,
    plan: RankPlan,
    work: Path,
    arm: str,
    resume: bool,
    lora_dropout: float = 0.0,
    rows: Dataset | None = None,
) -> dict[str, Any]:
    """Trains one arm of a comparison from scratch and evaluates it; kept in `arms/<arm>`.

    Args:
        rows: to train on; None is all training rows.

    Returns:
        train_seconds, trainable_parameters, lora_parameters, ranks, eval, peak memory.
    """
    folder = work / "arms" / arm
    figures = folder / "figures.json"
    if figures.exists():
        return json.loads(figures.read_text())
    args = training_arguments(job, folder)
    with measured(args.device) as found:
        trainer = training.train(
            fresh_model(job),
            plan,
            train_rows(job) if rows is None else rows,
            args=args,
            task_type=job.task.task_type,
            lora_dropout=lora_dropout,
            resume_from_checkpoint=resume and last_checkpoint(folder) is not None,
            data_collator=tasks.data_collator(job.task, job.tokenizer),
            **evaluation(job),
        )
    save_adapter(job, trainer.model, folder / "adapter")
    write_json(
        figures,
        {
            "train_seconds": found["seconds"],
            "peak_memory_bytes": found["bytes"],
            "peak_memory_of": found["of"],
            **sizes(plan, trainer),
            "steps": trainer.state.global_step,
            "eval": evaluate(job, trainer),
        },
    )
    return json.loads(figures.read_text())


def sizes(plan: RankPlan, trainer: Trainer) -> dict[str, Any]:
    """What an adapter at a plan's ranks weighs."""
    ranks = list(plan.ranks.values())
    head = sum(
        p.numel()
        for n, p in trainer.model.named_parameters()
        if p.requires_grad and "lora_" not in n
    )
    return {
        "trainable_parameters": plan.parameters + head,
        "lora_parameters": plan.parameters,
        "mean_rank": round(sum(ranks) / len(ranks), 4),
    }


def train_rows(job: Job) -> Dataset:
    """The encoded training rows, which a command that trains cannot do without."""
    if job.train is None:
        raise DataError("there are no training rows; give --task, --data_dir or --train_file")
    return job.train


def evaluate(job: Job, trainer: Trainer) -> dict[str, Any]:
    """The task's metrics on the evaluation rows, by their own names."""
    raw = trainer.evaluate(job.eval)
    if not math.isfinite(raw["eval_loss"]):
        raise DivergedError(
            f"the loss on the {job.eval_split} rows is {raw['eval_loss']} after training; lower "
            f"--learning_rate (now {job.fit.learning_rate:g})"
        )
    found = {name: raw[f"eval_{name}"] for name in job.task.metrics if f"eval_{name}" in raw}
    return {"split": job.eval_split, "rows": len(job.eval), "loss": raw["eval_loss"], **found}


def evaluate_adapter(job: Job, adapter: Path) -> dict[str, Any]:
    """The metrics of a PEFT adapter on disk."""
    try:
        model = PeftModel.from_pretrained(fresh_model(job), str(adapter))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"cannot load the adapter {adapter}: {str(error).splitlines()[0]}"
        ) from error
    args = training_arguments(job, adapter.parent, save_strategy="no")
    collator = tasks.data_collator(job.task, job.tokenizer)
    return evaluate(job, Trainer(model, args, data_collator=collator, **evaluation(job)))


def evaluation(job: Job) -> dict[str, Any]:
    """What a Trainer needs to compute the task's metrics."""
    return {
        "compute_metrics": tasks.compute_metrics(job.task),
        "preprocess_logits_for_metrics": tasks.preprocess_logits(job.task),
    }


def save_adapter(job: Job, model: PeftModel, folder: Path) -> None:
    """A stock PEFT adapter, with the task's description beside it for `rankwise evaluate`."""
    shutil.rmtree(folder, ignore_errors=True)
    name_base(job, model)
    model.save_pretrained(str(folder))
    describe_adapter(job, folder)


def name_base(job: Job, model: PeftModel) -> None:
    """Makes an adapter's config say which base model, of which revision, it belongs to."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = job.model.model_name_or_path
        config.revision = job.model.model_revision


def adapter_folder(path: str | Path, *within: str) -> Path:
    """The folder of an adapter: the path itself, or a run's folder by these names in it."""
    for folder in (Path(path), *(Path(path) / name for name in within)):
        if (folder / "adapter_config.json").is_file():
            return folder
    inside = f", nor in its {' or '.join(within)}/" if within else ""
    raise AdapterError(f"no adapter_config.json in {path}{inside}; give an adapter's folder")


def describe_adapter(job: Job, folder: Path) -> None:
    """Writes the task's description beside an adapter, for `rankwise evaluate`."""
    about = job.task.describe() | {"max_length": job.data.max_length}
    about["gguf_file"] = job.model.gguf_file
    write_json(folder / "task.json", about)


def write_results(
    job: Job, work: Path, plan: RankPlan, metrics: dict[str, Any], arms: dict[str, dict[str, Any]]
) -> None:
    """adapter/ with its card, ranks.png and metrics.json."""
    adapter = work / "arms" / "plan" / "adapter"
    if adapter.exists():
        write_card(adapter, plan, metrics, job.task, arms)
        adapter.replace(work / "adapter")
    save_heatmap(plan, work / "ranks.png")
    write_json(work / "metrics.json", metrics)


def describe_run(job: Job) -> dict[str, Any]:
    """The part of metrics.json that says what was run."""
    fit = {k: v for k, v in asdict(job.fit).items() if k not in ("report_to", "logging_steps")}
    return {
        "task": job.task.describe(),
        "model": training.model_name(str(job.model.model_name_or_path)),
        "train_rows": 0 if job.train is None else len(job.train),
        "max_length": job.data.max_length,
        "training": fit,
        "threads": torch.get_num_threads(),
    }


def split_rows(job: Job, search: SearchArguments, method: Method) -> training.TwoSets:
    """The training rows in two: what factors are trained on, and what ranks are chosen on."""
    fraction = search.validation_fraction or training.default_fraction(method)
    return training.two_sets(train_rows(job), None, fraction, job.fit.seed)


def check_search(
    job: Job,
    lora: LoraArguments,
    search: SearchArguments,
    method: Method,
    control_r: int | None = None,
) -> None:
    """Finds what is wrong with a search before there is an output folder or a step of it."""
    training.search_args(training_arguments(job, Path("unused")), method)
    split_rows(job, search, method)
    model = fresh_model(job)
    for r in (lora.r, control_r):
        if r is not None:
            find_entries(model, target_modules(lora), r)


def check_training(job: Job) -> None:
    """The same for training: rows that fit the model, arguments that transformers takes."""
    longest = max(map(len, train_rows(job)["input_ids"]))
    most = _positions(fresh_model(job))
    if most is not None and longest > most:
        raise DataError(
            f"--max_length is {job.data.max_length} and the longest row {longest} tokens, but the "
            f"model takes {most}; give at most that"
        )
    args = training_arguments(job, Path("unused"))
    try:
        get_reporting_integration_callbacks(args.report_to)
    except (ValueError, RuntimeError) as error:
        raise RankwiseError(f"--report_to: {' '.join(str(error).split())}") from error


def _positions(model: torch.nn.Module) -> int | None:
    """Tokens that a table of absolute positions has rows for; None where there is no such table."""
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if leaf in ("position_embeddings", "wpe") and isinstance(module, torch.nn.Embedding):
            # RoBERTa counts positions from the padding's on
            return module.num_embeddings - (
                0 if module.padding_idx is None else module.padding_idx + 1
            )
    return None


@contextmanager
def measured(device: torch.device) -> Iterator[dict[str, Any]]:
    """Seconds and peak memory of a block."""
    found: dict[str, Any] = {}
    peak: Peak = peak_memory(device)
    started = time.perf_counter()
    yield found
    found["seconds"] = round(time.perf_counter() - started, 3)
    found["bytes"], found["of"] = peak.read(), peak.of
