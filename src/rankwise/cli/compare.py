"""`rankwise compare`: a recipe's methods, tasks and seeds as a grid of cells, run or listed."""

import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.cli.arguments import flag, required
from rankwise.cli.flags import Group, parse
from rankwise.errors import RankwiseError, ResultError
from rankwise.escape import terminal

if TYPE_CHECKING:
    from rankwise.compare.cells import Cell
    from rankwise.compare.recipe import Recipe
    from rankwise.compare.workers import Grid


@dataclass
class CompareArguments:
    """The grid."""

    recipe: str | None = flag(None, "YAML file; may stand without --recipe")
    output_dir: str | None = flag(None, "folder for the results, cells/NAME.json; may have some")
    data_dir: str | None = flag(None, "folder of a folder a task, instead of the recipe's")
    model_name_or_path: str | None = flag(None, "base model, instead of the recipe's")
    trust_remote_code: bool = flag(False, "run code that the model or data set brings along")
    workers: int = flag(1, "cells at a time; threads and GPUs are shared out among them")
    threads: int | None = flag(
        None, "threads of a cell; without it cores / workers, OMP_NUM_THREADS at most"
    )
    cell: str | None = flag(None, "run this one alone, and what it waits for")
    list: bool = flag(False, "print a command line for each cell that is not there yet")
    retry_failed: bool = flag(False, "run cells anew whose failure is on record")
    snakefile: bool = flag(False, "write output_dir/Snakefile and run nothing")
    estimate: int = flag(0, "run so many steps of each method on each task; print the hours of all")


def main(argv: Sequence[str]) -> None:
    """Compare methods over tasks and seeds, each at its best learning rate: `compare RECIPE`."""
    if argv and not argv[0].startswith("-"):
        argv = ["--recipe", *argv]
    (given,) = parse("compare", main.__doc__ or "", [Group("grid", CompareArguments())], argv)
    from rankwise.compare.cells import cells_of
    from rankwise.compare.recipe import read_recipe
    from rankwise.files import check_folder

    if given.estimate < 0:
        raise RankwiseError(f"--estimate is {given.estimate}; it has to be a number of steps")
    for name in ("workers", "threads"):
        if (value := getattr(given, name)) is not None and value < 1:
            raise RankwiseError(f"--{name} is {value}; it has to be at least 1")
    path = required(given.recipe, "recipe", "compare")
    folder = Path(required(given.output_dir, "output_dir", "compare"))
    check_folder(folder, "--output_dir")
    trusted = given.trust_remote_code
    recipe = read_recipe(path, given.data_dir, given.model_name_or_path, trusted)
    cells = cells_of(recipe)
    if given.list:
        _list(cells, folder, given)
    elif given.snakefile:
        _snakefile(cells, folder, given)
    elif given.estimate > 0:
        _estimate(recipe, cells, folder, given.estimate)
    elif given.cell is not None:
        _one(recipe, cells, folder, given)
    else:
        _all(recipe, cells, folder, given)


def command(given: CompareArguments, *, absolute: bool = False) -> list[str]:
    """The command line of a cell, up to its name."""
    paths = {"output_dir": given.output_dir, "data_dir": given.data_dir}
    paths["model_name_or_path"] = given.model_name_or_path
    line = ["rankwise", "compare", _path(given.recipe, absolute)]
    for name, value in paths.items():
        if value is not None:
            line += [f"--{name}", _path(value, absolute)]
    line += ["--trust_remote_code"] * given.trust_remote_code
    return [*line, "--cell"]


def _path(value: Any, absolute: bool) -> str:
    path = Path(value)
    return str(path.resolve()) if absolute and path.exists() else str(value)


def _list(cells: "Sequence[Cell]", folder: Path, given: CompareArguments) -> None:
    from rankwise.compare.cells import cell_file, is_over, read_cell

    for cell in cells:
        try:
            found = read_cell(cell_file(folder, cell.name))
        except ResultError as error:  # running the cell sets it aside
            print(f"rankwise: {terminal(error)}", file=sys.stderr)
            found = None
        if not is_over(found):
            print(shlex.join([*command(given), cell.name]))


def _snakefile(cells: "Sequence[Cell]", folder: Path, given: CompareArguments) -> None:
    from rankwise.cli.show import say
    from rankwise.compare.snakefile import write_snakefile

    folder.mkdir(parents=True, exist_ok=True)
    line = command(given, absolute=True)
    write_snakefile(folder / "Snakefile", cells, line, given.threads or 1)
    say(f"{len(cells)} cells in {folder / 'Snakefile'}; in that folder:")
    say("  snakemake --cores all --keep-going")


