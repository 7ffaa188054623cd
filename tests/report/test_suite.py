"""What a report says of result files: which LoRA pairs with what, differences, costs, what is left
out. The expected figures are worked out by hand."""

import copy
import json
import math
import random

import pytest

from rankwise.cli import main
from rankwise.errors import ResultError
from rankwise.report.sections import sections
from rankwise.report.suite import comparisons, costs, learned, load
from rankwise.report.write import markdown
from rankwise.result import Result
from results import HOSTILE, record, write


def loaded(tmp_path, records):
    return load([write(tmp_path, records)])


def by_arm(suite):
    return {compared.arm.label: compared for compared in comparisons(suite)}


def both(task, seed, lora, ours, **more):
    return [record("lora", task, seed, lora), record("ours", task, seed, ours, kind="X", **more)]


def test_differences_are_paired_by_task_and_seed(tmp_path):
    records = [*both("a", 0, 0.80, 0.82), *both("a", 1, 0.70, 0.71), *both("b", 0, 0.90, 0.89)]
    records.append(record("ours", "c", 0, 0.1, kind="X"))  # has no partner
    (compared,) = comparisons(loaded(tmp_path, records))
    assert compared.reference.label == "lora" and compared.size == 1
    assert compared.differences == {
        "a": [pytest.approx(2.0), pytest.approx(1.0)],
        "b": [pytest.approx(-1.0)],
    }
    assert compared.mean == pytest.approx((1.5 - 1.0) / 2)


def test_every_figure_of_a_task_is_told(tmp_path):
    records = both("a", 0, 0.8, 0.9) + both("a", 1, 0.6, 0.9)
    for found, f1 in zip(records, (0.5, 0.25, 0.7, 0.75), strict=True):
        found["task"]["metrics"] = ["accuracy", "f1"]
        found["metrics"]["f1"] = f1
    (part,) = (p for p in sections(loaded(tmp_path, records), "") if p.title == "Every figure")
    ((caption, table),) = part.tables
    assert caption == "a" and table.head == ["method", "accuracy", "f1", "loss"]
    texts = [[text for text, _ in row] for row in table.rows]
    # sd of two values: their distance over the root of 2
    assert texts[0] == ["lora", "70.0 ± 14.1", "60.0 ± 14.1", "0.500 ± 0.000"]
    assert texts[1] == ["ours", "90.0 ± 0.0", "50.0 ± 35.4", "0.500 ± 0.000"]


def test_a_falling_metric_counts_the_other_way_and_an_endless_one_not_at_all(tmp_path):
    records = [
        *both("a", 0, 0.8, 0.9),
        record("lora", "text", 0, 20.0, metric="perplexity", floor=100.0),
        record("ours", "text", 0, 10.0, metric="perplexity", floor=100.0, kind="X"),
    ]
    suite = loaded(tmp_path, records)
    (compared,) = comparisons(suite)
    assert list(compared.differences) == ["a"]
    from rankwise.report.suite import gain

    results = {a.label: a.results["text", 0] for a in suite.arms}
    assert gain(results["ours"], results["lora"]) == pytest.approx(10.0)


def test_the_partner_is_the_lora_of_ones_size(tmp_path):
    records = [
        record("small", "a", 0, 0.8, parameters=500),
        record("large", "a", 0, 0.8, parameters=4000),
        record("made for cut", "a", 0, 0.8, parameters=3900, size_of="a-cut-0"),
        record("cut", "a", 0, 0.8, kind="X", parameters=3900),
        record("near small", "a", 0, 0.8, kind="X", parameters=700),
        record("full", "a", 0, 0.8, kind="X", ranks=None, parameters=100_000),
        record("ranks differ", "a", 0, 0.8, ranks=(1, 2, 3, 4), parameters=480),
    ]
    found = by_arm(loaded(tmp_path, records))
    partner = {label: compared.reference.label for label, compared in found.items()}
    assert partner == {
        "cut": "made for cut",
        "near small": "small",
        "full": "large",
        "ranks differ": "small",
    }
    assert found["near small"].equal_size and not found["full"].equal_size
    assert found["full"].verdict() == "not of one size"


def test_a_difference_needs_both_intervals(tmp_path):
    records = []
    for task, shift in (("a", 0.03), ("b", 0.031), ("c", 0.029)):
        for seed in (0, 1):
            records += both(task, seed, 0.8, 0.8 + shift)
            records.append(record("noise", task, seed, 0.8 + (shift - 0.03) * 9, kind="X"))
    found = by_arm(loaded(tmp_path, records))
    assert found["ours"].verdict() == "better"
    assert found["noise"].verdict() == "no difference shown"


