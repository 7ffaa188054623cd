"""Tasks: rows in, features and metrics out."""

from rankwise.tasks.task import (
    Task,
    check_metrics,
    compute_metrics,
    data_collator,
    encode,
    load_model,
    load_task,
    load_tokenizer,
    preprocess_logits,
)

__all__ = [
    "Task",
    "check_metrics",
    "compute_metrics",
    "data_collator",
    "encode",
    "load_model",
    "load_task",
    "load_tokenizer",
    "preprocess_logits",
]
