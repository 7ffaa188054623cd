"""The kinds of task by name: a new kind is a file with its class, and its class named here."""

from __future__ import annotations

from typing import Any

from rankwise.errors import DataError
from rankwise.tasks.base import Task
from rankwise.tasks.causal_lm import CausalLM
from rankwise.tasks.chat import Chat
from rankwise.tasks.classification import Classification
from rankwise.tasks.generation import Generation
from rankwise.tasks.regression import Regression
from rankwise.tasks.tagging import Tagging

KINDS: dict[str, type[Task]] = {
    kind.kind: kind for kind in (Classification, Regression, Tagging, CausalLM, Generation, Chat)
}


def find_kind(name: str) -> type[Task]:
    """The class of a kind.

    Raises:
        DataError: no such kind.
    """
    if name not in KINDS:
        raise DataError(f"unknown kind {name!r}; choose one of {', '.join(KINDS)}")
    return KINDS[name]


def from_description(description: dict[str, Any]) -> Task:
    """The task that Task.describe() wrote down, without rows.

    Raises:
        DataError: an entry is missing or the kind is unknown.
    """
    entries = ("name", "kind", "text_columns", "label_column", "label_names", "metrics")
    missing = [entry for entry in entries if entry not in description]
    if missing:
        raise DataError(
            f"the task description lacks {', '.join(missing)}; use one written by Task.describe()"
        )
    names = description["label_names"]
    return find_kind(description["kind"])(
        name=description["name"],
        text_columns=tuple(description["text_columns"]),
        label_column=description["label_column"],
        label_names=None if names is None else tuple(names),
        metrics=tuple(description["metrics"]),
    )