@pytest.mark.parametrize(
    ("value", "metric", "floor", "rows", "expected"),
    [
        (0.70, "accuracy", 0.68, 400, False),  # s.e. 0.0233: below 0.7266
        (0.73, "accuracy", 0.68, 400, True),
        (0.05, "pearson", 0.0, 1000, False),  # s.e. 0.0316
        (0.07, "pearson", 0.0, 1000, True),
        (9.0, "perplexity", 10.0, 10, True),
        (9.99, "perplexity", 10.0, 10, False),
        (0.70, "accuracy", None, 400, None),
    ],
)
def test_whether_lora_learned_anything(value, metric, floor, rows, expected):
    raw = record("lora", "a", 0, value, metric=metric, floor=floor, rows=rows)
    assert learned(Result.from_dict(raw)) is expected


def test_where_lora_learned_nothing_the_cell_is_said_and_left_out(tmp_path):
    records = [*both("a", 0, 0.80, 0.82), *both("a", 1, 0.51, 0.90), *both("b", 0, 0.50, 0.9)]
    suite = loaded(tmp_path, records)
    (compared,) = comparisons(suite)
    assert compared.differences == {"a": [pytest.approx(2.0)]}
    assert sorted(compared.left_out) == [("a", 1), ("b", 0)]
    text = markdown("t", sections(suite, "c"))
    assert "| ours | 1,000 | 82.0 (1) | 90.0 † |" in text
    assert "LoRA itself learned nothing there (a, seed 1; b, seed 0)" in text
    assert "Evaluated on a: 1,000 test rows; b: 1,000 test rows." in text


def test_costs_are_ratios_to_a_lora_on_the_same_machine(tmp_path):
    records = [
        record("lora", "a", 0, 0.8, seconds=(0, 10)),
        record("ours", "a", 0, 0.8, kind="X", seconds=(5, 20)),
        record("lora", "a", 1, 0.8, seconds=(0, 20)),
        record("ours", "a", 1, 0.8, kind="X", seconds=(4, 22)),
        record("lora", "a", 2, 0.8, seconds=(0, 1)),
        record("ours", "a", 2, 0.8, kind="X", seconds=(9, 9), about={"resumed": True}),
        record("lora", "a", 3, 0.8, seconds=(0, 1)),
        record("ours", "a", 3, 0.8, kind="X", seconds=(9, 9), about={"threads": 2}),
    ]
    (compared,) = comparisons(loaded(tmp_path, records))
    cost = costs(compared)
    assert (cost.search, cost.train, cost.total) == (
        pytest.approx((0.5 + 0.2) / 2),
        pytest.approx((2 + 1.1) / 2),
        pytest.approx((2.5 + 1.3) / 2),
    )
    assert (cost.least, cost.most, cost.cells) == (pytest.approx(1.3), pytest.approx(2.5), 2)


def test_cells_that_judge_a_rate_count_nowhere_else(tmp_path):
    records = [*both("a", 0, 0.8, 0.9), record("ours", "a", 1, 0.1, kind="X", held_out=0.1)]
    suite = loaded(tmp_path, records)
    assert len(suite.results) == 2 and len(suite.rates) == 1
    text = markdown("t", sections(suite, "c"))
    assert "| ours | 0.001 \\* |" in text and "a better one may lie beyond" in text


def test_two_results_for_one_place_are_said(tmp_path):
    records = [*both("a", 0, 0.8, 0.9), record("ours", "a", 0, 0.7, kind="X")]
    suite = loaded(tmp_path, records)
    (problem,) = suite.problems
    assert "both ours on a, seed 0; the second is reported" in problem
    (compared,) = comparisons(suite)
    assert compared.mean == pytest.approx(-10.0)


def test_cells_of_other_epochs_stay_apart(tmp_path):
    """Two recipes in one folder: a longer training of one method is no gain over the other."""
    records = [*both("a", 0, 0.80, 0.82), *both("a", 0, 0.90, 0.91), *both("b", 0, 0.7, 0.7)]
    for number, raw in enumerate(records):
        raw["about"]["cell"]["spec"]["training"] = {
            "num_train_epochs": 1 if number in (0, 1) else 9
        }
    suite = loaded(tmp_path, records)
    assert suite.tasks == ["a (num_train_epochs 1)", "a (num_train_epochs 9)", "b"]
    assert suite.problems == [
        "a stands for 2 settings, kept apart; they differ in num_train_epochs"
    ]
    (compared,) = comparisons(suite)
    assert compared.differences == {
        "a (num_train_epochs 1)": [pytest.approx(2.0)],
        "a (num_train_epochs 9)": [pytest.approx(1.0)],
        "b": [0.0],
    }


