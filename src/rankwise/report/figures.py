"""The drawings of a report, as PNG, and as SVG whose colours a page decides.

matplotlib writes colours into its SVG. Here each stands for a CSS variable, so that a drawing
follows the page into the dark.
"""

import math
import re
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from rankwise.errors import RankwiseError
from rankwise.files import temporary_name
from rankwise.report import suite as of
from rankwise.report.statistics import Interval
from rankwise.report.suite import Arm, Comparison, Suite

MARKS = "osD^vPX*<>hd"
COLOURS = 8
LABEL = 32  # letters


@dataclass(frozen=True)
class Theme:
    """Colours: of text, of what is less, of lines behind, and of the arms."""

    ink: str
    muted: str
    line: str
    arms: tuple[str, ...]


LIGHT = Theme(
    "#1d2733",
    "#66707c",
    "#d9dee4",
    ("#2f6fb7", "#c2502f", "#2e8b57", "#8450b0", "#a87908", "#137f92", "#b03a76", "#6b7280"),
)
# No colours but names: six digits that nothing else has, for what the page says.
NAMES = Theme("#0a0001", "#0a0002", "#0a0003", tuple(f"#0a01{n:02x}" for n in range(COLOURS)))
VARIABLES = {
    NAMES.ink: "var(--ink)",
    NAMES.muted: "var(--muted)",
    NAMES.line: "var(--line)",
    **{name: f"var(--arm{n})" for n, name in enumerate(NAMES.arms)},
}


def save_png(name: str, suite: Suite, path: Path) -> None:
    """Draws a figure on white.

    Args:
        name: "differences" or "parameters".
        suite: what it shows.
        path: of the PNG; written through a temporary name.
    """
    with _style():
        figure = DRAWINGS[name](suite, LIGHT)
        with temporary_name(path) as temporary:
            figure.savefig(temporary, dpi=160, format="png", facecolor="white")


