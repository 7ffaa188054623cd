"""Grids: the same files whoever is killed in between, whatever fails on the way, and no test row
that chooses."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from conftest import write_splits
from rankwise.cli import main
from rankwise.compare import execute as executing
from rankwise.compare.cells import Cell, Failure, cell_file, cells_of, read_cell, write_failure
from rankwise.compare.execute import execute
from rankwise.compare.recipe import Recipe, read_recipe
from rankwise.compare.workers import Grid, run_grid
from rankwise.errors import DivergedError
from rankwise.methods import by_name
from rankwise.result import Result

RECIPE = {
    "tasks": {"good": {"data_dir": "."}},
    "methods": {"svd": {"r": 4, "rank": 2}, "plain": {"method": "lora", "same_size_as": "svd"}},
    "seeds": [0, 1],
    "rates": [1e-3, 1e-2],
    "training": {
        "max_steps": 8,
        "per_device_train_batch_size": 8,
        "save_steps": 2,
        "use_cpu": True,
    },
    "tune": {"held_out": 0.25, "max_steps": 4},
}


@pytest.fixture(scope="session")
def grid_rows(tmp_path_factory) -> str:
    return write_splits(tmp_path_factory.mktemp("grid-rows"), train=80, validation=40, test=24)


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "small.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


@pytest.fixture(scope="session")
def small(recipe_file, grid_rows, tiny_bert) -> tuple[Recipe, list[Cell]]:
    """The recipe and its eight cells."""
    recipe = read_recipe(recipe_file, grid_rows, tiny_bert)
    return recipe, cells_of(recipe)


def lasting(folder: Path) -> dict[str, dict]:
    """What each cell's file says, but for what the clock, the memory and the workers decide."""
    found = {}
    for path in sorted((folder / "cells").iterdir()):
        raw = json.loads(path.read_text())
        cost = raw.pop("cost")
        raw["cost"] = cost["steps"]
        raw["about"].pop("resumed")
        raw["about"]["machine"].pop("workers")
        found[path.name] = raw
    return found


@pytest.fixture(scope="module")
def undisturbed(small, tmp_path_factory):
    """The folder of a grid that one worker ran, and the states that it went through."""
    folder, states = tmp_path_factory.mktemp("undisturbed"), []
    grid = run_grid(*small, folder, threads=1, show=lambda grid: states.append(len(grid.done)))
    assert len(grid.done) == 8 and not grid.failed and states == sorted(states)
    return folder


def until_finished(small, folder, workers, kills, seed):
    """Starts the grid again and again, and kills workers somewhere in a cell."""
    rng = random.Random(seed)
    killed = 0
    for _ in range(4 * kills):
        due = time.time() + rng.uniform(0.1, 1.2)

        def strike(grid: Grid) -> None:
            nonlocal killed, due
            children = multiprocessing.active_children()
            if killed < kills and children and time.time() > due:
                os.kill(rng.choice(children).pid, signal.SIGKILL)
                killed, due = killed + 1, time.time() + rng.uniform(0.1, 1.2)

        grid = run_grid(*small, folder, workers=workers, threads=1, show=strike)
        if len(grid.done) == len(grid.cells):
            if killed == kills:
                return
            cell_file(folder, rng.choice(list(grid.cells))).unlink()  # too quick: once more
        for failure in grid.failed.values():
            assert not failure.again and "signal 9" in failure.error
    raise AssertionError(f"{killed} kills, {grid.failed}")


def test_workers_that_are_killed_change_nothing(small, undisturbed, tmp_path):
    until_finished(small, tmp_path, workers=2, kills=3, seed=0)
    assert lasting(tmp_path) == lasting(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_ten_workers_that_are_killed_change_nothing(seed, small, undisturbed, tmp_path):
    until_finished(small, tmp_path, workers=1 + seed, kills=10, seed=seed)
    assert lasting(tmp_path) == lasting(undisturbed)


@pytest.mark.slow
def test_a_grid_that_is_killed_whole_goes_on(
    small, undisturbed, recipe_file, grid_rows, tiny_bert, tmp_path
):
    """The command itself is killed; what it had begun may run on beside the one that follows."""
    line = [sys.executable, "-m", "rankwise", "compare", str(recipe_file), "--data_dir", grid_rows]
    line += ["--model_name_or_path", tiny_bert, "--output_dir", str(tmp_path), "--threads", "1"]
    for end_by in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        process = subprocess.Popen(line)
        there = len(list(tmp_path.glob("cells/*")))
        end = time.time() + 60
        while len(list(tmp_path.glob("cells/*"))) < there + 2 and time.time() < end:
            time.sleep(0.05)
        process.send_signal(end_by)
        process.wait()
    assert subprocess.run(line).returncode == 0
    assert lasting(tmp_path) == lasting(undisturbed)


def test_what_is_there_is_not_run_again(small, undisturbed):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.glob("cells/*")}
    grid = run_grid(*small, undisturbed)
    assert len(grid.done) == 8 and not grid.seconds
    assert before == {path: path.stat().st_mtime_ns for path in undisturbed.glob("cells/*")}


