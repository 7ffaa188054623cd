"""AutoLoRA against uniform LoRA and random plans of the same size, over tasks and seeds.

    python experiments/autolora.py --data_dir DATA --model MODEL [--only mrpc stsb] [--seeds 0 1 2]

DATA holds one folder per task (`mrpc/train.jsonl`, `mrpc/validation.jsonl`, ...). Each run is one
`rankwise run`, and its metrics.json and plan.json are copied as they are to
experiments/results/autolora/. Runs whose result is there are skipped, so that the grid can be
stopped and started again. `--tune` writes the learning-rate sweep that the grid's rates come from.
"""

import argparse
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import grid

RESULTS = Path(__file__).parent / "results"
RATES = (1e-3, 3e-3)


@dataclass(frozen=True)
class Recipe:
    """What differs between tasks: epochs of the search and of training, rate, rows."""

    task: str
    learning_rate: float
    search_epochs: float
    epochs: float
    first_rows: int | None = None


GRID = {
    "mrpc": Recipe("glue/mrpc", 3e-3, 1, 2),
    "stsb": Recipe("glue/stsb", 1e-3, 1, 1),
    "sst2": Recipe("glue/sst2", 3e-3, 1, 1, 8000),
    "rte": Recipe("glue/rte", 3e-3, 1, 1, 320),
    "cola": Recipe("glue/cola", 3e-3, 1, 1, 960),
    "jnlpba": Recipe("jnlpba", 3e-3, 1, 1, 320),
}


def main() -> None:
    parser = grid.flags(__doc__, GRID)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/autolora"))
    parser.add_argument(
        "--tune", action="store_true", help="sweep the rate of uniform LoRA instead"
    )
    args = parser.parse_args()
    for name in args.only:
        if args.tune:
            for rate in RATES:
                tune(name, rate, args)
        else:
            for seed in args.seeds:
                compare(name, seed, args)


def compare(name: str, seed: int, args: argparse.Namespace) -> None:
    """One run: search, the plan, uniform r=4, a random plan of the plan's size."""
    recipe = GRID[name]
    rows = grid.train_rows(args.data_dir, name, recipe.first_rows)
    flags = [
        *("--train_file", str(rows)),
        *("--validation_file", str(args.data_dir / name / "validation.jsonl")),
        *("--learning_rate", str(recipe.learning_rate), "--num_train_epochs", str(recipe.epochs)),
        *("--num_search_epochs", str(recipe.search_epochs), "--seed", str(seed)),
        *("--control", "lora:r=4", "random"),
    ]
    target = RESULTS / "autolora" / f"{name}-seed{seed}"
    run("run", recipe, flags, target, args)


def tune(name: str, rate: float, args: argparse.Namespace) -> None:
    """Uniform r=4 for one epoch at one rate, judged on a tenth of the training rows."""
    rows = grid.train_rows(args.data_dir, name, GRID[name].first_rows)
    flags = [
        *("--train_file", str(rows), "--r", "4", "--seed", "0"),
        *("--learning_rate", str(rate), "--num_train_epochs", "1"),
        *("--max_eval_samples", "1000"),
    ]
    run("train", GRID[name], flags, RESULTS / "tune" / f"{name}-lr{rate:g}", args)


def run(
    command: str, recipe: Recipe, flags: list[str], target: Path, args: argparse.Namespace
) -> None:
    """Runs `rankwise COMMAND` unless its result is there, and keeps metrics.json and plan.json."""
    metrics = target.with_name(target.name + ".json")
    if metrics.exists():
        return
    work = args.work_dir / command / target.name
    resume = ["--resume_from_checkpoint"] if work.with_name(work.name + ".partial").exists() else []
    common = ["--model_name_or_path", args.model, "--task", recipe.task, "--output_dir", str(work)]
    fixed = ["--per_device_train_batch_size", "16", "--group_by_length", "--logging_steps", "100"]
    line = [
        sys.executable,
        "-m",
        "rankwise",
        command,
        *common,
        *fixed,
        *flags,
        *resume,
    ]
    print(" ".join(line), flush=True)
    subprocess.run(line, check=True)
    metrics.parent.mkdir(parents=True, exist_ok=True)
    if command == "run":
        shutil.copy(work / "plan.json", target.with_name(target.name + ".plan.json"))
    shutil.copy(work / "metrics.json", metrics)


if __name__ == "__main__":
    main()