def as_svg(name: str, suite: Suite) -> str:
    """A figure as an element for an HTML page, which sets the variables --ink, --arm0, ...

    The text in it is escaped. Ids carry the figure's name, so that several fit in a page.
    """
    file = StringIO()
    with _style(name):
        DRAWINGS[name](suite, NAMES).savefig(
            file, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    # the size is the page's matter; the shape stays in viewBox
    text = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", text)
    text = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # the same in every drawing
    text = re.sub(r"font: (\d[\d.]*)px [^;\"]*", r"font-size: \1px", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    return text.strip()


@contextmanager
def _style(salt: str = "") -> Iterator[None]:
    """Text as it is, never as mathematics, and the same file for the same results."""
    try:
        import matplotlib
    except ImportError as error:
        raise RankwiseError(
            "a report needs matplotlib, which is not installed; run: pip install 'rankwise[report]'"
        ) from error
    settings = {
        "text.parse_math": False,
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "svg.id": None,
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.8,
    }
    with matplotlib.rc_context({k: v for k, v in settings.items() if k in matplotlib.rcParams}):
        yield


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _tidy(axes: Any, theme: Theme) -> None:
    axes.tick_params(colors=theme.muted, labelcolor=theme.ink, length=3)
    for spine in axes.spines.values():
        spine.set_color(theme.muted)
    axes.xaxis.label.set_color(theme.ink)


def _differences(suite: Suite, theme: Theme) -> Any:
    """A line an arm: the mean difference, both intervals, and each task's mean as a dot."""
    compared = [c for c in of.comparisons(suite) if c.differences]
    compared.sort(key=lambda c: c.mean)
    figure = _figure(7.0, 0.9 + 0.42 * len(compared))
    axes = figure.add_subplot()
    axes.axvline(0, color=theme.muted, linewidth=1)
    for y, c in enumerate(compared):
        _line(axes, y, c, theme)
    names = [_name(c.arm) + ("" if c.equal_size else f"  (× {c.size:.2g})") for c in compared]
    axes.set_yticks(range(len(compared)), names)
    axes.set_ylim(-0.6, len(compared) - 0.4)
    axes.grid(axis="x", color=theme.line, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("points more than plain LoRA of the size")
    axes.spines["left"].set_visible(False)
    _tidy(axes, theme)
    axes.tick_params(axis="y", length=0)
    return figure


def _line(axes: Any, y: int, compared: Comparison, theme: Theme) -> None:
    colour = theme.arms[0] if compared.equal_size else theme.muted
    wide, narrow = compared.t, compared.bootstrap
    for interval, width in ((wide, 1.2), (narrow, 4.0)):
        if not math.isnan(interval.low):
            _bar(axes, y, interval, width, colour)
    means = [statistics.fmean(seeds) for seeds in compared.differences.values()]
    axes.plot(means, [y] * len(means), "|", color=theme.ink, markersize=7, markeredgewidth=0.8)
    axes.plot([compared.mean], [y], "o", color=colour, markersize=6)


def _bar(axes: Any, y: int, interval: Interval, width: float, colour: str) -> None:
    axes.plot([interval.low, interval.high], [y, y], "-", color=colour, linewidth=width,
              solid_capstyle="butt")  # fmt: skip


def _parameters(suite: Suite, theme: Theme) -> Any:
    """A panel a task, the metric over parameters on a log axis; a colour and a mark an arm."""
    tasks = [t for t in suite.tasks if any(_point(suite, arm, t) for arm in suite.arms)]
    columns = min(2, len(tasks))
    rows = -(-len(tasks) // columns)
    legend = -(-len(suite.arms) // 3)
    figure = _figure(7.0, 2.6 * rows + 0.3 + 0.22 * legend)
    panels = figure.subplots(rows, columns, squeeze=False)
    handles: dict[str, Any] = {}
    for axes, task in zip(panels.flat, tasks, strict=False):
        for number, arm in enumerate(suite.arms):
            if (point := _point(suite, arm, task)) is not None:
                handles[_name(arm)] = _mark(axes, number, point, theme)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda x, _: _short(x))
        axes.set_title(of.task_head(suite, task), loc="left", fontsize=10, color=theme.ink)
        axes.grid(color=theme.line, linewidth=0.6)
        axes.set_axisbelow(True)
        _tidy(axes, theme)
        axes.tick_params(which="minor", colors=theme.line)
        axes.minorticks_off()
    for axes in list(panels.flat)[len(tasks) :]:
        axes.set_visible(False)
    figure.supxlabel("trained parameters", color=theme.ink, fontsize=10)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper left",
        ncols=3,
        frameon=False,
        labelcolor=theme.ink,
        fontsize=9,
        handletextpad=0.3,
    )
    return figure


def _point(suite: Suite, arm: Arm, task: str) -> tuple[float, float, float] | None:
    """Mean parameters, mean points and their sd, of the seeds on which LoRA learned something."""
    places = [p for p in arm.results if p[0] == task and suite.learned(p)]
    if not places:
        return None
    values = [of.points(arm.results[place]) for place in places]
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return arm.parameters(places), statistics.fmean(values), sd


def _mark(axes: Any, number: int, point: tuple[float, float, float], theme: Theme) -> Any:
    x, y, sd = point
    colour = theme.arms[number % COLOURS]
    axes.errorbar([x], [y], yerr=[sd], fmt="none", ecolor=colour, elinewidth=1, alpha=0.6)
    mark = MARKS[number % len(MARKS)]
    (handle,) = axes.plot([x], [y], mark, color=colour, markersize=6, linestyle="none")
    return handle


def _name(arm: Arm) -> str:
    """Its label, cut where it would leave no room for the drawing."""
    return arm.label if len(arm.label) <= LABEL else arm.label[: LABEL - 1] + "…"


def _short(count: float) -> str:
    """100,000 as 100k."""
    for size, sign in ((1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:g}{sign}"
    return f"{count:g}"


DRAWINGS: dict[str, Callable[[Suite, Theme], Any]] = {
    "differences": _differences,
    "parameters": _parameters,
}
