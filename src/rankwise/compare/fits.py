"""Which cells cannot work on this model and these rows, found out before the first one runs."""

from collections.abc import Sequence

from rankwise.compare.cells import Cell
from rankwise.compare.execute import cell_job
from rankwise.compare.recipe import Recipe
from rankwise.errors import PlanError, RankwiseError
from rankwise.job import check
from rankwise.methods import Method

ROWS = 1000  # of each task, for the look: enough to find what is wrong, soon read
GIB = 2**30


def misfits(recipe: Recipe, cells: Sequence[Cell], workers: int) -> list[str]:
    """One line for each task, and each method on a task, that cannot be run.

    Args:
        recipe: of the cells.
        cells: those that have yet to run.
        workers: how many share this machine's memory.
    """
    found: dict[tuple[str, str], str] = {}  # the first thing wrong with a method on a task
    kinds = {(c.task.label, c.held_out is None): c for c in cells}
    for (label, counts), cell in kinds.items():
        try:
            job = cell_job(recipe, cell, cell.fit.learning_rate, ROWS)
            base = job.fresh_model()
        except RankwiseError as error:
            found.setdefault((label, ""), f"{label}: {_line(error)}")
            continue
        size = sum(p.numel() * p.element_size() for p in base.parameters())
        for method in recipe.methods:
            if all((c.task.label, c.method.label) != (label, method.label) for c in cells):
                continue
            try:
                check(method.method, job, base)
            except RankwiseError as error:
                # of what size it will be, and so whether there is a plan, is known later
                if not (isinstance(error, PlanError) and method.same_size_as):
                    said = f"{method.label} on {label}: {_line(error)}"
                    found.setdefault((label, method.label), said)
            short = _too_large(method.method, size, workers, bool(cell.fit.use_cpu))
            if short and counts:
                found.setdefault(("", method.label), f"{method.label}: {short}")
    return list(found.values())


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _too_large(method: Method, size: int, workers: int, use_cpu: bool) -> str:
    """Why the memory cannot do: by what is the least, the weights and, where all of them move,
    their gradients and AdamW's two moments."""
    import psutil
    import torch

    least = size * (4 if method.product == "model" else 1)
    if torch.cuda.is_available() and not use_cpu:
        on_one = -(-workers // torch.cuda.device_count())
        there, what = torch.cuda.get_device_properties(0).total_memory, "a GPU"
    else:
        on_one, there, what = workers, psutil.virtual_memory().total, "this machine"
    if least * on_one <= there:
        return ""
    return (
        f"it needs at least {least / GIB:.1f} GiB in each of {on_one} processes, and {what} has "
        f"{there / GIB:.1f} GiB; lower --workers, or take a smaller model"
    )
