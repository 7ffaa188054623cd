"""Under which conditions results came about: rows, epochs, model; those of others stay apart."""

from collections.abc import Mapping, Sequence
from typing import Any

from rankwise.compare.cells import digest
from rankwise.result import Result

# Of a run's training, what a method may have of its own, or what no figure hangs on.
_FREE = set("learning_rate seed save_steps per_device_eval_batch_size use_cpu bf16".split())
_SHOWN = 3  # differences in a name; more only make it long

Condition = Mapping[str, Any]


def of_task(result: Result, head: Result, spec: Mapping[str, Any]) -> Condition:
    """What a task's figures hang on beside the method.

    Args:
        result: one of a file.
        head: the file's own; its controls were trained on the rows that it was trained on.
        spec: of the cell; empty for a run.
    """
    found: dict[str, Any] = {
        "model": result.model,
        "split": result.split,
        "evaluated rows": result.rows.get("evaluated"),
    }
    if not spec:
        training = {k: v for k, v in result.training.items() if k not in _FREE}
        return {**found, "training rows": head.rows.get("train"), **training}
    task, training = spec.get("task", {}), spec.get("training") or {}
    found |= {k: v for k, v in task.items() if k not in ("label", "files")}
    found |= {k: v for k, v in training.items() if k not in _FREE}
    rows = {"files": task.get("files"), "drawn with": spec.get("data_seed")}
    return {**found, "rows": digest(rows), "weights": digest(spec.get("model") or {})}


def of_method(spec: Mapping[str, Any]) -> Condition:
    """A method's flags, and the rates that were tried; nothing for a run, where its task's size
    may stand among the flags."""
    found = {k: v for k, v in spec.get("method", {}).items() if k != "label"}
    return found | ({"rates": spec["rates"]} if "rates" in spec else {})


def apart(names: Sequence[str], conditions: Sequence[Condition]) -> tuple[list[str], list[str]]:
    """Names that are the same for the same conditions alone, and a line for each that was split.

    Args:
        names: of tasks or methods, one a result.
        conditions: of each result.

    Example:
        >>> apart(["rte", "rte"], [{"epochs": 1}, {"epochs": 3}])[0]
        ['rte (epochs 1)', 'rte (epochs 3)']
    """
    groups: dict[str, list[Condition]] = {}
    for name, condition in zip(names, conditions, strict=True):
        if condition not in groups.setdefault(name, []):
            groups[name].append(condition)
    said, renamed = [], {}
    for name, found in groups.items():
        keys = list(dict.fromkeys(key for one in found for key in one))
        differ = [k for k in keys if any(one.get(k) != found[0].get(k) for one in found)]
        if len(found) == 1:
            continue
        shown = ", ".join(differ[:_SHOWN]) + (", ..." if len(differ) > _SHOWN else "")
        said.append(f"{name} stands for {len(found)} settings, kept apart; they differ in {shown}")
        renamed[name] = _told_apart(name, found, differ[:_SHOWN])
    return [
        renamed[name][groups[name].index(condition)] if name in renamed else name
        for name, condition in zip(names, conditions, strict=True)
    ], said


def _told_apart(name: str, found: Sequence[Condition], keys: Sequence[str]) -> list[str]:
    labels: list[str] = []
    for one in found:
        values = [f"{k} {one[k]}" if one.get(k) is not None else f"no {k}" for k in keys]
        label = f"{name} ({', '.join(values)})"
        # where the keys that are shown are not all that differ
        labels.append(label if label not in labels else f"{label} {len(labels) + 1}")
    return labels
