"""What the grids share: their flags, and the file of a task's training rows."""

import argparse
import tempfile
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from rankwise.files import write_text


def flags(doc: str | None, tasks: Iterable[str]) -> argparse.ArgumentParser:
    """A parser with the data, the model, and which tasks and seeds to run."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--model", required=True, help="hub id or folder of the base model")
    parser.add_argument("--only", nargs="*", default=list(tasks), choices=list(tasks))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    return parser


def train_rows(data_dir: Path, task: str, first: int | None) -> Path:
    """The task's training file, or a file of its first rows where a recipe wants no more."""
    source = data_dir / task / "train.jsonl"
    if first is None:
        return source
    cut = Path(tempfile.gettempdir()) / f"{task}-first-{first}.jsonl"
    with source.open(encoding="utf-8") as file:
        write_text(cut, "".join(islice(file, first)))
    return cut
