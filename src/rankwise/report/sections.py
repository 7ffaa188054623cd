"""A report's tables and words, out of a suite; how they are set is `markdown`'s and `page`'s."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.report import suite as of
from rankwise.report.chance import learned, scale
from rankwise.report.heatmap import grid
from rankwise.report.statistics import Interval, agreement, spread
from rankwise.report.suite import Arm, Comparison, Suite
from rankwise.result import Result

NONE = ("–", "")


@dataclass(frozen=True)
class Table:
    """Rows of cells, each a text and what it is sorted by.

    Attributes:
        head: of the columns; the first is to the left, the others are numbers.
        rows: one cell a column.
    """

    head: list[str]
    rows: list[list[tuple[str, Any]]]


@dataclass(frozen=True)
class HeatMap:
    """Ranks by layer and matrix, means over seeds; None where a module has none."""

    title: str
    layers: list[str]
    matrices: list[str]
    ranks: list[list[float | None]]
    top: float


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Attributes:
        title, text: above.
        tables: with a caption each.
        figure: name of a drawing of `figures`, or "".
        maps: heat maps.
        notes: below, one line each.
        source: what it comes from: version, machine, command.
    """

    title: str
    text: str
    tables: tuple[tuple[str, Table], ...] = ()
    figure: str = ""
    maps: tuple[HeatMap, ...] = ()
    notes: tuple[str, ...] = ()
    source: str = ""


def sections(suite: Suite, command: str) -> list[Section]:
    """All parts that a suite has something to say in.

    Args:
        suite: of result files.
        command: that makes the report, for the record.
    """
    compared = of.comparisons(suite)
    parts = [
        _quality(suite),
        _figures(suite),
        _differences(compared),
        _over_parameters(suite),
        _costs(compared),
        _rates(suite),
        _ranks(suite),
        _missing(suite),
    ]
    source = provenance([*suite.results, *suite.rates], command)
    return [Section(**(vars(part) | {"source": source})) for part in parts if part is not None]


def provenance(results: Sequence[Result], command: str) -> str:
    """Version, machine and command, in one line."""
    versions = _each(results, lambda r: r.about.get("versions", {}).get("rankwise"))
    machines = _each(results, lambda r: _machine(r))
    recipes = _each(results, lambda r: r.about.get("cell", {}).get("recipe"))
    made = [f"rankwise compare {recipe}" for recipe in recipes] or ["rankwise run"]
    return (
        f"rankwise {', '.join(versions) or 'of no known version'}; "
        f"{'; '.join(machines) or 'machine not on record'}; {', '.join(made)}; {command}"
    )


def _each(results: Iterable[Result], what: Callable[[Result], Any]) -> list[str]:
    return list(dict.fromkeys(str(found) for r in results if (found := what(r))))


def _machine(result: Result) -> str:
    about = result.about.get("machine")
    if not about:
        return ""
    name = about.get("gpu") or about.get("processor")
    threads, workers = result.about.get("threads"), about.get("workers")
    return f"{name}, {about.get('cores')} cores; threads {threads}, cells at a time {workers}"


# --- quality ------------------------------------------------------------------------------------


def _quality(suite: Suite) -> Section:
    """Mean ± sd over seeds, by task; a mean over the tasks that every arm has."""
    whole = _everywhere(suite)
    head = ["method", "parameters", *(of.task_head(suite, task) for task in suite.tasks)]
    if len(whole) > 1:
        head.append("mean")
    rows = []
    for arm in suite.arms:
        row = [(arm.label, arm.label.lower()), _count(arm.parameters(arm.results))]
        row += [_score(suite, arm, task) for task in suite.tasks]
        if len(whole) > 1:
            means = [_mean(suite, arm, task) for task in whole]
            row.append(_number(statistics.fmean(m for m in means if m is not None)))
        rows.append(row)
    notes = []
    nothing = [f"{t}, seed {s}" for t, s in _places(suite) if not suite.learned((t, s))]
    if nothing:
        notes.append(
            f"† LoRA itself learned nothing there ({'; '.join(nothing)}): within two standard "
            "errors of what a model that was taught nothing scores. It is left out of all means."
        )
    untold = [t for t in suite.tasks if any(_untold(a, t) for a in suite.arms)]
    if untold:
        notes.append(
            f"Whether LoRA learned anything on {', '.join(untold)}, the files do not say: what a "
            "model that was taught nothing scores there is not on record."
        )
    if len(whole) > 1 and len(whole) < len(suite.tasks):
        notes.append(f"The mean is over {', '.join(whole)}, which every method has.")
    text = (
        "The main metric of each task in points, mean ± standard deviation over seeds, and the "
        "number of seeds where they differ. Parameters are those of the adapter, without the task "
        "head."
    )
    notes.append(f"Evaluated on {'; '.join(_evaluated(suite, task) for task in suite.tasks)}.")
    return Section("Quality", text, (("", Table(head, rows)),), notes=tuple(notes))


