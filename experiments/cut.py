"""Ways to a small adapter: one trained LoRA cut by every order, and the ways that train for it.

    python experiments/cut.py --data_dir DATA --model MODEL [--only sst2 stsb] [--seeds 0 1 2]

DATA holds one folder per task (`sst2/train.jsonl`, `sst2/validation.jsonl`, ...). For each task and
seed LoRA of rank 8 is trained on all linear layers, once, and kept in --adapters. Every order then
cuts that adapter to 1/4, 1/8, ... 1/64 of its parameters, and the cuts are measured on the official
validation rows, which no order has seen; 400 training rows, which the training has not seen, are
what the orders by data see. Beside them:

- from scratch: rank 1 of all linear layers (1/8 of the parameters) and of query and value (about
  1/36), and AdaLoRA from 2 pieces a module to 1, each for as many steps;
- healed: the cut trained on, for a tenth of the steps; or its head alone, the factors frozen;
- half-way: half of the steps at rank 8, the order and the cut, the other half at the cut's ranks.

With --r 16 another rank is cut, trained at a rate of its own. One JSON file a task and seed in
experiments/results/cut/; files that are there are skipped, arms that a file lacks are added, so
that the grid can be stopped and started again. Learning rates are the best in the files that
`--tune` writes, judged on those 400 rows, one seed; an arm without such a file takes that of
LoRA of rank 8.
"""

import argparse
import json
import math
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import grid
import torch
from datasets import disable_progress_bars
from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from rankwise import Adapter, tasks
from rankwise.errors import DivergedError
from rankwise.evaluation import evaluate
from rankwise.files import new_folder, write_json
from rankwise.job import Job, Source, load_job
from rankwise.lora import swap_adapter
from rankwise.methods import AdaLoRA, LoRA, Setting
from rankwise.methods.base import LoraMethod
from rankwise.orders import Ordered, at_random, by_energy, by_rank, by_sigma
from rankwise.rows import TwoSets, hold_out
from rankwise.surgeon import by_activation, by_data
from rankwise.trainer import FiniteTrainer, replaced, run_training

RESULTS = Path(__file__).parent / "results" / "cut"
SIZES = (4, 8, 16, 32, 64)
ORDER_ROWS = 400
RATES = (1e-4, 1e-3, 3e-3)
SCRATCH_RATES = (1e-3, 3e-3, 1e-2)
FOUR = (1 / 4, 1 / 16, 1 / 64)
SEVEN = (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64)
WHOLE = "all pieces"
# From scratch: the method, by the name of the arm.
SCRATCH: dict[str, LoRA | AdaLoRA] = {
    "all linear, r=1": LoRA(r=1, lora_alpha=2),
    "query and value, r=1": LoRA(r=1, lora_alpha=2, target_modules=None),
    "AdaLoRA": AdaLoRA(r=2, lora_alpha=4, target_r=1),
}
# Orders whose cuts are trained on, for this share of the steps.
HEALED = {
    "by data, healed": "by data, seven looks",
    "one threshold on σ, healed": "one threshold on σ",
    "by data, head re-fitted": "by data, four looks",
}
HEAD_ALONE = {"by data, head re-fitted"}
HEAL_SHARE, HEALED_SIZES = 0.1, (8, 16, 32, 64)
HALFWAY, HALFWAY_SIZES = "by data, half-way", (8, 32)


@dataclass(frozen=True)
class Recipe:
    """What differs between tasks."""

    task: str
    epochs: float = 2.0
    rows: int = 4000
    evaluation_rows: int = 1000


GRID = {
    "sst2": Recipe("glue/sst2"),
    "stsb": Recipe("glue/stsb"),
    "cola": Recipe("glue/cola", epochs=3),
    "mrpc": Recipe("glue/mrpc"),
    "qnli": Recipe("glue/qnli", rows=3000, evaluation_rows=500),
    "jnlpba": Recipe("jnlpba", rows=3000, evaluation_rows=500),
}


