"""A long grid of tiny cells with random kills: is memory flat, is a cell lost, is one run twice?

python tests/reliability/soak.py --minutes 30 --seed 0 --json FILE

In the first third the command itself is killed now and then and started again; after that one
process lives to the end, whose memory is looked at each second, and workers alone are killed. At
the end the grid is finished undisturbed. A cell is lost where its file was there and is gone, run
twice where the file of a finished one changed, different where a sample that was never disturbed
says something else.
"""

import argparse
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import yaml
from small import model_and_rows

from rankwise.compare.cells import cells_of, is_over, read_cell
from rankwise.compare.recipe import read_recipe
from rankwise.files import write_json
from rankwise.result import Result

METHODS = {"svd": {"r": 4, "rank": 2}, "plain": {"method": "lora", "same_size_as": "svd"}}
TRAINING = {"max_steps": 4, "per_device_train_batch_size": 8, "save_steps": 2, "use_cpu": True}
SAMPLE = 10  # cells that are run once more, undisturbed
PAUSE = 4, 25  # seconds between two kills
GROWTH = 0.05  # of memory, from the second quarter of the last process's life to the last


@dataclass
class Found:
    """What the soak saw; the lists hold names of cells.

    Attributes:
        starts, kills: of the command, and of workers.
        cells: finished ones.
        megabytes: resident memory of the last process and its fork server, the median of each tenth
            of its life.
    """

    minutes: float
    seed: int
    starts: int = 0
    kills: dict[str, int] = field(default_factory=lambda: {"command": 0, "worker": 0})
    cells: int = 0
    lost: list[str] = field(default_factory=list)
    run_twice: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    half_written: list[str] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)
    grows: bool = False

    @property
    def failed(self) -> bool:
        lists = (self.lost, self.run_twice, self.different, self.half_written)
        return self.grows or any(lists) or not self.cells


class Soak:
    """A grid on disk, what its files were when they were first seen, and what was found."""

    def __init__(self, folder: Path, minutes: float, seed: int):
        self.folder, self.rng = folder, random.Random(seed)
        self.found = Found(minutes, seed)
        self.model, self.rows, _ = model_and_rows(folder / "base")
        self.files: dict[str, bytes] = {}
        self.recipe = self.write("soak", range(100_000 if minutes > 60 else 4_000))

    def write(self, name: str, seeds: range) -> Path:
        path = self.folder / f"{name}.yaml"
        recipe = {"tasks": {"rows": {"data_dir": "."}}, "methods": METHODS, "seeds": list(seeds)}
        path.write_text(yaml.safe_dump(recipe | {"rates": [1e-2], "training": TRAINING}))
        return path

    def start(self, recipe: Path, folder: Path, *more: str) -> subprocess.Popen[bytes]:
        line = [sys.executable, "-m", "rankwise", "compare", str(recipe), "--data_dir", self.rows]
        line += ["--model_name_or_path", self.model, "--output_dir", str(folder), *more]
        line += [] if more else ["--workers", "2", "--threads", "1"]
        log = (self.folder / "log").open("ab")
        return subprocess.Popen(line, stdout=log, stderr=log, start_new_session=True)

    def look(self) -> None:
        """Holds each file against what it was, and remembers those that are new."""
        there = set()
        for path in (self.folder / "out" / "cells").glob("*.json"):
            there.add(path.stem)
            content = path.read_bytes()
            if path.stem in self.files:
                if self.files[path.stem] != content:
                    self.found.run_twice.append(path.stem)
            elif isinstance(read_cell(path), Result):
                self.files[path.stem] = content
        self.found.lost += sorted(set(self.files) - there - set(self.found.lost))

    def with_kills(self) -> None:
        """Kills at random until the time is over."""
        began, end = time.time(), time.time() + 60 * self.found.minutes
        alone = began + (end - began) / 3  # from here on the command is left alive
        process, memory = self.begun(), []
        due = time.time() + self.rng.uniform(*PAUSE)
        while time.time() < end:
            time.sleep(1)
            if process.poll() is not None:
                process = self.begun()
                memory = []
            elif time.time() > alone:
                memory.append(resident(process.pid))
            if time.time() > due:
                due = time.time() + self.rng.uniform(*PAUSE)
                if time.time() < alone and self.rng.random() < 0.2:
                    self.found.kills["command"] += 1
                    process.kill()
                    process.wait()
                elif (worker := self.worker(process.pid)) is not None:
                    with suppress(psutil.NoSuchProcess):
                        worker.kill()
                        self.found.kills["worker"] += 1
                self.look()
        process.send_signal(signal.SIGTERM)
        process.wait()
        tenth = max(1, len(memory) // 10)
        parts = [memory[at : at + tenth] for at in range(0, 10 * tenth, tenth)]
        self.found.megabytes = [round(statistics.median(part), 1) for part in parts if part]
        early, late = (statistics.median(self.found.megabytes[at:][:3]) for at in (2, -3))
        self.found.grows = late > early * (1 + GROWTH)

    def begun(self) -> subprocess.Popen[bytes]:
        self.found.starts += 1
        return self.start(self.recipe, self.folder / "out")

    def worker(self, pid: int) -> psutil.Process | None:
        """A process at a cell: those are children of the fork server, which is the command's."""
        with suppress(psutil.NoSuchProcess):
            children = psutil.Process(pid).children()
            working = [inner for child in children for inner in child.children()]
            return self.rng.choice(working) if working else None
        return None

    def finish(self) -> None:
        """Runs what is begun to its end, undisturbed, and a sample of it anew elsewhere."""
        if not self.files:  # nothing came of it, which counts as failed
            return
        seeds = {int(name.rpartition("-seed")[2].partition("-")[0]) for name in self.files}
        recipe = self.write("rest", range(max(seeds) + 1))
        self.start(recipe, self.folder / "out").wait()
        self.look()
        cells = cells_of(read_recipe(recipe, self.rows, self.model))
        places = {cell.name: self.folder / "out" / "cells" / f"{cell.name}.json" for cell in cells}
        self.found.lost += [name for name, path in places.items() if not is_over(read_cell(path))]
        self.found.cells = sum(path.is_file() for path in places.values())
        again = self.folder / "again"
        for name in self.rng.sample(sorted(places), min(SAMPLE, len(places))):
            self.start(recipe, again, "--cell", name).wait()
            if said(places[name]) != said(again / "cells" / f"{name}.json"):
                self.found.different.append(name)
        odd = (p for p in (self.folder / "out").rglob("*") if p.is_file() and p.name[0] == ".")
        self.found.half_written = sorted(str(p.relative_to(self.folder)) for p in odd)


def resident(pid: int) -> float:
    """MB that a command and its fork server hold."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return sum(p.memory_info().rss for p in (process, *process.children())) / 2**20
    return 0.0


def said(path: Path) -> object:
    """A cell's figures, but for what clock and memory decide."""
    if not path.is_file():
        return None
    raw = json.loads(path.read_text())
    return {key: raw.get(key) for key in ("metrics", "method", "lora_parameters", "training")}


def main() -> None:
    """Runs the soak; exits with 1 where something was lost, run twice, different, or grew."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for what was found")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        soak = Soak(Path(folder), given.minutes, given.seed)
        soak.with_kills()
        soak.finish()
    print(json.dumps(asdict(soak.found), indent=2))
    if given.json:
        write_json(given.json, asdict(soak.found))
    sys.exit(soak.found.failed)


if __name__ == "__main__":
    main()
