"""Result records of comparisons that never ran, as files hold them."""

import json
from pathlib import Path
from typing import Any

from rankwise.result import SCHEMA

MODULES = [f"bert.layer.{layer}.{name}" for layer in range(2) for name in ("query", "value")]
HOSTILE = 'a</td><script>document.title="run"</script><img src=x onerror=alert(1)> $x_1$ | `&` "b"'


def record(
    label: str,
    task: str,
    seed: int,
    value: float,
    *,
    metric: str = "accuracy",
    kind: str = "LoRA",
    ranks: Any = 4,
    parameters: int = 1000,
    seconds: tuple[float, float] = (0.0, 10.0),
    claim: str = "",
    size_of: str | None = None,
    held_out: float | None = None,
    floor: float | None = 0.5,
    rows: int = 1000,
    about: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One cell's file: a method (`label`) on a task with a seed that scored `value`."""
    known = None if ranks is None else dict.fromkeys(MODULES, ranks)
    spec = {"task": {"label": task}, "method": {"label": label}}
    spec |= {"size_of": size_of, "held_out": held_out}
    return {
        "schema": SCHEMA,
        "name": label,
        "method": {"name": kind},
        "claim": claim,
        "task": {"name": task, "kind": "classification", "metrics": [metric]},
        "model": "tiny",
        "rows": {"train": 100, "held_out": 0, "evaluated": rows},
        "split": "test",
        "training": {"seed": seed, "learning_rate": 1e-3},
        "metrics": {"loss": 0.5, metric: value},
        "trainable_parameters": parameters + 10,
        "lora_parameters": None if ranks is None else parameters,
        "ranks": dict(zip(MODULES, ranks, strict=True)) if isinstance(ranks, tuple) else known,
        "cost": {"search_seconds": seconds[0], "train_seconds": seconds[1], "steps": 5},
        "curve": None,
        "figures": {},
        "about": {
            "threads": 1,
            "resumed": False,
            "versions": {"rankwise": "0.1.0"},
            "cell": {"name": f"{task}-{label}-{seed}", "recipe": "r.yaml", "spec": spec},
            "judged": {"0.001": 0.8, "0.01": 0.7},
            "floor": {} if floor is None else {metric: floor},
            "machine": {"processor": "P", "cores": 2, "gpu": None, "workers": 1},
            **(about or {}),
        },
        "resampled": [],
        "verdict": "",
        "controls": [],
    }


def write(folder: Path, records: list[dict[str, Any]]) -> Path:
    """Writes each as a file of its own, as `compare` does."""
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    for number, raw in enumerate(records):
        (folder / "cells" / f"{number}.json").write_text(json.dumps(raw))
    return folder
