"""The recipes: what their statistics mean, and that README.md has the tables of the results."""

import importlib.util
import json
import statistics
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def load(name):
    """A recipe as a module; it may import the one beside it, as it does when it is run."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "experiments" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_close(found, saved, where="") -> None:
    """Equal but for the last digits of floats, whose sums differ between processors."""
    if isinstance(saved, dict):
        assert set(found) == set(saved), where
        for key in saved:
            assert_close(found[key], saved[key], f"{where}.{key}")
    elif isinstance(saved, list):
        assert len(found) == len(saved), where
        for i, (a, b) in enumerate(zip(found, saved, strict=True)):
            assert_close(a, b, f"{where}[{i}]")
    elif isinstance(saved, float):
        assert found == pytest.approx(saved, rel=1e-9, abs=1e-12), where
    else:
        assert found == saved, where


sys.path.append(str(ROOT / "experiments"))
summary = load("summary")
cut = load("cut_summary")
dylora = load("dylora_summary")


def test_points_are_hundredths():
    assert summary.points({"mean": 0.5, "sd": 0.012, "n": 3}) == "50.0 ± 1.2"
    assert summary.points({"mean": -0.005, "sd": 0.0, "n": 1}, sign=True) == "-0.5"


def test_readme_holds_the_tables_of_the_result_files():
    found = {task: summary.summarise(runs) for task, runs in summary.load().items()}
    assert found, "no results"
    saved = json.loads((ROOT / "experiments/results/autolora-summary.json").read_text())
    assert_close(json.loads(json.dumps(found)), saved)
    # the tables are those of the file: a recomputed float may round the other way elsewhere
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert summary.results_table(saved) in text
    assert summary.agreement_table(saved) in text
    assert summary.cost_table(json.loads(summary.COST.read_text())) in text


def test_arms_of_a_result_differ_in_ranks_alone():
    for task, runs in summary.load().items():
        for run in runs:
            arms = [summary.pick(run, which) for which in summary.ARMS.values()]
            assert len({arm.cost["steps"] for arm in arms}) == 1, task
            learned, uniform, drawn = (arm.lora_parameters for arm in arms)
            assert learned == drawn, task
            assert uniform == 4 * len(run.ranks) * 768, task


def made_up(seed: int, bonus: float) -> dict:
    """A result in which DyLoRA is `bonus` ahead of LoRA, and SVD 0.01 behind, at every rank."""
    by_rank = {b: {"loss": 0.5, "accuracy": 0.7 + 0.01 * int(b) + 0.1 * seed} for b in dylora.RANKS}

    def moved(by: float) -> dict:
        ranks = {b: m | {"accuracy": m["accuracy"] + by} for b, m in by_rank.items()}
        return {"steps": 10, "ranks": ranks}

    arms = {f"lora-{b}": {"steps": 10, "ranks": {b: by_rank[b]}} for b in dylora.RANKS}
    arms |= {"dylora": moved(bonus), "dylora-frozen": moved(0), "svd": moved(-0.01)}
    arms["first-pieces"] = moved(-0.3)
    by_layer = {"loss": 0.4, "accuracy": 0.8}, {"loss": 0.5, "accuracy": 0.75}
    arms["elastic"] = {
        "rank": 3,
        "rows_chosen_on": 9,
        "elastic": by_layer[0],
        "uniform": by_layer[1],
    }
    return {
        "task": {"metrics": ["accuracy"]},
        "training": {"seed": seed},
        "train_rows": 1,
        "evaluation_rows": 1,
        "arms": arms,
    }


def test_differences_to_lora_are_taken_seed_by_seed():
    """The spread between seeds, the same in both arms, is none of the difference's."""
    runs = {"a": [made_up(s, 0.02) for s in (0, 1)], "b": [made_up(s, 0.04) for s in (0, 1)]}
    found = dylora.summarise(runs)
    gap = found["tasks"]["a"]["minus_lora"]["dylora"]["3"]
    assert gap["mean"] == pytest.approx(0.02) and gap["sd"] == pytest.approx(0, abs=1e-12)
    score = found["tasks"]["a"]["scores"]["lora"]["3"]
    assert score["sd"] == pytest.approx(statistics.stdev([0.73, 0.83]))
    (mean,) = found["means"]
    assert mean["minus_lora"]["dylora"]["8"]["mean"] == pytest.approx(0.03)
    assert mean["minus_lora"]["svd"]["1"]["mean"] == pytest.approx(-0.01)
    assert found["tasks"]["b"]["elastic"]["gain"]["mean"] == pytest.approx(0.05)
    assert "| 3 | 78.0 ± 7.1 | +3.0 ± 0.0 |" in dylora.tables(found)


