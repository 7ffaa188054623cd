"""Held-out rows of any Trainer (TRL's too) as the batches that an order looks at.

Prepared as the trainer prepared them, with its collator, and the loss of its kind of model.
"""

import inspect
from collections.abc import Mapping
from dataclasses import is_dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer

from rankwise.errors import DataError

IGNORED = -100


def batches_of(
    trainer: Trainer, rows: Any = None, limit: int | None = None
) -> list[dict[str, Any]]:
    """Held-out rows of a trainer as batches with labels, each process all of them.

    Documents that were packed into one row, or are collated without padding, become rows of their
    own again, since an order tells pieces apart row by row. A preference trainer's batch is
    its two completions; their labels are the completions' tokens. A reward model's rows get none:
    its order keeps the rewards themselves.

    Args:
        trainer: any transformers.Trainer, TRL's among them.
        rows: prepared as the trainer's own; None is its `eval_dataset`.
        limit: at most so many rows, the first ones.

    Raises:
        DataError: no held-out rows, several sets of them, or a trainer that makes its rows while it
            trains (GRPO).
    """
    rows = trainer.eval_dataset if rows is None else rows
    if rows is None:
        raise DataError(
            f"the {type(trainer).__name__} has no eval_dataset; give it some held-out rows, or "
            "rankwise.order(model, batches)"
        )
    if isinstance(rows, dict):
        raise DataError(f"eval_dataset holds the sets {', '.join(rows)}; give order() one of them")
    if hasattr(trainer, "reward_funcs"):
        raise DataError(
            f"{type(trainer).__name__} makes its rows while it trains; order by rows with "
            "completions: rankwise.order(trainer.model, batches)"
        )
    collate: Any = trainer.data_collator
    if getattr(collate, "padding_free", False) and is_dataclass(collate):
        collate = replace(collate, padding_free=False)  # type: ignore[type-var]
    rows = documents(rows)
    if limit is not None and len(rows) > limit:
        rows = rows.select(range(limit)) if isinstance(rows, Dataset) else _first(rows, limit)
    if isinstance(rows, Dataset):
        rows = trainer._remove_unused_columns(rows, description="ordering")
    else:
        collate = trainer._get_collator_with_removed_columns(collate, description="ordering")
    loader = DataLoader(rows, trainer.args.per_device_eval_batch_size, collate_fn=collate)
    model = trainer.accelerator.unwrap_model(trainer.model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = set(inspect.signature(base.forward).parameters) | {"labels"}
    config = getattr(model, "config", None)
    return [{k: v for k, v in labelled(b, config).items() if k in known} for b in loader]


def _first(rows: Any, limit: int) -> Any:
    return torch.utils.data.Subset(rows, range(limit))


def documents(rows: Any) -> Any:
    """A row for each document of packed rows; rows that are not packed as they are."""
    if not isinstance(rows, Dataset) or "seq_lengths" not in rows.column_names:
        return rows
    columns = [name for name in ("input_ids", "labels", "attention_mask") if name in rows.features]
    found: dict[str, list[list[int]]] = {name: [] for name in columns}
    for row in rows:
        start = 0
        for length in row["seq_lengths"]:
            for name in columns:
                found[name].append(row[name][start : start + length])
            start += length
    return Dataset.from_dict(found)


def labelled(batch: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """A batch with labels: a preference trainer's rows say where their completions are instead."""
    found = dict(batch)
    if found.get("labels") is None and isinstance(mask := found.get("completion_mask"), Tensor):
        found["labels"] = found["input_ids"].masked_fill(mask == 0, IGNORED)
    elif found.get("labels") is None and getattr(config, "num_labels", None) == 1:
        found["labels"] = torch.zeros(len(found["input_ids"]))
    return found
