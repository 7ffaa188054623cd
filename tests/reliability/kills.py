"""Every command and method, small; how one is killed and taken up again."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from forks import Done, Forks
from same import difference

FAST = "--max_steps 5 --per_device_train_batch_size 8 --learning_rate 1e-2 --save_steps 2".split()
FEW = "--method adalora eva flop houlsby compacter full prefix-tuning prompt-tuning p-tuning ia3"
MORE = "random svd svd-energy random-order svd-threshold lora-grid dylora-frozen"
LORAS = "autolora-unconstrained autolora-sigmoid autolora-first-order"


@dataclass(frozen=True)
class Command:
    """A command, and which rows it takes."""

    argv: list[str]
    rows: str = "few"
    needs: str = ""  # whose result it takes as its adapter


OFFLINE = ("cut", "export")
"""Commands that take an adapter alone, and so little time that there is nothing to resume."""

OWN = {
    "lora-grid": ["--r", "2", "--ranks", "1", "2"],
    "houlsby": [],
    "compacter": [],
    "full": [],
    "ia3": [],
    "prefix-tuning": [],
    "prompt-tuning": [],
    "p-tuning": [],
}
COMMANDS = {
    "run": Command(
        "run --method autolora --r 4 --gate_learning_rate 0.1 --control lora".split() + FAST
    ),
    "run-cut": Command(
        ["run", "--method", "cut", "--r", "4", "--control", "none", "--sizes", "3", *FAST], "many"
    ),
    "train": Command(["train", "--r", "2", "--target_modules", "query", "value", *FAST]),
    "search": Command(["search", "--method", "autolora", "--r", "4", *FAST]),
    "dylora": Command(["search", "--method", "dylora", "--r", "4", *FAST]),
    "demo": Command(["demo", "--method", "autolora", "--r", "4", "--control", "none", *FAST]),
    "evaluate": Command(["evaluate"], needs="train"),
    "cut": Command(["cut", "--keep", "0.5"], needs="train"),
    "export": Command(["export", "--to", "vllm"], needs="train"),
    "run-heal": Command(
        ["run", "--control", "none", "--r", "4", "--sizes", "3", "--heal", "0.5", *FAST], "many"
    ),
} | {
    name: Command(
        ["run", "--method", name, "--control", "none", *OWN.get(name, ["--r", "4"]), *FAST]
    )
    for name in f"{FEW} {MORE} {LORAS}".removeprefix("--method ").split()
}


@dataclass(frozen=True)
class Whole:
    """An undisturbed run."""

    name: str
    argv: list[str]
    folder: Path
    operations: int
    seconds: float
    done: Done


@dataclass(frozen=True)
class Kill:
    """When: at the start of a file operation, or after some seconds."""

    at: int | None = None
    after: float | None = None
    how: dict = field(default_factory=dict)


def reference(
    forks: Forks,
    name: str,
    folder: Path,
    model: str,
    few: str,
    many: str,
    of: Callable[[str], Whole],
) -> Whole:
    """Runs a command once, to its end."""
    command = COMMANDS[name]
    argv = list(command.argv)
    rows = many if command.rows == "many" else few
    if argv[0] not in OFFLINE:
        argv += ["--model_name_or_path", model, "--data_dir", rows, "--use_cpu"]
    if command.needs:
        argv += ["--adapter", str(of(command.needs).folder / "out" / "adapter")]
    if argv[0] != "evaluate":
        argv += ["--output_dir", "out"]
    started = time.monotonic()
    done = forks.run(argv, folder)
    assert done.code == 0, done.err
    return Whole(name, argv, folder, done.operations, time.monotonic() - started, done)


def killed_and_resumed(forks: Forks, whole: Whole, moment: Kill, folder: Path) -> str:
    """What is wrong after a kill and a resume, in words; "" where nothing is."""
    folder.mkdir(parents=True)
    forks.run(whole.argv, folder, moment.after, kill_at=moment.at, **moment.how)
    return resumed(forks, whole, folder)


def resumed(forks: Forks, whole: Whole, folder: Path) -> str:
    """Goes on with what a stopped command left, and compares."""
    if whole.argv[0] == "evaluate":
        again = forks.run(whole.argv, folder)
        return "" if again.out == whole.done.out else f"evaluate: {again.line}"
    takes = whole.argv[0] not in OFFLINE
    again = forks.run([*whole.argv, *["--resume_from_checkpoint"] * takes], folder)
    if again.code == 2 and ("nothing to resume" in again.err):
        again = forks.run(whole.argv, folder)  # it had not begun
    if again.code == 2 and not takes and ("is not empty" in again.err or "out exists" in again.err):
        again = replace(again, code=0)  # it was done
    if again.code != 0 or again.crashed:
        return f"exit {again.code}: {again.line}"
    if said := difference(folder / "out", whole.folder / "out"):
        return said
    left = sorted(path.name for path in folder.iterdir() if path.name not in ("out", "out-rows"))
    if left:
        return f"left over: {left}"
    shutil.rmtree(folder)
    return ""
