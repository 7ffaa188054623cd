"""DyLoRA against LoRA trained at each rank and against LoRA cut afterwards, over tasks and seeds.

    python experiments/dylora.py --data_dir DATA --model MODEL [--only mrpc stsb] [--seeds 0 1 2]

DATA holds one folder per task (`mrpc/train.jsonl`, `mrpc/validation.jsonl`, ...). For each task and
seed, on the same rows, in the same order, for the same number of steps: DyLoRA in both modes, LoRA
at every rank from 1 to 8, and the LoRA of rank 8 cut to every rank, by SVD and to its own first b
pieces; all evaluated at every rank on the validation rows. alpha is 16 throughout, so a rank b has
the scale 16 / b in every arm. DyLoRA is trained once more for four times as long, which is half of
what LoRA at every rank takes. The DyLoRA adapter also gets ranks by layer at the size of rank 3,
chosen on 200 of the validation rows and compared with rank 3 everywhere on the others (not for rte,
which has too few).

One JSON file a task and seed in experiments/results/dylora/; arms that are in it are skipped, so
that the grid can be stopped and started again. `--tune` sweeps the learning rate instead, judged on
a tenth of the training rows; the rates below are its outcome on stsb and sst2.
"""

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import grid
import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from rankwise import Adapter, RankPlan, curve, ranks_by_layer, size_loss, tasks, train
from rankwise.files import write_json
from rankwise.lora import factors, uniform
from rankwise.nested import NestedTrainer

RESULTS = Path(__file__).parent / "results" / "dylora"
R, ALPHA = 8, 16
ELASTIC_RANK, ELASTIC_ROWS = 3, 200
LONGER = 4  # times the steps: half of what a LoRA of each rank costs
ARMS = ("dylora", "dylora-frozen", *(f"lora-{b}" for b in range(R, 0, -1)), "dylora-longer")


@dataclass(frozen=True)
class Recipe:
    """What differs between tasks: rows, epochs, batch. In frozen mode every piece moves in one step
    of eight, and the rate at which LoRA and DyLoRA do best is too low.
    """

    task: str
    learning_rate: float = 1e-3
    frozen_learning_rate: float = 3e-3
    epochs: float = 1.0
    batch_size: int = 16
    first_rows: int | None = None


GRID = {
    "rte": Recipe("glue/rte", first_rows=1500),
    "mrpc": Recipe("glue/mrpc", epochs=2),
    "cola": Recipe("glue/cola", first_rows=3000),
    "stsb": Recipe("glue/stsb", batch_size=8),
    "sst2": Recipe("glue/sst2", first_rows=8000),
}


def main() -> None:
    parser = grid.flags(__doc__, GRID)
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=ARMS)
    parser.add_argument("--tune", nargs="*", type=float, help="learning rates to try instead")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for seed in args.seeds:
        for name in args.only:
            if not args.tune:
                fill(RESULTS / f"{name}-seed{seed}.json", GRID[name], name, seed, args)
            for rate in args.tune or []:
                recipe = replace(GRID[name], learning_rate=rate, frozen_learning_rate=rate)
                target = RESULTS / "tune" / f"{name}-seed{seed}-lr{rate:g}.json"
                fill(target, recipe, name, seed, args)


def fill(target: Path, recipe: Recipe, name: str, seed: int, args: argparse.Namespace) -> None:
    """Adds the arms that a task's result file lacks."""
    found: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {}
    missing = [arm for arm in args.arms if arm not in found.get("arms", {})]
    if not missing:
        return
    if found and found["recipe"] != asdict(recipe):
        raise SystemExit(f"{target} was run with another recipe: {found['recipe']}; move it away")
    job = load(recipe, name, seed, args)
    found = found or describe(job) | {"arms": {}}
    for arm in missing:
        print(target.stem, arm, flush=True)
        found["arms"] |= run(job, arm)
        write_json(target, found)


@dataclass(frozen=True)
class Job:
    """One task and seed: rows, and how they are trained on."""

    recipe: Recipe
    seed: int
    model: str
    task: tasks.Task
    tokenizer: Any
    train: Dataset
    evaluation: Dataset
    args: TrainingArguments
    tuning: bool


def load(recipe: Recipe, name: str, seed: int, args: argparse.Namespace) -> Job:
    files = {"train_file": grid.train_rows(args.data_dir, name, recipe.first_rows)}
    if not args.tune:  # without a file for them, a tenth of the training rows is held out
        files["validation_file"] = args.data_dir / name / "validation.jsonl"
    task = tasks.load_task(recipe.task, **files, seed=seed)
    tokenizer = tasks.load_tokenizer(args.model)
    rows = [task.encode(part, tokenizer, 128) for part in (task.train, task.validation)]
    rows[1] = by_length(rows[1])
    training = TrainingArguments(
        output_dir=tempfile.gettempdir(),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=64,
        train_sampling_strategy="group_by_length",
        warmup_steps=0.06,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
        save_strategy="no",
        report_to="none",
        logging_strategy="no",
        disable_tqdm=True,
        label_names=["labels"],
    )
    tuning = args.tune is not None
    return Job(recipe, seed, args.model, task, tokenizer, *rows, training, tuning)