def test_methods_of_other_flags_stay_apart(tmp_path):
    records = [record("lora", "a", seed, 0.8) for seed in (0, 1)]
    for raw, r in zip(records, (4, 8), strict=True):
        raw["about"]["cell"]["spec"]["method"]["r"] = r
    suite = loaded(tmp_path, records)
    assert [arm.label for arm in suite.arms] == ["lora (r 4)", "lora (r 8)"]


def test_runs_of_other_rows_stay_apart(tmp_path):
    """Files of `rankwise run`: more training rows, and evaluated rows that are others'."""
    records = [record("LoRA", "rte", seed, 0.8) for seed in range(3)]
    for raw in records:
        del raw["about"]["cell"]
    records[1]["rows"]["train"] = 50
    records[2]["rows"]["evaluated"] = 10
    suite = loaded(tmp_path, records)
    assert suite.tasks == [
        "rte (evaluated rows 10, training rows 100)",
        "rte (evaluated rows 1000, training rows 100)",
        "rte (evaluated rows 1000, training rows 50)",
    ]
    assert all(len(arm.results) == 3 for arm in suite.arms)


def test_ranks_and_whether_seeds_agree(tmp_path):
    more = {"kind": "X", "claim": "choosing ranks"}
    records = [
        record("ours", "a", 0, 0.8, ranks=(1, 2, 3, 8), **more),
        record("ours", "a", 1, 0.8, ranks=(3, 2, 1, 8), **more),
    ]
    (part,) = [p for p in sections(loaded(tmp_path, records), "c") if p.title == "Ranks"]
    (heat,) = part.maps
    assert (heat.layers, heat.matrices, heat.top) == (["0", "1"], ["query", "value"], 8)
    assert heat.ranks == [[2.0, 2.0], [2.0, 8.0]]
    row = [text for text, _ in part.tables[0][1].rows[0]]
    assert row[2:5] == ["1 to 8", "3.50", "+0.86"]  # numpy.corrcoef says 0.862


@pytest.mark.parametrize("seeds", [1, 2])
def test_one_seed_has_no_spread_and_agrees_with_nobody(seeds, tmp_path):
    records = []
    for seed in range(seeds):
        small = record("ours", "a", seed, 0.9, kind="X", parameters=500)
        ranked = record("ranked", "a", seed, 0.8, kind="Y", ranks=(1, 2, 3, 8), claim="ranks")
        records += [record("lora", "a", seed, 0.8), small, ranked]
    said = {part.title: part.text for part in sections(loaded(tmp_path, records), "")}
    assert ("standard deviation" in said["Quality over parameters"]) == (seeds > 1)
    assert ("seeds agree" in said["Ranks"]) == (seeds > 1)


def test_every_part_says_where_it_comes_from(tmp_path):
    for part in sections(loaded(tmp_path, both("a", 0, 0.8, 0.9)), "rankwise report x"):
        assert part.source == (
            "rankwise 0.1.0; P, 2 cores; threads 1, cells at a time 1; rankwise compare r.yaml; "
            "rankwise report x"
        )


def test_files_that_cannot_be_read_are_said_one_line_each(tmp_path, capsys):
    folder = write(tmp_path, both("a", 0, 0.8, 0.9))
    cells = folder / "cells"
    (cells / "half.json").write_text((cells / "0.json").read_text()[:200])
    (cells / "old.json").write_text(json.dumps({"schema": "rankwise-result/0"}))
    (cells / "list.json").write_text("[]")
    failure = {"cell": {"method": {"label": "ours"}}, "error": "the loss is nan", "again": True}
    (cells / "failed.json").write_text(json.dumps({"schema": "rankwise-failure/1", **failure}))
    (cells / "failed2.json").write_text(json.dumps({"schema": "rankwise-failure/1"}))
    main(["report", str(folder)])
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 4 and all(line.startswith("rankwise: ") for line in said)
    text = (folder / "report" / "report.md").read_text()
    assert "the loss is nan" in text and "half.json" in text and "| ours | 1,000 | 90.0 |" in text


