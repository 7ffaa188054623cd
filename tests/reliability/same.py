"""Whether two finished folders are the same, but for seconds, memory and the word "resumed"."""

import json
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

VARIES = {
    "search_seconds",
    "train_seconds",
    "seconds",
    "peak_memory_bytes",
    "search_peak_memory_bytes",
    "resumed",
}


def difference(ours: Path, theirs: Path) -> str:
    """The first thing that differs, in words; "" for the same folders."""
    if not ours.is_dir():
        return f"no {ours.name}"
    here, there = names(ours), names(theirs)
    if here != there:
        return f"files differ: {sorted(set(here) ^ set(there))}"
    for name in here:
        a, b = ours / name, theirs / name
        if name == ".rankwise":
            continue
        if name.endswith(".json"):
            one, other = (without(json.loads(path.read_text())) for path in (a, b))
            if one != other:
                return f"{name} differs"
        elif name.endswith(".safetensors"):
            one, other = load_file(a), load_file(b)
            if one.keys() != other.keys():
                return f"{name} has other tensors"
            odd = [n for n in one if one[n].tobytes() != other[n].tobytes()]
            if odd:
                return f"{name}: {len(odd)} of {len(one)} tensors differ"
        elif name.endswith((".md", ".jsonl")) and a.read_text() != b.read_text():
            return f"{name} differs"
    return ""


def names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def without(value: Any) -> Any:
    """JSON without what differs from run to run."""
    if isinstance(value, dict):
        return {k: without(v) for k, v in value.items() if k not in VARIES}
    return [without(v) for v in value] if isinstance(value, list) else value
