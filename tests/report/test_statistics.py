"""Statistics of a comparison, against numpy, scipy and simulated truth."""

import math

import numpy as np
import pytest
from scipy import stats

from rankwise.report.statistics import (
    agreement,
    mean_correlation,
    mean_of,
    spread,
    t_over_tasks,
    two_level,
)


def test_spread_is_mean_and_sample_sd():
    found = spread([1.0, 2.0, 4.0])
    assert found["mean"] == pytest.approx(7 / 3)
    assert found["sd"] == pytest.approx(np.std([1.0, 2.0, 4.0], ddof=1))


def test_every_task_counts_alike():
    assert mean_of([[1.0], [2.0, 4.0]]) == pytest.approx(2.0)


def test_t_is_scipys():
    differences = [[1.0, 3.0], [2.0, 0.0], [5.0, 6.0]]
    found = t_over_tasks(differences)
    means = [2.0, 1.0, 5.5]
    low, high = stats.t.interval(0.95, 2, np.mean(means), stats.sem(means))
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    one = t_over_tasks([[1.0, 2.0, 4.0]])  # of one task, over its seeds
    low, high = stats.t.interval(0.95, 2, 7 / 3, stats.sem([1, 2, 4]))
    assert (one.low, one.high) == (pytest.approx(low), pytest.approx(high))


def test_too_little_for_an_interval():
    for interval in (two_level, t_over_tasks):
        found = interval([[1.5]])
        assert found.mean == 1.5 and math.isnan(found.low) and not found.excludes_zero


def test_the_bootstrap_of_two_levels_has_the_variance_of_both():
    """Variance of the drawn mean: between tasks, and within them, each over its number."""
    rng = np.random.default_rng(3)
    values = rng.normal(size=(40, 5)) + rng.normal(size=(40, 1))
    found = two_level(values.tolist(), draws=20_000)
    variance = (values.mean(axis=1).var() + values.var(axis=1).mean() / 5) / 40
    width = found.high - found.low
    assert width == pytest.approx(2 * 1.96 * math.sqrt(variance), rel=0.04)


def test_the_coverage_of_the_intervals():
    """Differences with a part of their own for each task: what is true should lie inside 95 times
    in a hundred. Cells drawn as if independent fall far short; that is why they are not used."""
    rng = np.random.default_rng(0)
    tasks, seeds, truth, simulations = 5, 3, 0.7, 600
    inside = {"cells": 0, "two levels": 0, "t": 0}
    for number in range(simulations):
        own = rng.normal(0, 1.0, (tasks, 1))
        differences = (truth + own + rng.normal(0, 1.0, (tasks, seeds))).tolist()
        cells = [[value] for task in differences for value in task]
        found = {
            "cells": two_level(cells, 300, number),
            "two levels": two_level(differences, 300, number),
            "t": t_over_tasks(differences),
        }
        for name, interval in found.items():
            inside[name] += interval.low <= truth <= interval.high
    share = {name: count / simulations for name, count in inside.items()}
    assert share["cells"] < 0.82
    assert 0.84 < share["two levels"] < 0.94
    assert 0.93 < share["t"] < 0.97  # exact for normal differences; its s.e. here is 0.009


def test_seeds_that_agree_are_told_from_seeds_that_do_not():
    same = agreement([[1, 2, 3, 4, 5, 6, 7, 8]] * 3)
    assert same["mean_correlation"] == pytest.approx(1.0) and same["p"] < 1e-3
    rng = np.random.default_rng(0)
    values = [agreement(rng.integers(1, 9, (3, 12)).tolist())["p"] for _ in range(8)]
    assert 0.2 < np.mean(values) < 0.8  # uniform under the null: mean 0.5, sd of this mean 0.1


def test_correlation_is_pearsons():
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(2, 10))
    assert mean_correlation(vectors) == pytest.approx(np.corrcoef(vectors)[0, 1])
    assert mean_correlation(np.array([[1.0, 1.0, 1.0], [1.0, 2.0, 3.0]])) == 0.0
