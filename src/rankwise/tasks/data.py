"""Rows as plain columns of Python values: from the hub, a folder or files, with their checks."""

from __future__ import annotations

import csv
import json
import logging
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from datasets import ClassLabel, Dataset, load_dataset

from rankwise import rows as draw
from rankwise.errors import DataError
from rankwise.rows import TwoSets

logger = logging.getLogger(__name__)

Kind = Literal["classification", "regression", "tagging", "causal_lm"]
# One split: column name -> one value a row. Labels may still be of any type.
Rows = dict[str, list[Any]]

SPLITS = ("train", "validation", "test")
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
HELD_OUT = 0.1

_LABEL_COLUMNS = ("label", "labels")
_TAG_COLUMNS = ("ner_tags", "tags", "labels")
_TEXT_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question1", "question2"),
    ("text",),
    ("sentence",),
)
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")


@dataclass(frozen=True)
class KnownTask:
    """What is known of a public data set: where it is, its columns, labels and metrics."""

    hub: tuple[str, ...]
    text_columns: tuple[str, ...]
    label_names: tuple[str, ...] | None
    metrics: tuple[str, ...] = ("accuracy",)
    kind: Kind = "classification"
    label_column: str = "label"
    hub_splits: tuple[str, str, str] = SPLITS


_PAIR = ("sentence1", "sentence2")
# Label names in the hub's order, so that class numbers mean the same everywhere.
KNOWN: dict[str, KnownTask] = {
    "glue/cola": KnownTask(
        ("glue", "cola"), ("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",)
    ),
    "glue/mnli": KnownTask(
        ("glue", "mnli"),
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        hub_splits=("train", "validation_matched", "test_matched"),
    ),
    "glue/mrpc": KnownTask(
        ("glue", "mrpc"), _PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1")
    ),
    "glue/qnli": KnownTask(
        ("glue", "qnli"), ("question", "sentence"), ("entailment", "not_entailment")
    ),
    "glue/qqp": KnownTask(
        ("glue", "qqp"),
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        ("accuracy", "f1"),
    ),
    "glue/rte": KnownTask(("glue", "rte"), _PAIR, ("entailment", "not_entailment")),
    "glue/sst2": KnownTask(("glue", "sst2"), ("sentence",), ("negative", "positive")),
    "glue/stsb": KnownTask(
        ("glue", "stsb"), _PAIR, None, ("pearson", "spearman"), kind="regression"
    ),
    "glue/wnli": KnownTask(("glue", "wnli"), _PAIR, ("not_entailment", "entailment")),
    "jnlpba": KnownTask(
        ("jnlpba/jnlpba",),
        ("tokens",),
        (
            "O",
            *("B-DNA", "I-DNA", "B-RNA", "I-RNA", "B-cell_line", "I-cell_line"),
            *("B-cell_type", "I-cell_type", "B-protein", "I-protein"),
        ),
        ("f1", "precision", "recall", "accuracy"),
        kind="tagging",
        label_column="ner_tags",
    ),
}


def known_name(task: str) -> str:
    """The full name of a known task ("mrpc" -> "glue/mrpc").

    Raises:
        DataError: no such task.
    """
    for name in (task, f"glue/{task}"):
        if name in KNOWN:
            return name
    raise DataError(
        f"unknown task {task!r}; known: {', '.join(KNOWN)}; "
        "for rows of your own give data_dir= or train_file="
    )


def check_kind(kind: str) -> Kind:
    """The same kind, typed.

    Raises:
        DataError: it is not one of the four kinds.
    """
    for known in get_args(Kind):
        if kind == known:
            return known  # type: ignore[no-any-return]
    raise DataError(f"unknown kind {kind!r}; choose one of {', '.join(get_args(Kind))}")


# Where rows come from


