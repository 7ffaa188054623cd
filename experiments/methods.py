"""Every method once on the rows of `rankwise demo`: that it runs, what it scores, what it costs.

    python experiments/methods.py [--only lora cut ...] [--output_dir DIR]

A tour, not a comparison: one short run and one seed each, at the rate that is usual for it and
not tuned. Costs are CPU seconds of the whole call on one thread, from rows to the evaluated
adapter, as a ratio to LoRA's; they hardly depend on what else the machine does. One JSON file,
experiments/results/methods.json, and the table of docs/methods.md; methods that are in the file
are skipped.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from summary import replace_block
from transformers import TrainingArguments
from transformers.utils import logging

import rankwise
from rankwise.cli.demo import MODEL_PACKAGE, package_folder, write_rows
from rankwise.errors import RankwiseError
from rankwise.files import write_json, write_text
from rankwise.methods import by_name

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "methods.json"
PAGE = HERE.parent / "docs" / "methods.md"

FLAGS: dict[str, dict[str, Any]] = {
    "lora-grid": {"ranks": (1, 2, 4, 8)},
    "autolora": {"gate_learning_rate": 1e-2},
}
FLAGS |= {f"autolora-{kind}": FLAGS["autolora"] for kind in ("unconstrained", "sigmoid")}
FLAGS["autolora-first-order"] = FLAGS["autolora"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(rankwise.METHODS))
    parser.add_argument("--output_dir", type=Path, default=Path("runs/methods"))
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    rows = args.output_dir / "rows"
    write_rows(rows)
    for name in args.only:
        if name not in found:
            found[name] = one(name, rows, args.output_dir / name)
            write_json(RESULTS, found)
            print(name, found[name], flush=True)
    if PAGE.exists():
        write_text(PAGE, replace_block(PAGE.read_text(encoding="utf-8"), "methods", table(found)))


def one(name: str, rows: Path, folder: Path) -> dict[str, Any]:
    """One method's figures, or why it has none on this model."""
    rate = by_name(name).rate_for(None)
    with tempfile.TemporaryDirectory() as scratch:
        training = TrainingArguments(
            output_dir=scratch,
            learning_rate=rate,
            num_train_epochs=2,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=64,
            train_sampling_strategy="group_by_length",
            warmup_steps=0.06,
            use_cpu=True,
            seed=0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        started = time.process_time()
        try:
            fitted = rankwise.fit(
                name,
                rows,
                model=package_folder(MODEL_PACKAGE) / "model",
                output_dir=folder,
                overwrite_output_dir=True,
                args=training,
                max_length=48,
                max_train_samples=1000,
                max_eval_samples=500,
                **FLAGS.get(name, {}),
            )
        except RankwiseError as error:
            return {"refused": " ".join(str(error).split())}
    result = fitted.result
    return {
        "title": by_name(name).title,
        "learning_rate": rate,
        "metrics": result.metrics,
        "trainable_parameters": result.trainable_parameters,
        "cpu_seconds": time.process_time() - started,
        "steps": result.cost["steps"],
        "rows": result.rows,
    }


def table(found: dict[str, Any]) -> str:
    """One row a method."""
    lora = found["lora"]["cpu_seconds"]
    lines = [
        "| name | method | rate | accuracy | trained parameters | cost, LoRA = 1 |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for name in filter(found.__contains__, rankwise.METHODS):
        run = found[name]
        if "refused" in run:
            lines.append(f"| `{name}` | {run['refused']} | | | | |")
            continue
        lines.append(
            f"| `{name}` | {run['title']} | {run['learning_rate']:g} | "
            f"{100 * run['metrics']['accuracy']:.1f} | {run['trainable_parameters']:,} | "
            f"{run['cpu_seconds'] / lora:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