def by_length(rows: Dataset) -> Dataset:
    """In batches of rows of like length an evaluation pads less; its figures are the same."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    return rows.select(sorted(range(len(rows)), key=lengths.__getitem__))


def describe(job: Job) -> dict[str, Any]:
    names = "num_train_epochs per_device_train_batch_size warmup_steps bf16 seed"
    return {
        "task": job.task.describe(),
        "recipe": asdict(job.recipe),
        "model": Path(job.model).name,
        "r": R,
        "lora_alpha": ALPHA,
        "train_rows": len(job.train),
        "evaluation_rows": len(job.evaluation),
        "training": {name: getattr(job.args, name) for name in names.split()},
    }


def base_model(job: Job) -> Any:
    """The frozen weights in bfloat16, the head in float32: it is trained, in small steps."""
    set_seed(job.seed)
    model = tasks.load_model(job.task, job.model, tokenizer=job.tokenizer, dtype="bfloat16")
    model.classifier.float()
    return model


def run(job: Job, arm: str) -> dict[str, Any]:
    """Trains one arm; its metrics by rank. LoRA at the largest rank brings its cuts along."""
    kind, _, b = arm.rpartition("-") if arm.startswith("lora-") else (arm, "", str(R))
    plan = replace(uniform(base := base_model(job), int(b)), scaling=ALPHA / int(b))
    method = kind.removesuffix("-longer")
    rate = job.recipe.frozen_learning_rate if arm == "dylora-frozen" else job.recipe.learning_rate
    epochs = job.recipe.epochs * (LONGER if arm == "dylora-longer" else 1)
    args = replace(job.args, learning_rate=rate, num_train_epochs=epochs)
    trainer = train(base, plan, job.train, args=args, method=method, **evaluation(job))
    trained = {"steps": trainer.state.global_step, "learning_rate": rate}
    if kind != "lora":
        found = curve(trainer, job.evaluation, metric=job.task.main_metric)
        by_rank = dict(zip(map(str, found.sizes), found.metrics, strict=True))
        result = {arm: trained | {"ranks": by_rank}}
        if arm == "dylora" and len(job.evaluation) >= 2 * ELASTIC_ROWS and not job.tuning:
            result["elastic"] = chosen_by_layer(trainer, job)
        return result
    found = {arm: trained | {"ranks": {b: measured(trainer, job)}}}
    if int(b) == R:
        with tempfile.TemporaryDirectory() as folder:
            trainer.model.save_pretrained(folder)
            adapter = Adapter.load(folder)
        svd = {str(b): truncated(job, adapter, b) for b in range(1, R + 1)}
        found["svd"] = trained | {"ranks": svd}
        found["first-pieces"] = trained | {"ranks": first_pieces(trainer, job)}
    return found


def chosen_by_layer(trainer: NestedTrainer, job: Job) -> dict[str, Any]:
    """Ranks by layer against one rank at the same size, on rows that they were not chosen on."""
    order = np.random.default_rng(job.seed).permutation(len(job.evaluation))
    chosen_on = by_length(job.evaluation.select(order[:ELASTIC_ROWS]))
    measured_on = by_length(job.evaluation.select(order[ELASTIC_ROWS:]))
    budget = RankPlan.uniform(trainer.plan, ELASTIC_RANK).parameters
    choice = ranks_by_layer(size_loss(trainer, chosen_on), trainer.plan, budget)
    found: dict[str, Any] = {
        "rank": ELASTIC_RANK,
        "rows_chosen_on": len(chosen_on),
        "rows_measured_on": len(measured_on),
        "pays_where_chosen": choice.pays,
        "chosen_ranks": choice.by_layer.ranks,
        "parameters": choice.by_layer.parameters,
    }
    for name, plan in (("elastic", choice.by_layer), ("uniform", choice.uniform)):
        trainer.set_ranks(plan.ranks)
        found[name] = measured(trainer, replace(job, evaluation=measured_on))
    trainer.set_ranks(R)
    return found


def truncated(job: Job, adapter: Adapter, b: int) -> dict[str, float]:
    """The metrics of an adapter after SVD truncation, loaded by stock PEFT."""
    with tempfile.TemporaryDirectory() as folder:
        adapter.truncate_svd(b).save(Path(folder) / "cut")
        model = PeftModel.from_pretrained(base_model(job), Path(folder) / "cut")
    return measured(Trainer(model, job.args, **evaluation(job)), job)


def first_pieces(trainer: Trainer, job: Job) -> dict[str, dict[str, float]]:
    """The metrics of LoRA cut to its own first b columns of B and rows of A, which have no order,
    the way a DyLoRA adapter is cut. Leaves the model at rank 1.
    """
    found = {}
    for b in range(R, 0, -1):
        for _, b_matrix in factors(trainer.model).values():
            b_matrix.data[:, b:] = 0
        found[str(b)] = measured(trainer, job)
    return found


def evaluation(job: Job) -> dict[str, Any]:
    return {
        "data_collator": job.task.data_collator(job.tokenizer),
        "compute_metrics": job.task.compute_metrics(),
        "preprocess_logits_for_metrics": job.task.preprocess_logits,
    }


def measured(trainer: Trainer, job: Job) -> dict[str, float]:
    found = trainer.evaluate(job.evaluation)
    return {name: found[f"eval_{name}"] for name in ("loss", *job.task.metrics)}


if __name__ == "__main__":
    torch.set_num_threads(1)  # two runs beside each other are faster than one with two threads
    main()
