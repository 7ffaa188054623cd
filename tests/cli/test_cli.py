"""The command line: every command end to end on a tiny model, resumed, and fed with nonsense."""

import csv
import json
import math
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from conftest import make_rows, write_jsonl
from rankwise import METHODS, RankPlan, RankwiseError, Result, stages, tasks, workspace
from rankwise.bilevel import SearchTrainer
from rankwise.cli import arguments, main, show
from rankwise.cli.job import parse_job
from rankwise.lora import check
from rankwise.trainer import FiniteTrainer

FAST = (
    "--max_steps 4 --per_device_train_batch_size 8 --learning_rate 1e-2 --save_steps 2 --use_cpu"
).split()
SEARCH = ["--method=autolora", "--r=4", "--gate_learning_rate=0.1"]


def for_train(flags: list[str]) -> list[str]:
    """The flags without those of a search, which `train --plan` refuses."""
    return [flag for flag in flags if flag not in SEARCH]


@pytest.fixture(scope="session")
def base(tiny_bert, rows_dir) -> list[str]:
    """Flags of a run that takes a second."""
    return ["--model_name_or_path", tiny_bert, "--data_dir", rows_dir, *FAST, *SEARCH]


@pytest.fixture(scope="session")
def finished(base, tmp_path_factory) -> Path:
    """The folder of a run with both controls, never stopped."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    main(["run", *base, "--control", "lora", "random", "--output_dir", str(folder)])
    return folder


@pytest.fixture(scope="session")
def trained(base, tmp_path_factory) -> Path:
    """The folder of `train --r 2`."""
    folder = tmp_path_factory.mktemp("trained") / "out"
    flags = ["--r", "2", "--target_modules", "query", "value"]
    main(["train", *for_train(base), *flags, "--output_dir", str(folder)])
    return folder


def metrics_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def test_without_a_rate_each_method_trains_at_its_usual_one(base, tmp_path):
    flags = [f for f in for_train(base) if f not in ("--learning_rate", "1e-2")]
    main(["run", "--method=lora", *flags, "--control", "full", "--output_dir", f"{tmp_path}/o"])
    record = metrics_of(tmp_path / "o")
    rates = [part["training"]["learning_rate"] for part in (record, *record["controls"])]
    assert rates == [1e-3, 1e-4]


def evaluated(folder: Path) -> dict:
    """What `rankwise evaluate` has to print of a run."""
    found = metrics_of(folder)
    return {"split": found["split"], "rows": found["rows"]["evaluated"], **found["metrics"]}


def json_of(plan: Path) -> dict:
    return json.loads(plan.read_text())


def same_tensors(a: Path, b: Path) -> bool:
    """Bit for bit, in the adapters of two runs."""
    ours, theirs = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (a, b))
    return ours.keys() == theirs.keys() and all(ours[n].equal(theirs[n]) for n in ours)


def names(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


def refused(capsys, argv: list[str], *words: str, code: int = 2) -> str:
    """The one line on standard error with which a command stops; it has all the words."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(argv)
    out, err = capsys.readouterr()
    assert stop.value.code == code
    assert err.startswith("rankwise: "), err
    assert err.count("\n") == 1 and err.endswith("\n"), err
    assert out == ""
    assert all(word in err for word in words), err
    return err


# What the commands write


def test_run_writes_everything_and_leaves_nothing_else(finished):
    assert names(finished) == [
        ".rankwise",
        "adapter/README.md",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/plan.json",
        "adapter/task.json",
        "adapter/tokenizer.json",
        "adapter/tokenizer_config.json",
        "controls/lora.json",
        "controls/random.json",
        "metrics.json",
        "plan.json",
        "ranks.png",
    ]
    assert [path.name for path in finished.parent.iterdir()] == ["out"]


def test_metrics_of_a_run(finished):
    found = metrics_of(finished)
    plan = RankPlan.load(finished / "plan.json")
    head = 32 * 2 + 2
    assert Result.load(finished / "metrics.json").to_dict() == found
    assert found["about"]["command"] == "run"
    assert found["cost"]["search_seconds"] > 0
    assert found["cost"]["train_seconds"] > 0
    assert found["ranks"] == plan.ranks
    assert found["lora_parameters"] == plan.parameters
    assert found["trainable_parameters"] == plan.parameters + head
    assert found["cost"]["steps"] == 4
    assert (found["split"], found["rows"]["evaluated"]) == ("test", 12)
    assert (found["rows"]["train"], found["rows"]["held_out"]) == (36, 18)
    assert 0 <= found["metrics"]["accuracy"] <= 1
    assert math.isfinite(found["metrics"]["loss"])
    for control in found["controls"]:
        assert control["cost"]["search_seconds"] == 0
        assert control["cost"]["train_seconds"] > 0
        assert control["cost"]["steps"] == found["cost"]["steps"]
        assert control["metrics"].keys() == found["metrics"].keys()
        assert control["rows"] == found["rows"] | {"held_out": 0}
        assert control["split"] == found["split"]
    uniform, random = found["controls"]
    assert uniform["name"].startswith("LoRA r=")
    assert random["name"] == "random plan"
    assert random["trainable_parameters"] == found["trainable_parameters"]
    assert f"{uniform['name']} " in found["verdict"] and "random plan " in found["verdict"]


def test_plans_of_a_run(finished):
    plan, uniform, random = (
        RankPlan.load(finished / name)
        for name in ("plan.json", "controls/lora.json", "controls/random.json")
    )
    assert all(1 <= r <= 4 for r in plan.ranks.values())
    assert all(len(entry.gate) == 4 for entry in plan.modules.values())
    assert all(sum(entry.gate) == pytest.approx(1, abs=1e-4) for entry in plan.modules.values())
    assert plan.ranks.keys() == uniform.ranks.keys() == random.ranks.keys()
    assert random.parameters == plan.parameters
    (r,) = set(uniform.ranks.values())
    # no other rank comes nearer to the plan's size
    distance = {n: abs(RankPlan.uniform(plan, n).parameters - plan.parameters) for n in range(1, 5)}
    assert distance[r] == min(distance.values())


def test_the_adapter_of_a_run_is_stock_peft(finished, bert):
    from peft import PeftModel

    model = PeftModel.from_pretrained(bert, str(finished / "adapter"))
    check(model, RankPlan.load(finished / "plan.json"))
    card = (finished / "adapter" / "README.md").read_text()
    assert "| layer | query | value |" in card
    assert f"{metrics_of(finished)['metrics']['accuracy']:.4f}" in card
    assert str(finished.parent) not in card


