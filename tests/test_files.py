"""Writing in one piece: a crash in the middle leaves what was there."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rankwise.files import MARKER, replace_folder, write_json, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_makes_parents_and_leaves_no_temporary(tmp_path):
    write_text(tmp_path / "a" / "b" / "c.txt", "früh\n")
    assert (tmp_path / "a" / "b" / "c.txt").read_bytes() == "früh\n".encode()
    assert names(tmp_path / "a" / "b") == ["c.txt"]


def test_write_replaces(tmp_path):
    path = tmp_path / "c.txt"
    write_text(path, "a long old text")
    write_text(path, "new")
    assert path.read_text() == "new"


@pytest.mark.parametrize(
    "crash", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
def test_a_crash_in_the_middle_of_writing_keeps_the_old_file(tmp_path, monkeypatch, crash):
    path = tmp_path / "plan.json"
    write_text(path, "old and whole")

    def half(self, text, **kwargs):
        with self.open("w") as file:
            file.write(text[: len(text) // 2])
        raise crash

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(type(crash)):
        write_text(path, "new and much longer than before")
    assert path.read_text() == "old and whole"
    assert names(tmp_path) == ["plan.json"]


def test_a_crash_before_the_rename_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    write_text(path, "old and whole")

    def refuse(self, target):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(PermissionError):
        write_text(path, "new")
    assert path.read_text() == "old and whole"
    assert names(tmp_path) == ["plan.json"]


def test_text_that_cannot_be_encoded_keeps_the_old_file(tmp_path):
    path = tmp_path / "plan.json"
    write_text(path, "old and whole")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "a lone surrogate \ud800")
    assert path.read_text() == "old and whole"
    assert names(tmp_path) == ["plan.json"]


def test_json_is_readable_and_refuses_nan(tmp_path):
    path = tmp_path / "metrics.json"
    write_json(path, {"accuracy": 0.5, "names": ["a"]})
    assert json.loads(path.read_text()) == {"accuracy": 0.5, "names": ["a"]}
    assert path.read_text().endswith("}\n")
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"accuracy": float("nan")})
    assert json.loads(path.read_text())["accuracy"] == 0.5
    assert names(tmp_path) == ["metrics.json"]


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """A finished folder, and the public one that it is to replace."""
    finished, target = tmp_path / "out.partial", tmp_path / "out"
    for folder, text in ((finished, "new"), (target, "old")):
        (folder / "adapter").mkdir(parents=True)
        (folder / "adapter" / "weights").write_text(text)
    (target / "stale").write_text("left over")
    (target / MARKER).write_text("")
    return finished, target


def test_replace_folder_leaves_nothing_of_the_old_one(folders):
    finished, target = folders
    replace_folder(finished, target)
    assert (target / "adapter" / "weights").read_text() == "new"
    assert names(target) == ["adapter"]
    assert names(target.parent) == ["out"]


def test_replace_folder_leaves_what_has_its_temporary_name_by_chance(folders):
    finished, target = folders
    precious = target.parent / ".out.old"
    precious.mkdir()
    (precious / "rows").write_text("mine")
    replace_folder(finished, target)
    assert (target / "adapter" / "weights").read_text() == "new"
    assert (precious / "rows").read_text() == "mine"
    assert names(target.parent) == [".out.old", "out"]


def test_replace_folder_where_none_was(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "f").write_text("x")
    replace_folder(tmp_path / "work", tmp_path / "out")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["f"]


def test_replace_folder_that_is_empty(folders):
    finished, target = folders
    (target / "stale").unlink()
    (target / MARKER).unlink()
    (target / "adapter" / "weights").unlink()
    (target / "adapter").rmdir()
    replace_folder(finished, target)
    assert (target / "adapter" / "weights").read_text() == "new"


@pytest.mark.parametrize("killed", [False, True])
def test_a_crash_between_the_two_renames_loses_neither_folder(folders, monkeypatch, killed):
    finished, target = folders
    rename = Path.rename

    def crash(self, to):
        if self == finished or (killed and to == target):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", crash)
    with pytest.raises(OSError, match="Input/output error"):
        replace_folder(finished, target)
    monkeypatch.undo()
    assert target.exists() == (not killed)  # what was there is back, where there was the time
    texts = {path.read_text() for path in target.parent.rglob("weights")}
    assert texts == {"old", "new"}
    replace_folder(finished, target)  # and a second try finishes the job
    assert names(target.parent) == ["out"]
    assert (target / "adapter" / "weights").read_text() == "new"


def test_what_a_killed_process_left_of_a_file_goes_and_nothing_else(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    dead = tmp_path / f".a [1].json.{child.pid}.tmp"
    others = [f".a [1].json.{os.getppid()}.tmp", f".b.json.{child.pid}.tmp", ".a [1].json.x.tmp"]
    for path in (dead, *(tmp_path / name for name in others)):
        path.write_text("half")
    write_text(tmp_path / "a [1].json", "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*others, "a [1].json"])
