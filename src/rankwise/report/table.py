"""The tables of a run, a curve and a cut, and the sentence under them; from result records only."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from rankwise.choose import Curve, interval
from rankwise.escape import markup as escape
from rankwise.report.chance import learned
from rankwise.result import Result
from rankwise.tasks.metrics import find_metric

LARGER = 1.5  # times as many parameters: no longer of the same size
NEAR = 4  # times as many, and more: it is there for reference, nobody takes it for a control


def _table(**options: Any) -> Table:
    return Table(title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), **options)


def print_table(results: Sequence[Result], console: Console | None = None) -> None:
    """Prints one row per result: metrics, parameters, seconds, peak memory.

    Args:
        results: on the same rows.
        console: standard output where None.
    """
    first = results[0]
    rows = f"{first.rows['evaluated']:,} {first.split} rows"
    table = _table(title=f"{escape(first.task['name'])}: {rows}, one seed")
    table.add_column("method", min_width=11)
    metrics = [name for name in first.task["metrics"] if name in first.metrics]
    named = (name.replace("_", "\n") for name in metrics)
    for header in (*named, "trainable\nparameters", "search\ns", "train\ns", "peak\nGiB"):
        table.add_column(header, justify="right", no_wrap=True)
    for result in results:
        cost = result.cost
        peak = max(cost["peak_memory_bytes"], cost.get("search_peak_memory_bytes", 0))
        table.add_row(
            escape(result.name),
            *(f"{result.metrics[metric]:.4f}" for metric in metrics),
            f"{result.trainable_parameters:,}",
            f"{cost['search_seconds']:.0f}",
            f"{cost['train_seconds']:.0f}",
            f"{peak / 2**30:.2f}",
        )
    (console or Console()).print(table)


def print_curve(curve: Curve, console: Console | None = None) -> None:
    """Prints the quality of one adapter at every size: metrics and standard error.

    Args:
        curve: what was measured.
        console: standard output where None.
    """
    one = "rank" if curve.unit == "rank" else "size"
    table = _table(title=f"every {one}, on {curve.rows:,} held-out rows")
    table.add_column(curve.unit, justify="right")
    others = [name for name in curve.metrics[0] if name != curve.metric]
    for name in (curve.metric, "± s.e.", *others):
        table.add_column(name.replace("_", "\n"), justify="right", no_wrap=True)
    for size, metrics, error in zip(curve.sizes, curve.metrics, curve.standard_errors, strict=True):
        rest = (f"{metrics[name]:.4f}" for name in others)
        table.add_row(f"{size:,}", f"{metrics[curve.metric]:.4f}", f"{error:.4f}", *rest)
    (console or Console()).print(table)


def print_cuts(cuts: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints what a cut did to every module.

    Args:
        cuts: `rankwise.adapter.ModuleCut` by module.
        console: standard output where None.
    """
    table = _table(
        caption="lost: the part of the module's update that is gone, ‖ΔW − new ΔW‖ / ‖ΔW‖; it can "
        "pass 100 % where what stays makes up for other modules",
        caption_justify="left",
    )
    for header in ("module", "rank before", "rank", "lost"):
        table.add_column(header, justify="left" if header == "module" else "right")
    for name, cut in cuts.items():
        lost = "trained" if cut.lost is None else f"{100 * cut.lost:.1f} %"
        table.add_row(escape(name), str(cut.rank_before), str(cut.rank), lost)
    (console or Console()).print(table)


def choice(result: Result) -> str:
    """What was picked out of several sizes and by what, in words; "" where nothing was."""
    figures, ranks = result.figures, set((result.ranks or {}).values())
    if "picked_by" not in figures:
        return ""
    if "choice" in figures:
        return str(figures["choice"])
    what = f"rank {ranks.pop()}" if len(ranks) == 1 else f"ranks {min(ranks)} to {max(ranks)}"
    said = f"picked {what} ({figures['picked_by']})"
    if (found := figures.get("by_layer")) is None:
        return said
    how = "below" if found["pays"] else "not below, so the uniform rank was kept:"
    return (
        f"{said}\nranks by layer: loss {found['by_layer_loss']:.4f} at {found['parameters']:,} "
        "parameters on the half of the held-out rows that they were not chosen on, "
        f"{how} {found['uniform_loss']:.4f} of rank {found['uniform_rank']} everywhere "
        f"({found['uniform_parameters']:,})"
    )


def verdict(ours: Result, controls: Sequence[Result]) -> str:
    """Whether a method's claim held against its controls, in sentences that do not flatter.

    Args:
        ours: the method's result.
        controls: on the same rows.
    """
    lines = [] if learned(ours) is not False else [nothing_learned(ours)]
    if not controls:
        said = f"No control was trained: nothing here says whether {ours.name} helped."
        return "\n".join([*lines, said])
    metric = ours.task["metrics"][0]
    sign = 1 if find_metric(metric).greater_is_better else -1
    claim = ours.claim or ours.name
    for control in controls:
        larger = (control.lora_parameters or 0) / (ours.lora_parameters or math.inf)
        if larger > LARGER:
            if larger < NEAR:
                said = f"{control.name} has {larger:.1f} times as many parameters:"
                lines.append(f"{said} it is no control of this size.")
            continue
        gain = sign * (ours.metrics[metric] - control.metrics[metric])
        if gain != gain:
            lines.append(f"{control.name}: {metric} is not a number, which says nothing.")
            continue
        width = _width(ours, control)
        paired = "" if width is None else f" ({_interval(gain, width)})"
        if width is not None and abs(gain) <= width:
            lines.append(
                f"{ours.name} and {control.name} cannot be told apart in {metric}{paired}: {claim} "
                "neither helped nor hurt that these rows could tell."
            )
        elif gain > 0:
            lines.append(f"{ours.name} beat {control.name} by {gain:.4f} in {metric}{paired}.")
        else:
            how = "as well" if gain == 0 else f"better by {-gain:.4f}"
            lines.append(
                f"{control.name} did {how} in {metric}{paired}: {claim} did not help here."
            )
    spread = (
        "An interval is over rows, of one training each: repeat with other --seed values before "
        "believing a difference."
    )
    return "\n".join([*lines, spread])


def nothing_learned(result: Result) -> str:
    """That nothing was, and so what the figures beside it are worth, in a sentence."""
    metric = result.task["metrics"][0]
    return (
        f"{result.name} learned nothing here: {metric} {result.metrics[metric]:.4f} on "
        f"{result.rows['evaluated']:,} rows is within two standard errors of a model that was "
        "taught nothing, so that no size and no method can be told from another: train longer, on "
        "more rows, or look for a rate with --tune."
    )


def _width(ours: Result, control: Result) -> float | None:
    """Half the paired interval of their difference; None where rows were not resampled."""
    if not ours.resampled or len(ours.resampled) != len(control.resampled):
        return None
    return interval(ours.resampled, control.resampled)


def _interval(gain: float, width: float) -> str:
    return f"paired 95 % interval of the gain {gain - width:+.4f} to {gain + width:+.4f}"
