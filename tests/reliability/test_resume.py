"""A stopped run goes on only where nothing that it stands on has changed, and then exactly."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from same import difference

from rankwise import CheckpointError, RankPlan
from rankwise.methods import METHODS, by_name
from rankwise.trainer import drop_damaged, last_checkpoint, missing

# 36 rows in batches of 8 are 5 steps an epoch: 7 steps end within the second
TRAIN = "train --r 2 --target_modules query value --use_cpu --per_device_train_batch_size 8".split()
TRAIN += "--learning_rate 1e-2 --lr_scheduler_type constant --max_steps 7 --save_steps 2".split()


@pytest.fixture(scope="module")
def base(tiny_bert, rows_dir, tmp_path_factory):
    """A model and rows of one's own, which may change, and the flags that name them."""
    folder = tmp_path_factory.mktemp("base")
    shutil.copytree(tiny_bert, folder / "model")
    shutil.copytree(rows_dir, folder / "rows")
    return folder


def argv_of(base: Path, *more: str, output: str = "out") -> list[str]:
    data = ["--model_name_or_path", str(base / "model"), "--data_dir", str(base / "rows")]
    return [*TRAIN, *data, "--output_dir", output, *more]


@pytest.fixture(scope="module")
def whole(forks, base, tmp_path_factory):
    """The folder of the run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    done = forks.run(argv_of(base), folder)
    assert done.code == 0, done.err
    return folder / "out"


@pytest.fixture(scope="module")
def stopped(forks, base, tmp_path_factory):
    """A folder with a run that was killed when it had two checkpoints, to be copied."""
    folder = tmp_path_factory.mktemp("stopped")
    assert forks.run(argv_of(base), folder, kill_on="checkpoint-6").code == -9
    assert last_checkpoint(folder / "out.partial" / "training").name == "checkpoint-4"
    return folder


@pytest.fixture
def work(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "w")
    return tmp_path / "w"


def checkpoint(work: Path, step: int) -> Path:
    return work / "out.partial" / "training" / f"checkpoint-{step}"


def test_it_goes_on_as_if_it_had_never_stopped(forks, base, whole, work):
    done = forks.run(argv_of(base, "--resume_from_checkpoint"), work)
    assert done.code == 0, done.err
    assert difference(work / "out", whole) == ""


def test_killed_behind_the_last_checkpoint_it_takes_no_step_more(forks, base, whole, tmp_path):
    """The last checkpoint is of the last step, which ends no epoch."""
    assert forks.run(argv_of(base), tmp_path, kill_on="/adapter/").code == -9
    assert checkpoint(tmp_path, 7).is_dir()
    done = forks.run(argv_of(base, "--resume_from_checkpoint"), tmp_path)
    assert done.code == 0, done.err
    assert difference(tmp_path / "out", whole) == ""


def other_rows(folder: Path) -> None:
    path = folder / "rows" / "train.jsonl"
    path.write_text(path.read_text().replace("film", "plot"))


def other_test_rows(folder: Path) -> None:
    path = folder / "rows" / "test.jsonl"
    path.write_text(path.read_text().replace("film", "plot"))


def other_weights(folder: Path) -> None:
    path = folder / "model" / "model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[-1]
    tensors[name].view(-1)[0] += 1e-3
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_rows, "other training rows"),
        (other_test_rows, "other evaluated rows"),
        (other_weights, "other base weights"),
    ],
)
def test_rows_or_weights_that_changed_are_not_mixed(forks, base, work, tmp_path, change, words):
    shutil.copytree(base, tmp_path / "base")
    settings = work / "out.partial" / "settings.json"
    settings.write_text(settings.read_text().replace(str(base), str(tmp_path / "base")))
    argv = argv_of(tmp_path / "base", "--resume_from_checkpoint")
    change(tmp_path / "base")
    done = forks.run(argv, work)
    assert done.code == 2 and words in done.line, done.err
    assert (work / "out.partial").is_dir()


@pytest.mark.parametrize("harm", ["no optimizer", "a changed byte", "no state", "all"])
def test_a_damaged_checkpoint_is_stepped_over(forks, base, whole, work, harm):
    """To the one before it; and to the start where none is whole."""
    newest = checkpoint(work, 4)
    victims = [newest] if harm != "all" else [newest, checkpoint(work, 2)]
    for victim in victims:
        optimizer = victim / "optimizer.pt"
        data = bytearray(optimizer.read_bytes())
        if harm in ("no optimizer", "all"):
            optimizer.unlink()
        elif harm == "a changed byte":
            data[len(data) // 2] ^= 1
            optimizer.write_bytes(data)
        else:
            (victim / "trainer_state.json").write_text('{"global_step": "four"}')
    done = forks.run(argv_of(base, "--resume_from_checkpoint"), work)
    assert done.code == 0, done.err
    assert "left out" in done.err
    assert difference(work / "out", whole) == ""


def test_checkpoints_without_an_optimizer_are_none(forks, base, whole, tmp_path):
    """`save_only_model`: the stage begins anew, and gives what it would have given."""
    flags = ["--training_arguments", '{"save_only_model": true}']
    assert forks.run(argv_of(base, *flags), tmp_path, kill_on="checkpoint-6").code == -9
    done = forks.run(argv_of(base, *flags, "--resume_from_checkpoint"), tmp_path)
    assert done.code == 0, done.err
    assert difference(tmp_path / "out", whole) == ""


def test_a_stock_checkpoint_is_looked_through_too(work, tmp_path):
    folder = checkpoint(work, 4)
    (folder / "whole.json").unlink()  # which is ours
    assert missing(folder) == ""
    (folder / "scheduler.pt").write_bytes((folder / "scheduler.pt").read_bytes()[:-40])
    assert missing(folder) != ""
    assert drop_damaged(folder.parent) == checkpoint(work, 2)
    assert not folder.exists()


def test_a_run_that_is_finished_is_said_to_be(forks, base, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    done = forks.run(argv_of(base, "--resume_from_checkpoint"), tmp_path)
    assert done.code == 0 and "finished already" in done.err, done.err
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == before
    other = forks.run(argv_of(base, "--resume_from_checkpoint", "--seed", "7"), tmp_path)
    assert other.code == 2 and "another run" in other.line


# Flags that act when the training is over

AFTER = {
    "cut": {"budget", "margin", "sizes", "order_rows", "heal"},
    "svd": {"rank", "energy", "budget"},
    "random-order": {"rank", "budget"},
    "dylora": {"tolerance", "pick_rank", "budget", "by_layer"},
    "lora": set(),
    "autolora": set(),
}


@pytest.mark.parametrize("name", AFTER)
def test_which_flags_act_afterwards(name):
    flags = METHODS[name].describe().keys() - METHODS[name].trained_by().keys()
    assert flags == AFTER[name]


def test_another_budget_on_resuming_trains_nothing_anew(forks, base, tmp_path):
    """The training of the first run, and the choice of one that had the other budget at once."""
    flags = ["--method", "svd", "--r", "4", "--control", "lora"]
    argv = ["run", *argv_of(base)[3:], *flags]
    at_once, changed = tmp_path / "a", tmp_path / "b"
    for folder in (at_once, changed):
        folder.mkdir()
    done = forks.run([*argv, "--rank", "1"], at_once)
    assert done.code == 0, done.err
    plan = RankPlan.load(at_once / "out" / "plan.json")
    assert forks.run([*argv, "--rank", "3"], changed, kill_on="ranks.png").code == -9
    assert (changed / "out.partial" / "result.json").exists()
    again = forks.run([*argv, "--rank", "1", "--resume_from_checkpoint"], changed)
    assert again.code == 0, again.err
    assert RankPlan.load(changed / "out" / "plan.json").ranks == plan.ranks
    assert difference(changed / "out", at_once / "out") == ""
    refused = forks.run([*argv, "--resume_from_checkpoint", "--r", "8"], changed)
    assert refused.code == 2, refused.err


def test_a_plan_behind_a_path_counts_by_what_it_says(tmp_path):
    from rankwise.plan import Entry

    plan = RankPlan({"a": Entry(2, 8, 8, "a")}, r=2)
    plan.save(tmp_path / "plan.json")
    method = by_name("lora", plan=str(tmp_path / "plan.json"))
    before = method.trained_by()
    shutil.copy(tmp_path / "plan.json", tmp_path / "copy.json")
    assert by_name("lora", plan=str(tmp_path / "copy.json")).trained_by() == before
    plan.with_ranks({"a": 1}).save(tmp_path / "plan.json")
    assert method.trained_by() != before
    assert json.dumps(before)  # for a record


def test_the_library_refuses_half_a_checkpoint_too(work):
    from rankwise.trainer import find_checkpoint

    (checkpoint(work, 4) / "optimizer.pt").unlink()
    with pytest.raises(CheckpointError, match=r"no optimizer\.pt"):
        find_checkpoint("unused", str(checkpoint(work, 4)))