@pytest.mark.parametrize(
    ("asked", "flag", "given"),
    [("1", None, 1), ("3", None, 2), ("3", 1, 1), ("4,2", None, 2)],
)
def test_threads_are_the_flags_or_the_environments_or_a_share(
    asked, flag, given, small, tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    recipe, cells = small
    one = next(cell for cell in cells if not cell.needs)
    grid = run_grid(recipe, [one], tmp_path, workers=2, threads=flag)
    assert grid.done == {one.name}
    assert read_cell(cell_file(tmp_path, one.name)).about["threads"] == given


def test_the_rate_is_the_one_that_held_out_training_rows_call_best(small, undisturbed):
    _, cells = small
    found = {c.name: Result.load(cell_file(undisturbed, c.name)) for c in cells}
    for cell in cells:
        result = found[cell.name]
        if cell.held_out is not None:
            # a quarter of the 80 training rows judges, and is not trained on
            assert result.split == "held-out training"
            assert (result.rows["train"], result.rows["evaluated"]) == (60, 20)
            continue
        assert (result.split, result.rows["evaluated"]) == ("test", 24)
        scores = {
            rate: (found[name].metrics["accuracy"], -found[name].metrics["loss"])
            for rate, name in cell.rates.items()
        }
        assert result.training["learning_rate"] == max(scores, key=scores.__getitem__)
        judged = {f"{rate:g}": score for rate, (score, _) in scores.items()}
        assert result.about["judged"] == judged


def test_rows_that_judge_a_rate_are_training_rows(small, grid_rows):
    recipe, cells = small
    texts = {
        split: [json.loads(line)["text"] for line in (Path(grid_rows) / f"{split}.jsonl").open()]
        for split in ("train", "test")
    }
    cell = next(c for c in cells if c.held_out is not None)
    task = executing.cell_job(recipe, cell, 1e-3).task
    assert sorted([*task.train["text"], *task.validation["text"]]) == sorted(texts["train"])
    assert task.test is None
    final = next(c for c in cells if c.held_out is None)
    assert executing.cell_job(recipe, final, 1e-3).task.test["text"] == texts["test"]


def test_a_control_has_the_size_of_what_it_controls(small, undisturbed):
    _, cells = small
    for cell in cells:
        if cell.size_of is not None:
            ours = Result.load(cell_file(undisturbed, cell.name))
            other = Result.load(cell_file(undisturbed, cell.size_of))
            assert ours.lora_parameters == other.lora_parameters


def cell_named(cells, label, rate=None, seed=0):
    return next(
        c
        for c in cells
        if (c.method.label, c.fit.seed) == (label, seed)
        and (c.fit.learning_rate == rate if rate else c.held_out is None)
    )


@pytest.fixture
def run_in_parts(small, monkeypatch):
    """Cells whose training is a stand-in, which fails where it is told to."""
    recipe, cells = small
    by_name = {cell.name: cell for cell in cells}

    def go(folder, name, failing):
        def stand_in(method, job, work, resume=False, name=None):
            error = failing.get(job.args.learning_rate)
            if error is not None:
                raise error
            return replace(TEMPLATE, name=name, task=job.task.describe())

        monkeypatch.setattr(executing, "run_method", stand_in)
        return execute(recipe, by_name, name, folder)

    return go


TEMPLATE = Result(
    name="",
    method={"name": "LoRA"},
    claim="",
    task={},
    model="tiny",
    rows={"train": 1},
    split="test",
    training={},
    metrics={"loss": 1.0, "accuracy": 0.5},
    trainable_parameters=1,
    lora_parameters=1,
    ranks=None,
    cost={},
)


def test_a_rate_that_diverges_loses_and_stops_nothing(small, run_in_parts, tmp_path):
    _, cells = small
    rate, final = cell_named(cells, "svd", 1e-2), cell_named(cells, "svd")
    result = run_in_parts(tmp_path, final.name, {1e-2: DivergedError("the loss\nis nan")})
    assert isinstance(result, Result)
    assert result.about["judged"] == {"0.001": 0.5, "0.01": "the loss is nan"}
    failure = read_cell(cell_file(tmp_path, rate.name))
    assert failure == Failure(dict(rate.spec), "the loss is nan", again=True)
    # it is on record, and not tried again
    assert run_in_parts(tmp_path, rate.name, {}) == failure


def test_what_breaks_down_is_recorded_and_holds_up_what_waits(small, run_in_parts, tmp_path):
    _, cells = small
    rate, final = cell_named(cells, "svd", 1e-2), cell_named(cells, "svd")
    broken = run_in_parts(tmp_path, final.name, {1e-2: MemoryError("no more")})
    assert not broken.again and rate.name in broken.error
    assert read_cell(cell_file(tmp_path, rate.name)).error == "MemoryError: no more"
    # the next start tries both again
    assert isinstance(run_in_parts(tmp_path, final.name, {}), Result)
    assert isinstance(read_cell(cell_file(tmp_path, rate.name)), Result)


def test_where_no_rate_works_the_cell_says_so(small, run_in_parts, tmp_path):
    _, cells = small
    bad = {rate: DivergedError("nan") for rate in (1e-3, 1e-2)}
    failure = run_in_parts(tmp_path, cell_named(cells, "svd").name, bad)
    assert failure.again and failure.error == "no learning rate worked; the first: nan"
    # and so does the one that would have taken its size
    failure = run_in_parts(tmp_path, cell_named(cells, "plain").name, {})
    assert failure.again and "no size to take over" in failure.error


def test_a_damaged_file_is_set_aside_and_run_again(small, run_in_parts, tmp_path, capsys):
    _, cells = small
    cell = cell_named(cells, "svd", 1e-2)
    path = cell_file(tmp_path, cell.name)
    run_in_parts(tmp_path, cell.name, {})
    whole = path.read_text()
    path.write_text(whole[:100])
    assert isinstance(run_in_parts(tmp_path, cell.name, {}), Result)
    assert path.read_text() == whole
    assert path.with_name(path.name + ".damaged").read_text() == whole[:100]


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def command(recipe_file, grid_rows, tiny_bert):
    def run(folder, *flags, recipe=recipe_file):
        data = ["--data_dir", grid_rows, "--model_name_or_path", tiny_bert]
        main(["compare", str(recipe), *data, "--output_dir", str(folder), *flags])

    return run


def test_the_list_has_a_line_for_each_cell_that_is_not_there(command, small, tmp_path, capsys):
    _, cells = small
    command(tmp_path, "--list")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines] == [cell.name for cell in cells]
    assert all(line.startswith("rankwise compare ") for line in lines)
    write_failure(cell_file(tmp_path, cells[0].name), Failure({}, "nan", again=True))
    write_failure(cell_file(tmp_path, cells[1].name), Failure({}, "killed", again=False))
    command(tmp_path, "--list")
    left = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert left == [cell.name for cell in cells[1:]]


