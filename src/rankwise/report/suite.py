"""The results of a comparison, gathered from their files: arms by task and seed, and what pairs."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rankwise.compare.cells import Failure, read_cell
from rankwise.errors import ResultError
from rankwise.report.chance import learned, scale
from rankwise.report.conditions import apart, of_method, of_task
from rankwise.report.statistics import Interval, mean_of, t_over_tasks, two_level
from rankwise.report.table import LARGER
from rankwise.result import Result
from rankwise.tasks.metrics import METRICS, find_metric

Place = tuple[str, int]
"""A task and a seed."""


@dataclass(frozen=True)
class Arm:
    """One method of a comparison.

    Attributes:
        label: its name.
        results: by task and seed.
        is_lora: whether it is plain LoRA of one rank everywhere, which others are compared with.
        size_of: label of the arm whose size it takes, or "".
    """

    label: str
    results: dict[Place, Result]
    is_lora: bool
    size_of: str = ""

    def parameters(self, places: Iterable[Place]) -> float:
        """Mean trained parameters, the task head left out where LoRA's are known."""
        return statistics.fmean(size_of(self.results[place]) for place in places)


@dataclass(frozen=True)
class Suite:
    """All that a folder of result files says.

    Attributes:
        arms: plain LoRA first, then by label.
        tasks: labels, in order.
        rates: results that only judged a learning rate.
        failures: cells without a result.
        problems: files that could not be read, one line each.
    """

    arms: list[Arm]
    tasks: list[str]
    rates: list[Result] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def results(self) -> list[Result]:
        """Those that count."""
        return [result for arm in self.arms for result in arm.results.values()]

    def learned(self, place: Place) -> bool:
        """Whether some plain LoRA of that task and seed learned anything; True where none tells."""
        found = [learned(a.results[place]) for a in self.arms if a.is_lora and place in a.results]
        return not found or any(answer is not False for answer in found)


@dataclass(frozen=True)
class Comparison:
    """An arm against plain LoRA, over the tasks and seeds that both have.

    Attributes:
        arm, reference: which.
        size: the arm's parameters over the reference's.
        differences: in points, positive where the arm is better; by task, one a seed.
        left_out: where the reference learned nothing.
    """

    arm: Arm
    reference: Arm
    size: float
    differences: dict[str, list[float]]
    left_out: list[Place]

    @property
    def equal_size(self) -> bool:
        return 1 / LARGER <= self.size <= LARGER

    @property
    def bootstrap(self) -> Interval:
        return two_level(list(self.differences.values()))

    @property
    def t(self) -> Interval:
        return t_over_tasks(list(self.differences.values()))

    @property
    def mean(self) -> float:
        return mean_of(list(self.differences.values()))

    def verdict(self) -> str:
        """In a word; a difference is one where both intervals say so."""
        if not self.equal_size:
            return "not of one size"
        if math.isnan(self.t.low):
            return "too few to say"
        if self.bootstrap.excludes_zero and self.t.excludes_zero:
            return "better" if self.mean > 0 else "worse"
        return "no difference shown"


