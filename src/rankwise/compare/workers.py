"""Many cells at once on one machine: a process a cell, threads and GPUs shared out."""

import gc
import math
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from shutil import which
from typing import Any

from rankwise.compare.cells import (
    Cell,
    Failure,
    cell_file,
    read_cell,
    set_aside,
    write_failure,
)
from rankwise.compare.recipe import Recipe
from rankwise.errors import RankwiseError
from rankwise.escape import terminal
from rankwise.result import Result

POLL = 0.05  # seconds between two looks at the processes


@dataclass
class Grid:
    """How far a grid is.

    Attributes:
        cells: by name, each after those that it waits for.
        done, failed, blocked: names; blocked are those whose cells to wait for broke down.
        running: what each busy worker is at.
        seconds: of each cell that was run here.
    """

    cells: Mapping[str, Cell]
    done: set[str] = field(default_factory=set)
    failed: dict[str, Failure] = field(default_factory=dict)
    blocked: set[str] = field(default_factory=set)
    running: dict[int, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    workers: int = 1

    def open(self) -> list[str]:
        """Those that have not begun."""
        over = {*self.done, *self.failed, *self.blocked, *self.running.values()}
        return [name for name in self.cells if name not in over]

    def seconds_left(self) -> float | None:
        """From what cells of the same task and method took; None before the first is done."""
        if not self.seconds:
            return None
        known: dict[tuple[str, str], list[float]] = {}
        for name, took in self.seconds.items():
            known.setdefault(_alike(self.cells[name]), []).append(took)
        all_of = list(self.seconds.values())
        left = [*self.open(), *self.running.values()]
        takes = [known.get(_alike(self.cells[name]), all_of) for name in left]
        return sum(sum(t) / len(t) for t in takes) / self.workers


def _alike(cell: Cell) -> tuple[str, str]:
    return cell.task.label, cell.method.label


def run_grid(
    recipe: Recipe,
    cells: Sequence[Cell],
    folder: Path,
    *,
    workers: int = 1,
    threads: int | None = None,
    retry_failed: bool = False,
    show: Any = None,
) -> Grid:
    """Runs all cells that have no file yet, and those that broke down.

    Args:
        recipe: of the cells.
        cells: each after those that it waits for.
        folder: for the results; `logs/` has what each process printed.
        workers: processes at a time.
        threads: of each; None shares the cores out, OMP_NUM_THREADS at most to each.
        retry_failed: run cells anew that would fail again, as far as is known.
        show: called with the `Grid` whenever it changed.

    Returns:
        Where everything stands at the end.
    """
    grid = Grid({cell.name: cell for cell in cells}, workers=workers)
    for name in grid.cells:
        if said := set_aside(folder, name):
            print(f"rankwise: {terminal(said)}", file=sys.stderr)
        found = read_cell(cell_file(folder, name))
        if isinstance(found, Failure) and (retry_failed or not found.again):
            cell_file(folder, name).unlink()
        elif found is not None:
            _enter(grid, name, found)
    start = _starter(workers, threads, bool(recipe.training.get("use_cpu")))
    slots: dict[int, tuple[Any, float]] = {}
    try:
        while True:
            _block(grid)
            for slot in range(workers):
                if slot not in slots and (following := _next(grid)) is not None:
                    grid.running[slot] = following
                    process = start(slot, recipe, grid.cells, following, folder, workers)
                    slots[slot] = process, time.time()
            if show is not None:
                show(grid)
            if not slots:
                return grid
            time.sleep(POLL)
            for slot, (process, began) in list(slots.items()):
                if not process.is_alive():
                    process.join()
                    del slots[slot]
                    _collect(grid, grid.running.pop(slot), folder, process.exitcode, began)
    finally:
        for process, _ in slots.values():
            process.terminate()
            process.join()


def _next(grid: Grid) -> str | None:
    """The first cell that waits for nothing."""
    over = grid.done | set(grid.failed)
    return next((n for n in grid.open() if set(grid.cells[n].needs) <= over), None)


def _block(grid: Grid) -> None:
    """Marks what waits for a cell that broke down, or for one that is blocked itself."""
    for name in grid.open():
        down = {n for n, failure in grid.failed.items() if not failure.again} | grid.blocked
        if set(grid.cells[name].needs) & down:
            grid.blocked.add(name)


def _enter(grid: Grid, name: str, found: Result | Failure) -> None:
    if isinstance(found, Result):
        grid.done.add(name)
    else:
        grid.failed[name] = found


def _collect(grid: Grid, name: str, folder: Path, code: int | None, began: float) -> None:
    """What a process left; where that is nothing, how it ended."""
    found = read_cell(cell_file(folder, name))
    if found is None:
        how = f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"
        log = folder / "logs" / f"{name}.log"
        lines = log.read_text(errors="replace").split("\n") if log.is_file() else []
        last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
        said = f"its process ended by {how}; the last it printed: {last[:300]}"
        found = Failure(grid.cells[name].spec, said, again=False)
        write_failure(cell_file(folder, name), found)
    if isinstance(found, Result):
        grid.seconds[name] = time.time() - began
    _enter(grid, name, found)


def context_for(gpus: Sequence[str]) -> Any:
    """How processes begin: from a server that has imported torch once, which saves seconds a cell.

    CUDA allows no fork, so with GPUs each begins from nothing.
    """
    context: Any = multiprocessing.get_context("spawn" if gpus else "forkserver")
    if not gpus:
        context.set_forkserver_preload(
            ["rankwise.compare.execute", "sklearn.metrics", "scipy.stats"]
        )
    return context


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [gpu for gpu in given.split(",") if gpu and gpu != "-1"]
    if which("nvidia-smi") is None:
        return []
    found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return [str(n) for n, _ in enumerate(re.findall("^GPU", found.stdout, re.MULTILINE))]


def _starter(workers: int, threads: int | None, use_cpu: bool) -> Callable[..., Any]:
    """A function that starts a cell in a process of its own, in one of the slots."""
    gpus = [] if use_cpu else visible_gpus()
    share = threads or min(_most_threads(), max(1, (os.cpu_count() or 1) // workers))
    context = context_for(gpus)

    def start(slot: int, *what: Any) -> Any:
        gpu = gpus[slot % len(gpus)] if gpus else None
        process = context.Process(target=_work, args=(share, gpu, *what))
        process.start()
        return process

    return start


def _most_threads() -> float:
    """What OMP_NUM_THREADS allows; no limit where it is not set, or is no count."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) else math.inf


def _work(
    threads: int,
    gpu: str | None,
    recipe: Recipe,
    cells: Mapping[str, Cell],
    name: str,
    folder: Path,
    workers: int,
) -> None:
    """In the new process: its share of the machine, its log, and the cell."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    log = folder / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        import torch

        from rankwise.compare.execute import execute

        gc.freeze()  # what was imported is not looked through by each collection
        torch.set_num_threads(threads)
        found = execute(recipe, cells, name, folder, workers)
        if isinstance(found, Failure):
            print(found.error)


def check_first(recipe: Recipe, cells: Sequence[Cell], workers: int) -> list[str]:
    """`fits.misfits`, in a process of its own, so that no model stays in this one."""
    context = context_for([] if recipe.training.get("use_cpu") else visible_gpus())
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(_misfits, recipe, cells, workers).result()
    except BrokenProcessPool as error:
        raise RankwiseError(
            "the process that looks whether the cells can run was killed, for want of memory "
            "perhaps; nothing was begun, start it again"
        ) from error


def _misfits(recipe: Recipe, cells: Sequence[Cell], workers: int) -> list[str]:
    from rankwise.compare.fits import misfits

    return misfits(recipe, cells, workers)
