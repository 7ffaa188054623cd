"""Signals and full disks: one line that says how to go on, and that is true."""

import os
import signal
import subprocess
import sys
import time

import pytest
from case import ROWS, train
from same import difference

SIGNALS = [signal.SIGTERM, signal.SIGHUP, signal.SIGINT]


@pytest.fixture(scope="module")
def whole(forks, tiny_bert, tmp_path_factory):
    """A run that nothing stopped: its flags, folder and count of file operations."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "rows.jsonl").write_text(ROWS)
    rows = str(folder / "rows.jsonl")
    flags = ["--max_steps", "5", "--save_steps", "2"]
    argv = [word.format(model=tiny_bert) for word in train(*flags, rows=rows)]
    done = forks.run(argv, folder)
    assert done.code == 0, done.err
    return argv, folder, done.operations


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_says_how_to_go_on(forks, whole, tmp_path, number):
    argv, folder, operations = whole
    done = forks.run(argv, tmp_path, interrupt_at=operations // 2, number=int(number))
    assert done.code == 128 + number, done.err
    assert "stopped" in done.line and "--resume_from_checkpoint goes on" in done.line
    assert not done.crashed
    again = forks.run([*argv, "--resume_from_checkpoint"], tmp_path)
    assert again.code == 0, again.err
    assert difference(tmp_path / "out", folder / "out") == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_from_the_first_second(tmp_path, number):
    """While libraries are imported: one line, and no promise to go on with nothing."""
    (tmp_path / "rows.jsonl").write_text(ROWS)
    argv = [word.format(model="nowhere") for word in train()]
    script = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    script += "print('here', flush=True); from rankwise.cli import main; "
    script += "main(sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", script, *argv],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    )
    process.stdout.readline()
    time.sleep(1.0)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err and "rankwise: stopped" in err
    assert "goes on" not in err


def test_nohup_stays_what_it_is():
    script = "import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
    script += "from rankwise.cli.boundary import listen; listen(); "
    script += "sys.exit(signal.getsignal(signal.SIGHUP) != signal.SIG_IGN)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


@pytest.mark.parametrize("share", [0.02, 0.5])
def test_a_full_disk_is_one_line_and_the_run_goes_on(forks, whole, tmp_path, share):
    argv, folder, operations = whole
    done = forks.run(argv, tmp_path, full_at=max(1, round(operations * share)))
    if done.code == 0:  # nothing was created any more
        assert difference(tmp_path / "out", folder / "out") == ""
        return
    assert done.code in (1, 2) and not done.crashed, done.err
    assert done.line.startswith("rankwise: ") and "space" in done.line, done.err
    again = forks.run([*argv, "--resume_from_checkpoint"], tmp_path)
    if "nothing to resume" in again.line:
        again = forks.run(argv, tmp_path)
    assert again.code == 0, again.err
    assert difference(tmp_path / "out", folder / "out") == ""


def test_a_file_that_grows_too_large(forks, whole, tmp_path):
    """What torch and safetensors write with C++ and Rust, which no hook sees."""
    argv, folder, _ = whole
    done = forks.run(argv, tmp_path, largest=4_000)
    assert done.code == 1 and not done.crashed, done.err
    assert done.line.startswith("rankwise: ")
    again = forks.run([*argv, "--resume_from_checkpoint"], tmp_path)
    if "nothing to resume" in again.line:
        again = forks.run(argv, tmp_path)
    assert again.code == 0, again.err
    assert difference(tmp_path / "out", folder / "out") == ""


def test_a_full_standard_output():
    script = "import sys; from rankwise.cli import main; main(['cut', '--help'])"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", script], stdout=full, stderr=subprocess.PIPE)
    assert b"Traceback" not in done.stderr
