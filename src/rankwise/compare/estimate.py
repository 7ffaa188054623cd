"""What a grid would take: a few measured steps of every method on every task, times its steps."""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rankwise.compare.cells import Cell
from rankwise.compare.execute import cell_job
from rankwise.compare.recipe import Recipe
from rankwise.errors import DivergedError, RankwiseError
from rankwise.job import check
from rankwise.stages import run_method


@dataclass(frozen=True)
class Estimate:
    """One method on one task.

    Attributes:
        task, method: labels.
        cells: how many the grid has, those that judge rates among them.
        seconds: of a step, search included where the method searches.
        hours: of all its cells, training and search; evaluations are left out.
        gib: peak memory.
        error: why the steps could not be run, or "".
    """

    task: str
    method: str
    cells: int
    seconds: float = math.nan
    hours: float = math.nan
    gib: float = math.nan
    error: str = ""


def estimates(
    recipe: Recipe,
    cells: Sequence[Cell],
    steps: int,
    show: Callable[[Estimate], None] | None = None,
) -> list[Estimate]:
    """Runs some steps of every method on every task, from model to adapter, and multiplies.

    The first steps, which are slower, count with the others, and a search is taken to grow with
    the steps: so it is a rough figure, and more likely too high than too low. A control of
    another's size runs at the size that it would have by itself.

    Args:
        recipe, cells: of the grid.
        steps: how many to measure.
        show: called with each estimate once it is there.
    """
    found = []
    places = {(cell.task.label, cell.method.label): cell for cell in cells if cell.held_out is None}
    for (task, method), cell in places.items():
        alike = [c for c in cells if (c.task.label, c.method.label) == (task, method)]
        try:
            estimate = _measured(recipe, cell, alike, steps)
        except (RankwiseError, DivergedError) as error:
            said = " ".join(str(error).split())
            estimate = Estimate(task, method, len(alike), error=said)
        found.append(estimate)
        if show is not None:
            show(estimate)
    return found


def _measured(recipe: Recipe, cell: Cell, alike: Sequence[Cell], steps: int) -> Estimate:
    rows = cell.fit.per_device_train_batch_size * cell.fit.gradient_accumulation_steps
    most = max(400, 2 * steps * rows)  # enough to hold some out
    short = replace(cell, fit=replace(cell.fit, max_steps=steps, save_steps=10**6), rates={})
    whole = _rows(recipe, cell)
    job = replace(cell_job(recipe, short, cell.fit.learning_rate, most), decoding=None)
    with tempfile.TemporaryDirectory() as scratch:
        base = check(cell.method.method, job)
        result = run_method(cell.method.method, job, Path(scratch), base=base)
    took = (result.cost["search_seconds"] + result.cost["train_seconds"]) / result.cost["steps"]
    total = sum(_steps(other, whole, rows) for other in alike)
    peak = max(result.cost["peak_memory_bytes"], result.cost.get("search_peak_memory_bytes", 0))
    return Estimate(
        cell.task.label, cell.method.label, len(alike), took, took * total / 3600, peak / 2**30
    )


def _rows(recipe: Recipe, cell: Cell) -> int:
    """Training rows of a task, without encoding them."""
    from rankwise.cli.job import task_of

    task = task_of(recipe.model, cell.task.data, cell.fit, seed=cell.data_seed)
    return 0 if task.train is None else len(task.train)


def _steps(cell: Cell, rows: int, batch: int) -> float:
    if cell.fit.max_steps > 0:
        return cell.fit.max_steps
    kept = rows * (1 - (cell.held_out or 0))
    return math.ceil(kept / batch) * cell.fit.num_train_epochs
