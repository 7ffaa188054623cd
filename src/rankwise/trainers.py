"""Trainers of other libraries (TRL's): their rows as batches to order by, and the cut at their end.

`rankwise.order(trainer)` takes what a trainer has: its held-out rows, prepared as it prepared them,
its collator, and the loss of its kind of model.
"""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from rankwise.errors import AdapterError, DataError
from rankwise.files import replace_folder

if TYPE_CHECKING:
    from rankwise.orders import Ordered

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
    labelled = (_labelled(batch, getattr(model, "config", None)) for batch in loader)
    return [{k: v for k, v in batch.items() if k in known} for batch in labelled]


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


def _labelled(batch: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """A batch with labels: a preference trainer's rows say where their completions are instead."""
    found = dict(batch)
    if found.get("labels") is None and isinstance(mask := found.get("completion_mask"), Tensor):
        found["labels"] = found["input_ids"].masked_fill(mask == 0, IGNORED)
    elif found.get("labels") is None and getattr(config, "num_labels", None) == 1:
        found["labels"] = torch.zeros(len(found["input_ids"]))
    return found


class CutAtEnd(TrainerCallback):
    """At the end of a training, orders the adapter by held-out rows and cuts it to a size.

    Writes into the training's output folder `ordered/`, from which `rankwise cut` makes every other
    size, and `cut/`, a stock PEFT adapter. The trained adapter stays as it is. For tools that take
    a callback by its class path: `rankwise.trainers.CutAtEnd`.

    Args:
        trainer: whose held-out rows order. None takes the batches that the last evaluation of the
            training saw, so there has to have been one.
        keep, budget, rank: the size, as `Ordered.cut` takes it; keep = 1/4 where none is given.
        rows: at most so many rows order.

    Example:
        >>> trainer.add_callback(rankwise.trainers.CutAtEnd(trainer, keep=1 / 16))
        >>> trainer.train()
    """

    def __init__(
        self,
        trainer: Trainer | None = None,
        *,
        keep: float | None = None,
        budget: int | None = None,
        rank: int | None = None,
        rows: int = 400,
    ):
        size = {"keep": keep, "budget": budget, "rank": rank}
        self.size: dict[str, Any] = {k: v for k, v in size.items() if v is not None}
        if len(self.size) > 1:
            raise AdapterError("give one of keep, budget and rank")
        self.size = self.size or {"keep": 0.25}
        self.trainer, self.rows = trainer, rows

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from rankwise.orders import order

        model = kwargs["model"]
        if self.trainer is not None:
            ordered = order(self.trainer, batches_of(self.trainer, limit=self.rows), seed=args.seed)
        elif (loader := kwargs.get("eval_dataloader")) is not None:
            ordered = order(model, _some(loader, self.rows), seed=args.seed)
        else:
            raise DataError(
                "CutAtEnd saw no held-out rows: set eval_dataset and eval_strategy, or give it the "
                "trainer"
            )
        if state.is_world_process_zero:
            save_cut(ordered, Path(args.output_dir), **self.size)


def _some(batches: Iterable[Any], rows: int) -> list[dict[str, Any]]:
    """The first batches of a loader that hold so many rows."""
    found: list[dict[str, Any]] = []
    count = 0
    for batch in batches:
        if count >= rows:
            break
        found.append(_labelled(batch, None))
        count += len(found[-1]["input_ids"])
    return found


def save_cut(ordered: "Ordered", folder: Path, **size: Any) -> None:
    """Writes `ordered/` and `cut/` into a folder, in place of those of an earlier training."""
    work = folder / ".cutting"
    ordered.save(work / "ordered")
    ordered.cut(**size).save(work / "cut")
    for name in ("ordered", "cut"):
        replace_folder(work / name, folder / name)
    work.rmdir()
