"""The whole drive, `make attack`: counts by family of what was tried, held and failed.

python tests/reliability/attack.py --kills 200 --families kills inputs disk signals --seed 0
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from case import tried
from forks import Forks
from inputs import cases
from kills import COMMANDS, Kill, Whole, killed_and_resumed, reference, resumed
from small import given as stand_on
from small import model_and_rows

from rankwise.files import write_json

Trial = tuple[str, str, str]  # family, name, what is wrong


class Drive:
    """The forking process, what all trials share, and a folder for each."""

    def __init__(self, folder: Path, given: argparse.Namespace):
        self.folder, self.rng = folder, random.Random(given.seed)
        self.commands, self.only = given.commands, set(given.only)
        self.model, self.few, self.many = model_and_rows(folder / "base")
        self.forks = Forks(given.source)
        self.found: dict[str, Whole] = {}
        self.count = 0

    def of(self, name: str) -> Whole:
        """The undisturbed run of a command."""
        if name not in self.found:
            place = self.folder / "whole" / name
            place.mkdir(parents=True)
            self.found[name] = reference(
                self.forks, name, place, self.model, self.few, self.many, self.of
            )
        return self.found[name]

    def new(self) -> Path:
        """A folder that is not there yet."""
        self.count += 1
        return self.folder / "trials" / str(self.count)

    def moment(self, whole: Whole) -> int:
        """One of its file operations; 1 where it was seen to do none."""
        return self.rng.randint(1, max(1, whole.operations))

    def inputs(self, share: float) -> Iterator[Trial]:
        """Bad input."""
        stand = stand_on(self.forks, self.model, self.folder / "given")
        for case in cases():
            if self.rng.random() >= share or (self.only and case.family not in self.only):
                continue
            place = self.new()
            yield f"input: {case.family}", case.name, tried(case, self.forks, place, stand)
            shutil.rmtree(place, ignore_errors=True)

    def kills(self, count: int) -> Iterator[Trial]:
        """SIGKILL, half at file operations and half after a time, over all commands in turn."""
        names = list(self.commands)
        self.rng.shuffle(names)
        for n in range(count):
            whole = self.of(names[n % len(names)])
            if n // len(names) % 2 == 0 and whole.operations:
                moment = Kill(at=self.moment(whole))
            else:
                moment = Kill(after=self.rng.uniform(0, whole.seconds))
            kind = "at a file operation" if moment.at else "after a time"
            said = killed_and_resumed(self.forks, whole, moment, self.new())
            yield f"kill {kind}", f"{whole.name} {moment}", said

    def disk(self, count: int) -> Iterator[Trial]:
        """A full disk: nothing can be created from an operation on, or no file can be large."""
        names = ["train", "run-cut", "cut", "search", "run"]
        for n in range(count):
            whole = self.of(names[n % len(names)])
            how = {"full_at": self.moment(whole)}
            if n % 3 == 2:
                how = {"largest": self.rng.choice([100, 2_000, 8_000])}
            place = self.new()
            place.mkdir(parents=True)
            done = self.forks.run(whole.argv, place, **how)
            said = ""
            if done.crashed or (done.code and not done.line.startswith("rankwise: ")):
                said = f"exit {done.code}, {done.line[:200]}"
            if not said and done.code:
                said = resumed(self.forks, whole, place)
            yield "disk full", f"{whole.name} {how}", said

    def signals(self, count: int) -> Iterator[Trial]:
        """SIGTERM, SIGHUP and SIGINT say how to go on, and that is true."""
        for n in range(count):
            whole = self.of(["train", "run-cut", "search"][n % 3])
            number = [15, 1, 2][n // 3 % 3]
            place = self.new()
            place.mkdir(parents=True)
            at = self.moment(whole)
            done = self.forks.run(whole.argv, place, interrupt_at=at, number=number)
            said = ""
            if done.code == 0:
                said = "" if (place / "out").is_dir() else "nothing was made"
            elif done.code != 128 + number or done.crashed:
                said = f"exit {done.code}: {done.line[:200]}"
            elif "stopped" not in done.line:
                said = f"it says: {done.line[:200]}"
            elif "goes on" in done.line or (place / "out.partial").exists():
                said = resumed(self.forks, whole, place)
            yield "signals", f"{whole.name} {number} at {at}", said

    def two(self, count: int) -> Iterator[Trial]:
        """A second process that would resume or replace a run which still works."""
        for n in range(count):
            whole = self.of(["train", "run-cut"][n % 2])
            place = self.new()
            place.mkdir(parents=True)
            first = self.forks.start(whole.argv, place)
            flag = ["--resume_from_checkpoint", "--overwrite_output_dir"][n // 2 % 2]
            other = self.forks.start([*whole.argv, flag], place)
            done = [self.forks.wait(first), self.forks.wait(other)]
            said = "" if any(d.code == 0 for d in done) else f"both failed: {done[0].line[:200]}"
            if any(d.crashed for d in done):
                said = "traceback"
            said = said or resumed(self.forks, whole, place)
            yield "two at once", f"{whole.name} {flag}", said


class Counts:
    """What was tried and what failed, by family, kept in a file after each trial.

    A drive that is stopped has some, and what it takes to draw the same trials again.
    """

    def __init__(self, given: argparse.Namespace):
        self.given = given
        self.tried: Counter[str] = Counter()
        self.failed: list[Trial] = []

    def add(self, kind: str, name: str, said: str) -> None:
        self.tried[kind] += 1
        if said:
            self.failed.append((kind, name, said))
            print(f"  {kind}: {name}: {said}", file=sys.stderr, flush=True)
        if self.given.json:
            self.write(Path(self.given.json))

    def write(self, path: Path) -> None:
        bad = Counter(kind for kind, _, _ in self.failed)
        drawn = {k: v for k, v in vars(self.given).items() if k not in ("json", "source")}
        counts = {kind: {"trials": n, "failed": bad[kind]} for kind, n in self.tried.items()}
        write_json(path, {"drawn": drawn, "counts": counts, "failed": self.failed})

    def show(self) -> None:
        bad = Counter(kind for kind, _, _ in self.failed)
        print(f"{'family':<28}{'trials':>8}{'held':>8}{'failed':>8}")
        for kind, n in [*self.tried.items(), ("all", sum(self.tried.values()))]:
            lost = len(self.failed) if kind == "all" else bad[kind]
            print(f"{kind:<28}{n:>8}{n - lost:>8}{lost:>8}")


def main() -> None:
    """Runs families of trials; exits with 1 where something failed, 130 where it was stopped."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    known = ["inputs", "kills", "disk", "signals", "two"]
    parser.add_argument("--families", nargs="+", choices=known, default=known)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--disk", type=int, default=60)
    parser.add_argument("--signals", type=int, default=36)
    parser.add_argument("--two", type=int, default=12)
    parser.add_argument("--inputs", type=float, default=1.0, help="share of the bad inputs")
    parser.add_argument("--only", nargs="+", default=[], help="families of bad input; else all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--source", help="src/ of another revision, to compare with")
    parser.add_argument("--json", help="file for the counts and what failed")
    given = parser.parse_args()
    counts, stopped = Counts(given), False
    folder = Path(tempfile.mkdtemp(prefix="attack-"))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    drive = None
    try:
        drive = Drive(folder, given)
        for family in given.families:
            for trial in getattr(drive, family)(getattr(given, family)):
                counts.add(*trial)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one is for the same
        stopped = True
    finally:
        if drive is not None:
            drive.forks.close()
        shutil.rmtree(folder, ignore_errors=True)
    counts.show()
    if stopped:
        print("attack: stopped; these are the counts so far", file=sys.stderr)
    sys.exit(130 if stopped else bool(counts.failed))


if __name__ == "__main__":
    main()