def result_files(paths: Sequence[str | Path]) -> list[Path]:
    """JSON files: those given, and of a folder those in `cells/`, or in it.

    Raises:
        ResultError: nothing there.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        try:
            path.stat()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ResultError(f"cannot read {path}: {reason}") from error
        if path.is_dir():
            inside = path / "cells" if (path / "cells").is_dir() else path
            files = sorted(f for f in inside.glob("*.json") if not f.name.endswith("plan.json"))
            if not files:
                raise ResultError(f"no result files in {inside}; give a folder of `compare`")
            found += files
        else:
            found.append(path)
    return found


def load(paths: Sequence[str | Path]) -> Suite:
    """Reads result files; of those that cannot be read, a line each is kept.

    Args:
        paths: files, and folders of them: of `rankwise compare`, or of `metrics.json` of runs.

    Raises:
        ResultError: there is no result at all.
    """
    pairs: list[tuple[Result, Result]] = []  # with the one that its file is of
    failures, problems = [], []
    for file in result_files(paths):
        try:
            found = read_cell(file)
        except ResultError as error:
            problems.append(" ".join(str(error).split()))
            continue
        if isinstance(found, Failure):
            failures.append(found)
        elif found is not None:
            # a run's controls are arms of their own
            of_file = [found, *(() if "cell" in found.about else found.controls)]
            for result in of_file:
                if said := _unfit(result):
                    problems.append(f"{file}: {result.name}: {said}")
                else:
                    pairs.append((result, found))
    judging = [result for result, _ in pairs if _spec(result).get("held_out")]
    counting, split = _told_apart([pair for pair in pairs if not _spec(pair[0]).get("held_out")])
    problems += split
    if not counting:
        said = f": {problems[0]}" if problems else ""
        raise ResultError(f"no result to report among {', '.join(map(str, paths))}{said}")
    problems += _twice(counting)
    arms = _arms(counting)
    tasks = dict.fromkeys(task_of(result) for result in counting)
    return Suite(arms, sorted(tasks), judging, failures, problems)


def _unfit(result: Result) -> str:
    """Why a report cannot use a result whose schema is right; "" where it can."""
    metrics = result.task.get("metrics")
    texts = isinstance(metrics, list) and all(isinstance(name, str) for name in metrics)
    if not texts or not metrics or not isinstance(result.task.get("name"), str):
        return "its task has no name or no metrics"
    if metrics[0] not in METRICS or metrics[0] not in result.metrics:
        return f"its main metric {metrics[0]!r} is not known, or not among its figures"
    seconds = [result.cost.get(name) for name in ("search_seconds", "train_seconds")]
    if not all(isinstance(value, int | float) for value in seconds):
        return "its cost has no search_seconds or no train_seconds"
    seed, rate = (result.training.get(name) for name in ("seed", "learning_rate"))
    if not isinstance(seed, int | None) or not isinstance(rate, int | float):
        return f"its training has the seed {seed!r} and the learning rate {rate!r}; one is odd"
    about = result.about
    parts = [about.get(name, {}) for name in ("cell", "floor", "machine", "judged", "versions")]
    spec = parts[0].get("spec", {}) if isinstance(parts[0], dict) else None
    parts.append(spec)
    if isinstance(spec, dict):
        parts += [spec.get(name, {}) for name in ("task", "method", "training")]
    if not all(isinstance(part, dict) for part in parts) or not (
        isinstance(spec, dict) and isinstance(spec.get("size_of"), str | None)
    ):
        return "what it says about its cell is not as compare writes it"
    judged = about.get("judged", {})
    if not all(_is_number(key) and isinstance(v, int | float | str) for key, v in judged.items()):
        return "the learning rates that were judged are not as compare writes them"
    return ""


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _told_apart(pairs: Sequence[tuple[Result, Result]]) -> tuple[list[Result], list[str]]:
    """With other names where a task or a method means another thing in another file."""
    specs = [_spec(result) for result, _ in pairs]
    of_tasks = [of_task(*pair, spec) for pair, spec in zip(pairs, specs, strict=True)]
    tasks, said = apart([task_of(result) for result, _ in pairs], of_tasks)
    labels, more = apart([label_of(result) for result, _ in pairs], list(map(of_method, specs)))
    named = [
        replace(result, about=result.about | {"named": {"task": task, "label": label}})
        for (result, _), task, label in zip(pairs, tasks, labels, strict=True)
    ]
    return named, said + more


def _twice(results: Sequence[Result]) -> list[str]:
    """A line for each two results that claim the same place: of two versions of a recipe, say."""
    seen: dict[tuple[str, str, int], Result] = {}
    said = []
    for result in results:
        key = label_of(result), task_of(result), seed_of(result)
        if key in seen:
            names = " and ".join(cell_name(r) or r.name for r in (seen[key], result))
            said.append(
                f"{names} are both {key[0]} on {key[1]}, seed {key[2]}; the second is reported, "
                "remove one"
            )
        seen[key] = result
    return said


def _arms(results: Sequence[Result]) -> list[Arm]:
    by_label: dict[str, dict[Place, Result]] = {}
    labels = {name: label_of(r) for r in results if (name := cell_name(r))}
    for result in results:
        by_label.setdefault(label_of(result), {})[task_of(result), seed_of(result)] = result
    arms = []
    for label, found in by_label.items():
        of = {labels.get(_spec(r).get("size_of") or "", "") for r in found.values()}
        plain = all(r.method.get("name") == "LoRA" and _uniform(r) for r in found.values())
        arms.append(Arm(label, found, plain, of.pop() if len(of) == 1 else ""))
    return sorted(arms, key=lambda arm: (not arm.is_lora, arm.label.lower()))


def _uniform(result: Result) -> bool:
    return len(set((result.ranks or {}).values())) == 1


def _spec(result: Result) -> dict[str, Any]:
    found = result.about.get("cell", {}).get("spec", {})
    return found if isinstance(found, dict) else {}


def cell_name(result: Result) -> str:
    return str(result.about.get("cell", {}).get("name", ""))


def label_of(result: Result) -> str:
    """What the recipe calls the method; of a run, its own name."""
    if named := result.about.get("named"):
        return str(named["label"])
    return str(_spec(result).get("method", {}).get("label", result.name))


def task_of(result: Result) -> str:
    """What the recipe calls the task; of a run, its own name."""
    if named := result.about.get("named"):
        return str(named["task"])
    return str(_spec(result).get("task", {}).get("label", result.task.get("name", "")))


def seed_of(result: Result) -> int:
    return int(result.training.get("seed") or 0)


def size_of(result: Result) -> int:
    """LoRA parameters, or all trained ones of a method without ranks."""
    if result.lora_parameters is None:
        return result.trainable_parameters
    return result.lora_parameters


def main_metric(result: Result) -> str:
    """The task's first, or, where that is a language model's loss and texts were generated, the
    first official figure."""
    first, *rest = result.task["metrics"]
    if first == "loss":
        of_texts = [m for m in rest if m in result.metrics and m in METRICS and scale(m)]
        return str((of_texts or [first])[0])
    return str(first)


def metric_of(suite: Suite, task: str) -> str:
    """The main metric of a task."""
    return next(main_metric(r) for r in suite.results if task_of(r) == task)


def task_head(suite: Suite, task: str) -> str:
    """A task and its main metric, over a column or a drawing."""
    return f"{task}, {metric_of(suite, task).replace('_correlation', '').replace('_', ' ')}"


def points(result: Result) -> float:
    """The main metric in points, or as it is where it has no best value."""
    metric = main_metric(result)
    return result.metrics[metric] * (scale(metric) or 1.0)


def gain(ours: Result, other: Result) -> float:
    """How many points the first is better."""
    sign = 1 if find_metric(main_metric(ours)).greater_is_better else -1
    return sign * (points(ours) - points(other))


def comparisons(suite: Suite) -> list[Comparison]:
    """Every arm against the plain LoRA of its size, or the nearest to it in size."""
    found = []
    for arm in suite.arms:
        references = [a for a in suite.arms if a.is_lora and a is not arm]
        if (reference := _reference(arm, references)) is not None:
            found.append(_compare(suite, arm, reference))
    return [c for c in found if c.differences or c.left_out]


def _common(arm: Arm, other: Arm) -> list[Place]:
    return [place for place in arm.results if place in other.results]


def _reference(arm: Arm, references: Sequence[Arm]) -> Arm | None:
    # of an unfinished grid, the two may have no place in common yet
    made_for = [o for o in references if o.size_of == arm.label and _common(arm, o)]
    if made_for:
        return made_for[0]
    if arm.is_lora and arm.size_of:
        return None  # a control itself
    near = []
    for other in references:
        places = _common(arm, other)
        if places and arm.parameters(places) and other.parameters(places):
            ratio = math.log(arm.parameters(places) / other.parameters(places))
            near.append((abs(ratio), -len(places), other.label, other))
    return min(near)[-1] if near and not arm.is_lora else None


def _compare(suite: Suite, arm: Arm, reference: Arm) -> Comparison:
    places = _common(arm, reference)
    kept = [p for p in places if learned(reference.results[p]) is not False]
    differences: dict[str, list[float]] = {}
    for task, seed in sorted(kept):
        ours, other = arm.results[task, seed], reference.results[task, seed]
        if scale(main_metric(ours)) is not None:
            differences.setdefault(task, []).append(gain(ours, other))
    left = [p for p in places if p not in kept]
    size = arm.parameters(places) / (reference.parameters(places) or math.inf)
    return Comparison(arm, reference, size, differences, left)


@dataclass(frozen=True)
class Cost:
    """What an arm took, over one plain LoRA run on the same machine; medians over cells."""

    search: float
    train: float
    total: float
    least: float
    most: float
    cells: int


def costs(compared: Comparison) -> Cost | None:
    """Of cells that no restart cut in two, on the machine and with the threads of the reference."""
    ratios = []
    for place in _common(compared.arm, compared.reference):
        ours, other = compared.arm.results[place], compared.reference.results[place]
        base = _seconds(other)
        if not base or setup(ours) != setup(other):
            continue
        if ours.about.get("resumed") or other.about.get("resumed"):
            continue
        search, train = ours.cost["search_seconds"] / base, ours.cost["train_seconds"] / base
        ratios.append((search, train, search + train))
    if not ratios:
        return None
    search, train, total = (statistics.median(column) for column in zip(*ratios, strict=True))
    totals = [ratio[2] for ratio in ratios]
    return Cost(search, train, total, min(totals), max(totals), len(ratios))


def _seconds(result: Result) -> float:
    return float(result.cost["search_seconds"] + result.cost["train_seconds"])


def setup(result: Result) -> tuple[Any, ...]:
    """What seconds hang on: machine, threads, and how many ran side by side."""
    machine = result.about.get("machine", {})
    names = ("processor", "cores", "gpu", "workers")
    return (*(machine.get(name) for name in names), result.about.get("threads"))