def _figures(suite: Suite) -> Section | None:
    """Every figure of each task and the loss: the main metric may hide what another shows."""
    tables = []
    for task in suite.tasks:
        arms = {
            arm.label: [r for (where, _), r in sorted(arm.results.items()) if where == task]
            for arm in suite.arms
        }
        arms = {label: results for label, results in arms.items() if results}
        every = [result for results in arms.values() for result in results]
        asked = dict.fromkeys([*every[0].task["metrics"], "loss"])
        names = [name for name in asked if all(name in r.metrics for r in every)]
        if len(names) < 2:
            continue
        rows = [
            [(label, label.lower()), *(_spread(results, name) for name in names)]
            for label, results in arms.items()
        ]
        head = ["method", *(name.replace("_", " ") for name in names)]
        tables.append((task, Table(head, rows)))
    if not tables:
        return None
    text = (
        "Every figure of each task and the loss, mean ± standard deviation over all its seeds: in "
        "points where a figure has a best value, else as it is."
    )
    return Section("Every figure", text, tuple(tables))


def _spread(results: Sequence[Result], metric: str) -> tuple[str, Any]:
    """A figure's mean over results, ± its standard deviation where there are several."""
    factor = scale(metric)
    values = [result.metrics[metric] * (factor or 1.0) for result in results]
    return _mean_and_sd(values, 3 if factor is None else 1)


def _mean_and_sd(values: Sequence[float], digits: int = 1, sign: bool = False) -> tuple[str, float]:
    """`81.2 ± 0.4`, without the second part where there is one value; and the mean."""
    found = spread(values)
    text, _ = _number(found["mean"], digits, sign)
    return text + (f" ± {found['sd']:.{digits}f}" if len(values) > 1 else ""), found["mean"]


def _evaluated(suite: Suite, task: str) -> str:
    """`mrpc: 1,725 test rows`; more than one where results differ in it, which they should not."""
    here = [r for r in suite.results if of.task_of(r) == task]
    kinds = _each(here, lambda r: f"{r.rows.get('evaluated', 0):,} {r.split} rows")
    return f"{task}: {', '.join(kinds)}"


def _untold(arm: Arm, task: str) -> bool:
    found = [r for (where, _), r in arm.results.items() if arm.is_lora and where == task]
    return any(learned(result) is None for result in found)


def _places(suite: Suite) -> list[of.Place]:
    return sorted({place for arm in suite.arms for place in arm.results})


def _everywhere(suite: Suite) -> list[str]:
    """Tasks with points, where every arm has a seed on which LoRA learned something."""
    found = []
    for task in suite.tasks:
        bounded = scale(of.metric_of(suite, task)) is not None
        if bounded and all(_mean(suite, arm, task) is not None for arm in suite.arms):
            found.append(task)
    return found


def _values(suite: Suite, arm: Arm, task: str, learned: bool) -> list[float]:
    return [
        of.points(result)
        for (where, seed), result in sorted(arm.results.items())
        if where == task and suite.learned((task, seed)) is learned
    ]


def _mean(suite: Suite, arm: Arm, task: str) -> float | None:
    values = _values(suite, arm, task, learned=True)
    return statistics.fmean(values) if values else None


def _score(suite: Suite, arm: Arm, task: str) -> tuple[str, Any]:
    values = _values(suite, arm, task, learned=True)
    if not values:
        values = _values(suite, arm, task, learned=False)
        return (f"{statistics.fmean(values):.1f} †", "") if values else NONE
    seeds = len({seed for _, seed in _places(suite)})
    text, mean = _mean_and_sd(values)
    return text + (f" ({len(values)})" if len(values) != seeds else ""), mean


def _number(value: float, digits: int = 1, sign: bool = False) -> tuple[str, Any]:
    if math.isnan(value):
        return NONE
    return f"{value:{'+' if sign else ''}.{digits}f}", value


def _count(value: float) -> tuple[str, Any]:
    return f"{value:,.0f}", value


# --- differences --------------------------------------------------------------------------------


