"""Classification and regression: labels to numbers, features and metrics."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value
from transformers import DataCollatorWithPadding, EvalPrediction, PreTrainedTokenizerBase

from rankwise.errors import DataError
from rankwise.tasks import checks
from rankwise.tasks.checks import Rows


def number_classes(
    splits: dict[str, Rows], label: str, label_names: Sequence[str] | None
) -> tuple[dict[str, Rows], tuple[str, ...]]:
    """The splits with class numbers as labels, and the class names in their order.

    Without label_names the classes are those of train: sorted, numbers by value.

    Raises:
        DataError: a label is missing, a list, a fraction or not one of the classes.
    """
    values = {split: _class_values(rows, label, split) for split, rows in splits.items()}
    if label_names is None:
        if "train" not in values:
            raise DataError("the classes are unknown without train rows; give label_names=")
        order = sorted(set(values["train"]), key=lambda v: (isinstance(v, str), v))
        names = tuple(str(value) for value in order)
    else:
        names = tuple(label_names)
    numbered = {
        split: {**rows, label: _numbers(values[split], names, split, label_names is None)}
        for split, rows in splits.items()
    }
    return numbered, names


def _class_values(rows: Rows, label: str, split: str) -> list[Any]:
    checks.check_column(rows, label, split)
    values = checks.parse_numbers(rows[label])
    checks.check_given(values, label, split)
    return [_class_value(value, label, split, n) for n, value in enumerate(values, 1)]


def _class_value(value: Any, label: str, split: str, row: int) -> int | str:
    if isinstance(value, (list, dict)):
        raise DataError(
            f"{split} row {row}: {label!r} is a {type(value).__name__}; give one label a row, or "
            "kind='tagging' with a text column of token lists"
        )
    if isinstance(value, float):
        if not value.is_integer():
            raise DataError(
                f"{split} row {row}: {label!r} is {value}, not a class; use kind='regression'"
            )
        return int(value)
    # bool before int: True is an int too, but its name is "True".
    return value if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _numbers(values: list[Any], names: tuple[str, ...], split: str, from_train: bool) -> list[int]:
    # Whole numbers are class numbers only under given names such as "entailment". Names that are
    # numbers themselves ("1", "2", "3") are matched as names: class 0 there is the label 1.
    named = not from_train and not any(re.fullmatch(r"-?\d+", name) for name in names)
    if named and all(isinstance(value, int) for value in values):
        index: dict[Any, int] = {number: number for number in range(len(names))}
    else:
        values = [str(value) for value in values]
        index = {name: number for number, name in enumerate(names)}
    unknown = sorted({str(value) for value in values if value not in index})
    if unknown:
        known = "the labels in train" if from_train else "label_names"
        raise DataError(
            f"{split} has labels that are not among {known} ({', '.join(names[:20])}): "
            f"{', '.join(unknown[:10])}; correct them or give label_names= with all classes"
        )
    return [index[value] for value in values]


def check_scores(splits: dict[str, Rows], label: str) -> dict[str, Rows]:
    """The splits with floats as labels.

    Raises:
        DataError: a label is missing or not a finite number.
    """
    return {split: {**rows, label: _scores(rows, label, split)} for split, rows in splits.items()}


def _scores(rows: Rows, label: str, split: str) -> list[float]:
    checks.check_column(rows, label, split)
    values = checks.parse_numbers(rows[label])
    checks.check_given(values, label, split)
    for row, value in enumerate(values, 1):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not np.isfinite(value):
            raise DataError(
                f"{split} row {row}: {label!r} is {value!r}, not a finite number; "
                "correct it or use kind='classification'"
            )
    return [float(value) for value in values]


def check_varied(rows: Dataset, label: str, names: Sequence[str] | None) -> None:
    """Raises DataError when all labels to train on are the same."""
    values = set(rows[:][label])
    if len(values) < 2:
        only = next(iter(values))
        raise DataError(
            f"all {len(rows)} train rows have the {label!r} {names[only] if names else only}, so "
            "there is nothing to learn; give rows with two labels or more"
        )


def features(text_columns: Sequence[str], label: str, regression: bool) -> Features:
    """The columns of a split."""
    label_type = Value("float32") if regression else Value("int64")
    return Features({**{name: Value("string") for name in text_columns}, label: label_type})


def encode(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    text_columns: Sequence[str],
    label: str,
    max_length: int,
) -> Dataset:
    """Token ids of one text or of a pair (cut from the longer one), and the label."""

    def batch_features(batch: dict[str, list[Any]]) -> dict[str, Any]:
        texts = [batch[name] for name in text_columns]
        return {
            **tokenizer(*texts, truncation=True, max_length=max_length),
            "labels": batch[label],
        }

    return rows.map(batch_features, batched=True, remove_columns=rows.column_names)


def data_collator(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[Any]], Any]:
    """Pads a batch to its longest row."""
    return DataCollatorWithPadding(tokenizer)


def compute_metrics(
    metrics: Sequence[str], num_labels: int
) -> Callable[[EvalPrediction], dict[str, float]]:
    """accuracy, f1 and matthews_correlation of logits (rows, num_labels).

    f1 is that of class 1 with two classes (as GLUE has it), else the mean over classes.
    All lie in [0, 1] but matthews_correlation, in [-1, 1].
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    average = "binary" if num_labels == 2 else "macro"
    functions: dict[str, Callable[[Any, Any], Any]] = {
        "accuracy": accuracy_score,
        "f1": lambda y, p: f1_score(y, p, average=average, zero_division=0),
        "matthews_correlation": matthews_corrcoef,
    }

    def measure(output: EvalPrediction) -> dict[str, float]:
        predicted = first_output(output).argmax(axis=-1)
        return {name: float(functions[name](output.label_ids, predicted)) for name in metrics}

    return measure


def compute_correlations(
    metrics: Sequence[str],
) -> Callable[[EvalPrediction], dict[str, float]]:
    """pearson and spearman of scores (rows, 1), in [-1, 1].

    0.0 when all scores or all labels are equal, where a correlation is not defined.
    """
    from scipy.stats import pearsonr, spearmanr

    functions: dict[str, Callable[[Any, Any], Any]] = {"pearson": pearsonr, "spearman": spearmanr}

    def measure(output: EvalPrediction) -> dict[str, float]:
        predicted = np.asarray(first_output(output), dtype=np.float64).reshape(-1)
        labels = np.asarray(output.label_ids, dtype=np.float64).reshape(-1)
        if np.ptp(predicted) == 0 or np.ptp(labels) == 0:
            return dict.fromkeys(metrics, 0.0)
        return {name: float(functions[name](predicted, labels)[0]) for name in metrics}

    return measure


def first_output(output: EvalPrediction) -> np.ndarray:
    """The logits; some models hand back hidden states after them."""
    predictions = output.predictions
    return predictions[0] if isinstance(predictions, tuple) else predictions