@pytest.mark.parametrize(
    "changes",
    [
        {"task": {"name": "a", "metrics": []}},
        {"task": {"name": "a", "metrics": ["elegance"]}},
        {"metrics": {"loss": 0.5}},
        {"cost": {}},
        {"about": {"cell": []}},
        {"about": {"cell": {"spec": "x"}}},
        {"about": {"floor": 3}},
        {"task": {"name": "a", "metrics": [[]]}},
        {"training": {"seed": "x", "learning_rate": 1e-3}},
        {"training": {"seed": 0}},
        {"about": {"judged": {"x": 0.1}}},
        {"about": {"cell": {"spec": {"size_of": ["x"]}}}},
    ],
)
def test_a_result_that_says_too_little_is_left_out_and_said(changes, tmp_path):
    records = [*both("a", 0, 0.8, 0.9), record("odd", "a", 0, 0.7, kind="X") | changes]
    suite = loaded(tmp_path, records)
    (problem,) = suite.problems
    assert "2.json: odd: its" in problem or " as compare writes " in problem
    assert [arm.label for arm in suite.arms] == ["lora", "ours"]
    markdown("t", sections(suite, "c"))


def fields_of(value, at=()):
    if at:
        yield at
    for key in value if isinstance(value, dict) else ():
        yield from fields_of(value[key], (*at, key))


def test_any_field_of_any_value_is_a_report_or_a_line(tmp_path):
    """Every field of a result in turn, replaced by a value that it never has."""
    odd = [None, True, -1, 10**30, "", "../x\x1b[2J", [[]], {}, {"x": {"y": 1}}]
    good = both("a", 0, 0.8, 0.9)
    rng = random.Random(0)
    for where in fields_of(good[1]):
        for value in rng.sample(odd, 3):
            changed = copy.deepcopy(good)
            inner = changed[1]
            for key in where[:-1]:
                inner = inner[key]
            inner[where[-1]] = value
            markdown("t", sections(loaded(tmp_path, changed), "c"))


def test_a_run_beside_a_grid_is_nobodys_size(tmp_path):
    """A run is no cell, so that it has no name that others could take their size of."""
    run = record("theirs", "c", 0, 0.9, kind="X")
    del run["about"]["cell"]
    suite = loaded(tmp_path, [*both("a", 0, 0.8, 0.9), run])
    assert {arm.label: arm.size_of for arm in suite.arms} == dict.fromkeys(
        ("lora", "ours", "theirs"), ""
    )


def test_a_control_that_shares_no_place_yet_is_not_compared_with(tmp_path):
    records = [
        record("ours", "a", 0, 0.9, kind="X"),
        record("its", "b", 0, 0.8, size_of="a-ours-0"),
        record("lora", "a", 0, 0.7),
    ]
    compared = by_arm(loaded(tmp_path, records))
    assert compared["ours"].reference.label == "lora"


@pytest.mark.parametrize("content", [None, "empty", "broken"])
def test_nothing_to_report_is_one_line(content, tmp_path, capsys):
    if content is not None:
        (tmp_path / "cells").mkdir()
    if content == "broken":
        (tmp_path / "cells" / "x.json").write_text("{")
    with pytest.raises(SystemExit) as caught:
        main(["report", str(tmp_path) if content else str(tmp_path / "no")])
    said = capsys.readouterr().err.strip()
    assert caught.value.code == 2 and "\n" not in said and said.startswith("rankwise: ")


def test_a_runs_controls_are_arms_of_their_own(tmp_path):
    ours = record("ours", "a", 0, 0.9, kind="X")
    lora = record("LoRA r=4", "a", 0, 0.8)
    for raw in (ours, lora):
        del raw["about"]["cell"]
    ours["controls"] = [lora]
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps(ours))
    suite = load([path])
    assert [arm.label for arm in suite.arms] == ["LoRA r=4", "ours"]
    (compared,) = comparisons(suite)
    assert compared.mean == pytest.approx(10.0) and math.isnan(compared.t.low)
    assert compared.verdict() == "too few to say"


def test_markdown_keeps_hostile_text_as_text(tmp_path):
    suite = loaded(tmp_path, [record(HOSTILE, "a", 0, 0.8), *both("a", 0, 0.8, 0.9)])
    text = markdown("t", sections(suite, "c"))
    assert "<script" not in text and "<img" not in text
    rows = [line for line in text.splitlines() if line.startswith("| a&lt;/td")]
    head = next(line for line in text.splitlines() if line.startswith("| method"))
    bare = rows[0].replace("\\|", "")
    assert bare.count("|") == head.count("|")


def test_the_folder_of_a_grid_is_read(tmp_path):
    write(tmp_path, both("a", 0, 0.8, 0.9))
    assert len(load([tmp_path]).results) == len(load([tmp_path / "cells"]).results) == 2
    with pytest.raises(ResultError, match="nowhere: No such file"):
        load([tmp_path / "nowhere"])