def read_hub(known: KnownTask, trust_remote_code: bool = False) -> dict[str, Rows]:
    """A known task's splits from the Hugging Face hub.

    Raises:
        DataError: the hub cannot be reached or does not have it.
    """
    options: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    name = "/".join(known.hub)
    try:
        try:
            loaded = load_dataset(*known.hub, **options)
        except RuntimeError as error:
            # Sets that are still a loading script are readable only as the hub's own conversion.
            if "script" not in str(error):
                raise
            loaded = load_dataset(*known.hub, revision="refs/convert/parquet", **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"cannot get {name} from the Hugging Face hub ({_first_line(error)}); "
            "give data_dir= a folder with its train.jsonl and validation.jsonl"
        ) from error
    found = zip(SPLITS, known.hub_splits, strict=True)
    return {split: _plain_rows(loaded[there]) for split, there in found if there in loaded}


def folder_files(data_dir: str | Path) -> dict[str, Path]:
    """The train, validation and test files of a folder, as far as they are there.

    Raises:
        DataError: no such folder, none of the files, or two files for one split.
    """
    folder = Path(data_dir)
    if not folder.is_dir():
        raise DataError(f"data_dir {str(folder)!r} is not a folder; {_neighbours(folder)}")
    files: dict[str, Path] = {}
    for split in SPLITS:
        there = [folder / (split + suffix) for suffix in SUFFIXES]
        there = [path for path in there if path.is_file()]
        if len(there) > 1:
            names = ", ".join(path.name for path in there)
            raise DataError(f"{folder} has more than one {split} file: {names}; leave one")
        if there:
            files[split] = there[0]
    if not files:
        raise DataError(
            f"{folder} has no train, validation or test file ({', '.join(SUFFIXES)}); "
            f"it has: {_listing(folder)}"
        )
    return files


