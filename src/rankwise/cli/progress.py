"""The display of a grid that runs: done, running, failed, and the time left."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

if TYPE_CHECKING:
    from rankwise.compare.workers import Grid

console = Console(stderr=True)


@contextmanager
def grid_progress() -> Iterator[Callable[["Grid"], None]]:
    """A function that shows a grid: in place on a terminal, else a line whenever a cell ends."""
    if not console.is_terminal:
        seen: set[str] = set()

        def tell(grid: "Grid") -> None:
            new = [n for n in (*grid.done, *grid.failed) if n not in seen]
            if seen or len(new) < len(grid.cells):
                for name in new if seen else []:
                    how = "failed" if name in grid.failed else "done"
                    console.print(f"{how} {name}; {summary(grid)}", highlight=False, soft_wrap=True)
            seen.update(new, {""})

        yield tell
        return
    with Live(console=console, refresh_per_second=4, transient=False) as live:
        yield lambda grid: live.update(display(grid))


def display(grid: "Grid") -> Group:
    """A bar, the counts, and what runs."""
    over = len(grid.done) + len(grid.failed)
    lines = [Text(f"  {name}", style="dim") for name in grid.running.values()]
    return Group(
        ProgressBar(total=len(grid.cells), completed=over, width=60), Text(summary(grid)), *lines
    )


def summary(grid: "Grid") -> str:
    """`12 of 40 done, 2 running, 1 failed, about 1:05 h left`."""
    parts = [f"{len(grid.done)} of {len(grid.cells)} done", f"{len(grid.running)} running"]
    if grid.failed:
        parts.append(f"{len(grid.failed)} failed")
    if grid.blocked:
        parts.append(f"{len(grid.blocked)} held up")
    left = grid.seconds_left()
    if left is not None and (grid.open() or grid.running):
        parts.append(f"about {clock(left)} left")
    return ", ".join(parts)


def clock(seconds: float) -> str:
    """3700 as `1:01 h`, 70 as `1:10 min`, 5 as `5 s`."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    return f"{minutes // 60}:{minutes % 60:02d} h"
