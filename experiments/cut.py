"""Ways to cut one trained LoRA to a size: the same adapter, the same rows, the same measure.

    python experiments/cut.py --data_dir DATA --model MODEL [--only sst2 stsb] [--seeds 0 1 2]

DATA holds one folder per task (`sst2/train.jsonl`, `sst2/validation.jsonl`, ...). For each task and
seed LoRA of rank 8 is trained on all linear layers, once. Every order then cuts that adapter to
1/4, 1/8, ... 1/64 of its parameters, and the cuts are measured on the official validation rows,
which no order has seen; 400 training rows, which the training has not seen, are what the orders by
data see. Beside them LoRA trained from scratch at rank 1 of all linear layers (1/8 of the
parameters) and of query and value (about 1/36), for as many steps.

One JSON file a task and seed in experiments/results/cut/; files that are there are skipped, arms
that a file lacks are added, so that the grid can be stopped and started again. `--tune` instead
writes the learning-rate sweep that the rates below come from, judged on those 400 rows.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import grid
import torch
from transformers import TrainingArguments
from transformers.utils import logging

from rankwise import Adapter, tasks
from rankwise.files import write_json
from rankwise.job import Job, Source, evaluate, load_job
from rankwise.lora import swap_adapter
from rankwise.methods import LoRA, Setting
from rankwise.orders import (
    Ordered,
    at_random,
    by_activation,
    by_data,
    by_energy,
    by_rank,
    by_sigma,
)
from rankwise.rows import hold_out
from rankwise.trainer import run_training

RESULTS = Path(__file__).parent / "results" / "cut"
SIZES = (4, 8, 16, 32, 64)
ORDER_ROWS = 400
RATES = (3e-4, 1e-3, 3e-3)
# From scratch: the flags of LoRA, by the name of the arm.
SCRATCH = {
    "all linear, r=1": LoRA(r=1, lora_alpha=2),
    "query and value, r=1": LoRA(r=1, lora_alpha=2, target_modules=None),
}


@dataclass(frozen=True)
class Recipe:
    """What differs between tasks."""

    task: str
    learning_rate: float = 1e-3
    epochs: float = 2.0
    rows: int = 4000
    evaluation_rows: int = 1000


GRID = {
    "sst2": Recipe("glue/sst2"),
    "stsb": Recipe("glue/stsb", learning_rate=3e-4),
    "qnli": Recipe("glue/qnli"),
    "mrpc": Recipe("glue/mrpc", epochs=3),
    "cola": Recipe("glue/cola", epochs=3),
    "jnlpba": Recipe("jnlpba"),
}


def main() -> None:
    parser = grid.flags(__doc__, GRID)
    parser.add_argument("--tune", action="store_true", help="sweep the learning rate instead")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for seed in args.seeds:
        for name in args.only:
            if not args.tune:
                fill(RESULTS / f"{name}-seed{seed}.json", GRID[name], seed, args)
            for rate in RATES if args.tune else ():
                recipe = replace(GRID[name], learning_rate=rate)
                tune(RESULTS / "tune" / f"{name}-seed{seed}-lr{rate:g}.json", recipe, seed, args)


def load(recipe: Recipe, seed: int, args: argparse.Namespace) -> Job:
    folder = args.data_dir / recipe.task.removeprefix("glue/")
    task = tasks.load_task(
        recipe.task,
        train_file=folder / "train.jsonl",
        validation_file=folder / "validation.jsonl",
        max_train_samples=recipe.rows + ORDER_ROWS,
        max_eval_samples=recipe.evaluation_rows,
        seed=seed,
    )
    training = TrainingArguments(
        output_dir=tempfile.gettempdir(),
        learning_rate=recipe.learning_rate,
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        train_sampling_strategy="group_by_length",
        warmup_steps=0.06,
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
        save_strategy="no",
        report_to="none",
        logging_strategy="no",
        disable_tqdm=True,
        label_names=["labels"],
    )
    return load_job(task, Source(args.model), training, command="experiments/cut.py")


def trained(job: Job, method: LoRA) -> tuple[Any, Any]:
    """The trainer of a method after training, and the rows that orders may see."""
    rows = hold_out(job.train_rows, ORDER_ROWS, job.args.seed)
    setting = Setting(
        rows.train, rows.validation, job.args, job.task.task_type, options=job.options()
    )
    base = job.fresh_model()
    plan = method.start(base, setting)
    trainer = method.trainer(method.attach(base, plan, setting), plan, setting)
    run_training(trainer, None)
    return trainer, rows.validation


def tune(target: Path, recipe: Recipe, seed: int, args: argparse.Namespace) -> None:
    """LoRA of rank 8 at one rate, on the rows that the orders would see."""
    if target.exists():
        return
    job = load(recipe, seed, args)
    trainer, held_out = trained(job, LoRA())
    found = evaluate(replace(job, evaluation=held_out), trainer)
    write_json(target, {"recipe": asdict(recipe), "seed": seed, "held_out": found})
    print(target.stem, found, flush=True)


def fill(target: Path, recipe: Recipe, seed: int, args: argparse.Namespace) -> None:
    """Adds the arms that a task's result file lacks."""
    found: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {}
    if found and found["recipe"] != asdict(recipe):
        raise SystemExit(f"{target} was run with another recipe: {found['recipe']}; move it away")
    arms = found.get("arms", {})
    missing = [name for name in (*ORDERS, *SCRATCH) if name not in arms]
    if not missing:
        return
    job = load(recipe, seed, args)
    found = found or {
        "task": job.task.describe(),
        "recipe": asdict(recipe),
        "seed": seed,
        "model": Path(args.model).name,
        "r": LoRA().r,
        "train_rows": len(job.train_rows) - ORDER_ROWS,
        "order_rows": ORDER_ROWS,
        "evaluation_rows": len(job.evaluation),
        "arms": {},
    }
    if any(name in ORDERS for name in missing):
        trainer, held_out = trained(job, LoRA())
        found["steps"] = trainer.state.global_step
        with tempfile.TemporaryDirectory() as folder:
            trainer.model.save_pretrained(folder)
            whole = Adapter.load(folder)
        found["parameters"] = whole.parameters
        found["arms"]["all pieces"] = evaluate(job, trainer)
        batches = list(trainer.get_eval_dataloader(held_out))
        for name in ORDERS:
            if name in missing:
                found["arms"][name] = cuts(name, trainer, whole, batches, job)
                write_json(target, found)
                print(target.stem, name, {k: v["loss"] for k, v in found["arms"][name].items()})
    for name in SCRATCH:
        if name in missing:
            trainer, _ = trained(job, SCRATCH[name])
            size = sum(p.numel() for n, p in trainer.model.named_parameters() if "lora_" in n)
            found["arms"][name] = {"parameters": size, **evaluate(job, trainer)}
            write_json(target, found)
            print(target.stem, name, found["arms"][name], flush=True)


