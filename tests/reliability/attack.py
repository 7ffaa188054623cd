"""The whole drive, `make attack`: counts by family of what was tried, held and failed.

python tests/reliability/attack.py --kills 200 --families kills inputs disk signals --seed 0
"""

import argparse
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from forks import Forks
from inputs import cases, prepare, wrong
from kills import COMMANDS, Kill, Whole, killed_and_resumed, reference, resumed
from small import model_and_rows

from rankwise.files import write_json

Trial = tuple[str, str, str]  # family, name, what is wrong


class Drive:
    """The forking process, what all trials share, and a folder for each."""

    def __init__(self, folder: Path, seed: int, source: str | None, commands: list[str]):
        self.folder, self.rng, self.commands = folder, random.Random(seed), commands
        self.model, self.few, self.many = model_and_rows(folder / "base")
        self.forks = Forks(source)
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

    def inputs(self, share: float) -> Iterator[Trial]:
        """Bad input."""
        adapter = self.of("train").folder / "out"
        for case in cases():
            if self.rng.random() >= share:
                continue
            place = self.new()
            argv = prepare(
                case, place, self.model, str(adapter / "adapter"), str(adapter / "plan.json")
            )
            done = self.forks.run(argv, place)
            yield f"input: {case.family}", case.name, wrong(case, done, place)
            shutil.rmtree(place)

    def kills(self, count: int) -> Iterator[Trial]:
        """SIGKILL, half at file operations and half after a time, over all commands in turn."""
        names = list(self.commands)
        self.rng.shuffle(names)
        for n in range(count):
            whole = self.of(names[n % len(names)])
            if n // len(names) % 2 == 0 and whole.operations:
                moment = Kill(at=self.rng.randint(1, whole.operations))
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
            how = {"full_at": self.rng.randint(1, whole.operations)}
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
            at = self.rng.randint(1, whole.operations)
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


def write(path: Path, tried: Counter, failed: Counter, lines: list[list[str]]) -> None:
    """The counts so far: after each trial, so that a drive that is stopped has some."""
    counts = {kind: {"trials": n, "failed": failed[kind]} for kind, n in tried.items()}
    write_json(path, {"counts": counts, "failed": lines})


def main() -> None:
    """Runs families of trials; exits with 1 where something failed."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    known = ["inputs", "kills", "disk", "signals", "two"]
    parser.add_argument("--families", nargs="+", choices=known, default=known)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--disk", type=int, default=60)
    parser.add_argument("--signals", type=int, default=36)
    parser.add_argument("--two", type=int, default=12)
    parser.add_argument("--inputs", type=float, default=1.0, help="share of the bad inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--source", help="src/ of another revision, to compare with")
    parser.add_argument("--json", help="file for the counts and what failed")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="attack-"))
    drive = Drive(folder, given.seed, given.source, given.commands)
    tried, failed, lines = Counter(), Counter(), []
    try:
        for family in given.families:
            for kind, name, said in getattr(drive, family)(getattr(given, family)):
                tried[kind] += 1
                if said:
                    failed[kind] += 1
                    lines.append([kind, name, said])
                    print(f"  {kind}: {name}: {said}", file=sys.stderr, flush=True)
                if given.json:
                    write(Path(given.json), tried, failed, lines)
    except KeyboardInterrupt:
        print("stopped; the counts so far:", file=sys.stderr)
    finally:
        drive.forks.close()
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{'family':<28}{'trials':>8}{'held':>8}{'failed':>8}")
    for kind, count in tried.items():
        print(f"{kind:<28}{count:>8}{count - failed[kind]:>8}{failed[kind]:>8}")
    total, bad = sum(tried.values()), sum(failed.values())
    print(f"{'all':<28}{total:>8}{total - bad:>8}{bad:>8}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