def main() -> None:
    parser = grid.flags(__doc__, GRID)
    parser.add_argument("--tune", action="store_true", help="sweep the learning rate instead")
    parser.add_argument("--arms", nargs="*", help="these alone (of a sweep: methods from scratch)")
    parser.add_argument("--rates", nargs="*", type=float, help="to sweep, in place of the usual")
    parser.add_argument("--r", type=int, default=LoRA().r, help="rank of what is cut")
    parser.add_argument("--adapters", type=Path, default=Path("runs/cut"), help="trained ones")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    for seed in args.seeds:
        for name in args.only:
            if args.tune:
                tune(name, seed, args)
            else:
                fill(name, seed, args)


def load(recipe: Recipe, seed: int, rate: float, args: argparse.Namespace) -> Job:
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
        learning_rate=rate,
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


def two_sets(job: Job) -> TwoSets:
    """The rows that are trained on, and those that orders and rates are chosen on."""
    return hold_out(job.train_rows, ORDER_ROWS, job.args.seed)


def trained(job: Job, method: LoraMethod, callbacks: Sequence[TrainerCallback] = ()) -> Trainer:
    """A method's trainer after training; of AdaLoRA's, with the plain LoRA that is left."""
    rows = two_sets(job)
    options = job.options() | {"callbacks": list(callbacks)}
    setting = Setting(rows.train, rows.validation, job.args, job.task.task_type, options=options)
    base = job.fresh_model()
    plan = method.start(base, setting)
    trainer = method.trainer(method.attach(base, plan, setting), plan, setting)
    run_training(trainer, None)
    with tempfile.TemporaryDirectory() as folder:
        method.hand_over(trainer, method.keep(trainer, plan, setting), Path(folder))
    return trainer


def trained_on(job: Job, folder: Path, steps: int, rate: float, head: bool = False) -> Trainer:
    """The trainer of an adapter on disk after more steps, warmed up anew and down to zero; with
    `head` of the task's head alone."""
    model = PeftModel.from_pretrained(job.fresh_model(), str(folder), is_trainable=True)
    if head:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and "lora_" not in name)
    args = replaced(job.args, max_steps=steps, learning_rate=rate)
    trainer = FiniteTrainer(model, args, train_dataset=two_sets(job).train, **job.options())
    run_training(trainer, None)
    return trainer


def tune(name: str, seed: int, args: argparse.Namespace) -> None:
    """One method at every rate, on the rows that the orders would see."""
    methods: dict[str, LoraMethod] = {WHOLE: whole(args.r), **SCRATCH}
    for arm in args.arms or [WHOLE]:
        for rate in args.rates or (RATES if arm == WHOLE else SCRATCH_RATES):
            target = tuned(name, arm, args.r, seed, f"{rate:g}")
            if target.exists():
                continue
            job = load(GRID[name], seed, rate, args)
            judged = replace(job, evaluation=two_sets(job).validation)
            found = {"arm": arm, "learning_rate": rate, "recipe": asdict(GRID[name]), "seed": seed}
            found |= {"metrics": job.task.metrics}
            try:
                trainer = trained(job, methods[arm])
                found["held_out"] = evaluate(judged, trainer)
                if arm == WHOLE:
                    save(trainer, adapter_folder(name, seed, rate, args))
            except DivergedError as error:
                found["diverged"] = str(error)
            write_json(target, found)
            print(target.stem, found.get("held_out", "diverged"), flush=True)


def whole(r: int) -> LoRA:
    """What is cut."""
    return LoRA(r=r, lora_alpha=2 * r)


def label(name: str, r: int) -> str:
    """What the files of a task are called, by the rank of what is cut."""
    return name if r == LoRA().r else f"{name}-r{r}"


def tuned(name: str, arm: str, r: int, seed: int, rate: str) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", arm.lower()).strip("-")
    of = label(name, r) if arm == WHOLE else name
    return RESULTS / "tune" / f"{of}-{slug}-seed{seed}-lr{rate}.json"


def adapter_folder(name: str, seed: int, rate: float, args: argparse.Namespace) -> Path:
    return Path(args.adapters, f"{label(name, args.r)}-seed{seed}-lr{rate:g}")