def test_one_cell_by_its_name(command, small, undisturbed, tmp_path, capsys):
    _, cells = small
    cell = cell_named(cells, "svd", 1e-2)
    command(tmp_path, "--cell", cell.name)
    found, expected = lasting(tmp_path), lasting(undisturbed)
    assert found == {path: expected[path] for path in found} and len(found) == 1
    with pytest.raises(SystemExit) as caught:
        command(tmp_path, "--cell", cell.name[:-1])
    assert caught.value.code == 2 and cell.name in capsys.readouterr().err


def test_the_status_says_whether_a_failure_would_be_repeated(command, small, tmp_path, monkeypatch):
    _, cells = small
    name = cells[0].name
    for error, status in ((DivergedError("nan"), 0), (MemoryError("no more"), 1)):

        def fail(*args, error=error, **more):
            raise error

        monkeypatch.setattr(executing, "run_method", fail)
        with pytest.raises(SystemExit) as caught:
            command(tmp_path, "--cell", name, "--retry_failed")
        assert caught.value.code == status


def test_what_cannot_fit_is_said_before_anything_runs(
    command, recipe_file, small, tmp_path, capsys, monkeypatch
):
    from rankwise.compare import fits

    raw = yaml.safe_load(recipe_file.read_text())
    raw["methods"] = {"eva": {"r": 30}, "cut": {"budget": 3}, "lora": {"r": 4}, "full": None}
    raw["max_length"] = 150
    path = tmp_path / "large.yaml"
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(SystemExit) as caught:
        command(tmp_path / "out", recipe=path)
    said = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2 and not (tmp_path / "out").exists()
    assert len(said) == 2 and said[-1].endswith("Nothing was run: mend the recipe")
    assert "cut on good: 12 held-out rows" in said[0] and "eva on good: rho" in said[1]
    # a machine with room for the weights of two processes, not for gradients and moments
    recipe, cells = small
    recipe = replace(
        recipe, methods=(replace(recipe.methods[0], method=by_name("full")), *recipe.methods[1:])
    )
    size = 4 * 24_000

    class Memory:
        total = 2 * size

    monkeypatch.setattr("psutil.virtual_memory", lambda: Memory)
    (line,) = fits.misfits(recipe, cells, workers=2)
    assert "in each of 2 processes" in line and line.startswith("plain:")


