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


def print_curve(figures: dict[str, Any], console: Console | None = None) -> None:
    """Prints the quality of a nested adapter at every rank: metrics and standard error.

    Args:
        figures: of metrics.json; its `curve` is `rankwise.Curve.to_dict()`.
        console: standard output where None.
    """
    found = figures["curve"]
    names = [found["metric"], *(n for n in found["metrics"][0] if n != found["metric"])]
    table = Table(
        title=f"every rank, {found['rows']:,} validation rows",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("rank", justify="right")
    for name in (names[0], "± s.e.", *names[1:]):
        table.add_column(name.replace("_", "\n"), justify="right", no_wrap=True)
    for rank, metrics, error in zip(
        found["ranks"], found["metrics"], found["standard_errors"], strict=True
    ):
        rest = (f"{metrics[name]:.4f}" for name in names[1:])
        table.add_row(str(rank), f"{metrics[names[0]]:.4f}", f"{error:.4f}", *rest)
    (console or Console()).print(table)


def print_cuts(cuts: dict[str, Any], console: Console | None = None) -> None:
    """Prints what a truncation did to every module.

    Args:
        cuts: `rankwise.adapter.Cut` by module.
        console: standard output where None.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for header in ("module", "rank before", "rank", "lost"):
        table.add_column(header, justify="left" if header == "module" else "right")
    for name, cut in cuts.items():
        lost = "trained" if cut.lost is None else f"{100 * cut.lost:.1f} %"
        table.add_row(name, str(cut.rank_before), str(cut.rank), lost)
    (console or Console()).print(table)


def verdict(arms: dict[str, dict[str, Any]], task: Task, trained_at_once: bool = False) -> str:
    """Whether choosing ranks helped, in a sentence that does not flatter.

    Args:
        arms: the searched plan's figures first, then the controls'.
        task: says which metric, and in which direction it counts.
        trained_at_once: the first arm is DyLoRA's: what differs is the training, not the ranks.
    """
    (_, ours), *controls = arms.items()
    metric = task.main_metric
    if not controls:
        what = (
            "how DyLoRA compares with LoRA" if trained_at_once else "whether choosing ranks helped"
        )
        return f"No control was trained: nothing here says {what}."
    sign = 1 if task.greater_is_better else -1
    lines = []
    for name, figures in controls:
        gain = sign * (ours["eval"][metric] - figures["eval"][metric])
        if gain != gain:
            lines.append(f"{name}: {metric} is not a number, which says nothing.")
        elif gain <= 0:
            how = "as well" if gain == 0 else f"better by {-gain:.4f}"
            what = "one training for all ranks" if trained_at_once else "choosing ranks"
            lines.append(f"{name} did {how} in {metric}: {what} did not help here.")
        else:
            ours_name = "DyLoRA" if trained_at_once else "The searched ranks"
            lines.append(f"{ours_name} beat {name} by {gain:.4f} in {metric}.")
    spread = "One seed is one draw: repeat with other --seed values before believing a difference."
    return "\n".join([*lines, spread])
