"""`rankwise score`: the official figures of a file of generated texts, of anybody's."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rankwise.cli.arguments import flag, required
from rankwise.cli.flags import Group, parse
from rankwise.errors import DataError
from rankwise.reading import Unreadable, parse_json


@dataclass
class ScoreArguments:
    """What to score."""

    task: Literal["e2e", "webnlg", "dart"] | None = flag(
        None, "whose scorer judges: E2E challenge, WebNLG 2017, DART"
    )
    hypotheses: str | None = flag(None, "file of the texts to be judged, one a line")
    references: tuple[str, ...] = flag(
        (),
        "one text a line and a blank line between inputs; JSON lines with a list `references`; or "
        "several files of a text a line, blank where an input has no more",
    )
    json: bool = flag(False, "print JSON")


def main(argv: Sequence[str]) -> None:
    """Score generated texts as a benchmark's official scorer does, without Java or downloads."""
    (given,) = parse("score", main.__doc__ or "", [Group("score", ScoreArguments())], argv)
    task = required(given.task, "task", "score")
    file = Path(required(given.hypotheses, "hypotheses", "score"))
    paths = [Path(path) for path in required(given.references or None, "references", "score")]
    from rankwise.metrics import score
    from rankwise.metrics.suites import check_packages

    hypotheses = read_lines(file)
    references = read_references(paths)
    if len(hypotheses) != len(references):
        raise DataError(
            f"{file} has {len(hypotheses)} texts and {paths[0]} references for {len(references)} "
            "inputs; give a text, or an empty line, for every input"
        )
    for row, texts in enumerate(references, 1):
        if not any(text.strip() for text in texts):
            raise DataError(f"input {row} has no reference in {', '.join(map(str, paths))}")
    check_packages(task)
    figures = score(task, hypotheses, references)
    if given.json:
        print(json.dumps({f.name: {"value": f.value, "signature": f.signature} for f in figures}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("", task, box=None)
    table.add_column("signature", no_wrap=True)
    for figure in figures:
        table.add_row(figure.name, f"{figure.value:.4f}", figure.signature)
    # one line a figure, its signature whole, however narrow the terminal
    width = max(len(figure.name) + len(figure.signature) for figure in figures) + 20
    Console(width=max(width, Console().width), soft_wrap=True).print(table, highlight=False)


def read_lines(path: Path) -> list[str]:
    """The lines of a file, blank ones too; the last needs no line break.

    Raises:
        DataError: it cannot be read, or is empty.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise DataError(f"cannot read {path}: {reason}") from error
    # Not splitlines(): a text may hold U+2028, which that would cut at.
    lines = [line.rstrip("\r") for line in text.removesuffix("\n").split("\n")]
    if not any(line.strip() for line in lines):
        raise DataError(f"{path} has no text in it")
    return lines


def read_references(paths: Sequence[Path]) -> list[list[str]]:
    """The references of every input, from one file of groups, JSON lines, or a file a reference.

    Raises:
        DataError: a file cannot be read, is malformed, or files have different numbers of lines.
    """
    files = [read_lines(path) for path in paths]
    if len(files) > 1:
        counts = {len(lines) for lines in files}
        if len(counts) > 1:
            said = ", ".join(f"{p} {len(lines)}" for p, lines in zip(paths, files, strict=True))
            raise DataError(f"the files of references have different numbers of lines: {said}")
        return [list(texts) for texts in zip(*files, strict=True)]
    (lines,) = files
    if lines[0].lstrip().startswith("{"):
        return [_from_json(line, paths[0], n) for n, line in enumerate(lines, 1) if line.strip()]
    groups: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            groups[-1].append(line)
        elif groups[-1]:  # several blank lines are one
            groups.append([])
    return [group for group in groups if group]


def _from_json(line: str, path: Path, number: int) -> list[str]:
    try:
        row = parse_json(line, finite=False)
    except Unreadable as error:
        raise DataError(f"{path}:{number}: {error}; mend the line") from error
    found = row.get("references") if isinstance(row, dict) else None
    if isinstance(found, str):
        found = [found]
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise DataError(
            f'{path}:{number}: "references" is {found!r:.60}; give a text or a list of texts'
        )
    return found