def test_nothing_but_peft_s_own_config_holds_a_path(finished, tiny_bert, rows_dir):
    written = ("README.md", "task.json", "tokenizer.json", "tokenizer_config.json")
    for name in ("plan.json", "metrics.json", *(f"adapter/{name}" for name in written)):
        text = (finished / name).read_text()
        for path in (tiny_bert, rows_dir, str(finished)):
            assert path not in text
            assert str(Path(path).parent) not in text


def test_search_train_evaluate_give_what_run_gave(finished, base, tmp_path, capsys):
    main(["search", *base, "--output_dir", str(tmp_path / "s")])
    assert json_of(tmp_path / "s" / "plan.json") == json_of(finished / "plan.json")
    assert names(tmp_path / "s") == [".rankwise", "plan.json", "ranks.png", "search.json"]
    found = json_of(tmp_path / "s" / "search.json")  # nothing was trained: no result record
    assert found["search_seconds"] > 0
    assert found["ranks"] == metrics_of(finished)["ranks"]
    plan = str(tmp_path / "s" / "plan.json")
    main(["train", *for_train(base), "--plan", plan, "--output_dir", str(tmp_path / "t")])
    assert same_tensors(tmp_path / "t", finished)
    assert metrics_of(tmp_path / "t")["metrics"] == metrics_of(finished)["metrics"]
    data = base[base.index("--data_dir") + 1]
    capsys.readouterr()
    main(["evaluate", "--adapter", str(tmp_path / "t"), "--data_dir", data, "--use_cpu"])
    assert json.loads(capsys.readouterr().out) == evaluated(tmp_path / "t")


def test_a_plan_that_is_trained_keeps_saying_where_it_comes_from(finished, base, tmp_path):
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    shutil.copy(finished / "plan.json", plan)
    argv = ["train", *for_train(base), "--max_steps", "1", "--plan", str(plan)]
    main([*argv, "--output_dir", str(out)])
    assert json_of(out / "plan.json") == json_of(plan)
    assert "AutoLoRA (softmax gate)" in (out / "adapter" / "README.md").read_text()
    written = ("README.md", "task.json", "tokenizer.json", "tokenizer_config.json")
    for name in ("plan.json", "metrics.json", *(f"adapter/{name}" for name in written)):
        assert str(tmp_path) not in (out / name).read_text()


