"""The recipes: what their statistics mean, and that README.md has the tables of the results."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "experiments" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


summary = load("summary")


def test_seeds_that_agree_are_told_from_seeds_that_do_not():
    same = summary.agreement([[1, 2, 3, 4, 5, 6, 7, 8]] * 3)
    assert same["mean_correlation"] == pytest.approx(1.0) and same["p"] < 1e-3
    rng = np.random.default_rng(0)
    values = [summary.agreement(rng.integers(1, 9, (3, 12)).tolist())["p"] for _ in range(8)]
    assert 0.2 < np.mean(values) < 0.8  # uniform under the null: mean 0.5, sd of this mean 0.1


def test_correlation_is_pearsons():
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(2, 10))
    assert summary.mean_correlation(vectors) == pytest.approx(np.corrcoef(vectors)[0, 1])
    assert summary.mean_correlation(np.array([[1.0, 1.0, 1.0], [1.0, 2.0, 3.0]])) == 0.0


def test_spread_is_mean_and_sample_sd():
    found = summary.spread([1.0, 2.0, 4.0])
    assert found["mean"] == pytest.approx(7 / 3)
    assert found["sd"] == pytest.approx(np.std([1.0, 2.0, 4.0], ddof=1))
    assert summary.points({"mean": 0.5, "sd": 0.012, "n": 3}) == "50.0 ± 1.2"
    assert summary.points({"mean": -0.005, "sd": 0.0, "n": 1}, sign=True) == "-0.5"


def test_readme_holds_the_tables_of_the_result_files():
    found = {task: summary.summarise(runs) for task, runs in summary.load().items()}
    assert found, "no results"
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert summary.results_table(found) in text
    assert summary.agreement_table(found) in text
    saved = json.loads((ROOT / "experiments/results/autolora-summary.json").read_text())
    assert json.loads(json.dumps(found)) == saved


def test_arms_of_a_result_differ_in_ranks_alone():
    for task, runs in summary.load().items():
        for run in runs:
            arms = [summary.pick(run, keys) for keys in summary.ARMS.values()]
            assert len({arm["steps"] for arm in arms}) == 1, task
            learned, uniform, drawn = (arm["lora_parameters"] for arm in arms)
            assert learned == drawn, task
            assert uniform == 4 * len(run["ranks"]) * 768, task