def test_a_grid_that_is_finished_says_so(command, undisturbed, capsys):
    command(undisturbed)
    said = " ".join(capsys.readouterr().err.split())
    assert "8 of 8 cells are in" in said and "rankwise report" in said


def test_the_display_counts_and_says_what_is_left(small):
    from rich.console import Console

    from rankwise.cli.progress import clock, display, summary

    _, cells = small
    grid = Grid({cell.name: cell for cell in cells}, workers=2)
    names = list(grid.cells)
    assert summary(grid) == "0 of 8 done, 0 running"
    grid.done |= set(names[:3])
    grid.seconds = dict.fromkeys(names[:3], 100.0)
    grid.failed[names[3]] = Failure({}, "nan", again=True)
    grid.running[0] = names[4]
    # four of eight are left, at 100 s each, two at a time
    assert summary(grid) == "3 of 8 done, 1 running, 1 failed, about 3:20 min left"
    console = Console(record=True, width=90, file=StringIO())
    console.print(display(grid))
    assert names[4] in console.export_text()
    assert clock(5) == "5 s" and clock(59.6) == "1:00 min" and clock(3700) == "1:01 h"


def test_the_snakefile_names_every_cell_and_what_it_waits_for(command, small, tmp_path):
    import shlex

    _, cells = small
    command(tmp_path, "--snakefile", "--threads", "2")
    text = (tmp_path / "Snakefile").read_text()
    found: dict = {}
    exec(text[text.index("NEEDS") : text.index("rule all")], found)
    assert found["NEEDS"] == {cell.name: list(cell.needs) for cell in cells}
    line = json.loads(text.strip().splitlines()[-1]).format(
        threads=2, wildcards=SimpleNamespace(name=cells[0].name)
    )
    assert shlex.split(line)[:3] == ["OMP_NUM_THREADS=2", "rankwise", "compare"]
    assert shlex.split(line)[-1] == cells[0].name


@pytest.mark.slow
def test_snakemake_gives_the_same_files(command, small, undisturbed, tmp_path):
    """One cell and the two that it waits for, with the local executor, two at a time. A folder on
    PATH stands for the installed command."""
    if (snakemake := shutil.which("snakemake")) is None:
        pytest.skip("snakemake is not installed (pip install 'rankwise[snakemake]')")
    out, scripts = tmp_path / "out", tmp_path / "bin"
    command(out, "--snakefile", "--threads", "1")
    scripts.mkdir()
    (scripts / "rankwise").write_text(f'#!/bin/sh\nexec {sys.executable} -m rankwise "$@"\n')
    (scripts / "rankwise").chmod(0o755)
    path = f"{scripts}{os.pathsep}{os.environ['PATH']}"
    target = f"cells/{cell_named(small[1], 'svd').name}.json"
    line = [snakemake, target, "--cores", "2", "--keep-going", "--rerun-triggers", "mtime"]
    subprocess.run(line, cwd=out, env=os.environ | {"PATH": path}, check=True, timeout=280)
    found, expected = lasting(out), lasting(undisturbed)
    assert found == {path: expected[path] for path in found} and len(found) == 3
