"""One text or a pair of them with one label a row: what classification and regression share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rankwise.errors import DataError
from rankwise.tasks.checks import Rows, check_column, check_given, parse_numbers

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from transformers import PreTrainedTokenizerBase


def read_labels(rows: Rows, label: str, split: str) -> list[Any]:
    """The labels of a split, as numbers where all of them read as numbers.

    Raises:
        DataError: the column or a label is missing.
    """
    check_column(rows, label, split)
    values = parse_numbers(rows[label])
    check_given(values, label, split)
    return values


def text_features(text_columns: Sequence[str], label: str, label_type: str) -> Features:
    """The columns of a split: strings, and a label of the type that `datasets` calls so."""
    from datasets import Features, Value

    return Features({**{name: Value("string") for name in text_columns}, label: Value(label_type)})


def check_two_labels(rows: Dataset, label: str, names: Sequence[str] | None) -> None:
    """Raises DataError when all labels to train on are the same."""
    values = set(rows[:][label])
    if len(values) < 2:
        only = next(iter(values))
        raise DataError(
            f"all {len(rows)} train rows have the {label!r} {names[only] if names else only}, so "
            "there is nothing to learn; give rows with two labels or more"
        )


def encode_texts(
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


def pad_texts(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[Any]], Any]:
    """Pads a batch to its longest row."""
    from transformers import DataCollatorWithPadding

    return DataCollatorWithPadding(tokenizer)
