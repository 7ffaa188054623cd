"""What every row needs: its column, a text that is one, a label that is there."""

from __future__ import annotations

import math
import re
from typing import Any

from rankwise.errors import DataError

# One split: column name -> one value a row. Labels may still be of any type.
Rows = dict[str, list[Any]]

_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")


def check_column(rows: Rows, name: str, split: str) -> None:
    """Raises DataError, naming the columns there are, when the column is missing."""
    if name not in rows:
        raise DataError(
            f"{split} has no column {name!r}; its columns are {', '.join(rows)}: "
            "give text_column= and label_column="
        )


def check_texts(rows: Rows, column: str, split: str) -> None:
    """Raises DataError, naming the row, when a text is missing or not a string."""
    check_column(rows, column, split)
    for number, value in enumerate(rows[column], 1):
        if isinstance(value, str):
            continue
        found = "empty" if value is None else f"of type {type(value).__name__}"
        advice = "; for lists of tokens use kind='tagging'" if isinstance(value, list) else ""
        raise DataError(
            f"{split} row {number}: {column!r} is {found}, not a text; "
            f"mend or leave out the row{advice}"
        )


def check_given(values: list[Any], column: str, split: str) -> None:
    """Raises DataError, naming the first row and how many, when labels are missing."""
    missing = [number for number, value in enumerate(values, 1) if is_missing(value)]
    if missing:
        raise DataError(
            f"{split} row {missing[0]}: {column!r} is empty ({len(missing)} of {len(values)} "
            "rows); label or leave out such rows"
        )


def is_missing(value: Any) -> bool:
    """None, a blank string or NaN."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def parse_numbers(values: list[Any]) -> list[Any]:
    """Labels as numbers where every one that is there reads as a number; else as they are.

    CSV holds only strings, so "1" there and 1 elsewhere must be the same label.
    """
    there = [value for value in values if not is_missing(value)]
    if not all(isinstance(value, str) and _NUMBER.fullmatch(value.strip()) for value in there):
        return values
    return [None if is_missing(value) else _number(value.strip()) for value in values]


def _number(text: str) -> int | float:
    return int(text) if text.lstrip("-").isdigit() else float(text)