def best_rate(name: str, arm: str, r: int = LoRA().r) -> float:
    """The rate with the best metric in the files of the sweep, seed 0; the smallest of equals."""
    pattern, found = tuned(name, arm, r, 0, "*"), {}
    for path in pattern.parent.glob(pattern.name):
        run = json.loads(path.read_text())
        if "held_out" in run:
            found[run["learning_rate"]] = run["held_out"][run["metrics"][0]]
    if found:
        return max(sorted(found), key=lambda rate: found[rate])
    if arm == WHOLE:
        raise SystemExit(f"no sweep of {name}; run --tune --only {name} --seeds 0 --r {r}")
    return best_rate(name, WHOLE)


def fill(name: str, seed: int, args: argparse.Namespace) -> None:
    """Adds the arms that a task's result file lacks."""
    target, recipe = RESULTS / f"{label(name, args.r)}-seed{seed}.json", GRID[name]
    found: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {}
    rates = {arm: best_rate(name, arm, args.r) for arm in (WHOLE, *SCRATCH)}
    if found and (found["recipe"] != asdict(recipe) or found["rates"][WHOLE] != rates[WHOLE]):
        raise SystemExit(f"{target} was run otherwise: {found['recipe']}; move it away")
    wanted = args.arms or [*ORDERS, *SCRATCH, *HEALED, HALFWAY]
    missing = [arm for arm in wanted if arm not in found.get("arms", {})]
    if not missing:
        return
    job = load(recipe, seed, rates[WHOLE], args)
    found = found or {
        "task": job.task.describe(),
        "recipe": asdict(recipe),
        "seed": seed,
        "model": Path(args.model).name,
        "r": args.r,
        "train_rows": len(job.train_rows) - ORDER_ROWS,
        "order_rows": ORDER_ROWS,
        "evaluation_rows": len(job.evaluation),
        "rates": rates,
        "arms": {},
    }
    folder = adapter_folder(name, seed, rates[WHOLE], args)
    if not folder.exists():
        save(trained(job, whole(args.r)), folder)
    figures = evaluate(job, loaded(job, folder))
    if WHOLE in found["arms"]:
        check_alike(target, found["arms"][WHOLE], figures)
    else:
        batches = math.ceil(found["train_rows"] / job.args.per_device_train_batch_size)
        found["steps"] = math.ceil(batches * recipe.epochs)
        found["arms"][WHOLE] = figures
        found["parameters"] = Adapter.load(folder).parameters
    for arm in missing:
        started = time.process_time()
        found["arms"][arm] = run_arm(arm, job, folder, found)
        write_json(target, found)
        print(target.stem, arm, f"{time.process_time() - started:.0f} s", flush=True)


def save(trainer: Trainer, folder: Path) -> None:
    """Keeps what was trained, whole or not at all."""
    with new_folder(folder) as filling:
        trainer.model.save_pretrained(filling)


def check_alike(target: Path, before: dict[str, float], now: dict[str, float]) -> None:
    """Refuses arms of another adapter: trained anew, it may come out otherwise elsewhere."""
    if odd := [n for n, value in before.items() if not math.isclose(value, now[n], rel_tol=1e-3)]:
        raise SystemExit(
            f"{target}: trained anew, {odd[0]} is {now[odd[0]]:.6f}, not {before[odd[0]]:.6f} as "
            "for the arms there; give the folder of the old adapters, or move the file away"
        )


def run_arm(arm: str, job: Job, folder: Path, found: dict[str, Any]) -> dict[str, Any]:
    """The metrics of one arm; by the size's denominator where it is cut to several."""
    if arm in SCRATCH:
        rate = found["rates"][arm] = best_rate(Path(folder).name.partition("-")[0], arm)
        trainer = trained(replace(job, args=replaced(job.args, learning_rate=rate)), SCRATCH[arm])
        size = sum(p.numel() for n, p in trainer.model.named_parameters() if "lora_" in n)
        return {"parameters": size, **evaluate(job, trainer)}
    if arm in HEALED:
        return healed(HEALED[arm], job, folder, found["steps"], arm in HEAD_ALONE)
    return halfway(job, found) if arm == HALFWAY else cuts(arm, job, folder)


