"""Rows in two parts, drawn with a seed, and the fingerprint that says which rows they were."""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from typing import Any
from weakref import WeakKeyDictionary

from rankwise.errors import DataError


@dataclass(frozen=True)
class TwoSets:
    """D_tr and D_val."""

    train: Any
    validation: Any


def two_sets(train: Any, validation: Any, fraction: float, seed: int) -> TwoSets:
    """D_tr and D_val: as given, or `train` cut in two by a seeded permutation.

    Args:
        train: rows with a length and an index.
        validation: D_val where it is given, else None.
        fraction: share of `train` that becomes D_val.
        seed: of the permutation.

    Raises:
        DataError: an empty split, or rows that cannot be counted.
    """
    for name, rows in (("train_dataset", train), ("validation_dataset", validation)):
        if isinstance(rows, str | bytes):
            raise DataError(f"{name} is a text; give rows, and a file to rankwise.fit")
        if isinstance(rows, dict):
            raise DataError(f"{name} holds the splits {', '.join(rows)}; give one of them")
        if rows is not None and not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
            raise DataError(
                f"{name} is a {type(rows).__name__}, which has no length or index; load it whole "
                "(streaming=False)"
            )
    if len(train) == 0:
        raise DataError("train_dataset has no rows")
    if validation is not None:
        if len(validation) == 0:
            raise DataError("validation_dataset has no rows; leave it out to split train_dataset")
        return TwoSets(train, validation)
    if not 0 < fraction < 1:
        raise DataError(f"validation_fraction is {fraction}; it has to lie between 0 and 1")
    cut = round(len(train) * (1 - fraction))
    if cut == 0 or cut == len(train):
        empty = "training" if cut == 0 else "validation"
        raise DataError(
            f"the {empty} split would be empty: {len(train)} rows at validation_fraction "
            f"{fraction}; give more rows or another fraction"
        )
    return hold_out(train, len(train) - cut, seed)


def hold_out(rows: Any, count: int, seed: int) -> TwoSets:
    """`rows` cut in two by a seeded permutation: every split that rankwise draws is drawn here.

    Args:
        rows: a `datasets.Dataset`, or any dataset with a length and an index.
        count: how many rows to hold out, as `validation`; the others are `train`.
        seed: of the permutation.

    Example:
        >>> parts = hold_out(rows, 100, seed=0)
        >>> len(parts.train), len(parts.validation)
        (900, 100)
    """
    import numpy as np

    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    kept = len(rows) - count
    return TwoSets(_select(rows, order[:kept]), _select(rows, order[kept:]))


def _select(dataset: Any, rows: list[int]) -> Any:
    from datasets import Dataset
    from torch.utils.data import Subset

    return dataset.select(rows) if isinstance(dataset, Dataset) else Subset(dataset, rows)


# A run asks for those of the same rows in every stage and arm. A `datasets.Dataset` never changes.
_known: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def fingerprint(dataset: Any) -> str | None:
    """sha256 over the rows of a `datasets.Dataset`, in order; None for any other dataset."""
    from datasets import Dataset

    if not isinstance(dataset, Dataset):
        return None
    if dataset not in _known:
        digest = sha256()
        for row in dataset.with_format(None):
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        _known[dataset] = digest.hexdigest()
    return _known[dataset]
