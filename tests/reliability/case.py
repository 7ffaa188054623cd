"""A case of bad input: files, a command, what is right of its end; how one is tried."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forks import Done, Forks

ROWS = "".join(
    json.dumps({"text": f"{'fine' if n % 2 else 'awful'} film {n}", "label": "ba"[n % 2]}) + "\n"
    for n in range(24)
)
DEEP = "[" * 5000 + "]" * 5000
LONG = "9" * 5000
FAST = "--max_steps 2 --per_device_train_batch_size 8 --use_cpu".split()
ODD: list[Any] = [
    *(None, True, -1, 0, 1.5, 1e300, 10**30, float("nan"), float("inf")),
    *("", "x", "../x", "/etc/passwd", "\x1b[2J", LONG),
    *([], [[]], [None], ["x", "x"], [{}], {}, {"": {}}, {"x": {"y": {}}}, {1: 2}),
]
"""Values of every type, for a place that takes others."""


@dataclass(frozen=True)
class Case:
    """One command that cannot work, or has to.

    Attributes:
        family, name: for the counts.
        argv: after `rankwise`; with {model}, {chat}, ... as `Given` has them. "python" and a text:
            a call of the library.
        files: by name in the folder, text, bytes, or a function that writes it.
        words: in the line.
        code: the exit code that is right; None where the command may work or refuse.
        change: of a copy of the adapter, in the folder "a".
    """

    family: str
    name: str
    argv: list[str]
    files: dict[str, Any] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    code: int | None = 2
    change: Callable[[Path], None] | None = None


@dataclass(frozen=True)
class Given:
    """Folders that cases stand on: models, and a finished run on the first of them.

    Attributes:
        model: a tiny BERT.
        result: of `rankwise train`, an adapter and its plan among others.
        chat: a tiny Llama with a chat template.
        spoken: a LoRA adapter of that.
    """

    model: str
    result: str
    chat: str
    spoken: str


def train(*more: str, rows: str = "rows.jsonl") -> list[str]:
    argv = ["train", "--r", "2", "--target_modules", "query", *FAST, "--train_file", rows]
    return [*argv, "--model_name_or_path", "{model}", "--output_dir", "out", *more]


def named(text: str, given: Given) -> str:
    """With folders for their names in braces."""
    for name, folder in vars(given).items():
        text = text.replace("{" + name + "}", folder)
    return text


def prepare(case: Case, folder: Path, given: Given) -> list[str]:
    """Writes the files of a case; its command."""
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text(ROWS)
    shutil.copy(Path(given.result) / "plan.json", folder / "good-plan.json")
    (folder / "link").symlink_to("nowhere")
    if case.change is not None or "a" in case.argv:
        shutil.copytree(Path(given.result) / "adapter", folder / "a")
    for name, content in case.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(folder / name)
        elif isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            (folder / name).write_text(named(content, given), encoding="utf-8")
    if case.change is not None:
        case.change(folder / "a")
    return [named(word, given) for word in case.argv]


def tried(case: Case, forks: Forks, folder: Path, given: Given) -> str:
    """Runs a case in a new folder; what went wrong, in words, "" where nothing did."""
    argv = prepare(case, folder, given)
    before = _listing(folder)
    return wrong(case, forks.run(argv, folder), before, _listing(folder))


def wrong(case: Case, done: Done, before: set[str], after: set[str]) -> str:
    """What a command did wrong, in words; "" where it did right."""
    if done.crashed:
        return f"traceback: {done.line[:200]}"
    if case.code == 0 or (case.code is None and done.code == 0):
        return "" if done.code == 0 else f"exit {done.code}: {done.line[:200]}"
    if done.code != 2:
        return f"exit {done.code}, not 2: {done.line[:200]}"
    if not done.line.startswith("rankwise: "):
        return f"no line of ours: {done.line[:200]}"
    if len(done.line) > 2000:
        return f"a line of {len(done.line)} characters: {done.line[:120]}"
    ours = done.line if case.argv[0] == "python" else done.err  # colours of a library are its own
    if "\x1b" in ours:
        return "an escape reached the terminal"
    if left := sorted(after ^ before):
        return f"it left or took {left[:3]}"
    if missing := [word for word in case.words if word not in done.line]:
        return f"no {missing[0]!r} in: {done.line[:200]}"
    return ""


def _listing(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
