"""Rows as plain columns of Python values: from the hub, a folder or files."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.errors import DataError
from rankwise.tasks.checks import Rows
from rankwise.tasks.known import SPLITS, KnownTask

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def read_hub(known: KnownTask, trust_remote_code: bool = False) -> dict[str, Rows]:
    """A known task's splits from the Hugging Face hub.

    Raises:
        DataError: the hub cannot be reached or does not have it.
    """
    from datasets import load_dataset

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


def read_rows(rows: Any) -> Rows:
    """All columns of rows in memory: a `datasets.Dataset`, a DataFrame, or a list of dicts.

    Raises:
        DataError: rows of another kind, or none.
    """
    from datasets import Dataset

    if isinstance(rows, Dataset):
        found = _plain_rows(rows)
    elif hasattr(rows, "to_dict") and hasattr(rows, "columns"):  # pandas, which is not imported
        records = rows.to_dict("records")
        found = {
            name: [None if row[name] != row[name] else row[name] for row in records]
            for name in rows.columns
        }
    elif isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
        found = _by_column(enumerate(rows, 1), Path("rows"), "row")
    else:
        raise DataError(
            f"the rows are a {type(rows).__name__}; give a file, a folder, a task's name, a "
            "datasets.Dataset of one split, a DataFrame, or a list of dicts"
        )
    if count(found) == 0:
        raise DataError("there are no rows; give at least one")
    return found


def _read_json(path: Path) -> Rows:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".json" and text.lstrip().startswith("["):
        try:
            return _by_column(enumerate(json.loads(text), 1), path, "item")
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}: not JSON ({error.msg}); mend it") from error
    # Not splitlines(): a JSON string may hold U+2028, which that would cut at.
    lines = ((n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip())
    return _by_column(((n, _parse_line(path, n, line)) for n, line in lines), path, "line")


def _parse_line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{number}: not a line of JSON ({error.msg} at column {error.colno}); "
            "write one JSON object a line"
        ) from error


def _by_column(items: Iterable[tuple[int, Any]], path: Path, unit: str) -> Rows:
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
    from datasets import Dataset

    try:
        return _plain_rows(Dataset(pq.read_table(path)))
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} cannot be read as Parquet ({_first_line(error)}); write it again"
        ) from error


def _plain_rows(rows: Dataset) -> Rows:
    """Columns of Python values; class numbers that carry names become the names."""
    from datasets import ClassLabel

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
