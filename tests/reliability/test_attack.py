"""The drive itself: what it keeps of its trials, and that it ends in a line where it is stopped."""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from attack import Counts, Drive
from forks import Done
from kills import Whole


def test_counts_say_what_was_drawn(tmp_path, capsys):
    file = tmp_path / "counts.json"
    drawn = {"seed": 7, "commands": ["cut"], "kills": 3}
    counts = Counts(argparse.Namespace(**drawn, json=str(file), source="/somewhere"))
    counts.add("kill", "cut at 3", "")
    counts.add("kill", "cut at 9", "no out")
    found = json.loads(file.read_text())
    assert found["drawn"] == drawn
    assert found["counts"] == {"kill": {"trials": 2, "failed": 1}}
    assert found["failed"] == [["kill", "cut at 9", "no out"]]
    counts.show()
    assert [line.split()[-3:] for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["2", "1", "1"],
        ["2", "1", "1"],
    ]


def test_a_command_without_file_operations_has_a_moment_too(tmp_path):
    done = Done(0, "", "", 0, [])
    whole = Whole("evaluate", [], tmp_path, 0, 1.0, done)
    assert Drive.moment(SimpleNamespace(rng=random.Random(0)), whole) == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_drive_that_is_stopped_ends_in_a_line(tmp_path, number):
    """Ctrl-C goes to the whole group of a terminal."""
    file = tmp_path / "counts.json"
    argv = [sys.executable, str(Path(__file__).with_name("attack.py")), "--families", "inputs"]
    process = subprocess.Popen(
        [*argv, "--only", "flags", "--json", str(file)],
        cwd=tmp_path,
        env=dict(os.environ, TMPDIR=str(tmp_path)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        until = time.monotonic() + 300
        while not file.exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        os.killpg(process.pid, number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err and err.splitlines()[-1].startswith("attack: stopped")
    assert "input: flags" in out and json.loads(file.read_text())["counts"]
    assert not list(tmp_path.glob("attack-*"))
