"""The Task dataclass, and the functions that send each kind of task to its own file."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from datasets import Dataset
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rankwise import rows as rows_
from rankwise.errors import DataError, ModelError, RankwiseError
from rankwise.rows import TwoSets
from rankwise.tasks import causal_lm, checks, classification, tagging
from rankwise.tasks import files as files_
from rankwise.tasks.checks import Rows
from rankwise.tasks.columns import Columns, Kind, check_kind, choose_columns
from rankwise.tasks.known import KNOWN, KnownTask, known_name

logger = logging.getLogger(__name__)

HELD_OUT = 0.1

TaskType = Literal["SEQ_CLS", "TOKEN_CLS", "CAUSAL_LM"]
Metrics = Callable[[EvalPrediction], dict[str, float]]

_TASK_TYPES: dict[Kind, TaskType] = {
    "classification": "SEQ_CLS",
    "regression": "SEQ_CLS",
    "tagging": "TOKEN_CLS",
    "causal_lm": "CAUSAL_LM",
}


@dataclass(frozen=True)
class Task:
    """One data set and what is asked of it. Rows hold only the text and label columns.

    Labels in the splits are already numbers: a class number (classification), a float
    (regression) or a list of class numbers, one a token (tagging).

    Attributes:
        name: "glue/mrpc", "jnlpba", or the stem of the user's own file or folder.
        kind: what is predicted.
        text_columns: one or two text columns (classification, regression), one column of
            token lists (tagging), or a text column or a prompt and a completion column
            (causal_lm).
        label_column: None for causal_lm.
        label_names: in the order of the class numbers; None for regression and causal_lm.
        metrics: the first is the main one.
        train: None when only an evaluation set was given.
        validation: None when only a test set was given.
        test: None when there is none, or its labels are hidden.
    """

    name: str
    kind: Kind
    text_columns: tuple[str, ...]
    label_column: str | None
    label_names: tuple[str, ...] | None
    metrics: tuple[str, ...]
    train: Dataset | None = None
    validation: Dataset | None = None
    test: Dataset | None = None

    @property
    def task_type(self) -> TaskType:
        """PEFT's name for the kind of task."""
        return _TASK_TYPES[self.kind]

    @property
    def main_metric(self) -> str:
        """The metric a model is chosen by, as compute_metrics names it (no "eval_")."""
        return self.metrics[0]

    @property
    def greater_is_better(self) -> bool:
        """False where the main metric is a perplexity or a loss."""
        return self.main_metric not in ("perplexity", "loss")

    def describe(self) -> dict[str, Any]:
        """All but the rows, as a dict that JSON can hold; see from_description."""
        return {
            "name": self.name,
            "kind": self.kind,
            "text_columns": list(self.text_columns),
            "label_column": self.label_column,
            "label_names": None if self.label_names is None else list(self.label_names),
            "metrics": list(self.metrics),
        }

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> Task:
        """The task that describe() wrote down, without rows.

        Raises:
            DataError: an entry is missing or the kind is unknown.
        """
        missing = [
            key
            for key in cls("", "causal_lm", (), None, None, ()).describe()
            if key not in description
        ]
        if missing:
            raise DataError(
                f"the task description lacks {', '.join(missing)}; "
                "use one written by Task.describe()"
            )
        kind = check_kind(description["kind"])
        names = description["label_names"]
        return cls(
            name=description["name"],
            kind=kind,
            text_columns=tuple(description["text_columns"]),
            label_column=description["label_column"],
            label_names=None if names is None else tuple(names),
            metrics=tuple(description["metrics"]),
        )


