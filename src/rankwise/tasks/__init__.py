"""Tasks: rows in, features and metrics out. One kind of task is one class in one file."""

from __future__ import annotations

from rankwise.tasks.base import Task
from rankwise.tasks.causal_lm import CausalLM
from rankwise.tasks.chat import Chat
from rankwise.tasks.classification import Classification
from rankwise.tasks.generation import Generation
from rankwise.tasks.kinds import KINDS, from_description
from rankwise.tasks.known import KNOWN
from rankwise.tasks.load import load_task
from rankwise.tasks.metrics import METRICS, Metric
from rankwise.tasks.models import load_config, load_model, load_tokenizer
from rankwise.tasks.regression import Regression
from rankwise.tasks.tagging import Tagging

__all__ = [
    "KINDS",
    "KNOWN",
    "METRICS",
    "CausalLM",
    "Chat",
    "Classification",
    "Generation",
    "Metric",
    "Regression",
    "Tagging",
    "Task",
    "from_description",
    "load_config",
    "load_model",
    "load_task",
    "load_tokenizer",
]
