"""Which columns hold the text and the label, and which kind of task they make."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rankwise.errors import DataError
from rankwise.tasks.checks import Rows, check_column, parse_numbers
from rankwise.tasks.kinds import find_kind

logger = logging.getLogger(__name__)

_LABEL_COLUMNS = ("label", "labels")
_TAG_COLUMNS = ("ner_tags", "tags", "labels")
_TEXT_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question1", "question2"),
    ("text",),
    ("sentence",),
)


@dataclass(frozen=True)
class Columns:
    """What to read from the rows and what is predicted from it."""

    kind: str
    text: tuple[str, ...]
    label: str | None


def choose_columns(
    rows: Rows,
    text_column: str | Sequence[str] | None = None,
    label_column: str | None = None,
    kind: str | None = None,
    split: str = "train",
) -> Columns:
    """The columns as given; what is not given is inferred from names and first values.

    Raises:
        DataError: no such kind; a column is not there, or cannot be told without being given.
    """
    if kind is not None:
        find_kind(kind)
    if kind == "chat" or (kind is None and rows.keys() & {"messages", "conversations"}):
        return Columns("chat", ("messages",), None)
    given = (text_column,) if isinstance(text_column, str) else tuple(text_column or ())
    text = given or _guess_text(rows, label_column, kind)
    for name in (*text, *([label_column] if label_column else [])):
        check_column(rows, name, split)
    if kind is None:
        kind = _guess_kind(rows, text, label_column)
    of = find_kind(kind)
    if len(text) > of.most_texts:
        most = "one text column" if of.most_texts == 1 else "one or two text columns"
        raise DataError(f"{kind} takes {most}, found {', '.join(text)}; leave out the others")
    if not of.labelled:
        return Columns(kind, text, None)
    label = label_column or _guess_label(rows, text)
    if label is None:
        raise DataError(
            f"no label column among {', '.join(rows)}; give label_column=, or kind='causal_lm' "
            "to learn the text itself"
        )
    if label in text:
        raise DataError(f"column {label!r} is both text and label; give two different columns")
    return Columns(kind, text, label)


def _guess_text(rows: Rows, label_column: str | None, kind: str | None) -> tuple[str, ...]:
    prompted = {"prompt", "completion"} <= rows.keys() and label_column is None
    if kind in (None, "causal_lm") and prompted:
        return ("prompt", "completion")
    if kind in (None, "tagging") and "tokens" in rows and _is_listed(rows["tokens"]):
        return ("tokens",)
    for names in _TEXT_PAIRS:
        if set(names) <= rows.keys() and label_column not in names:
            return names
    others = [name for name in rows if name not in (label_column, *_LABEL_COLUMNS)]
    others = [name for name in others if isinstance(_first(rows[name]), str)]
    if len(others) == 1:
        return (others[0],)
    raise DataError(
        f"cannot tell the text column among {', '.join(rows)}; give text_column= (one or two names)"
    )


def _guess_kind(rows: Rows, text: tuple[str, ...], label_column: str | None) -> str:
    if _is_listed(rows[text[0]]):
        return "tagging"
    label = label_column or _guess_label(rows, text)
    if label is None and text in (("text",), ("prompt", "completion")):
        if rows.keys() > set(text):
            logger.warning(
                "no label column among %s: %s is learned as a text, by a language model; else "
                "give --label_column",
                *(", ".join(rows), " and ".join(text)),
            )
        return "causal_lm"
    if label is None or label not in rows:
        return "classification"
    values = parse_numbers(rows[label])
    if any(isinstance(value, float) and not value.is_integer() for value in values):
        return "regression"
    return "classification"


def _guess_label(rows: Rows, text: tuple[str, ...]) -> str | None:
    names = _TAG_COLUMNS if _is_listed(rows[text[0]]) else _LABEL_COLUMNS
    return next((name for name in names if name in rows and name not in text), None)


def _is_listed(values: list[Any]) -> bool:
    return isinstance(_first(values), list)


def _first(values: list[Any]) -> Any:
    return next((value for value in values if value is not None), None)
