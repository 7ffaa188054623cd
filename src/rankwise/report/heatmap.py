"""Ranks as a heat map, layers x matrices (arXiv 2403.09113, figure 3): a PNG, and for notebooks."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rankwise import escape
from rankwise.files import temporary_name

if TYPE_CHECKING:
    from rankwise.plan import RankPlan

T = TypeVar("T")


def save_heatmap(plan: "RankPlan", path: Path) -> bool:
    """Draws a plan's ranks. Needs matplotlib (`pip install 'rankwise[plots]'`).

    Args:
        plan: any plan.
        path: of the PNG; written through a temporary name.

    Returns:
        False where matplotlib is not installed and nothing was drawn.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    layers, matrices, ranks = grid(plan.ranks)
    figure = Figure(
        figsize=(1.8 + 0.55 * len(layers), 1.5 + 0.5 * len(matrices)), layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    top = max(plan.r, *plan.ranks.values())
    image = axes.imshow(
        [[float("nan") if r is None else r for r in row] for row in ranks],
        cmap="viridis",
        vmin=0,
        vmax=top,
        aspect="equal",
    )
    for y, row in enumerate(ranks):
        for x, r in enumerate(row):
            if r is not None:
                color = "black" if r > 0.6 * top else "white"
                axes.text(x, y, str(r), ha="center", va="center", color=color)
    axes.set_xticks(range(len(layers)), layers)
    axes.set_yticks(range(len(matrices)), matrices)
    axes.set_xlabel("layer")
    mean = sum(plan.ranks.values()) / len(plan.ranks)
    axes.set_title(
        f"ranks, mean {mean:.2f} of {plan.r}; {plan.parameters:,} parameters", fontsize=10
    )
    figure.colorbar(image, ax=axes, label="rank", shrink=0.7)
    with temporary_name(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    return True


def html_table(caption: str, ranks: Mapping[str, int]) -> str:
    """Ranks by entry as an HTML table, the higher the darker; legible on light and dark pages."""
    layers, matrices, rows = grid(ranks)
    top = max([*ranks.values(), 1])

    def cell(rank: int | None) -> str:
        if rank is None:
            return "<td></td>"
        shade = f"background:rgba(70,110,200,{0.6 * rank / top:.2f})"
        return f'<td style="text-align:center;{shade}">{rank}</td>'

    head = "".join(f"<th>{escape.html(layer)}</th>" for layer in layers)
    body = "".join(
        f"<tr><th>{escape.html(matrix)}</th>{''.join(map(cell, row))}</tr>"
        for matrix, row in zip(matrices, rows, strict=True)
    )
    return (
        f"<table><caption>{escape.html(caption)}</caption>"
        f"<tr><th>layer</th>{head}</tr>{body}</table>"
    )


def grid(of: Mapping[str, T]) -> tuple[list[str], list[str], list[list[T | None]]]:
    """Ranks by entry as a table: layers, matrices, and ranks[matrix][layer], None where absent.

    The layer is the first number in an entry's name; the matrix is the name's last part, or more of
    its end where two entries of a layer share that.
    """
    places = []
    for name in of:
        found = re.search(r"(?:^|\.)(\d+)\.", name)
        layer = found.group(1) if found else "-"
        places.append((layer, f"{name[: found.start()]}.{name[found.end() :]}" if found else name))
    short = _shortest({rest for _, rest in places})
    layers = list(dict.fromkeys(layer for layer, _ in places))
    matrices = list(dict.fromkeys(short[rest] for _, rest in places))
    ranks: list[list[T | None]] = [[None] * len(layers) for _ in matrices]
    for (layer, rest), r in zip(places, of.values(), strict=True):
        ranks[matrices.index(short[rest])][layers.index(layer)] = r
    return layers, matrices, ranks


def _shortest(names: set[str]) -> dict[str, str]:
    """Each dotted name's shortest ending that no other name shares."""
    short = {}
    for name in names:
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            ending = ".".join(parts[-length:])
            if sum(n == ending or n.endswith("." + ending) for n in names) == 1:
                break
        short[name] = ending
    return short