def read_file(path: str | Path) -> Rows:
    """All columns of a .jsonl, .json (an array or lines), .csv or .parquet file.

    CSV values stay strings ("007" is a text), an empty cell is None.

    Raises:
        DataError: missing, empty or malformed; the message names the file and the line.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no file {str(path)!r}; {_neighbours(path)}")
    readers = {
        ".jsonl": _read_json,
        ".json": _read_json,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
    }
    if path.suffix not in readers:
        raise DataError(f"{path} is not a {', '.join(SUFFIXES)} file; convert it to one of these")
    try:
        rows = readers[path.suffix](path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}); convert it to UTF-8") from error
    if count(rows) == 0:
        raise DataError(f"{path} has no rows; give a file with at least one")
    return rows


def _read_json(path: Path) -> Rows:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".json" and text.lstrip().startswith("["):
        try:
            return _columns(enumerate(json.loads(text), 1), path, "item")
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}: not JSON ({error.msg}); mend it") from error
    # Not splitlines(): a JSON string may hold U+2028, which that would cut at.
    lines = ((n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip())
    return _columns(((n, _parse_line(path, n, line)) for n, line in lines), path, "line")


def _parse_line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{number}: not a line of JSON ({error.msg} at column {error.colno}); "
            "write one JSON object a line"
        ) from error


def _columns(items: Iterable[tuple[int, Any]], path: Path, unit: str) -> Rows:
    found: list[dict[str, Any]] = []
    for number, item in items:
        if not isinstance(item, dict):
            raise DataError(
                f"{path}: {unit} {number} is a JSON {type(item).__name__}, not an object; "
                'write rows such as {"text": "...", "label": "..."}'
            )
        found.append(item)
    # A row may lack a column that another has.
    names = dict.fromkeys(name for item in found for name in item)
    return {name: [item.get(name) for item in found] for name in names}


def _read_csv(path: Path) -> Rows:
    csv.field_size_limit(2**31 - 1)  # the default takes a long text for a broken file
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        try:
            header = next(reader, [])
            rows: Rows = {name: [] for name in header}
            if len(rows) != len(header):
                raise DataError(f"{path}:1: a column name is there twice: {', '.join(header)}")
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise DataError(
                        f"{path}:{reader.line_num}: {len(cells)} cells where the header has "
                        f'{len(header)}; quote texts that hold a comma: "..."'
                    )
                for name, cell in zip(header, cells, strict=True):
                    rows[name].append(cell if cell.strip() else None)
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not CSV ({error}); mend it") from error
    return rows


def _read_parquet(path: Path) -> Rows:
    import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
    import pyarrow.parquet as pq  # type: ignore[import-untyped, unused-ignore]

    try:
        return _plain_rows(Dataset(pq.read_table(path)))
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} cannot be read as Parquet ({_first_line(error)}); write it again"
        ) from error


def _plain_rows(rows: Dataset) -> Rows:
    """Columns of Python values; class numbers that carry names become the names."""
    columns: Rows = dict(rows[:])
    for name, feature in rows.features.items():
        inner = getattr(feature, "feature", feature)
        if not isinstance(inner, ClassLabel):
            continue
        names = inner.names
        if inner is feature:
            columns[name] = [_class_name(value, names) for value in columns[name]]
        else:
            columns[name] = [[_class_name(v, names) for v in row] for row in columns[name]]
    return columns


def _class_name(value: int | None, names: list[str]) -> str | int | None:
    # -1 stands for a hidden label and has no name.
    return value if value is None or value < 0 else names[value]


# Which columns matter


@dataclass(frozen=True)
class Columns:
    """What to read from the rows and what is predicted from it."""

    kind: Kind
    text: tuple[str, ...]
    label: str | None


def choose_columns(
    rows: Rows,
    text_column: str | Sequence[str] | None = None,
    label_column: str | None = None,
    kind: Kind | None = None,
    split: str = "train",
) -> Columns:
    """The columns as given; what is not given is inferred from names and first values.

    Raises:
        DataError: a column is not there, or cannot be told without being given.
    """
    given = (text_column,) if isinstance(text_column, str) else tuple(text_column or ())
    text = given or _guess_text(rows, label_column, kind)
    for name in (*text, *([label_column] if label_column else [])):
        check_column(rows, name, split)
    if kind is None:
        kind = _guess_kind(rows, text, label_column)
    if len(text) > (1 if kind == "tagging" else 2):
        most = "one text column" if kind == "tagging" else "one or two text columns"
        raise DataError(f"{kind} takes {most}, found {', '.join(text)}; leave out the others")
    if kind == "causal_lm":
        return Columns(kind, text, None)
    label = label_column or _guess_label(rows, text)
    if label is None:
        raise DataError(
            f"no label column among {', '.join(rows)}; give label_column=, or kind='causal_lm' "
            "to learn the text itself"
        )
    if label in text:
        raise DataError(f"column {label!r} is both text and label; give two different columns")
    return Columns(kind, text, label)


def _guess_text(rows: Rows, label_column: str | None, kind: Kind | None) -> tuple[str, ...]:
    prompted = {"prompt", "completion"} <= rows.keys() and label_column is None
    if kind in (None, "causal_lm") and prompted:
        return ("prompt", "completion")
    if kind in (None, "tagging") and "tokens" in rows and _is_listed(rows["tokens"]):
        return ("tokens",)
    for names in _TEXT_PAIRS:
        if set(names) <= rows.keys() and label_column not in names:
            return names
    others = [name for name in rows if name not in (label_column, *_LABEL_COLUMNS)]
    others = [name for name in others if isinstance(_first(rows[name]), str)]
    if len(others) == 1:
        return (others[0],)
    raise DataError(
        f"cannot tell the text column among {', '.join(rows)}; give text_column= (one or two names)"
    )


def _guess_kind(rows: Rows, text: tuple[str, ...], label_column: str | None) -> Kind:
    if _is_listed(rows[text[0]]):
        return "tagging"
    label = label_column or _guess_label(rows, text)
    if label is None and text in (("text",), ("prompt", "completion")):
        return "causal_lm"
    if label is None or label not in rows:
        return "classification"
    values = parse_numbers(rows[label])
    if any(isinstance(value, float) and not value.is_integer() for value in values):
        return "regression"
    return "classification"


def _guess_label(rows: Rows, text: tuple[str, ...]) -> str | None:
    names = _TAG_COLUMNS if _is_listed(rows[text[0]]) else _LABEL_COLUMNS
    return next((name for name in names if name in rows and name not in text), None)


def _is_listed(values: list[Any]) -> bool:
    return isinstance(_first(values), list)


def _first(values: list[Any]) -> Any:
    return next((value for value in values if value is not None), None)


# Checks


def check_column(rows: Rows, name: str, split: str) -> None:
    """Raises DataError, naming the columns there are, when the column is missing."""
    if name not in rows:
        raise DataError(
            f"{split} has no column {name!r}; its columns are {', '.join(rows)}: "
            "give text_column= and label_column="
        )


def check_texts(rows: Rows, column: str, split: str) -> None:
    """Raises DataError, naming the row, when a text is missing or not a string."""
    check_column(rows, column, split)
    for number, value in enumerate(rows[column], 1):
        if isinstance(value, str):
            continue
        found = "empty" if value is None else f"of type {type(value).__name__}"
        advice = "; for lists of tokens use kind='tagging'" if isinstance(value, list) else ""
        raise DataError(
            f"{split} row {number}: {column!r} is {found}, not a text; "
            f"mend or leave out the row{advice}"
        )


def check_given(values: list[Any], column: str, split: str) -> None:
    """Raises DataError, naming the first row and how many, when labels are missing."""
    missing = [number for number, value in enumerate(values, 1) if is_missing(value)]
    if missing:
        raise DataError(
            f"{split} row {missing[0]}: {column!r} is empty ({len(missing)} of {len(values)} "
            "rows); label or leave out such rows"
        )


def is_missing(value: Any) -> bool:
    """None, a blank string or NaN."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def parse_numbers(values: list[Any]) -> list[Any]:
    """Labels as numbers where every one that is there reads as a number; else as they are.

    CSV holds only strings, so "1" there and 1 elsewhere must be the same label.
    """
    there = [value for value in values if not is_missing(value)]
    if not all(isinstance(value, str) and _NUMBER.fullmatch(value.strip()) for value in there):
        return values
    return [None if is_missing(value) else _number(value.strip()) for value in values]


