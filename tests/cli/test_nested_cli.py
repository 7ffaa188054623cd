"""`--method dylora` and `rankwise cut` on a tiny model: what they write, resume and refuse."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_cli import killed, metrics_of, names, refused
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rankwise import RankPlan
from rankwise.cli import main
from rankwise.nested import NestedTrainer
from rankwise.trainer import FiniteTrainer

FAST = (
    "--max_steps 6 --per_device_train_batch_size 8 --learning_rate 1e-2 --save_steps 2 --use_cpu "
    "--method dylora --r 4"
).split()
PER_RANK = 2 * 2 * (32 + 32)  # layers x matrices x (in + out)


@pytest.fixture(scope="session")
def base(tiny_bert, rows_dir) -> list[str]:
    return ["--model_name_or_path", tiny_bert, "--data_dir", rows_dir, *FAST]


@pytest.fixture(scope="session")
def finished(base, tmp_path_factory) -> Path:
    """The folder of a run that picked rank 3, with both kinds of control."""
    folder = tmp_path_factory.mktemp("dylora") / "out"
    flags = ["--pick_rank", "3", "--control", "lora", "svd"]
    main(["run", *base, *flags, "--output_dir", str(folder)])
    return folder


def logits(base_model: str, adapter: Path, text: str = "a fine film") -> torch.Tensor:
    model = AutoModelForSequenceClassification.from_pretrained(base_model, num_labels=2)
    model = PeftModel.from_pretrained(model, adapter).eval()
    inputs = AutoTokenizer.from_pretrained(base_model)(text, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits


# What the commands write


def test_run_writes_the_picked_adapter_and_the_nested_one(finished):
    assert names(finished) == [
        ".rankwise",
        "adapter/README.md",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/plan.json",
        "adapter/task.json",
        "adapter/tokenizer.json",
        "adapter/tokenizer_config.json",
        "adapter/truncation.json",
        "controls/lora.json",
        "controls/svd.json",
        "curve.png",
        "metrics.json",
        "nested/README.md",
        "nested/adapter_config.json",
        "nested/adapter_model.safetensors",
        "nested/nested_plan.json",
        "nested/task.json",
        "plan.json",
        "ranks.png",
    ]
    found = metrics_of(finished)
    assert (found["curve"]["unit"], found["curve"]["sizes"]) == ("rank", [1, 2, 3, 4])
    assert found["curve"]["rows"] == 4  # a tenth of 36
    assert found["rows"] == {"train": 32, "held_out": 4, "evaluated": 12}
    assert found["figures"]["picked_by"] == "the user"
    assert found["lora_parameters"] == 3 * PER_RANK
    uniform, svd = found["controls"]
    assert uniform["name"] == "LoRA r=3"
    assert uniform["cost"]["steps"] == svd["cost"]["steps"] == found["cost"]["steps"] == 6
    # the rank was chosen on the other rows, so controls get no more than these
    assert uniform["rows"]["train"] == svd["rows"]["train"] == 32
    assert svd["lora_parameters"] <= 3 * PER_RANK
    assert svd["name"] == "LoRA, cut by SVD"
    assert RankPlan.load(finished / "controls" / "svd.json").ranks == svd["ranks"]
    assert set(RankPlan.load(finished / "plan.json").ranks.values()) == {3}


def test_the_adapter_of_one_rank_has_no_patterns(finished):
    config = json.loads((finished / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 6)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}


def test_metrics_are_those_of_the_adapter_on_disk(finished, tiny_bert, rows_dir, capsys):
    main(["evaluate", "--adapter", str(finished), "--data_dir", rows_dir, "--use_cpu"])
    again = json.loads(capsys.readouterr().out)
    found = metrics_of(finished)["metrics"]
    assert again["loss"] == pytest.approx(found["loss"], rel=1e-5)
    assert again["accuracy"] == found["accuracy"]


def test_cut_gives_every_rank_as_it_was_trained(finished, tiny_bert, tmp_path, capsys):
    for b in (1, 3, 4):
        out = str(tmp_path / str(b))
        main(["cut", "--adapter", str(finished), "--rank", str(b), "--output_dir", out])
        config = json.loads((tmp_path / str(b) / "adapter_config.json").read_text())
        assert config["r"] == b
        assert "trained" in capsys.readouterr().out
    ours, theirs = logits(tiny_bert, tmp_path / "3"), logits(tiny_bert, finished / "adapter")
    torch.testing.assert_close(ours, theirs)
    full = logits(tiny_bert, tmp_path / "4")
    torch.testing.assert_close(full, logits(tiny_bert, finished / "nested"))
    weights = load_file(tmp_path / "1" / "adapter_model.safetensors")
    nested = load_file(finished / "nested" / "adapter_model.safetensors")
    for name, tensor in weights.items():
        if "lora_A" in name:
            assert torch.equal(tensor, nested[name][:1])
        if "lora_B" in name:
            torch.testing.assert_close(tensor, 4 * nested[name][:, :1])


def test_cut_takes_a_plan_and_a_budget(finished, tmp_path):
    plan = RankPlan.load(finished / "plan.json")
    plan = plan.with_ranks({name: 1 + i % 4 for i, name in enumerate(plan.modules)})
    plan.save(tmp_path / "mine.json")
    common = ["cut", "--adapter", str(finished / "nested")]
    main([*common, "--plan", str(tmp_path / "mine.json"), "--output_dir", str(tmp_path / "a")])
    cuts = json.loads((tmp_path / "a" / "truncation.json").read_text())
    assert {name: cut["rank"] for name, cut in cuts.items()} == plan.ranks
    main([*common, "--budget", str(3 * PER_RANK - 1), "--output_dir", str(tmp_path / "b")])
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["r"] == 2


def test_cut_shrinks_any_adapter_by_svd(tiny_bert, rows_dir, tmp_path, capsys):
    flags = [flag for flag in FAST if flag not in ("--method", "dylora")]
    common = ["--model_name_or_path", tiny_bert, "--data_dir", rows_dir, *flags]
    main(["train", *common, "--output_dir", str(tmp_path / "lora")])
    cut = ["cut", "--adapter", str(tmp_path / "lora")]
    main([*cut, "--rank", "4", "--output_dir", str(tmp_path / "same")])
    torch.testing.assert_close(
        logits(tiny_bert, tmp_path / "same"), logits(tiny_bert, tmp_path / "lora" / "adapter")
    )
    capsys.readouterr()
    main([*cut, "--energy", "0.9", "--output_dir", str(tmp_path / "less")])
    cuts = json.loads((tmp_path / "less" / "truncation.json").read_text())
    lost = [cut["lost"] for cut in cuts.values()]
    assert all(0 <= x <= 0.1**0.5 for x in lost) and max(lost) > 0
    assert f"{100 * lost[0]:.1f} %" in capsys.readouterr().out
    main(["evaluate", "--adapter", str(tmp_path / "less"), "--data_dir", rows_dir, "--use_cpu"])


def test_search_picks_by_one_standard_error_and_says_so(base, tmp_path, capsys):
    main(["search", *base, "--output_dir", str(tmp_path / "out")])
    out, err = capsys.readouterr()
    found = metrics_of(tmp_path / "out")
    values = [metrics["accuracy"] for metrics in found["curve"]["metrics"]]
    best = values.index(max(values))
    allowed = max(values) - found["curve"]["standard_errors"][best]
    picked = 1 + next(i for i, value in enumerate(values) if value >= allowed)
    assert set(RankPlan.load(tmp_path / "out" / "plan.json").ranks.values()) == {picked}
    assert "every rank, on 4 held-out rows" in out
    assert f"picked rank {picked} (one standard error)" in " ".join(err.split())
    assert names(tmp_path / "out")[:2] == [".rankwise", "adapter/README.md"]


def test_a_budget_gives_a_rank_that_was_trained(base, tmp_path):
    weights = ["--rank_weights", "0.5", "0", "0", "0.5", "--budget", str(3 * PER_RANK)]
    main(["search", *base, *weights, "--output_dir", str(tmp_path / "out")])
    assert set(RankPlan.load(tmp_path / "out" / "plan.json").ranks.values()) == {1}
    argv = ["cut", "--adapter", str(tmp_path / "out"), "--budget", str(3 * PER_RANK)]
    main([*argv, "--output_dir", str(tmp_path / "cut")])
    assert json.loads((tmp_path / "cut" / "adapter_config.json").read_text())["r"] == 1


def test_a_finished_run_chooses_anew_without_training(finished, base, tmp_path, monkeypatch):
    budget = 2 * PER_RANK
    flags = ["--nested_adapter", str(finished), "--by_layer", "--budget", str(budget)]

    def never(*args, **kwargs):
        raise AssertionError("trained again")

    with monkeypatch.context() as patch:
        patch.setattr(NestedTrainer, "training_step", never)
        main(["search", *base, *flags, "--output_dir", str(tmp_path / "out")])
    found = metrics_of(tmp_path / "out")
    assert found["cost"]["steps"] == 0 and found["figures"]["picked_by"] == "layer"
    ours = [m["loss"] for m in found["curve"]["metrics"]]
    theirs = [m["loss"] for m in metrics_of(finished)["curve"]["metrics"]]
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert RankPlan.load(tmp_path / "out" / "plan.json").parameters <= budget
    nested = [
        load_file(f / "nested" / "adapter_model.safetensors") for f in (tmp_path / "out", finished)
    ]
    assert all(torch.equal(nested[0][key], nested[1][key]) for key in nested[1])
    assert str(finished) not in (tmp_path / "out" / "metrics.json").read_text()
    assert "an earlier run had trained" in (tmp_path / "out" / "adapter" / "README.md").read_text()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--seed", "1"], ["was not trained on the rows that these flags give"]),
        (["--r", "3"], ["r is 3, but the adapter has 4"]),
        (["--r_min", "2"], ["the flags give r_min 2, but the adapter was trained with 1"]),
        (["--nested_adapter", "nowhere"], ["there is no folder nowhere"]),
        (["--method", "autolora"], ["unknown flag --nested_adapter"]),
    ],
)
def test_a_choice_out_of_another_run_is_refused(finished, base, tmp_path, capsys, flags, words):
    argv = ["search", *base, "--nested_adapter", str(finished), *flags]
    refused(capsys, [*argv, "--output_dir", str(tmp_path / "out")], *words)
    refused(
        capsys,
        [*argv[: -len(flags)], "--nested_adapter", str(finished / "adapter"), "--output_dir", "x"],
        "holds an adapter of one rank; give a DyLoRA run",
    )
    assert list(tmp_path.iterdir()) == []


def test_no_random_control_where_one_plan_has_the_size(base, tmp_path, capsys):
    flags = ["--pick_rank", "1", "--control", "random"]
    main(["run", *base, *flags, "--output_dir", str(tmp_path / "out")])
    assert metrics_of(tmp_path / "out")["controls"] == []
    assert "no random control" in capsys.readouterr().err


def test_ranks_by_layer_stay_within_the_budget(base, tmp_path, capsys):
    budget = 2 * PER_RANK + 70
    flags = ["--by_layer", "--budget", str(budget), "--control", "none"]
    main(["run", *base, *flags, "--output_dir", str(tmp_path / "out")])
    figures = metrics_of(tmp_path / "out")["figures"]
    found = figures["by_layer"]
    assert figures["picked_by"] == "layer"
    assert found["uniform_rank"] == 2
    assert found["parameters"] <= budget
    plan = RankPlan.load(tmp_path / "out" / "plan.json")
    ranks = found["ranks"] if found["pays"] else dict.fromkeys(plan.modules, 2)
    assert plan.ranks == ranks
    said = " ".join(capsys.readouterr().err.split())
    assert ("not below" in said) == (not found["pays"])


@pytest.mark.parametrize("calls", [1, 4, 6, 10, 16])  # from 7 in a control, from 13 in the other
def test_a_run_killed_and_resumed_equals_one_never_stopped(
    finished, base, tmp_path, monkeypatch, calls
):
    out = tmp_path / "out"
    flags = ["--pick_rank", "3", "--control", "lora", "svd"]
    argv = ["run", *base, *flags, "--output_dir", str(out)]
    killed(argv, monkeypatch, FiniteTrainer, "training_step", calls)
    main([*argv, "--resume_from_checkpoint"])
    assert names(out) == names(finished)
    for name in ("adapter", "nested"):
        ours, theirs = (load_file(f / name / "adapter_model.safetensors") for f in (out, finished))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert metrics_of(out)["curve"] == metrics_of(finished)["curve"]
    for ours, theirs in zip(
        metrics_of(out)["controls"], metrics_of(finished)["controls"], strict=True
    ):
        assert (ours["metrics"], ours["ranks"]) == (theirs["metrics"], theirs["ranks"])


@pytest.mark.parametrize("name", ["save_nested", "measure"])
def test_a_run_killed_while_it_measures_or_saves_goes_on(
    finished, base, tmp_path, monkeypatch, name
):
    out = tmp_path / "out"
    argv = ["run", *base, "--pick_rank", "3", "--control", "none", "--output_dir", str(out)]
    killed(argv, monkeypatch, NestedTrainer, name, 2 if name == "measure" else 1)
    main([*argv, "--resume_from_checkpoint"])
    assert metrics_of(out)["curve"] == metrics_of(finished)["curve"]


def test_demo_takes_dylora(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["demo", *base, "--control", "none"])
    assert metrics_of(tmp_path / "runs" / "demo")["curve"]["sizes"] == [1, 2, 3, 4]


# What they refuse, before there is a folder


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--r_min", "0"], ["r_min is 0"]),
        (["--r_min", "5"], ["r_min is 5", "4"]),
        (["--rank_weights", "0.5", "0.5"], ["2 rank_weights for the 4 ranks"]),
        (["--rank_weights", "1", "1", "1", "1"], ["rank_weights sum to 4"]),
        (["--rank_weights", "a", "b"], ["--rank_weights", "'a'"]),
        (["--pick_rank", "9"], ["pick_rank is 9", "[1, 2, 3, 4]"]),
        (["--budget", "10"], ["budget is 10", f"{PER_RANK:,} to {4 * PER_RANK:,}"]),
        (["--by_layer"], ["by_layer", "budget"]),
        (["--pick_rank", "2", "--budget", "600"], ["pick_rank", "budget", "give one"]),
        (["--tolerance", "-1"], ["tolerance is -1"]),
        (["--estimator", "exact"], ["unknown flag --estimator"]),
        (["--gate_learning_rate", "3"], ["unknown flag --gate_learning_rate"]),
        (["--geometric_p", "0.3"], ["geometric_p is for", "rank_distribution geometric"]),
        (
            ["--rank_weights", "0", "0", "0", "1", "--budget", str(2 * PER_RANK)],
            [f"ranks 4 to 4 of these modules take {4 * PER_RANK:,}"],
        ),
        (["--method", "autolora", "--budget", "600"], ["unknown flag --budget"]),
        (["--r", "99"], ["r is 99"]),
    ],
)
def test_flags_that_make_no_sense(base, tmp_path, capsys, flags, words):
    refused(capsys, ["run", *base, *flags, "--output_dir", str(tmp_path / "out")], *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["give one of --rank, --energy, --budget, --keep and --plan"]),
        (["--rank", "2", "--budget", "900"], ["give one of", "--rank and --budget"]),
        (["--rank", "0"], ["rank 0", "1, 2, 3, 4"]),
        (["--rank", "5"], ["rank 5", "was not trained", "1, 2, 3, 4"]),
        (["--budget", "9"], ["budget is 9"]),
        (["--energy", "0.5"], ["--energy needs singular values", "--svd"]),
        (["--energy", "2", "--svd"], ["energy is 2"]),
        (["--plan", "nowhere.json"], ["cannot read the plan"]),
        (["--rank", "2", "--resume_from_checkpoint"], ["nothing to resume"]),
    ],
)
def test_cuts_that_make_no_sense(finished, tmp_path, capsys, flags, words):
    out = tmp_path / "out"
    argv = ["cut", "--adapter", str(finished), *flags, "--output_dir", str(out)]
    refused(capsys, argv, *words)
    assert list(tmp_path.iterdir()) == []


def test_cut_overwrites_only_what_it_wrote(finished, tmp_path, capsys):
    nested, mine, out = tmp_path / "nested", tmp_path / "mine", tmp_path / "out"
    shutil.copytree(finished / "nested", nested)
    mine.mkdir()
    (mine / "notes.txt").write_text("keep")
    argv = ["cut", "--adapter", str(nested), "--rank", "2", "--output_dir"]
    over = "--overwrite_output_dir"
    refused(capsys, [*argv, str(nested), over], "holds the adapter itself")
    refused(capsys, [*argv, str(tmp_path), over], "holds the adapter itself")
    refused(capsys, [*argv, str(mine)], "is not empty")
    refused(capsys, [*argv, str(mine), over], "not written by rankwise cut")
    main([*argv, str(out)])
    refused(capsys, [*argv, str(out)], "is not empty", over)
    main([*argv, str(out), over, "--rank", "1"])
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 1
    run_adapter = str(finished / "adapter")
    refused(capsys, [*argv, run_adapter, over], "not written by rankwise cut")
    refused(capsys, [*argv, str(mine / "notes.txt" / "x")], "cannot make")
    argv = ["cut", "--adapter", str(mine), "--rank", "1", "--output_dir", str(tmp_path / "x")]
    refused(capsys, argv, "no adapter_config.json")
    assert names(mine) == ["notes.txt"]