def _differences(compared: Sequence[Comparison]) -> Section | None:
    kept = [c for c in compared if c.differences]
    if not kept:
        return None
    tasks = list(dict.fromkeys(task for c in kept for task in c.differences))
    head = ["method", "against", "size", "tasks × seeds", "mean", "bootstrap, 95 %", "t, 95 %"]
    rows = []
    for c in kept:
        pairs = "+".join(str(len(seeds)) for seeds in c.differences.values())
        if len({len(seeds) for seeds in c.differences.values()}) == 1:
            pairs = f"{len(c.differences)} × {len(next(iter(c.differences.values())))}"
        rows.append(
            [
                (c.arm.label, c.arm.label.lower()),
                (c.reference.label, c.reference.label.lower()),
                (f"× {c.size:.2f}", c.size),
                (pairs, sum(map(len, c.differences.values()))),
                _number(c.mean, 2, sign=True),
                _ends(c.bootstrap),
                _ends(c.t),
                (c.verdict(), c.verdict()),
            ]
        )
    by_task = [
        [(c.arm.label, c.arm.label.lower()), *(_difference(c, task) for task in tasks)]
        for c in kept
    ]
    text = (
        "Each result minus that of plain LoRA of the same size (one rank everywhere) with the same "
        "task, seed and rows, in points; positive is better. Two kinds of 95 % interval: a "
        "bootstrap of tasks and, within them, of seeds, which is somewhat narrow where tasks are "
        "few, and Student's t over the means of the tasks, which is exact for normal differences "
        "but wide. A difference is called one where both leave out 0. In the drawing a dot is the "
        "mean, the thick line the bootstrap, the thin one t, and each stroke a task."
    )
    notes = []
    if any(len(c.differences) == 1 for c in kept):
        notes.append("Of one task, both intervals are over its seeds and say nothing of others.")
    left: dict[of.Place, list[str]] = {}
    for c in compared:
        for place in c.left_out:
            left.setdefault(place, []).append(c.arm.label)
    if left:
        said = [f"{t}, seed {s} ({', '.join(arms)})" for (t, s), arms in sorted(left.items())]
        notes.append(
            f"Left out, where the LoRA that is compared with learned nothing: {'; '.join(said)}."
        )
    unequal = [f"{c.arm.label} × {c.size:.2f}" for c in kept if not c.equal_size]
    if unequal:
        notes.append(f"Not of one size with any LoRA here: {'; '.join(unequal)}.")
    tables = (
        ("Over all tasks", Table([*head, "so"], rows)),
        ("By task, mean ± standard deviation over seeds", Table(["method", *tasks], by_task)),
    )
    return Section("Differences to LoRA", text, tables, figure="differences", notes=tuple(notes))


def _ends(interval: Interval) -> tuple[str, Any]:
    if math.isnan(interval.low):
        return NONE
    return f"{interval.low:+.2f} to {interval.high:+.2f}", interval.low


def _difference(compared: Comparison, task: str) -> tuple[str, Any]:
    values = compared.differences.get(task)
    if not values:
        return NONE
    return _mean_and_sd(values, sign=True)


# --- cost ---------------------------------------------------------------------------------------


def _over_parameters(suite: Suite) -> Section | None:
    sizes = {round(arm.parameters(arm.results)) for arm in suite.arms}
    if len(sizes) < 2 or not any(map(suite.learned, _places(suite))):
        return None
    text = (
        "Means over seeds of each method on each task against its trained parameters, without "
        "those cells where LoRA learned nothing."
    )
    cells = Counter((arm.label, task) for arm in suite.arms for task, _ in arm.results)
    if max(cells.values()) > 1:
        text += " Bars are one standard deviation."
    return Section("Quality over parameters", text, figure="parameters")


def _costs(compared: Sequence[Comparison]) -> Section | None:
    rows = []
    for c in compared:
        if (cost := of.costs(c)) is not None:
            rows.append(
                [
                    (c.arm.label, c.arm.label.lower()),
                    _number(cost.search, 2),
                    _number(cost.train, 2),
                    _number(cost.total, 2),
                    (f"{cost.least:.2f} to {cost.most:.2f}", cost.most),
                    (str(cost.cells), cost.cells),
                    (f"× {c.size:.2f}", c.size),
                ]
            )
    if not rows:
        return None
    head = ["method", "search", "training", "in all", "from, to", "cells", "parameters"]
    text = (
        "Time to choose and to train, as ratios to one run of the plain LoRA that the method is "
        "compared with, on the same machine: medians over tasks and seeds. Cells that a restart "
        "cut in two, or that ran with other threads or neighbours than their LoRA, are left out."
    )
    return Section("Cost", text, (("", Table(head, rows)),))