def _number(text: str) -> int | float:
    return int(text) if text.lstrip("-").isdigit() else float(text)


def drop_hidden(rows: Rows, label: str) -> Rows | None:
    """The rows whose label is public (GLUE hides test labels as -1); None when none is."""
    if label not in rows:
        return None
    values = parse_numbers(rows[label])
    keep = [n for n, value in enumerate(values) if value != -1]
    return {name: [column[n] for n in keep] for name, column in rows.items()} if keep else None


# Cutting


def hold_out(rows: Dataset, fraction: float, seed: int, what: str) -> TwoSets:
    """What stays (train) and what is held out (validation), at least one row each.

    Raises:
        DataError: there are too few rows for both.
    """
    size = max(1, round(len(rows) * fraction))
    if len(rows) - size < 1:
        raise DataError(
            f"train has {len(rows)} row, too few to hold out a {what} part; "
            f"give more rows or a {what} file"
        )
    logger.info("no %s rows given: held out %d of %d train rows", what, size, len(rows))
    return draw.hold_out(rows, size, seed)


def sample(rows: Dataset, size: int | None, seed: int, option: str) -> Dataset:
    """At most size rows, drawn with the seed (a file may be sorted by label); None: all.

    Raises:
        DataError: size is below 1.
    """
    if size is None:
        return rows
    if size < 1:
        raise DataError(f"{option}={size} would leave no rows; give 1 or more, or leave it out")
    if size >= len(rows):
        return rows
    return rows.shuffle(seed=seed).select(range(size))


def count(rows: Rows) -> int:
    """How many rows."""
    return len(next(iter(rows.values()), []))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no folder {str(path.parent)!r} either"
    return f"{path.parent} has: {_listing(path.parent)}"


def _listing(folder: Path) -> str:
    names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in folder.iterdir())
    shown = ", ".join(names[:12]) or "nothing"
    return shown + (f" and {len(names) - 12} more" if len(names) > 12 else "")
