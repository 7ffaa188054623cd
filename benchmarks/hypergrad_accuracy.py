"""How close the finite difference comes to the exact hypergradient, by the length of its step.

    python benchmarks/hypergrad_accuracy.py [--draws 3]

MiniLM with gated LoRA of rank 8 on query and value learns to sort tweets for 40 AdamW steps (so
that B is not zero), and β is moved away from its start. Then, for a training and a validation batch
in train mode, dropout masks the same in every pass,

    hypergradient = direct - η mixed,    mixed = ∂_β[∇_θ L_train(θ, β) · v]

is computed with `mixed` exact (a second backward pass, float32) and as a finite difference whose
perturbation of θ has the given Euclidean length. `mixed` is compared as well as the whole, in which
it is small: a wrong `mixed` would hardly show there.

Each figure is the median over draws of batches, masks and β; the cosine's worst draw is kept too.
Written to benchmarks/results/hypergrad_accuracy.json.
"""

import argparse
import logging
import statistics
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import set_seed
from transformers.utils import logging as transformers_logging

import rankwise
from rankwise import tasks
from rankwise.cli.demo import MODEL_PACKAGE, package_folder, write_rows
from rankwise.files import write_json
from rankwise.gate import attach
from rankwise.hypergrad import (
    RADIUS,
    Loss,
    TrainGradient,
    _gradient,
    _mixed_difference,
    _mixed_exact,
    _moved,
)
from rankwise.lora import build, uniform

RESULT = Path(__file__).parent / "results" / "hypergrad_accuracy.json"
RADII = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
RATES = (1e-4, 1e-3)  # η of the look-ahead
PRECISIONS = ("float32", "bf16 autocast")
BATCH, MAX_LENGTH, R = 16, 48, 8
STEPS, LEARNING_RATE = 40, 1e-3  # of θ, before anything is measured
BETA_SPREAD = 0.3  # standard deviation of what is added to β

Batch = dict[str, Tensor]
Estimate = tuple[Tensor, Tensor]  # the whole hypergradient, and its mixed term


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore", FutureWarning)  # between PEFT and transformers
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    problem = make_problem(seed=0)
    terms, comparisons = [], []
    for draw in track(range(args.draws), "Draws", console=Console(stderr=True)):
        found = measure(problem, draw)
        terms += found[0]
        comparisons += found[1]
    result = conditions(problem, args.draws) | {
        "terms": merged(terms, ("learning_rate",)),
        "comparisons": merged(comparisons, ("learning_rate", "precision", "estimator", "radius")),
    }
    print_tables(result)
    write_json(args.output, result)


@dataclass(frozen=True)
class Problem:
    """A model some steps into its training, and batches that it has not seen."""

    model: PeftModel
    parameters: list[Tensor]
    betas: list[Tensor]
    batches: Iterator[Batch]


def make_problem(seed: int) -> Problem:
    """MiniLM on tweets after STEPS steps of AdamW at θ; β has not moved yet."""
    with TemporaryDirectory() as folder:
        write_rows(Path(folder), seed)
        task = tasks.load_task(data_dir=folder)
    name = package_folder(MODEL_PACKAGE) / "model"
    tokenizer = tasks.load_tokenizer(name)
    set_seed(seed)
    base = tasks.load_model(  # eager: the fused attention has no second derivative
        task, name, tokenizer=tokenizer, attn_implementation="eager", dtype=torch.float32
    )
    plan = uniform(base, R)
    model = build(base, plan, task_type="SEQ_CLS")
    method = rankwise.AutoLoRA()
    gated = attach(model, plan, method.activation, method.initial(R))
    model.to("cuda" if torch.cuda.is_available() else "cpu").train()
    betas: list[Tensor] = [gate.beta for gate in gated.values()]
    meta = {id(beta) for beta in betas}
    theta: list[Tensor] = [p for p in model.parameters() if p.requires_grad and id(p) not in meta]

    rows = task.encode(task.train, tokenizer, MAX_LENGTH).shuffle(seed=seed)
    collate = task.data_collator(tokenizer)
    batches = (
        {key: value.to(model.device) for key, value in collate(chunk).items()}
        for start in range(0, len(rows), BATCH)
        for chunk in [[rows[row] for row in range(start, start + BATCH)]]
    )
    optimizer = torch.optim.AdamW(theta, lr=LEARNING_RATE)
    for _ in track(range(STEPS), "Training", console=Console(stderr=True)):
        model(**next(batches)).loss.backward()
        optimizer.step()
        model.zero_grad()
    return Problem(model, theta, betas, batches)