Model = Any
ORDERS: dict[str, Callable[[Model, Adapter, list[Any], int], Any]] = {
    "one rank by SVD": lambda model, whole, batches, seed: by_rank(whole.factors()),
    "energy per layer": lambda model, whole, batches, seed: by_energy(whole.factors()),
    "one threshold on σ": lambda model, whole, batches, seed: by_sigma(whole.factors()),
    "activations": lambda model, whole, batches, seed: by_activation(model, batches),
    "by data, one look, gates at 1": lambda model, whole, batches, seed: by_data(
        model, batches, ladder=(), ridge=1e9, seed=seed
    ),
    "by data, one look": lambda model, whole, batches, seed: by_data(
        model, batches, ladder=(), seed=seed
    ),
    "by data": lambda model, whole, batches, seed: by_data(model, batches, seed=seed),
    "random": lambda model, whole, batches, seed: at_random(whole.factors(), seed),
}


def cuts(name: str, trainer: Any, whole: Adapter, batches: list[Any], job: Job) -> dict[str, Any]:
    """The metrics of an order's cuts, by the size's denominator."""
    with tempfile.TemporaryDirectory() as folder:
        whole.save(Path(folder) / "whole")
        swap_adapter(trainer, Path(folder) / "whole")
        order = ORDERS[name](trainer.model, whole, batches, job.args.seed)
        found = {}
        for size in SIZES:
            small = Ordered(whole, order).cut(whole.parameters // size)
            small.save(Path(folder) / f"{size}")
            swap_adapter(trainer, Path(folder) / f"{size}")
            found[str(size)] = {"parameters": small.parameters, **evaluate(job, trainer)}
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