def _estimate(recipe: "Recipe", cells: "Sequence[Cell]", folder: Path, steps: int) -> None:
    """Prints what each method on each task would take, and writes estimate.json."""
    from dataclasses import asdict

    from rankwise.cli.show import say
    from rankwise.compare.estimate import Estimate, estimates
    from rankwise.compare.execute import machine
    from rankwise.files import write_json

    def show(found: Estimate) -> None:
        name = f"{found.method} on {found.task}"
        if found.error:
            say(f"{name}: {found.error}")
            return
        figures = f"{found.cells} cells, {found.seconds:.2f} s a step, {found.gib:.1f} GiB"
        say(f"{name}: {found.hours:.2f} h ({figures})")

    found = estimates(recipe, cells, steps, show)
    worked = [estimate for estimate in found if not estimate.error]
    hours = sum(estimate.hours for estimate in worked)
    plain = [{k: None if v != v else v for k, v in asdict(estimate).items()} for estimate in found]
    about = {"recipe": recipe.path.name, "steps": steps, "hours": hours, "machine": machine(1)}
    write_json(folder / "estimate.json", about | {"estimates": plain})
    say(f"{hours:.1f} h in all, one cell at a time; in {folder / 'estimate.json'}")
    if len(worked) < len(found):
        raise RankwiseError(f"{len(found) - len(worked)} of {len(found)} could not be run")


def _one(recipe: "Recipe", cells: "Sequence[Cell]", folder: Path, given: CompareArguments) -> None:
    from rankwise.compare.cells import Failure, cell_file, read_cell, set_aside
    from rankwise.compare.recipe import nearest

    by_name, name = {cell.name: cell for cell in cells}, given.cell or ""
    if name not in by_name:
        raise RankwiseError(f"the recipe has no cell {name!r}{nearest(name, list(by_name)[:20])}")
    path = cell_file(folder, name)
    if said := set_aside(folder, name):
        print(f"rankwise: {terminal(said)}", file=sys.stderr)
    if given.retry_failed and isinstance(read_cell(path), Failure):
        path.unlink()
    from rankwise.compare.execute import execute

    if given.threads is not None:
        import torch

        torch.set_num_threads(given.threads)
    found = execute(recipe, by_name, name, folder, given.workers)
    if isinstance(found, Failure):
        print(f"rankwise: {name} failed: {terminal(found.error)}", file=sys.stderr)
        # a failure that would be repeated is a finding like another, and what waits goes on
        raise SystemExit(0 if found.again else 1)
    print(path)


def _all(recipe: "Recipe", cells: "Sequence[Cell]", folder: Path, given: CompareArguments) -> None:
    from rankwise.cli.progress import grid_progress
    from rankwise.compare.cells import cell_file, is_over, read_cell, set_aside
    from rankwise.compare.workers import check_first, run_grid

    said = [line for cell in cells if (line := set_aside(folder, cell.name))]
    for line in said:
        print(f"rankwise: {terminal(line)}", file=sys.stderr)
    left = [c for c in cells if not is_over(read_cell(cell_file(folder, c.name)))]
    wrong = check_first(recipe, left, given.workers) if left else []
    if wrong:
        *others, last = wrong
        for line in others:
            print(f"rankwise: {terminal(line)}", file=sys.stderr)
        raise RankwiseError(f"{last}. Nothing was run: mend the recipe")
    # a scheduler's way to stop a job: the cells' processes are to end with this one
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with grid_progress() as show:
        grid = run_grid(
            recipe,
            cells,
            folder,
            workers=given.workers,
            threads=given.threads,
            retry_failed=given.retry_failed,
            show=show,
        )
    _say(grid, folder, given)


def _say(grid: "Grid", folder: Path, given: CompareArguments) -> None:
    from rankwise.cli.show import say

    for name, failure in grid.failed.items():
        say(f"failed: {name}: {failure.error}")
    if grid.blocked:
        say(f"not begun, for what they wait for broke down: {len(grid.blocked)}")
    say(f"{len(grid.done)} of {len(grid.cells)} cells are in {folder / 'cells'}")
    say(f"  rankwise report {folder}")
    broke = any(not failure.again for failure in grid.failed.values())
    if broke or any(grid.cells[name].held_out is None for name in grid.failed):
        raise SystemExit(1)
