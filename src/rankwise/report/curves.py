"""The figure of a metric against the rank, or another size."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankwise.files import temporary_name

Series = tuple[Sequence[int], Sequence[float], Sequence[float]]
"""Sizes, values, and the half-width of the band around each value."""


SPREAD = 32  # times the smallest: more than ranks ever differ by


def save_curves(
    series: Mapping[str, Series],
    metric: str,
    path: Path,
    *,
    mark: int | None = None,
    spread: str,
    unit: str = "rank",
) -> bool:
    """Draws a metric against the size. Needs matplotlib (`pip install 'rankwise[plots]'`).

    Args:
        series: by label, in the order of the legend.
        metric: label of the vertical axis.
        path: a .png.
        mark: a size to point out, the picked one.
        spread: what the bands are, for the caption.
        unit: of the sizes.

    Returns:
        False where matplotlib is not installed and nothing was drawn.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False

    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    draw_curves(axes, series)
    sizes = sorted({size for of, _, _ in series.values() for size in of})
    if sizes[-1] > SPREAD * sizes[0]:  # sizes that double: each as far from the next
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [_short(size) for size in sizes], fontsize="small")
        axes.minorticks_off()
    if mark is not None:
        axes.axvline(mark, color="0.6", linestyle=":", zorder=0)
        late = mark > sizes[len(sizes) // 2]
        axes.annotate(
            f"picked: {mark:,}",
            (mark, 0),
            xycoords=("data", "axes fraction"),
            xytext=(-4 if late else 4, 5),
            textcoords="offset points",
            ha="right" if late else "left",
        )
    axes.set_xlabel(unit)
    axes.set_ylabel(metric)
    axes.set_title(f"bands: one {spread}", fontsize="small", color="0.4", loc="right")
    with temporary_name(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    return True


def _short(size: int) -> str:
    """41,856 as 42k: eight of them stand side by side."""
    return f"{size / 1000:.3g}k" if size >= 1000 else str(size)


def draw_curves(axes: Any, series: Mapping[str, Series]) -> None:
    """One line with a band for each series, into matplotlib axes."""
    for label, (ranks, values, spreads) in series.items():
        (line,) = axes.plot(ranks, values, marker="o", markersize=3.5, label=label)
        low = [v - s for v, s in zip(values, spreads, strict=True)]
        high = [v + s for v, s in zip(values, spreads, strict=True)]
        axes.fill_between(ranks, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_xticks(sorted({rank for ranks, _, _ in series.values() for rank in ranks}))
