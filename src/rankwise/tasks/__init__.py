"""Tasks: rows in, features and metrics out. One kind of task is one class in one file."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rankwise.tasks.base import Task
from rankwise.tasks.causal_lm import CausalLM
from rankwise.tasks.classification import Classification
from rankwise.tasks.kinds import KINDS, from_description
from rankwise.tasks.known import KNOWN
from rankwise.tasks.load import load_task
from rankwise.tasks.metrics import METRICS, Metric
from rankwise.tasks.models import load_model, load_tokenizer
from rankwise.tasks.regression import Regression
from rankwise.tasks.tagging import Tagging

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import EvalPrediction, PreTrainedTokenizerBase

__all__ = [
    "KINDS",
    "KNOWN",
    "METRICS",
    "CausalLM",
    "Classification",
    "Metric",
    "Regression",
    "Tagging",
    "Task",
    "check_metrics",
    "compute_metrics",
    "data_collator",
    "encode",
    "from_description",
    "load_model",
    "load_task",
    "load_tokenizer",
    "preprocess_logits",
]

# From here to the end of the file: the methods of Task as functions, for callers that are still to
# move. To be deleted in one go, with their names above and the imports only they use.


def encode(
    task: Task, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int = 128
) -> Dataset:
    """See Task.encode."""
    return task.encode(rows, tokenizer, max_length)


def data_collator(task: Task, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[Any]], Any]:
    """See Task.data_collator."""
    return task.data_collator(tokenizer)


def compute_metrics(task: Task) -> Callable[[EvalPrediction], dict[str, float]]:
    """See Task.compute_metrics."""
    return task.compute_metrics()


def check_metrics(task: Task) -> None:
    """See Task.check_metrics."""
    task.check_metrics()


def preprocess_logits(task: Task) -> Callable[[Any, torch.Tensor], torch.Tensor] | None:
    """See Task.preprocess_logits."""
    return task.preprocess_logits
