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
    """A command, its rows, and whose result it takes; `{rows}` and `{needs}` are their folders."""

    argv: list[str]
    rows: str = "few"
    needs: str = ""


BRIEF = ("cut", "export", "predict", "report", "score", "verify")
"""Commands that take so little time that there is nothing to resume: they are given again."""

PRINT = ("evaluate", "score", "verify")
"""Commands that write nothing: given again, they say the same."""

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
    "predict": Command(["predict", "--output_file", "out/said.jsonl"], needs="train"),
    "report": Command(["report", "{needs}/metrics.json"], needs="train"),
    "score": Command(
        "score --task e2e --hypotheses {rows}/said.txt --references {rows}/meant.txt".split()
    ),
    "verify": Command(["verify", "{needs}"], needs="export"),
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
    rows = many if command.rows == "many" else few
    needs = of(command.needs).folder / "out" if command.needs else ""
    argv = [word.format(rows=rows, needs=needs) for word in command.argv]
    if argv[0] not in BRIEF:
        argv += ["--model_name_or_path", model, "--data_dir", rows, "--use_cpu"]
    if command.needs and not any("{needs}" in word for word in command.argv):
        argv += ["--adapter", f"{needs}/adapter"]
    if argv[0] == "predict":
        argv += ["--input_file", f"{rows}/test.jsonl"]
    elif argv[0] == "score":
        for file, between in (("said", "\n"), ("meant", "\n\n")):
            (Path(rows) / f"{file}.txt").write_text(f"a red cat{between}the dog is big\n")
    if argv[0] not in (*PRINT, "predict"):
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
    if whole.argv[0] in PRINT:
        again = forks.run(whole.argv, folder)
        left = [path.name for path in folder.iterdir()]
        said = "" if again.out == whole.done.out else f"{whole.argv[0]}: {again.line}"
        return said or (f"left over: {left}" if left else "")
    takes = whole.argv[0] not in BRIEF
    again = forks.run([*whole.argv, *["--resume_from_checkpoint"] * takes], folder)
    if again.code == 2 and ("nothing to resume" in again.err):
        again = forks.run(whole.argv, folder)  # it had not begun
    if again.code == 2 and not takes and ("is not empty" in again.err or " exists" in again.err):
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