def load_task(
    task: str | None = None,
    *,
    data_dir: str | Path | None = None,
    train_file: str | Path | None = None,
    validation_file: str | Path | None = None,
    test_file: str | Path | None = None,
    text_column: str | Sequence[str] | None = None,
    label_column: str | None = None,
    kind: Kind | None = None,
    label_names: Sequence[str] | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    test_size: float | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> Task:
    """Reads, checks and numbers the rows of a task.

    Rows come from the files if any is given, else from data_dir, else from the hub. Without
    validation rows a tenth of train, drawn with the seed, is held out for them.

    Args:
        task: a known task ("glue/rte", also "rte"; "jnlpba"); None for rows of your own.
        data_dir: folder with train, validation and test .jsonl, .json, .csv or .parquet.
        train_file, validation_file, test_file: the same, one file a split. Train may be left
            out where only an evaluation is wanted (classes then need label_names).
        text_column: one or two names; default: inferred from the columns.
        label_column: default: "label" or "labels" ("ner_tags" or "tags" too for tags).
        kind: default: tagging for lists of tokens, regression for labels with fractions,
            causal_lm for prompt/completion or text without labels, else classification.
        label_names: the classes in the order of their numbers; default: those of the data set,
            or the sorted labels of train. What a saved model was trained with goes here.
        max_train_samples: at most so many train rows, drawn with the seed; default all.
        max_eval_samples: the same for validation and for test; default all.
        test_size: fraction of train, in (0, 1), held out as test where there is no test;
            default none.
        seed: of the held-out parts and samples; default 0.
        trust_remote_code: passed on to datasets.load_dataset; default False.

    Raises:
        DataError: files, columns, texts or labels are not as they should be.
    """
    known = None if task is None else KNOWN[known_name(task)]
    if test_size is not None and not 0 < test_size < 1:
        raise DataError(f"test_size={test_size} is not between 0 and 1; give a fraction of train")
    paths = {"train": train_file, "validation": validation_file, "test": test_file}
    files = {split: path for split, path in paths.items() if path is not None}
    rows = _read(known, data_dir, files, trust_remote_code)
    columns = _columns(rows, known, text_column, label_column, kind)
    if known and columns.label and "test" in rows:
        public = _drop_hidden(rows.pop("test"), columns.label)
        rows.update({} if public is None else {"test": public})
    if known and known.kind == columns.kind and label_names is None:
        label_names = known.label_names
    rows, names = _number_labels(rows, columns, label_names)
    splits = _datasets(rows, columns)
    splits = _cut(splits, max_train_samples, max_eval_samples, test_size, seed)
    if "train" in splits:
        _check_varied(splits["train"], columns, names)
    return Task(
        name=known_name(task) if task is not None else _name(data_dir, files),
        kind=columns.kind,
        text_columns=columns.text,
        label_column=columns.label,
        label_names=names,
        metrics=_metrics(known, columns.kind, names),
        **splits,
    )


def _name(data_dir: str | Path | None, files: dict[str, str | Path]) -> str:
    if files:
        return Path(next(iter(files.values()))).stem
    return Path(data_dir or ".").resolve().name


def _read(
    known: KnownTask | None,
    data_dir: str | Path | None,
    files: dict[str, str | Path],
    trust_remote_code: bool,
) -> dict[str, Rows]:
    if data_dir is not None and files:
        raise DataError(
            f"both data_dir and {next(iter(files))}_file are given; give the folder or the files"
        )
    if files:
        return {split: files_.read_file(path) for split, path in files.items()}
    if data_dir is not None:
        found = files_.folder_files(data_dir)
        return {split: files_.read_file(path) for split, path in found.items()}
    if known is None:
        raise DataError(
            f"no data given; give a task by name ({', '.join(KNOWN)}), data_dir= or train_file="
        )
    return files_.read_hub(known, trust_remote_code)


def _columns(
    rows: dict[str, Rows],
    known: KnownTask | None,
    text_column: str | Sequence[str] | None,
    label_column: str | None,
    kind: Kind | None,
) -> Columns:
    if kind is not None:
        check_kind(kind)
    if known is not None:
        text_column = text_column or known.text_columns
        label_column = label_column or known.label_column
        kind = kind or check_kind(known.kind)
    # The first split is train, unless only an evaluation is wanted.
    split = next(iter(rows))
    columns = choose_columns(rows[split], text_column, label_column, kind, split)
    if columns.kind != "tagging":
        for split, there in rows.items():
            for name in columns.text:
                checks.check_texts(there, name, split)
    return columns


def _number_labels(
    rows: dict[str, Rows], columns: Columns, label_names: Sequence[str] | None
) -> tuple[dict[str, Rows], tuple[str, ...] | None]:
    if label_names is not None and len(set(label_names)) < len(label_names):
        raise DataError(f"label_names has a name twice ({', '.join(label_names)}); name each once")
    if columns.label is None:
        return rows, None
    if columns.kind == "regression":
        return classification.check_scores(rows, columns.label), None
    if columns.kind == "tagging":
        return tagging.number_tags(rows, columns.text[0], columns.label, label_names)
    return classification.number_classes(rows, columns.label, label_names)


def _datasets(rows: dict[str, Rows], columns: Columns) -> dict[str, Dataset]:
    if columns.label is None:
        features = causal_lm.features(columns.text)
    elif columns.kind == "tagging":
        features = tagging.features(columns.text[0], columns.label)
    else:
        regression = columns.kind == "regression"
        features = classification.features(columns.text, columns.label, regression)
    return {
        split: Dataset.from_dict({name: there[name] for name in features}, features=features)
        for split, there in rows.items()
    }


def _cut(
    splits: dict[str, Dataset],
    max_train_samples: int | None,
    max_eval_samples: int | None,
    test_size: float | None,
    seed: int,
) -> dict[str, Dataset]:
    wanted = {"test": test_size, "validation": HELD_OUT}
    for split, fraction in wanted.items():
        if "train" in splits and split not in splits and fraction is not None:
            parts = _hold_out(splits["train"], fraction, seed, split)
            splits["train"], splits[split] = parts.train, parts.validation
    return {
        split: _sample(there, max_train_samples, seed, "max_train_samples")
        if split == "train"
        else _sample(there, max_eval_samples, seed, "max_eval_samples")
        for split, there in splits.items()
    }


def _drop_hidden(rows: Rows, label: str) -> Rows | None:
    """The rows whose label is public (GLUE hides test labels as -1); None when none is."""
    if label not in rows:
        return None
    values = checks.parse_numbers(rows[label])
    keep = [n for n, value in enumerate(values) if value != -1]
    return {name: [column[n] for n in keep] for name, column in rows.items()} if keep else None


def _hold_out(rows: Dataset, fraction: float, seed: int, what: str) -> TwoSets:
    """What stays (train) and what is held out (validation), at least one row each.

    Raises:
        DataError: there are too few rows for both.
    """
    size = max(1, round(len(rows) * fraction))
    if len(rows) - size < 1:
        raise DataError(
            f"train has {len(rows)} row, too few to hold out a {what} part; "
            f"give more rows or a {what} file"
        )
    logger.info("no %s rows given: held out %d of %d train rows", what, size, len(rows))
    return rows_.hold_out(rows, size, seed)


def _sample(rows: Dataset, size: int | None, seed: int, option: str) -> Dataset:
    """At most size rows, drawn with the seed (a file may be sorted by label); None: all.

    Raises:
        DataError: size is below 1.
    """
    if size is None:
        return rows
    if size < 1:
        raise DataError(f"{option}={size} would leave no rows; give 1 or more, or leave it out")
    if size >= len(rows):
        return rows
    return rows.shuffle(seed=seed).select(range(size))


def _check_varied(train: Dataset, columns: Columns, names: tuple[str, ...] | None) -> None:
    if columns.label is not None and columns.kind == "tagging":
        tagging.check_varied(train, columns.label, names or ())
    elif columns.label is not None:
        classification.check_varied(train, columns.label, names)


def _metrics(known: KnownTask | None, kind: Kind, names: tuple[str, ...] | None) -> tuple[str, ...]:
    if known is not None and known.kind == kind:
        return known.metrics
    if kind == "tagging":
        return tagging.default_metrics(names or ())
    defaults: dict[Kind, tuple[str, ...]] = {
        "classification": ("accuracy", "f1"),
        "regression": ("pearson", "spearman"),
        "causal_lm": ("perplexity", "loss"),
    }
    return defaults[kind]


def load_tokenizer(
    model_name_or_path: str | Path,
    *,
    gguf_file: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with EOS as the padding where it has none (GPT-2, Llama).

    It needs no add_prefix_space=True for tagging: encode gives each word its space itself.

    Args:
        model_name_or_path: a folder or a hub id.
        gguf_file: a file name in it, for a GGUF model.
        revision: of the hub repository.
        trust_remote_code: whether code from the repository may run.

    Raises:
        ModelError: it cannot be loaded, or has neither a padding nor an EOS token.
    """
    options = _options(gguf_file=gguf_file, revision=revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(model_name_or_path), trust_remote_code=trust_remote_code, **options
        )
    except _LOAD_ERRORS as error:
        raise _not_loaded("tokenizer", model_name_or_path, error) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ModelError(
            f"{str(model_name_or_path)!r} has no vocabulary: no tokenizer.json or the like; "
            "save the tokenizer beside the model"
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(
                f"the tokenizer of {str(model_name_or_path)!r} has neither a pad nor an EOS "
                "token; set pad_token in its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    task: Task,
    model_name_or_path: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    gguf_file: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    dtype: torch.dtype | str | None = None,
) -> PreTrainedModel:
    """The model with the head the task needs; its config holds the task's label names.

    A new regression head that has a bias starts at the mean score of `task.train`.

    Args:
        task: gives the head and its size.
        model_name_or_path: a folder or a hub id.
        tokenizer: what load_tokenizer gave; its padding becomes the model's, which a decoder
            needs to find the last token it classifies by.
        gguf_file: a file name in it, for a GGUF model.
        revision: of the hub repository.
        trust_remote_code: whether code from the repository may run.
        attn_implementation: "sdpa", "eager", ...; default transformers' own choice.
        dtype: of the weights; default transformers' own choice.

    Raises:
        ModelError: it cannot be loaded, or has no such head.
    """
    name = str(model_name_or_path)
    source = _options(gguf_file=gguf_file, revision=revision)
    source["trust_remote_code"] = trust_remote_code
    loading = _options(attn_implementation=attn_implementation, dtype=dtype)
    if gguf_file is not None and hasattr(transformers, "GgufConfig"):
        # Newer releases leave the weights packed where they can, and mark them as no good to train.
        loading["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        config = AutoConfig.from_pretrained(name, **source, **_head(task))
        model, info = _AUTO[task.task_type].from_pretrained(
            name, config=config, output_loading_info=True, **source, **loading
        )
    except _LOAD_ERRORS as error:
        raise _not_loaded(f"model for {task.kind}", model_name_or_path, error) from error
    model.config.pad_token_id = tokenizer.pad_token_id
    if task.kind == "regression" and task.train is not None:
        scores = task.train[str(task.label_column)]
        _start_at(model, sum(scores) / len(scores), set(info["missing_keys"]))
    return model


@torch.no_grad()
def _start_at(model: PreTrainedModel, mean: float, new: set[str]) -> None:
    """Sets the bias of a new regression head to the mean score.

    From zero, the first hundred steps push the factors to make up for the offset, and at LoRA's
    learning rates they seldom come back: every input gets the same score.
    """
    for name, parameter in model.named_parameters():
        if name in new and name.endswith("bias") and parameter.numel() == 1:
            parameter.fill_(mean)


_AUTO: dict[TaskType, Any] = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "CAUSAL_LM": AutoModelForCausalLM,
}
# What transformers raises for a missing, foreign or damaged model, or a package it lacks.
_LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)


def _head(task: Task) -> dict[str, Any]:
    if task.kind == "causal_lm":
        return {}
    if task.kind == "regression":
        return {"num_labels": 1, "problem_type": "regression"}
    names = dict(enumerate(task.label_names or ()))
    return {"id2label": names, "label2id": {name: number for number, name in names.items()}}


def _options(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _not_loaded(what: str, name: str | Path, error: BaseException) -> ModelError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ModelError(
        f"cannot load the {what} from {str(name)!r} ({reason}); "
        "give a folder with config.json and weights, or a hub id"
    )


def encode(
    task: Task, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int = 128
) -> Dataset:
    """Features of a split of the task, one row each, not padded.

    Columns: input_ids and attention_mask, lists of int of the same length, at most max_length;
    token_type_ids if the tokenizer gives them; labels: int (classification), float
    (regression), or a list of int as long as input_ids with -100 where nothing is learned
    (tagging: all but a word's first token; causal_lm: the prompt). For causal_lm, rows with
    nothing to learn are left out and counted in a warning.

    Args:
        task: what the rows are for.
        rows: task.train, task.validation or task.test, or rows like them.
        tokenizer: what load_tokenizer gave.
        max_length: in tokens, special ones included; default 128.

    Raises:
        DataError: max_length does not suit the tokenizer, a column is missing or no row is left.
        ModelError: tagging with a tokenizer that cannot tell words apart.
    """
    _check_length(tokenizer, max_length, pair=len(task.text_columns) == 2)
    for name in (*task.text_columns, *([task.label_column] if task.label_column else [])):
        if name not in rows.column_names:
            raise DataError(
                f"the rows have no column {name!r}, only {', '.join(rows.column_names)}; "
                "encode the splits of load_task"
            )
    if task.label_column is None:
        return causal_lm.encode(rows, tokenizer, task.text_columns, max_length)
    if task.kind == "tagging":
        return tagging.encode(rows, tokenizer, task.text_columns[0], task.label_column, max_length)
    return classification.encode(rows, tokenizer, task.text_columns, task.label_column, max_length)


def _check_length(tokenizer: PreTrainedTokenizerBase, max_length: int, pair: bool) -> None:
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    least = special + (2 if pair else 1)
    if max_length < least:
        raise DataError(
            f"max_length={max_length} leaves no room for text beside {special} special tokens; "
            f"give {least} or more"
        )
    if max_length > tokenizer.model_max_length:
        raise DataError(
            f"max_length={max_length} is more than the {tokenizer.model_max_length} tokens the "
            "model takes; give at most that"
        )


def data_collator(task: Task, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[Any]], Any]:
    """Encoded rows to a batch of tensors (batch, longest); labels are padded with -100."""
    if task.kind == "tagging":
        return tagging.data_collator(tokenizer)
    if task.kind == "causal_lm":
        return causal_lm.data_collator(tokenizer)
    return classification.data_collator(tokenizer)


def check_metrics(task: Task) -> None:
    """Call before long work.

    Raises:
        RankwiseError: a package that the task's metrics need is not installed.
    """
    packages = {
        "classification": "sklearn",
        "regression": "scipy",
        "tagging": "seqeval",
        "causal_lm": None,
    }
    package = packages[task.kind]
    try:
        if package is not None:
            importlib.import_module(package)
    except ImportError as error:
        raise RankwiseError(
            f"{', '.join(task.metrics)} of {task.name} need {package}, which is not installed; "
            "run: pip install 'rankwise[metrics]'"
        ) from error


def compute_metrics(task: Task) -> Metrics:
    """Trainer's compute_metrics: predictions to the task's metrics by name (no "eval_").

    Correlations lie in [-1, 1], perplexity from 1 up, loss is in nats a token, the others lie in
    [0, 1]. For causal_lm it needs preprocess_logits in the trainer, and its loss replaces
    Trainer's eval_loss: the exact mean over tokens instead of a mean of batch means.

    Raises:
        RankwiseError: as check_metrics.
    """
    check_metrics(task)
    if task.kind == "tagging":
        return tagging.compute_metrics(task.metrics, task.label_names or ())
    if task.kind == "causal_lm":
        return causal_lm.compute_metrics(task.metrics)
    if task.kind == "regression":
        return classification.compute_correlations(task.metrics)
    return classification.compute_metrics(task.metrics, len(task.label_names or ()))


def preprocess_logits(task: Task) -> Callable[[Any, torch.Tensor], torch.Tensor] | None:
    """Trainer's preprocess_logits_for_metrics for the task; None where it needs none.

    For causal_lm it reduces logits (batch, seq, vocabulary) to (batch, 2): see causal_lm.py.
    """
    return causal_lm.preprocess_logits if task.kind == "causal_lm" else None
