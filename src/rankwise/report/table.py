"""The table of a run and the sentence under it."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from rankwise.tasks import Task


def print_table(
    arms: dict[str, dict[str, Any]], task: Task, console: Console | None = None
) -> None:
    """Prints one row per arm: metrics, parameters, seconds, peak memory.

    Args:
        arms: figures by the arm's name, as `metrics.json` holds them.
        task: names the metrics.
        console: standard output where None.
    """
    console = console or Console()
    first = next(iter(arms.values()))["eval"]
    rows = f"{first['rows']:,} {first['split']} rows"
    table = Table(
        title=f"{task.name}: {rows}, one seed",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("ranks", min_width=11)
    metrics = [name for name in task.metrics if name in first]
    named = (name.replace("_", "\n") for name in metrics)
    for header in (*named, "trainable\nparameters", "search\ns", "train\ns", "peak\nGiB"):
        table.add_column(header, justify="right", no_wrap=True)
    for name, figures in arms.items():
        peak = max(figures["peak_memory_bytes"], figures.get("search_peak_memory_bytes", 0))
        table.add_row(
            name,
            *(f"{figures['eval'][metric]:.4f}" for metric in metrics),
            f"{figures['trainable_parameters']:,}",
            f"{figures.get('search_seconds', 0.0):.0f}",
            f"{figures['train_seconds']:.0f}",
            f"{peak / 2**30:.2f}",
        )
    console.print(table)


def verdict(arms: dict[str, dict[str, Any]], task: Task) -> str:
    """Whether choosing ranks helped, in a sentence that does not flatter.

    Args:
        arms: the searched plan's figures first, then the controls'.
        task: says which metric, and in which direction it counts.
    """
    (_, ours), *controls = arms.items()
    metric = task.main_metric
    if not controls:
        return "No control was trained: nothing here says whether choosing ranks helped."
    sign = 1 if task.greater_is_better else -1
    lines = []
    for name, figures in controls:
        gain = sign * (ours["eval"][metric] - figures["eval"][metric])
        if gain != gain:
            lines.append(f"{name}: {metric} is not a number, which says nothing about ranks.")
        elif gain <= 0:
            how = "as well" if gain == 0 else f"better by {-gain:.4f}"
            lines.append(f"{name} did {how} in {metric}: choosing ranks did not help here.")
        else:
            lines.append(f"The searched ranks beat {name} by {gain:.4f} in {metric}.")
    spread = "One seed is one draw: repeat with other --seed values before believing a difference."
    return "\n".join([*lines, spread])