def measure(problem: Problem, draw: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """For each η: the sizes of the two terms, and every estimate against the exact one."""
    theta, betas = problem.parameters, problem.betas
    generator = torch.Generator().manual_seed(draw)
    noise = [BETA_SPREAD * torch.randn(b.shape, generator=generator).to(b.device) for b in betas]
    train_batch, val_batch = next(problem.batches), next(problem.batches)
    terms, comparisons = [], []
    with _moved(betas, noise, 1.0):
        for rate in RATES:
            found = {}
            for precision in PRECISIONS:
                bf16 = precision != "float32"
                train = loss_of(problem.model, train_batch, 2 * draw, bf16)
                val = loss_of(problem.model, val_batch, 2 * draw + 1, bf16)
                found[precision] = estimates(theta, betas, train, val, rate)
            exact = found["float32"]["exact", None]
            whole, mixed = exact
            size = rate * norm(mixed) / norm(whole + rate * mixed)
            sizes = {"mixed_to_direct": size, "theta_norm": norm(flat(theta))}
            terms.append({"learning_rate": rate} | sizes)
            comparisons += [
                {"learning_rate": rate, "precision": precision}
                | {"estimator": estimator, "radius": radius}
                | against(exact, estimate)
                for precision, made in found.items()
                for (estimator, radius), estimate in made.items()
            ]
    return terms, comparisons


def estimates(
    theta: list[Tensor], betas: list[Tensor], train: Loss, val: Loss, rate: float
) -> dict[tuple[str, float | None], Estimate]:
    """(estimator, radius) -> the whole hypergradient and its mixed term, each in one vector.

    Put together from the parts of `rankwise.hypergrad`, so that the mixed term can be looked at
    without the rounding error of taking it back out of the whole.
    """
    at_hand = _gradient([train], [*theta, *betas])
    gradient = TrainGradient(at_hand[: len(theta)], at_hand[len(theta) :])
    with _moved(theta, gradient.parameters, -rate):
        both = _gradient([val], [*theta, *betas])
    v, direct = both[: len(theta)], flat(both[len(theta) :])

    mixed: dict[tuple[str, float | None], Tensor] = {}
    mixed["exact", None] = flat(_mixed_exact(theta, betas, [train], v))
    for radius in RADII:
        eps = radius / norm(flat(v))
        for name, two_sided in (("one-sided", False), ("two-sided", True)):
            difference = _mixed_difference(theta, betas, [train], v, eps, gradient, two_sided, list)
            mixed[name, radius] = flat(difference)
    found: dict[tuple[str, float | None], Estimate]
    found = {key: (direct - rate * term, term) for key, term in mixed.items()}  # eq. 5
    found["first_order", None] = (flat(_gradient([val], betas)), torch.zeros_like(direct))
    return found


def loss_of(model: PeftModel, batch: Batch, seed: int, bf16: bool) -> Loss:
    """The loss of a batch, with the same dropout masks at every call."""

    def loss() -> Tensor:
        cuda = model.device.type == "cuda"
        cast = torch.autocast(model.device.type, dtype=torch.bfloat16) if bf16 else nullcontext()
        with torch.random.fork_rng([model.device] if cuda else []), cast:
            torch.manual_seed(seed)
            return model(**batch).loss

    return loss


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All in one vector, float64 so that comparing adds no error."""
    return torch.cat([t.detach().reshape(-1).double() for t in tensors])


def norm(vector: Tensor) -> float:
    return float(vector.norm())


def against(reference: Estimate, estimate: Estimate) -> dict[str, float | None]:
    """Cosine and norm ratio of the whole hypergradient and of its mixed term alone."""
    found: dict[str, float | None] = {}
    for name, exact, vector in zip(("whole", "mixed"), reference, estimate, strict=True):
        cosine = ratio = None
        if norm(vector) > 0:  # first_order has no mixed term
            cosine = float(exact @ vector) / (norm(exact) * norm(vector))
            ratio = norm(vector) / norm(exact)
        found |= {f"{name}_cosine": cosine, f"{name}_norm_ratio": ratio}
    return found


def merged(rows: list[dict[str, Any]], keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows that agree in `keys` as one: the median of each figure, and the worst of a cosine."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    result = []
    for values, group in groups.items():
        one: dict[str, Any] = dict(zip(keys, values, strict=True))
        for name in group[0].keys() - set(keys):
            figures = [row[name] for row in group if row[name] is not None]
            one[name] = round(statistics.median(figures), 8) if figures else None
            if name.endswith("cosine"):
                one[f"{name}_worst"] = round(min(figures), 8) if figures else None
        result.append({key: one[key] for key in (*keys, *sorted(one.keys() - set(keys)))})
    return result


def conditions(problem: Problem, draws: int) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "model": MODEL_PACKAGE,
        "batch": BATCH,
        "max_length": MAX_LENGTH,
        "r": R,
        "steps_before": STEPS,
        "learning_rate_before": LEARNING_RATE,
        "beta_spread": BETA_SPREAD,
        "draws": draws,
        "default_radius": RADIUS,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "versions": {
            "python": ".".join(map(str, sys.version_info[:3])),
            **{name: version(name) for name in ("rankwise", "torch", "transformers", "peft")},
        },
    }


def print_tables(result: dict[str, Any]) -> None:
    """One table per η and precision: cosine and norm ratio of the whole and of the mixed term."""
    console = Console()
    for terms in result["terms"]:
        rate = terms["learning_rate"]
        console.print(
            f"η = {rate:g}: η‖mixed‖ is {terms['mixed_to_direct']:.4%} of ‖direct‖; "
            f"‖θ‖ is {terms['theta_norm']:.1f}"
        )
        for precision in PRECISIONS:
            table = Table(title=f"η = {rate:g}, {precision}", title_justify="left")
            table.add_column("estimator", no_wrap=True)
            for header in ("radius", "whole: cosine", "norm", "mixed: cosine", "worst", "norm"):
                table.add_column(header, justify="right", no_wrap="cosine" not in header)
            for row in result["comparisons"]:
                if (row["learning_rate"], row["precision"]) == (rate, precision):
                    table.add_row(*cells(row))
            console.print(table)


def cells(row: dict[str, Any]) -> list[str]:
    """A comparison as the columns of the table."""
    names = "whole_cosine whole_norm_ratio mixed_cosine mixed_cosine_worst mixed_norm_ratio".split()
    figures = [
        "" if row[name] is None else f"{row[name]:.6f}" if "cosine" in name else f"{row[name]:.3f}"
        for name in names
    ]
    return [row["estimator"], "" if row["radius"] is None else f"{row['radius']:g}", *figures]


if __name__ == "__main__":
    main()