def test_page_holds_the_tables_of_the_result_files():
    found = dylora.summarise(dylora.load())
    saved = json.loads((ROOT / "experiments/results/dylora-summary.json").read_text())
    assert_close(json.loads(json.dumps(found)), saved)
    assert dylora.tables(saved) in (ROOT / "docs" / "dylora.md").read_text(encoding="utf-8")


def test_arms_of_the_dylora_comparison_had_as_many_steps():
    for task, runs in dylora.load().items():
        for run in runs:
            steps = {name: arm["steps"] for name, arm in run["arms"].items() if "steps" in arm}
            longer = steps.pop("dylora-longer", 4 * steps["dylora"])
            assert len(set(steps.values())) == 1, task
            assert longer / steps["dylora"] == pytest.approx(4, rel=0.01)


def cut_run(ahead: float, **more: dict) -> dict:
    """A result in which the order by data is so far ahead of σ at every size."""
    of = {cut.OURS: ahead, cut.CONTROL: 0.0}
    arms = {
        arm: {size: {"accuracy": 0.5 + by, "loss": 1 - by} for size in cut.NAMES}
        for arm, by in of.items()
    }
    return {"task": {"metrics": ["accuracy"]}, "seed": 0, "arms": arms | more}


def test_orders_are_compared_on_the_same_adapter_and_every_task_counts_alike():
    found = cut.paired({"a": [cut_run(0.1), cut_run(0.3)], "b": [cut_run(-0.4)]}, "metric")["16"]
    assert found["mean"] == pytest.approx((0.2 - 0.4) / 2)
    # t of one degree of freedom is 12.706; the standard error of two means is half their distance
    ends = [-0.1 - 12.7062 * 0.3, -0.1 + 12.7062 * 0.3]
    assert found["t_over_tasks"] == pytest.approx(ends, abs=1e-4)


def test_a_head_is_compared_with_the_cut_of_the_same_seeds():
    head = {cut.HEAD: {"8": {"accuracy": 0.9, "loss": 0.1}}}
    runs = {"a": [cut_run(0.1), cut_run(0.3, **head)], "b": [cut_run(0.2)]}
    found = cut.before_and_after(runs, cut.OURS, cut.HEAD)
    assert list(found) == ["a"] and found["a"][cut.OURS]["8"]["accuracy"] == pytest.approx(0.8)
    assert "80.0 / 0.700 → 90.0 / 0.100" in cut.before_and_after_table(
        found, cut.OURS, cut.HEAD, ""
    )


def test_undone_steps_are_compared_on_the_same_seeds_and_with_the_control():
    default = {size: {"accuracy": 0.5, "loss": 1.05 if size == "64" else 0.5} for size in cut.NAMES}
    runs = {"a": [cut_run(-0.1), cut_run(-0.2, **{cut.DEFAULT: default | {"looks": 7}})]}
    said = cut.undoing_table(cut.undoing(runs))
    assert "| a |" in said and "30.0 / 1.200 → 50.0 / 0.500" in said
    assert "30.0 / 1.200 → 50.0 / 0.500 at 1/16 (σ 50.0 / 1.000)" in said
    assert "0 → 1 of 1 at 1/32, 0 → 0 of 1 at 1/64" in said
    assert said.endswith("a 7.")


def test_pages_hold_the_tables_of_the_cut():
    found = cut.summarise(cut.load()) | {"of_rank_16": cut.rank_16()}
    saved = json.loads((ROOT / "experiments/results/cut-summary.json").read_text())
    assert_close(json.loads(json.dumps(found)), saved)
    assert cut.tables(saved) in (ROOT / "docs" / "cut.md").read_text(encoding="utf-8")
    assert cut.rates_table(saved) in (ROOT / "docs" / "compare.md").read_text(encoding="utf-8")
    assert cut.short_table(saved) in (ROOT / "README.md").read_text(encoding="utf-8")