def _rates(suite: Suite) -> Section | None:
    """Which rate each method got on each task, and whether it lies at an end of what was tried."""
    chosen: dict[tuple[str, str], tuple[str, Any]] = {}
    notes: dict[str, None] = {}
    for arm in suite.arms:
        for (task, _), result in arm.results.items():
            judged = result.about.get("judged")
            if not judged:
                continue
            rate = float(result.training["learning_rate"])
            worked = [float(r) for r, score in judged.items() if not isinstance(score, str)]
            tried = sorted(map(float, judged))
            edge = " *" if rate in (tried[0], tried[-1]) and len(tried) > 1 else ""
            chosen[arm.label, task] = (f"{rate:g}{edge}", rate)
            if edge:
                notes["* an end of the rates that were tried: a better one may lie beyond."] = None
            if len(worked) < len(tried):
                lost = ", ".join(f"{r:g}" for r in tried if r not in worked)
                notes[f"{arm.label} on {task}: {lost} failed."] = None
    if not chosen:
        return None
    rows = [
        [(arm.label, arm.label.lower()), *(chosen.get((arm.label, t), NONE) for t in suite.tasks)]
        for arm in suite.arms
    ]
    rates = sorted({float(rate) for r in suite.results for rate in r.about.get("judged", {})})
    text = (
        "The learning rate that each method was given: the best of as many for every method, "
        f"judged on held-out training rows. Tried: {', '.join(f'{r:g}' for r in rates)}."
    )
    table = Table(["method", *suite.tasks], rows)
    return Section("Learning rates", text, (("", table),), notes=tuple(notes))


# --- ranks --------------------------------------------------------------------------------------


def _ranks(suite: Suite) -> Section | None:
    maps, rows = [], []
    for arm in suite.arms:
        for task in suite.tasks:
            here = [r for (t, _), r in sorted(arm.results.items()) if t == task]
            found = [r for r in here if r.ranks and r.claim]  # ranks that somebody chose
            if not found or all(len(set((r.ranks or {}).values())) == 1 for r in found):
                continue
            names = list(dict.fromkeys(name for r in found for name in r.ranks or {}))
            vectors = [[float((r.ranks or {}).get(name, 0)) for name in names] for r in found]
            means = [statistics.fmean(column) for column in zip(*vectors, strict=True)]
            layers, matrices, ranks = grid(dict(zip(names, means, strict=True)))
            title = f"{arm.label} on {task}"
            maps.append(HeatMap(title, layers, matrices, ranks, max(map(max, vectors))))
            if (agreed := agreement(vectors)) is not None:
                rows.append(
                    [
                        (arm.label, arm.label.lower()),
                        (task, task),
                        (f"{min(map(min, vectors)):g} to {max(map(max, vectors)):g}", ""),
                        _number(statistics.fmean(means), 2),
                        _number(agreed["mean_correlation"], 2, sign=True),
                        ("< 0.001" if agreed["p"] < 0.001 else f"{agreed['p']:.3f}", agreed["p"]),
                    ]
                )
    if not maps:
        return None
    head = ["method", "task", "ranks", "mean", "correlation between seeds", "p, random plans"]
    text = "The rank of each module, mean over seeds; 0 where a module was left out."
    if rows:
        text += (
            " Do seeds agree? The mean correlation of the ranks of two seeds, and how often random "
            "plans, the same ranks on other modules, agree as well."
        )
    tables = (("", Table(head, rows)),) if rows else ()
    return Section("Ranks", text, tables, maps=tuple(maps))


def _missing(suite: Suite) -> Section | None:
    """What is not there: failures, and files that could not be read."""
    rows = []
    for failure in suite.failures:
        rate = failure.cell.get("held_out") is not None
        cells = [
            _inside(failure.cell, "method", "label"),
            _inside(failure.cell, "task", "label"),
            f"seed {_inside(failure.cell, 'training', 'seed')}",
            f"rate {failure.cell.get('rates')}" if rate else "result",
            failure.error,
        ]
        rows.append([(text, text) for text in cells])
    if not rows and not suite.problems:
        return None
    head = ["method", "task", "seed", "of", "error"]
    text = "Cells without a result, and files that could not be read; nothing above counts them."
    tables = (("", Table(head, rows)),) if rows else ()
    return Section("Not there", text, tables, notes=tuple(suite.problems))


def _inside(cell: Mapping[str, Any], part: str, key: str) -> str:
    found = cell.get(part)
    return str(found.get(key, "?")) if isinstance(found, dict) else "?"


def title_of(suite: Suite) -> str:
    """Model and tasks, for the head."""
    models = ", ".join(dict.fromkeys(r.model for r in suite.results))
    return f"{models}: {len(suite.arms)} methods on {', '.join(suite.tasks)}"


def said_of(paths: Sequence[str | Path]) -> str:
    """The command of a report, of a path the last part alone."""
    return "rankwise report " + " ".join(Path(path).name for path in paths)
