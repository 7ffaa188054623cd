"""One task on one base model, ready to train, and what can be wrong with it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from rankwise import tasks
from rankwise.decoding import Decoding
from rankwise.errors import DataError
from rankwise.methods import Method
from rankwise.rows import TwoSets, fingerprint, two_sets
from rankwise.sharded import load_everywhere, sharding
from rankwise.trainer import check_arguments, replaced
from rankwise.training import setting_of, weights_of

GENERATIONS = "generations.jsonl"  # in a run's folder

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
    split, rows = evaluation_rows(task, eval_split)
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


def evaluation_rows(task: tasks.Task, wanted: str) -> tuple[str, Dataset]:
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
    setting = setting_of(method, base, split_rows(method, job), args, job.options(), **asked(job))
    method.check(base, setting)
    return base


def asked(job: Job) -> dict[str, Any]:
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


def recorded(args: TrainingArguments) -> dict[str, Any]:
    """The TrainingArguments that a result rests on, as JSON holds them."""
    given = args.to_dict()
    return {name: given.get(name) for name in RECORDED}


def check_generation(job: Job, most: int | None) -> None:
    """Raises DataError where a prompt of the evaluation rows and its text do not fit the model."""
    if not job.task.generates or most is None or job.decoding is None:
        return
    task: Any = job.task
    _, rows = evaluation_rows(task, job.split)
    longest = max(map(len, task.prompts(job.tokenizer, rows)))
    if longest + job.decoding.max_new_tokens > most:
        raise DataError(
            f"the longest input is {longest} tokens and --max_new_tokens "
            f"{job.decoding.max_new_tokens}, but the model takes {most}; give fewer new tokens"
        )