def test_train_at_one_rank(trained):
    assert set(RankPlan.load(trained / "plan.json").ranks.values()) == {2}
    found = metrics_of(trained)
    assert found["about"]["command"] == "train"
    assert found["lora_parameters"] == 4 * 64 * 2
    assert found["cost"]["search_seconds"] == 0
    config = json.loads((trained / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (2, 4, {})
    assert [path.name for path in trained.parent.iterdir()] == ["out"]


def test_a_hand_edited_plan_is_trained_as_edited(finished, base, tmp_path):
    raw = json.loads((finished / "plan.json").read_text())
    first, second, *_ = raw["modules"]
    raw["modules"][first]["rank"], raw["modules"][second]["rank"] = 0, 7
    (tmp_path / "plan.json").write_text(json.dumps(raw))
    out = tmp_path / "out"
    main(
        ["train", *for_train(base), "--plan", str(tmp_path / "plan.json"), "--output_dir", str(out)]
    )
    shapes = {
        n: t.shape for n, t in load_file(out / "adapter" / "adapter_model.safetensors").items()
    }
    assert not [name for name in shapes if first in name]
    assert [shape[0] for name, shape in shapes.items() if f"{second}.lora_A" in name] == [7]


def test_evaluate_takes_the_split_the_folder_and_the_file_it_is_given(trained, rows_dir, capsys):
    flags = ["--data_dir", rows_dir, "--use_cpu"]
    found = []
    for adapter, more in (
        (trained, [*flags, "--eval_split", "validation"]),
        (trained / "adapter", [*flags, "--eval_split", "validation"]),
        (trained, ["--test_file", f"{rows_dir}/validation.jsonl", "--use_cpu"]),
    ):
        capsys.readouterr()
        main(["evaluate", "--adapter", str(adapter), *more])
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]
    assert found[0]["split"] == "validation"
    assert found[2] == found[0] | {"split": "test"}


def test_evaluate_cuts_rows_where_training_did(base, tiny_bert, tmp_path, capsys):
    """Words that tell lie beyond the default max_length of 128."""
    for split, count in (("train", 16), ("validation", 8), ("test", 8)):
        rows = [
            {"text": "the " * 140 + ("fine" if n % 2 else "awful"), "label": n % 2}
            for n in range(count)
        ]
        path = tmp_path / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--data_dir", str(tmp_path), "--model_name_or_path", tiny_bert]
    out = tmp_path / "out"
    main(["train", *flags, *FAST, "--max_length", "160", "--output_dir", str(out)])
    capsys.readouterr()
    main(["evaluate", *flags, "--adapter", str(out), "--use_cpu"])
    assert json.loads(capsys.readouterr().out) == evaluated(out)


@pytest.mark.parametrize(
    ("kind", "metric"), [("regression", "pearson"), ("pair", "accuracy"), ("tagging", "f1")]
)
def test_other_kinds_of_task(base, tiny_bert, tmp_path, kind, metric):
    words = "fine awful the film warm cold".split()
    rows = []
    for n in range(24):
        good = words[n % 6]
        rows.append(
            {
                "regression": {"text": f"{good} film", "label": n / 10 + 0.05},
                "pair": {"sentence1": good, "sentence2": "film", "label": n % 2},
                "tagging": {"tokens": [good, "film"], "ner_tags": ["B-x" if n % 2 else "O", "O"]},
            }[kind]
        )
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    flags = ["--model_name_or_path", tiny_bert, "--train_file", str(path), *FAST]
    few = ["--method", "autolora"]  # which needs no more rows than these to choose on
    main(["run", *few, *flags, "--control", "none", "--output_dir", str(out)])
    found = metrics_of(out)
    assert metric in found["metrics"]
    assert found["rows"]["evaluated"] == 2  # a tenth of train, held out
    assert found["rows"]["train"] == 22
    assert found["controls"] == []


def test_columns_and_limits_of_a_csv(tiny_bert, tmp_path):
    folder = tmp_path / "Ordner mit ümlaut"
    folder.mkdir()
    path = folder / "rows of mine.csv"
    with path.open("w", encoding="utf-8-sig", newline="") as file:  # with a byte order mark
        writer = csv.writer(file)
        writer.writerow(["what, exactly", "Urteil"])
        writer.writerows([[f'a "good", film {n}', "jä" if n % 2 else "nein"] for n in range(30)])
    out = folder / "a new" / "results ü"
    argv = ["train", "--model_name_or_path", tiny_bert, "--train_file", str(path), *FAST]
    argv += ["--text_column", "what, exactly", "--label_column", "Urteil"]
    argv += ["--max_train_samples", "20", "--max_eval_samples", "2", "--output_dir", str(out)]
    main(argv)
    assert metrics_of(out)["task"]["label_names"] == ["jä", "nein"]
    assert metrics_of(out)["rows"]["train"] == 20
    assert metrics_of(out)["rows"]["evaluated"] == 2
    assert (out / "adapter" / "README.md").is_file()


def test_a_csv_cell_of_any_length(tiny_bert, tmp_path):
    rows = "".join(f'"{"film " * 27_000}{n}",{"good" if n % 2 else "bad"}\n' for n in range(6))
    (tmp_path / "rows.csv").write_text("text,label\n" + rows)
    argv = ["train", "--model_name_or_path", tiny_bert, *FAST, "--max_steps", "1"]
    argv += ["--train_file", str(tmp_path / "rows.csv"), "--output_dir", str(tmp_path / "out")]
    main(argv)
    assert metrics_of(tmp_path / "out")["rows"]["train"] == 5


def test_any_field_of_training_arguments(base, tmp_path, monkeypatch):
    seen = []
    real = stages.run_training

    def run_training(trainer, *args):
        seen.append(trainer.args)
        return real(trainer, *args)

    monkeypatch.setattr(stages, "run_training", run_training)
    extra = ["--training_arguments", '{"adam_beta2": 0.5, "adam_epsilon": 1e-4}']
    main(
        ["train", *for_train(base), "--max_steps", "1", *extra, "--output_dir", str(tmp_path / "o")]
    )
    assert [(args.adam_beta2, args.adam_epsilon) for args in seen] == [(0.5, 1e-4)]
    assert seen[0].learning_rate == 1e-2


def test_all_linear_leaves_the_head_alone(base, tmp_path):
    out = tmp_path / "out"
    flags = ["--target_modules", "all-linear", "--control", "none"]
    main(["run", *base, *flags, "--output_dir", str(out)])
    plan = RankPlan.load(out / "plan.json")
    assert not [name for name in plan.ranks if "classifier" in name]
    assert len(plan.ranks) >= 2 * 6


def test_demo_is_run_with_other_defaults(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["demo", *base, "--control", "none"])
    assert metrics_of(tmp_path / "runs" / "demo")["about"]["command"] == "demo"
    assert metrics_of(tmp_path / "runs" / "demo")["training"]["per_device_train_batch_size"] == 8


def test_demo_without_its_packages_says_what_to_install(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("rankwise.cli.demo.find_spec", lambda name: None)
    argv = ["demo", "--output_dir", str(tmp_path / "o")]
    refused(capsys, argv, "pip install 'rankwise[demo]'")
    assert list(tmp_path.iterdir()) == []


# Every method

NOT_FOR_BERT = {"llama-adapter"}


@pytest.mark.parametrize("name", [name for name in METHODS if name not in NOT_FOR_BERT])
def test_every_method_runs_and_what_it_hands_over_is_what_was_measured(
    name, tiny_bert, rows_dir, many_rows_dir, tmp_path, capsys
):
    method, out = METHODS[name], tmp_path / "out"
    own = {"r": ["4"], "ranks": ["1", "2"], "gate_learning_rate": ["0.1"]}
    flags = [word for k, v in own.items() if hasattr(method, k) for word in (f"--{k}", *v)]
    rows = many_rows_dir if method.takes_validation else rows_dir
    data = ["--model_name_or_path", tiny_bert, "--data_dir", rows]
    main(["run", "--method", name, *data, *FAST, *flags, "--output_dir", str(out)])
    capsys.readouterr()
    main(["evaluate", "--adapter", str(out), *data, "--use_cpu"])
    again, found = json.loads(capsys.readouterr().out), evaluated(out)
    assert again.pop("loss") == pytest.approx(found.pop("loss"), rel=1e-5)
    assert again == found
    assert metrics_of(out)["method"]["name"] == type(method).__name__
    assert "README.md" in [path.name for path in (out / method.product).iterdir()]
    assert not {"arms", "search", "training", "result.json"} & {p.name for p in out.iterdir()}


@pytest.mark.parametrize("name", NOT_FOR_BERT)
def test_a_method_that_the_model_is_not_for(base, tmp_path, capsys, name):
    argv = ["run", *for_train(base), "--method", name, "--output_dir", str(tmp_path / "out")]
    refused(capsys, argv, "of type 'bert'")
    assert list(tmp_path.iterdir()) == []


# Controls


def test_a_control_with_flags_of_its_own(base, tmp_path):
    """Its size is the one that is asked for; its scaling is the method's, alpha / r of both."""
    out = tmp_path / "out"
    controls = ["lora", "lora:r=2", "lora:r=2,lora_alpha=2", "svd-energy"]
    flags = ["--lora_alpha", "6", "--control", *controls]
    main(["run", *base, *flags, "--output_dir", str(out)])
    found = metrics_of(out)["controls"]
    assert [control["name"] for control in found[1:]] == ["LoRA r=2"] * 2 + [
        "LoRA, cut by SVD, energy"
    ]
    plans = [
        RankPlan.load(out / "controls" / f"{name}.json")
        for name in ("lora", "lora-2", "lora-3", "svd-energy")
    ]
    assert [plan.scaling for plan in plans] == [1.5, 1.5, 1, 1.5]
    assert [plan.ranks for plan in plans] == [control["ranks"] for control in found]
    assert set(plans[1].ranks.values()) == set(plans[2].ranks.values()) == {2}


def test_a_control_that_has_too_few_rows_is_found_before_any_training(tiny_bert, tmp_path, capsys):
    """40 rows of 400 are evaluated; the method holds out 72, the control a fifth of the 288."""
    rows = str(write_jsonl(tmp_path / "rows.jsonl", make_rows(400, 0)))
    argv = ["run", "--model_name_or_path", tiny_bert, "--use_cpu", "--method", "cut"]
    argv += ["--train_file", rows, "--control", "cut", "--output_dir", str(tmp_path / "out")]
    refused(capsys, argv, "58 held-out rows are too few")
    assert not list(tmp_path.glob("out*"))


def test_a_control_at_a_plan(finished, base, tmp_path):
    plan = finished / "controls" / "random.json"
    flags = ["--control", f"lora:plan={plan}", "--output_dir", str(tmp_path / "o")]
    main(["run", *base, *flags])
    (control,) = metrics_of(tmp_path / "o")["controls"]
    assert control["ranks"] == RankPlan.load(plan).ranks


def test_a_random_control_waits_for_the_size_that_is_found(base, tmp_path, capsys):
    """Of half of rank 2 there is one plan alone, but the search may find another size."""
    argv = ["run", *base, "--r", "2", "--control", "random"]
    main([*argv, "--output_dir", str(tmp_path / "out")])
    sizes = set(RankPlan.load(tmp_path / "out" / "plan.json").ranks.values())
    alone = sizes in ({1}, {2})
    assert len(metrics_of(tmp_path / "out")["controls"]) == 1 - alone
    assert ("no random control" in capsys.readouterr().err) == alone


@pytest.mark.parametrize(("control", "times"), [("none", 1), ("lora", 2)])
def test_the_base_model_is_loaded_once_per_arm(base, tmp_path, monkeypatch, control, times):
    loaded = []
    real = tasks.load_model

    def load_model(*args, **kwargs):
        loaded.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(tasks, "load_model", load_model)
    flags = ["--control", control, "--output_dir", str(tmp_path / "out")]
    main(["run", *base, *flags])
    assert len(loaded) == times


def test_search_is_for_methods_that_choose(base, tmp_path, capsys):
    argv = ["search", *for_train(base), "--method", "lora", "--output_dir", str(tmp_path / "out")]
    refused(capsys, argv, "LoRA chooses nothing", "rankwise run")
    assert list(tmp_path.iterdir()) == []


# The output folder


def test_results_are_not_overwritten_unasked(trained, base, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    (out / "plan.json").write_text("precious")
    (out / "rows.txt").write_text("put there by hand")
    argv = ["train", *for_train(base), "--r", "4", "--max_steps", "1", "--output_dir", str(out)]
    refused(capsys, argv, str(out), "--overwrite_output_dir")
    assert (out / "plan.json").read_text() == "precious"
    refused(capsys, [*argv, "--overwrite_output_dir"], "rows.txt", "did not write")
    assert (out / "plan.json").read_text() == "precious"
    (out / "rows.txt").unlink()
    main([*argv, "--overwrite_output_dir"])
    assert RankPlan.load(out / "plan.json").r == 4
    assert metrics_of(out)["cost"]["steps"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwriting_never_takes_the_rows_or_the_model(tiny_bert, base, tmp_path, capsys):
    """`--overwrite_output_dir` replaces results, not whatever folder is named by mistake."""
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "train.jsonl").write_text(ROWS)
    argv = ["train", "--model_name_or_path", tiny_bert, *FAST, "--max_steps", "1"]
    argv += ["--overwrite_output_dir", "--data_dir", str(rows)]
    for place in (rows, tmp_path):
        refused(capsys, [*argv, "--output_dir", str(place)], str(place))
    assert (rows / "train.jsonl").read_text() == ROWS
    assert names(tmp_path) == ["rows/train.jsonl"]


def test_a_failed_run_leaves_the_results_that_it_was_to_replace(
    trained, base, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    before = {name: (out / name).read_bytes() for name in names(out)}

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "_train_stage", stop)
    with pytest.raises(SystemExit):
        main(["train", *for_train(base), "--output_dir", str(out), "--overwrite_output_dir"])
    assert {name: (out / name).read_bytes() for name in names(out)} == before


def test_an_empty_folder_is_a_fine_output_folder(base, tmp_path):
    (tmp_path / "out").mkdir()
    main(["train", *for_train(base), "--max_steps", "1", "--output_dir", str(tmp_path / "out")])
    assert (tmp_path / "out" / "metrics.json").is_file()


@pytest.mark.parametrize("place", ["{}/file", "{}/file/out", "/proc/nowhere/out"])
def test_an_output_folder_that_cannot_be_made(base, tmp_path, capsys, place):
    (tmp_path / "file").write_text("not a folder")
    refused(
        capsys, ["train", *for_train(base), "--output_dir", place.format(tmp_path)], "--output_dir"
    )
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("place", [".", "", "out/.."])
def test_an_output_folder_without_a_name_of_its_own(base, tmp_path, capsys, place, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(capsys, ["train", *for_train(base), "--output_dir", place], "output_dir")
    assert list(tmp_path.parent.glob("*.partial")) == list(tmp_path.iterdir()) == []


def test_an_output_folder_is_needed(base, capsys):
    for command in ("search", "train", "run"):
        refused(capsys, [command, *for_train(base)], "--output_dir", command)


# Stopping and going on


def killed(argv: list[str], monkeypatch, owner, name: str, calls: int = 1) -> None:
    """Runs a command that is interrupted when owner.name is called for the calls-th time."""
    real, count = getattr(owner, name), 0

    def interrupt(*args, **kwargs):
        nonlocal count
        count += 1
        if count == calls:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupt)
        with pytest.raises(SystemExit) as stop:
            main(argv)
    assert stop.value.code == 130
    assert count == calls


def test_a_run_killed_after_the_search_goes_on(finished, base, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    argv = ["run", *base, "--control", "lora", "random", "--output_dir", str(out)]
    killed(argv, monkeypatch, stages, "_train_stage")
    assert "--resume_from_checkpoint" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]

    def again(*args, **kwargs):
        pytest.fail("the search was repeated")

    monkeypatch.setattr(SearchTrainer, "train", again)
    main([*argv, "--resume_from_checkpoint"])
    assert json_of(out / "plan.json") == json_of(finished / "plan.json")
    assert same_tensors(out, finished)
    assert metrics_of(out)["metrics"] == metrics_of(finished)["metrics"]
    for ours, theirs in zip(
        metrics_of(out)["controls"], metrics_of(finished)["controls"], strict=True
    ):
        assert ours["metrics"] == theirs["metrics"]
    assert metrics_of(out)["about"]["resumed"] is True
    assert metrics_of(finished)["about"]["resumed"] is False
    assert names(out) == names(finished)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("trainer", "calls"),
    [
        (SearchTrainer, 1),  # before the first checkpoint
        (SearchTrainer, 4),  # after the checkpoint of step 2
        (FiniteTrainer, 4),  # in the training of the plan
        (FiniteTrainer, 8),  # in that of the control
    ],
)
def test_a_run_killed_within_a_stage_goes_on(finished, base, tmp_path, monkeypatch, trainer, calls):
    out = tmp_path / "out"
    argv = ["run", *base, "--control", "lora", "--output_dir", str(out)]
    killed(argv, monkeypatch, trainer, "training_step", calls)
    main([*argv, "--resume_from_checkpoint"])
    assert json_of(out / "plan.json") == json_of(finished / "plan.json")
    assert same_tensors(out, finished)
    assert (
        metrics_of(out)["controls"][0]["metrics"] == metrics_of(finished)["controls"][0]["metrics"]
    )
    assert names(out) == [name for name in names(finished) if "random" not in name]


@pytest.mark.parametrize(
    "name", ["write_card", "save_heatmap", "finish"], ids=["card", "heatmap", "finish"]
)
def test_a_run_killed_while_it_reports_goes_on(finished, base, tmp_path, monkeypatch, name):
    out = tmp_path / "out"
    argv = ["run", *base, "--control", "none", "--output_dir", str(out)]
    killed(argv, monkeypatch, workspace if name == "finish" else show, name)
    main([*argv, "--resume_from_checkpoint"])
    assert names(out) == [name for name in names(finished) if "controls/" not in name]
    assert same_tensors(out, finished)
    table = "| layer | query | value |"
    assert table in (out / "adapter" / "README.md").read_text()


def test_an_unfinished_run_is_not_dropped_unasked(base, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    argv = ["run", *base, "--control", "none", "--output_dir", str(out)]
    killed(argv, monkeypatch, stages, "_train_stage")
    partial = tmp_path / "out.partial"
    before = names(partial)
    refused(capsys, argv, str(partial), "--resume_from_checkpoint", "--overwrite_output_dir")
    changed = [*argv, "--resume_from_checkpoint", "--learning_rate", "0.5"]
    refused(capsys, changed, "--learning_rate", "0.01", "0.5")
    changed = [*argv, "--resume_from_checkpoint", "--control", "lora"]
    refused(capsys, changed, "--control")
    assert names(partial) == before
    main([*argv, "--overwrite_output_dir"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert metrics_of(out)["about"]["resumed"] is False


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--r", "3"], ["--r 4", "3"]),
        (["--method", "autolora-sigmoid"], ["--gate softmax", "sigmoid"]),
        (["--target_modules", "key"], ["--target_modules None", "['key']"]),
    ],
)
def test_a_run_is_resumed_with_the_flags_of_its_method(
    base, tmp_path, monkeypatch, capsys, flags, words
):
    argv = ["run", *base, "--control", "none", "--output_dir", str(tmp_path / "out")]
    killed(argv, monkeypatch, stages, "_train_stage")
    refused(capsys, [*argv, "--resume_from_checkpoint", *flags], "had", *words)


def test_there_may_be_nothing_to_resume(base, tmp_path, capsys):
    argv = ["run", *base, "--output_dir", str(tmp_path / "out"), "--resume_from_checkpoint"]
    refused(capsys, argv, "nothing to resume", "--resume_from_checkpoint")
    assert list(tmp_path.iterdir()) == []


def test_a_plan_edited_between_two_starts_is_another_run(
    finished, base, tmp_path, monkeypatch, capsys
):
    plan = tmp_path / "plan.json"
    shutil.copy(finished / "plan.json", plan)
    argv = ["train", *for_train(base), "--plan", str(plan), "--output_dir", str(tmp_path / "out")]
    killed(argv, monkeypatch, FiniteTrainer, "training_step", 4)
    RankPlan.uniform(RankPlan.load(plan), 3).save(plan)
    refused(capsys, [*argv, "--resume_from_checkpoint"], "plan")


def test_a_diverged_run_exits_with_1(base, tmp_path, capsys):
    argv = [
        "train",
        *for_train(base),
        "--learning_rate",
        "1e38",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("rankwise: ")
    assert "Lower the learning rate" in last


# Flags and the YAML file


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (
            "search",
            ["--method", "--r", "--validation_fraction", "--target_modules", "--output_dir"],
        ),
        ("train", ["--plan", "--r", "--learning_rate", "--output_dir", "--resume_from_checkpoint"]),
        (
            "run",
            ["--control", "--method", "--train_file", "--text_column", "--overwrite_output_dir"],
        ),
        ("evaluate", ["--adapter", "--data_dir", "--eval_split", "--max_length"]),
        ("demo", ["--output_dir", "--control", "--seed"]),
        ("cut", ["--adapter", "--rank", "--energy", "--budget", "--plan", "--output_dir"]),
    ],
)
def test_help(command, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    out, err = capsys.readouterr()
    assert f"rankwise {command}" in out
    common = ["--config", *(["--model_name_or_path"] if command != "cut" else [])]
    assert all(f"  {flag}" in out for flag in [*flags, *common])
    assert "--output-dir" not in out  # each flag under one name
    assert err == ""


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_of_the_whole(argv, capsys):
    main(argv)
    out = capsys.readouterr().out
    assert all(command in out for command in ("run", "search", "train", "cut", "evaluate", "demo"))


HEAVY = ("torch", "transformers", "peft", "datasets")


def test_help_is_there_at_once():
    """One process, in which nothing may import what takes seconds."""
    helps = [["--help"], ["cut", "--help"], ["evaluate", "--help"], ["demo", "--help"]]
    for command in ("run", "search", "train"):
        helps += [[command, "--method", method, "--help"] for method in METHODS]
    script = f"""
import json, sys
from rankwise.cli import main
found = []
for argv in {helps!r}:
    try:
        main(argv)
    except SystemExit as stop:
        assert not stop.code, argv
    found += [[argv, name] for name in {HEAVY!r} if name in sys.modules]
print(json.dumps(found), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stderr) == []
    assert done.stdout.count("--config") == len(helps) - 1


@pytest.mark.parametrize("method", METHODS)
def test_help_has_the_flags_of_its_method_alone(method, capsys):
    with pytest.raises(SystemExit):
        main(["run", "--method", method, "--help"])
    out = capsys.readouterr().out
    own = {f.name for f in fields(METHODS[method])}
    others = {f.name for other in METHODS.values() for f in fields(other)} - own
    assert all(f"  --{name}" in out for name in own)
    assert not [name for name in others if f"  --{name} " in out or f"  --{name}\n" in out]


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out.startswith("rankwise 0.")


@pytest.mark.parametrize("argv", [["serach"], ["--model", "x"], [""]])
def test_unknown_command(argv, capsys):
    refused(
        capsys, argv, repr(argv[0]), "run, search, train, cut, predict, export, verify, evaluate"
    )


def parsed(path: Path, config: object, *flags: str) -> dict:
    """What `train` makes of a YAML file and flags, by flag."""
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    found = parse_job("train", "", ["--config", str(path), *flags], method="lora")
    return {key: value for part in found for key, value in vars(part).items()}


def test_flags_go_over_the_file_and_the_file_over_defaults(tmp_path):
    config = {"r": 3, "max_steps": 7, "use_cpu": True, "lr_scheduler_type": "constant"}
    found = parsed(tmp_path / "c.yaml", config, "--r", "2", "--text_column", "a", "b")
    assert (found["r"], found["max_steps"], found["use_cpu"]) == (2, 7, True)
    assert found["lr_scheduler_type"] == "constant"
    assert found["text_column"] == ("a", "b")
    assert found["seed"] == 42


def test_a_flag_turns_off_what_the_file_turned_on(tmp_path):
    assert parsed(tmp_path / "c.yaml", {"bf16": True}, "--bf16", "false")["bf16"] is False


@pytest.mark.parametrize("written", ["1e-4", "1.0e-4", "0.0001", "'1e-4'", "1E-4"])
def test_floats_as_people_write_them(tmp_path, written):
    # YAML 1.1 reads 1e-4 as a text
    found = parsed(tmp_path / "c.yaml", f"learning_rate: {written}\nweight_decay: {written}\n")
    assert found["learning_rate"] == found["weight_decay"] == 1e-4


@pytest.mark.parametrize("key", ["target_modules", "text_column"])
def test_one_value_where_a_list_may_stand(tmp_path, key):
    assert parsed(tmp_path / "c.yaml", {key: "query"})[key] == ("query",)
    assert parsed(tmp_path / "c.yaml", {key: ["query", "value"]})[key] == ("query", "value")


def test_a_mapping_in_the_file(tmp_path):
    found = parsed(tmp_path / "c.yaml", {"training_arguments": {"adam_beta2": 0.98}})
    assert found["training_arguments"] == {"adam_beta2": 0.98}


@pytest.mark.parametrize("config", ["", "# nothing yet\n", "max_train_samples: null\n"])
def test_a_file_that_sets_nothing(tmp_path, config):
    assert parsed(tmp_path / "c.yaml", config)["max_train_samples"] is None


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("learning_rte: 1", ["'learning_rte'", "--help"]),
        ("help: true", ["'help'"]),
        ("1: 2", ["'1'"]),
        ("- r\n- 4", ["list"]),
        ("just words", ["str"]),
        ("a: [1, 2", ["cannot read"]),
        ("r: four", ["r", "four"]),
        ("r: 2.5", ["r", "2.5"]),
        ("r: [2]", ["r", "[2]"]),
        ("max_steps: {a: 1}", ["max_steps"]),
        ("use_cpu: perhaps", ["use_cpu", "perhaps"]),
        ("use_cpu: 3", ["use_cpu", "3"]),
        ("eval_split: everything", ["eval_split", "everything"]),
        ("kind: poetry", ["kind", "poetry"]),
        ("estimator: guess", ["estimator", "guess"]),
        ("target_modules: 3", ["target_modules", "3"]),
        ("model_name_or_path: [a]", ["model_name_or_path"]),
    ],
)
def test_files_with_nonsense(base, tmp_path, capsys, config, words):
    (tmp_path / "c.yaml").write_text(config)
    given = {line.split(":")[0] for line in config.splitlines()}
    flags = [flag for flag in base if flag != "--r=4" or "r" not in given]
    for key in given & {"max_steps", "use_cpu", "model_name_or_path"}:
        at = flags.index(f"--{key}")
        del flags[at : at + (1 if key == "use_cpu" else 2)]
    argv = ["search", *flags, "--config", str(tmp_path / "c.yaml")]
    refused(capsys, [*argv, "--output_dir", str(tmp_path / "o")], *words)
    assert names(tmp_path) == ["c.yaml"]


def test_a_file_that_is_not_there(capsys, tmp_path):
    refused(capsys, ["run", "--config", str(tmp_path / "c.yaml")], "cannot read --config", "c.yaml")


def test_a_config_file_of_a_whole_run(tiny_bert, rows_dir, tmp_path):
    config = {
        "model_name_or_path": tiny_bert,
        "data_dir": rows_dir,
        "method": "autolora",
        "max_search_steps": 4,
        "per_device_train_batch_size": 8,
        "control": "random",
        "target_modules": ["key"],
        "use_cpu": True,
        "output_dir": str(tmp_path / "out"),
    }
    text = yaml.safe_dump(config) + "learning_rate: 3e-3\nmax_steps: 9\n"
    (tmp_path / "c.yaml").write_text(text)
    main(["run", "--config", str(tmp_path / "c.yaml"), "--max_steps", "1", "--r", "4"])
    found = metrics_of(tmp_path / "out")
    assert found["training"]["learning_rate"] == 3e-3
    assert found["cost"]["steps"] == 1
    assert [control["name"] for control in found["controls"]] == ["random plan"]
    ranks = RankPlan.load(tmp_path / "out" / "plan.json").ranks
    assert all(name.endswith(".key") and 1 <= r <= 4 for name, r in ranks.items())


def test_a_required_value_names_flag_and_command():
    assert arguments.required(0, "r", "run") == 0
    with pytest.raises(RankwiseError, match="rankwise run needs --r"):
        arguments.required(None, "r", "run")


# Wrong input: one line, exit code 2, nothing left behind

WRONG_FLAGS = {
    "unknown target": ("--target_modules query nope", ["'nope'", "query (2)", "value (2)"]),
    "rank 0": ("--r 0", ["r is 0"]),
    "rank -3": ("--r -3", ["r is -3"]),
    "rank above the matrix": ("--r 33", ["33", "32"]),
    "huge rank": ("--r 1000000000", ["1000000000", "32"]),
    "rank that is no number": ("--r four", ["--r", "four"]),
    "fraction 0": ("--validation_fraction 0", ["validation_fraction", "0"]),
    "fraction 1": ("--validation_fraction 1", ["validation_fraction", "1"]),
    "fraction that empties D_tr": ("--validation_fraction 0.999", ["validation_fraction", "36"]),
    "fraction nan": ("--validation_fraction nan", ["validation_fraction", "nan"]),
    "unknown method": ("--method autolara", ["'autolara'", "autolora-sigmoid"]),
    "unknown estimator": ("--estimator guess", ["estimator", "guess"]),
    "unknown control": ("--control bogus", ["--control", "'bogus'", "lora", "random", "none"]),
    "control of old": ("--control uniform", ["--control uniform", "--control lora"]),
    "control rank 0": ("--control lora:r=0", ["r is 0"]),
    "control rank above the matrix": ("--control lora:r=33", ["33", "32"]),
    "control rank that is no number": ("--control lora:r=x", ["--control lora", "--r", "'x'"]),
    "control without a value": ("--control lora:r", ["--control lora:r", "name:flag=value"]),
    "control with a flag it lacks": ("--control random:rank=3", ["random plan", "'rank'"]),
    "control with a flag of the command": ("--control lora:config=x", ["LoRA", "'config'"]),
    "flag of another method": ("--by_layer", ["unknown flag --by_layer"]),
    "max_length 0": ("--max_length 0", ["max_length", "0"]),
    "max_length without room": ("--max_length 2", ["max_length", "2"]),
    "max_length above the model's": ("--max_length 4096", ["max_length", "4096"]),
    "no rows left": ("--max_train_samples 0", ["max_train_samples", "0"]),
    "learning rate negative": ("--learning_rate -1", ["learning_rate", "-1"]),
    "learning rate nan": ("--learning_rate nan", ["learning_rate", "nan"]),
    "search learning rate": ("--search_learning_rate -1", ["search_learning_rate", "-1"]),
    "gate learning rate": ("--gate_learning_rate 0", ["learning_rate", "0"]),
    "alpha 0": ("--lora_alpha 0", ["lora_alpha", "0"]),
    "alpha negative": ("--lora_alpha -8", ["lora_alpha", "-8"]),
    "dropout 2": ("--lora_dropout 2", ["lora_dropout", "2"]),
    "batch of none": ("--per_device_train_batch_size 0", ["per_device_train_batch_size", "0"]),
    "eval batch of none": ("--per_device_eval_batch_size 0", ["per_device_eval_batch_size", "0"]),
    "no accumulation": ("--gradient_accumulation_steps 0", ["gradient_accumulation_steps", "0"]),
    "no epochs": ("--max_steps -1 --num_train_epochs 0", ["num_train_epochs", "0"]),
    "seed": ("--seed -1", ["seed", "-1"]),
    "schedule": ("--lr_scheduler_type zigzag", ["zigzag", "cosine"]),
    "reporter": ("--report_to nobody", ["nobody"]),
    "dtype": ("--dtype float99", ["dtype"]),
    "attention": ("--attn_implementation none", ["attn_implementation"]),
    "training_arguments no JSON": ("--training_arguments nonsense", ["training_arguments"]),
    "training_arguments a list": ("--training_arguments [1]", ["training_arguments"]),
    "training_arguments unknown": ('--training_arguments {"adam_beta9":1}', ["adam_beta9"]),
    "training_arguments typed wrongly": ('--training_arguments {"max_steps":"x"}', ["max_steps"]),
    "unknown flag": ("--lerning_rate 1", ["--lerning_rate"]),
    "ambiguous flag": ("--max 1", ["--max"]),
    "stray word": ("stray", ["stray"]),
    "no value": ("--method", ["--method"]),
    "choice": ("--eval_split everything", ["eval_split", "everything", "validation"]),
    "model that is not there": ("--model_name_or_path /no/such/model", ["/no/such/model"]),
    "label also text": ("--text_column text --label_column text", ["'text'", "both"]),
    "missing text column": ("--text_column body", ["'body'", "text, label"]),
    "missing label column": ("--label_column stars", ["'stars'", "text, label"]),
    "three texts": ("--text_column text text text", ["text"]),
    "unknown kind": ("--kind poetry", ["poetry"]),
    "fp16": ('--training_arguments {"fp16":true}', ["fp16", "bf16"]),
}


@pytest.mark.parametrize("case", WRONG_FLAGS)
def test_wrong_flags(base, tmp_path, capsys, case):
    flags, words = WRONG_FLAGS[case]
    argv = ["run", *base, "--output_dir", str(tmp_path / "out"), *flags.split()]
    refused(capsys, argv, *words)
    assert list(tmp_path.iterdir()) == []


GOOD_ROW, BAD_ROW = '{"text": "fine film", "label": "good"}', '{"text": "dull", "label": "bad"}'
ROWS = f"{GOOD_ROW}\n{BAD_ROW}\n" * 6
WRONG_FILES = {
    "empty file": ({"train_file": ""}, ["no rows", "train_file.jsonl"]),
    "blank lines": ({"train_file": "\n \n"}, ["no rows"]),
    "one class": ({"train_file": f"{GOOD_ROW}\n" * 8}, ["train rows", "good", "two labels"]),
    "columns that are not there": (
        {"train_file": '{"body": "x", "stars": 1, "title": "y"}\n' * 4},
        ["body, stars, title", "text_column"],
    ),
    "no label": ({"train_file": '{"sentence": "x"}\n' * 4}, ["sentence", "label_column"]),
    "labels that differ between files": (
        {"train_file": ROWS, "validation_file": '{"text": "so so", "label": "mixed"}\n'},
        ["validation", "mixed", "bad, good"],
    ),
    "columns that differ between files": (
        {"train_file": ROWS, "validation_file": '{"body": "so so", "label": "good"}\n'},
        ["validation", "'text'", "body, label"],
    ),
    "a row without a text": (
        {"train_file": ROWS + '{"text": null, "label": "bad"}\n'},
        ["row 13", "'text'"],
    ),
    "a row without a label": ({"train_file": ROWS + '{"text": "x"}\n'}, ["row 13", "'label'"]),
    "broken JSON": ({"train_file": ROWS + '{"text": "x"'}, ["train_file.jsonl:13"]),
    "two rows for three splits": (
        {"train_file": f"{GOOD_ROW}\n{BAD_ROW}\n", "validation_file": ROWS},
        ["2 rows", "validation_fraction"],
    ),
    "one row to hold out from": ({"train_file": f"{GOOD_ROW}\n"}, ["1 row", "validation"]),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_wrong_files(tiny_bert, tmp_path, capsys, case):
    files, words = WRONG_FILES[case]
    argv = ["run", "--model_name_or_path", tiny_bert, *FAST, "--output_dir", str(tmp_path / "out")]
    for flag, text in files.items():
        path = tmp_path / f"{flag}.jsonl"
        path.write_text(text)
        argv += [f"--{flag}", str(path)]
    # of two rows a tenth is none
    refused(capsys, [*argv, "--validation_fraction", "0.1"], *words)
    assert names(tmp_path) == sorted(f"{flag}.jsonl" for flag in files)
    assert not (tmp_path / "out.partial").exists()


def test_messages_name_flags_and_not_python_arguments(tiny_bert, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"body": "x", "stars": 1, "title": "y"}\n' * 4)
    argv = ["run", "--model_name_or_path", tiny_bert, "--train_file", str(tmp_path / "rows.jsonl")]
    message = refused(capsys, [*argv, "--output_dir", str(tmp_path / "out")])
    assert "--text_column" in message
    assert "text_column=" not in message


def test_no_rows_and_unknown_tasks(tiny_bert, tmp_path, capsys):
    argv = ["run", "--model_name_or_path", tiny_bert, "--output_dir", str(tmp_path / "out")]
    refused(capsys, argv, "data_dir", "train_file")
    refused(capsys, [*argv, "--task", "glue/xyz"], "'glue/xyz'", "glue/mrpc")
    refused(capsys, [*argv, "--data_dir", str(tmp_path / "gone")], "gone")
    refused(capsys, [*argv, "--data_dir", str(tmp_path)], "no train, validation or test file")
    refused(capsys, [*argv, "--train_file", str(tmp_path / "gone.csv")], "gone.csv")
    (tmp_path / "test.jsonl").write_text(ROWS)
    refused(capsys, [*argv, "--test_file", str(tmp_path / "test.jsonl")], "train")
    assert names(tmp_path) == ["test.jsonl"]


def test_a_model_is_needed(rows_dir, tmp_path, capsys):
    for command in ("search", "train", "run"):
        argv = [command, "--data_dir", rows_dir, "--output_dir", str(tmp_path / "out")]
        refused(capsys, argv, "--model_name_or_path", command)


@pytest.mark.parametrize("broken", ["tokenizer", "config", "weights", "cut weights", "everything"])
def test_a_model_folder_that_is_not_whole(tiny_bert, base, tmp_path, capsys, broken):
    folder = tmp_path / "model"
    shutil.copytree(tiny_bert, folder)
    if broken == "tokenizer":
        for path in folder.glob("token*"):
            path.unlink()
    elif broken == "config":
        (folder / "config.json").write_text("{")
    elif broken == "weights":
        (folder / "model.safetensors").unlink()
    elif broken == "cut weights":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        shutil.rmtree(folder)
        folder.mkdir()
    flags = ["--model_name_or_path", str(folder), "--output_dir", str(tmp_path / "out")]
    refused(capsys, ["run", *base, *flags], str(folder))
    assert not (tmp_path / "out.partial").exists()


def test_rows_longer_than_the_model_although_its_tokenizer_knows_no_end(
    tiny_bert, tmp_path, capsys
):
    folder = tmp_path / "model"
    shutil.copytree(tiny_bert, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["model_max_length"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    rows = "".join(json.dumps({"text": "film " * 300, "label": n % 2}) + "\n" for n in range(8))
    (tmp_path / "rows.jsonl").write_text(rows)
    argv = ["train", "--model_name_or_path", str(folder), *FAST, "--max_length", "300"]
    argv += ["--train_file", str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / "out")]
    refused(capsys, argv, "max_length", "300", "192")
    assert not (tmp_path / "out.partial").exists()


def test_targets_that_are_trained_whole_anyway(base, tmp_path, capsys):
    """The head is trained in full: PEFT leaves it out of the adapters."""
    flags = ["--r", "2", "--target_modules", "classifier", "--output_dir", str(tmp_path / "out")]
    refused(capsys, ["run", *base, *flags], "classifier")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (None, ["cannot read the plan", "plan.json"]),
        ("", ["plan.json", "not JSON"]),
        ('{"format": "rankwise-plan/1", "mod', ["plan.json", "not JSON"]),
        ('{"r": 4}', ["plan.json", "rankwise-plan/1"]),
    ],
)
def test_a_plan_that_cannot_be_read(base, tmp_path, capsys, plan, words):
    if plan is not None:
        (tmp_path / "plan.json").write_text(plan)
    flags = ["--plan", str(tmp_path / "plan.json"), "--output_dir", str(tmp_path / "out")]
    refused(capsys, ["train", *for_train(base), *flags], *words)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda name, value: (name.replace("layer.0", "layer.9"), value), ["layer.9"]),
        (lambda name, value: (name, value | {"in": 64}), ["32 x 64", "another model"]),
        (lambda name, value: (name, value | {"rank": -1}), ["-1", ">= 0"]),
        (lambda name, value: (name, value | {"rank": 0}), ["every rank of the plan is 0"]),
    ],
)
def test_a_plan_for_another_model(finished, base, tmp_path, capsys, edit, words):
    raw = json.loads((finished / "plan.json").read_text())
    raw["modules"] = dict(edit(name, value) for name, value in raw["modules"].items())
    (tmp_path / "plan.json").write_text(json.dumps(raw))
    flags = ["--plan", str(tmp_path / "plan.json"), "--output_dir", str(tmp_path / "out")]
    refused(capsys, ["train", *for_train(base), *flags], *words)
    assert names(tmp_path) == ["plan.json"]


def test_adapters_that_cannot_be_evaluated(trained, rows_dir, tmp_path, capsys):
    flags = ["--data_dir", rows_dir, "--use_cpu"]
    refused(capsys, ["evaluate", *flags], "--adapter")
    refused(capsys, ["evaluate", *flags, "--adapter", str(tmp_path)], str(tmp_path))
    for name in ("adapter_model.safetensors", "adapter_config.json", "task.json"):
        folder = tmp_path / name
        shutil.copytree(trained / "adapter", folder)
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
        refused(capsys, ["evaluate", *flags, "--adapter", str(folder)], str(folder))
    folder = tmp_path / "without weights"
    shutil.copytree(trained / "adapter", folder)
    (folder / "adapter_model.safetensors").unlink()
    refused(capsys, ["evaluate", *flags, "--adapter", str(folder)], str(folder))


def test_an_adapter_on_rows_with_other_labels(trained, tmp_path, capsys):
    (tmp_path / "test.jsonl").write_text('{"text": "x", "label": "mixed"}\n')
    argv = ["evaluate", "--adapter", str(trained), "--test_file", str(tmp_path / "test.jsonl")]
    refused(capsys, argv, "mixed", "bad, good")


def test_evaluate_prints_nothing_but_json(trained, rows_dir, capsys):
    capsys.readouterr()
    argv = ["evaluate", "--adapter", str(trained), "--data_dir", rows_dir, "--use_cpu"]
    main([*argv, "--max_eval_samples", "3"])
    assert json.loads(capsys.readouterr().out)["rows"] == 3
    assert [path.name for path in trained.parent.iterdir()] == ["out"]