def loaded(job: Job, folder: Path) -> Trainer:
    """A trainer of the adapter in a folder, to look at it and to measure it."""
    model = PeftModel.from_pretrained(job.fresh_model(), str(folder))
    return FiniteTrainer(model, job.args, **job.options())


def ordered(name: str, job: Job, trainer: Trainer, whole: Adapter) -> Ordered:
    batches = list(trainer.get_eval_dataloader(two_sets(job).validation))
    return Ordered(whole, ORDERS[name](trainer.model, whole, batches, job.args.seed))


def cuts(name: str, job: Job, folder: Path) -> dict[str, Any]:
    """An order's cuts to every size."""
    trainer, found = loaded(job, folder), {}
    by = ordered(name, job, trainer, Adapter.load(folder))
    if "looks" in by.order.provenance:
        found["looks"] = by.order.provenance["looks"]
    with tempfile.TemporaryDirectory() as scratch:
        for size in SIZES:
            small = by.cut(by.adapter.parameters // size)
            small.save(Path(scratch) / f"{size}")
            swap_adapter(trainer, Path(scratch) / f"{size}")
            found[str(size)] = {"parameters": small.parameters, **evaluate(job, trainer)}
    return found


def healed(name: str, job: Job, folder: Path, steps: int, head: bool) -> dict[str, Any]:
    """An order's cuts, each trained on for a share of the steps, at the rate of the training."""
    by, found = ordered(name, job, loaded(job, folder), Adapter.load(folder)), {}
    with tempfile.TemporaryDirectory() as scratch:
        for size in HEALED_SIZES:
            small = by.cut(by.adapter.parameters // size)
            small.save(cut := Path(scratch) / f"{size}")
            more, rate = round(steps * HEAL_SHARE), job.args.learning_rate
            trainer = trained_on(job, cut, more, rate, head)
            found[str(size)] = {"parameters": small.parameters, **evaluate(job, trainer)}
    return found


class StopAt(TrainerCallback):
    """Ends a training in the middle of its schedule."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = state.global_step >= self.step
        return control


def halfway(job: Job, about: dict[str, Any]) -> dict[str, Any]:
    """Cut in the middle of the training; the second half starts at half the rate, as the first
    ended."""
    steps, found = about["steps"], {}
    trainer = trained(job, whole(about["r"]), [StopAt(steps // 2)])
    with tempfile.TemporaryDirectory() as scratch:
        trainer.model.save_pretrained(f"{scratch}/whole")
        by = ordered("by data, seven looks", job, trainer, Adapter.load(f"{scratch}/whole"))
        for size in HALFWAY_SIZES:
            small = by.cut(by.adapter.parameters // size)
            small.save(cut := Path(scratch) / f"{size}")
            after = trained_on(job, cut, steps - steps // 2, job.args.learning_rate / 2)
            found[str(size)] = {"parameters": small.parameters, **evaluate(job, after)}
    return found


Model = Any
ORDERS: dict[str, Callable[[Model, Adapter, list[Any], int], Any]] = {
    "one rank by SVD": lambda model, whole, batches, seed: by_rank(whole.factors()),
    "energy per layer": lambda model, whole, batches, seed: by_energy(whole.factors()),
    "one threshold on σ": lambda model, whole, batches, seed: by_sigma(whole.factors()),
    "activations": lambda model, whole, batches, seed: by_activation(model, batches),
    "by data": lambda model, whole, batches, seed: by_data(model, batches, seed=seed),
    "by data, four looks": lambda model, whole, batches, seed: by_data(
        model, batches, ladder=FOUR, trust=math.inf, seed=seed
    ),
    "by data, one look": lambda model, whole, batches, seed: by_data(
        model, batches, ladder=(), seed=seed
    ),
    "by data, seven looks": lambda model, whole, batches, seed: by_data(
        model, batches, ladder=SEVEN, trust=math.inf, seed=seed
    ),
    "by data, one look, gates at 1": lambda model, whole, batches, seed: by_data(
        model, batches, ladder=(), ridge=1e9, seed=seed
    ),
    "random": lambda model, whole, batches, seed: at_random(whole.factors(), seed),
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
