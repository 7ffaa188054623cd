"""What a comparison over tasks and seeds says: spreads, intervals, and whether ranks agree."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

DRAWS = 4_000
PERMUTATIONS = 20_000


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its 95 % interval; NaN where there is too little for one."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether it lies on one side of 0."""
        return self.low > 0 or self.high < 0


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and sample sd (0 for one value)."""
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "sd": sd, "n": len(values)}


def mean_of(differences: Sequence[Sequence[float]]) -> float:
    """The mean over tasks of the means over their seeds: every task counts alike."""
    return statistics.fmean(statistics.fmean(seeds) for seeds in differences)


def two_level(
    differences: Sequence[Sequence[float]], draws: int = DRAWS, seed: int = 0
) -> Interval:
    """A bootstrap of tasks, and within each drawn task of its seeds; percentiles.

    Task × seed cells drawn as if they were independent would give a far too narrow interval: the
    seeds of a task share what the task has of its own. This one is still somewhat narrow where
    tasks are few.

    Args:
        differences: for each task, one a seed.
        draws: how often.
        seed: of the drawing.

    Example:
        >>> two_level([[1.0, 1.0], [1.0, 1.0]])
        Interval(mean=1.0, low=1.0, high=1.0)
    """
    mean = mean_of(differences)
    if sum(map(len, differences)) < 2:
        return Interval(mean, math.nan, math.nan)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(differences), size=(draws, len(differences)))
    means = np.empty(drawn.shape)
    for task, values in enumerate(differences):
        here = drawn == task
        seeds = rng.integers(len(values), size=(int(here.sum()), len(values)))
        means[here] = np.asarray(values, dtype=float)[seeds].mean(axis=1)
    low, high = np.percentile(means.mean(axis=1), (2.5, 97.5))
    return Interval(mean, float(low), float(high))


def t_over_tasks(differences: Sequence[Sequence[float]]) -> Interval:
    """Student's t over the means of the tasks; of one task alone, over its seeds.

    Args:
        differences: for each task, one a seed.
    """
    from scipy.stats import t

    values = [statistics.fmean(seeds) for seeds in differences]
    if len(values) == 1:
        values = list(differences[0])
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return Interval(mean, math.nan, math.nan)
    half = float(t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def agreement(ranks: Sequence[Sequence[float]]) -> dict[str, Any] | None:
    """Do seeds give the same modules high ranks? Mean pairwise correlation of the rank vectors, and
    the share of random plans, the same ranks on other modules, that reach it (one-sided p)."""
    if len(ranks) < 2:
        return None
    vectors = np.array(ranks, dtype=float)
    rng = np.random.default_rng(0)
    observed = mean_correlation(vectors)
    plans = np.broadcast_to(_unit(vectors), (PERMUTATIONS, *vectors.shape))
    null = _over_pairs(rng.permuted(plans, axis=2))
    p = (1 + int((null >= observed - 1e-12).sum())) / (1 + PERMUTATIONS)
    return {"mean_correlation": observed, "p": p, "modules": vectors.shape[1]}


def mean_correlation(vectors: np.ndarray) -> float:
    """Mean over pairs of rows of their Pearson correlation; 0 for a row without variance."""
    return float(_over_pairs(_unit(vectors)))


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Rows centred and of length 1; of zeros where they do not vary."""
    centred = vectors - vectors.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(centred, axis=1, keepdims=True)
    return np.divide(centred, norms, out=np.zeros_like(centred), where=norms > 0)


def _over_pairs(rows: np.ndarray) -> Any:
    """Mean over pairs of rows z of z_i · z_j: (|Σ z|² - Σ |z|²) / n (n - 1)."""
    n = rows.shape[-2]
    square = (rows.sum(axis=-2) ** 2).sum(axis=-1) - (rows**2).sum(axis=(-2, -1))
    return square / (n * (n - 1))
