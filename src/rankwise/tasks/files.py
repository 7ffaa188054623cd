"""Rows as plain columns of Python values: from the hub, a folder or files."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.errors import DataError
from rankwise.given import check_path
from rankwise.reading import Unreadable, parse_json
from rankwise.tasks.checks import Rows
from rankwise.tasks.known import SPLITS, KnownTask, Row

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
    read = _plain_rows if known.flat is None else partial(_flat_rows, known.flat)
    rows = {split: read(loaded[there]) for split, there in found if there in loaded}
    if empty := [split for split, columns in rows.items() if not columns]:
        raise DataError(
            f"{name} has no {empty[0]} rows that could be read; give data_dir= a folder"
        )
    return rows


def folder_files(data_dir: str | Path) -> dict[str, Path]:
    """The train, validation and test files of a folder, as far as they are there.

    Raises:
        DataError: no such folder, none of the files, or two files for one split.
    """
    check_path("data_dir", data_dir, DataError)
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
    path = Path(path).expanduser()
    check_path("the file", path, DataError)
    if path.is_dir():
        raise DataError(f"{str(path)!r} is a folder; give a file, or the folder as data_dir")
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
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
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
        _check_names(list(rows.columns))
        records = rows.to_dict("records")
        found = {
            name: [None if row[name] != row[name] else row[name] for row in records]
            for name in rows.columns
        }
    elif isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
        _check_names(list({name: None for row in rows for name in row}))
        found = _by_column(enumerate(rows, 1), Path("rows"), "row")
    else:
        raise DataError(
            f"the rows are a {type(rows).__name__}; give a file, a folder, a task's name, a "
            "datasets.Dataset of one split, a DataFrame, or a list of dicts"
        )
    if count(found) == 0:
        raise DataError("there are no rows; give at least one")
    return found


def _check_names(names: list[Any]) -> None:
    """Raises DataError at a column of rows in memory whose name is no text, or another's too."""
    for name in names:
        if not isinstance(name, str):
            raise DataError(f"the rows have a column named {name!r}; give it a text for a name")
        if names.count(name) > 1:
            raise DataError(f"the rows have the column {name!r} twice; leave one")


def _read_json(path: Path) -> Rows:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".json" and text.lstrip().startswith("["):
        try:
            return _by_column(enumerate(parse_json(text, finite=False), 1), path, "item")
        except Unreadable as error:
            where = f"{path}:{error.line}" if error.line else str(path)
            raise DataError(f"{where}: {error}; mend it") from error
    # Not splitlines(): a JSON string may hold U+2028, which that would cut at.
    lines = ((n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip())
    return _by_column(((n, _parse_line(path, n, line)) for n, line in lines), path, "line")


def _parse_line(path: Path, number: int, line: str) -> Any:
    try:
        return parse_json(line, finite=False)
    except Unreadable as error:
        raise DataError(
            f"{path}:{number}: not a line of JSON ({error}); write one JSON object a line"
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
    return _named({name: [item.get(name) for item in found] for name in names}, path)


def _named(rows: Rows, path: Path) -> Rows:
    """The columns without the spaces around their names that a hand or a spreadsheet left."""
    named = {name.strip(): values for name, values in rows.items()}
    if len(named) < len(rows):
        raise DataError(f"{path}: a column name is there twice: {', '.join(rows)}")
    return named


def _read_csv(path: Path) -> Rows:
    csv.field_size_limit(2**31 - 1)  # the default takes a long text for a broken file
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        try:
            header = next(reader, [])
            if any(name != name.lstrip() for name in header[1:]):
                # `text, label`: the space behind a comma belongs to no cell of this file
                file.seek(0)
                reader = csv.reader(file, skipinitialspace=True)
                header = next(reader, [])
            header = [name.strip() for name in header]
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
    """Texts, numbers and lists of them. Nothing is decoded: what the metadata calls an image is
    left alone, with the address or the path that it may name."""
    import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
    import pyarrow.parquet as pq  # type: ignore[import-untyped, unused-ignore]

    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            if len(set(schema.names)) < len(schema.names):
                raise DataError(f"{path}: a column name is there twice: {', '.join(schema.names)}")
            plain = [name for name in schema.names if _is_plain(schema.field(name).type, pa)]
            # what is no text, number or list of them keeps its name, so that a message can say it
            stubs: Rows = {n: [{}] * file.metadata.num_rows for n in schema.names if n not in plain}
            table = file.read(columns=plain) if plain else None
            found: Rows = {} if table is None else {n: table[n].to_pylist() for n in plain}
    except (pa.ArrowException, OSError, ValueError, OverflowError, KeyError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path} cannot be read as Parquet ({_first_line(error)}); write it again"
        ) from error
    for name, names in _class_names(schema.metadata, path).items():
        if name in found:
            found[name] = [_named_class(value, names, path, name) for value in found[name]]
    return _named({name: found.get(name, stubs.get(name, [])) for name in schema.names}, path)


def _is_plain(kind: Any, pa: Any) -> bool:
    """Whether Arrow values of a type are texts, numbers, dates, or lists of them."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _is_plain(kind.value_type, pa)
    if pa.types.is_dictionary(kind):
        return _is_plain(kind.value_type, pa)
    odd = pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    return not (odd or isinstance(kind, pa.BaseExtensionType))


def _class_names(metadata: Any, path: Path) -> dict[str, list[str]]:
    """By column, the names of the classes that `datasets` wrote beside the numbers."""
    try:
        about = parse_json((metadata or {}).get(b"huggingface", b"{}").decode())
        features = about.get("info", {}).get("features", {})
        found = {}
        for name, feature in features.items():
            inner = feature.get("feature", feature) if isinstance(feature, dict) else {}
            if isinstance(inner, dict) and inner.get("_type") == "ClassLabel":
                found[name] = [str(one) for one in inner["names"]]
        return found
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: what it says of its columns (the metadata 'huggingface') cannot be read: "
            f"{_first_line(error)}; write it again"
        ) from error


def _named_class(value: Any, names: list[str], path: Path, column: str) -> Any:
    """The name of a class by its number, in lists too. -1 stands for a hidden label: no name."""
    if isinstance(value, list):
        return [_named_class(one, names, path, column) for one in value]
    if value is None or not isinstance(value, int) or value < 0:
        return value
    if value >= len(names):
        raise DataError(
            f"{path}: {column!r} has the class {value}, but names {len(names)} classes alone "
            f"({', '.join(names[:12])}); write it again"
        )
    return names[value]


def _flat_rows(flat: Callable[[Row], list[Row]], rows: Dataset) -> Rows:
    """Columns of what `flat` makes of each row."""
    found = [part for row in rows for part in flat(row)]
    return {name: [part[name] for part in found] for name in (found[0] if found else ())}


def _plain_rows(rows: Dataset) -> Rows:
    """Columns of a set from the hub as Python values, classes by their names; no other kind is
    decoded."""
    from datasets import ClassLabel, Value

    columns: Rows = {}
    for name, feature in rows.features.items():
        inner = getattr(feature, "feature", feature)
        if not isinstance(inner, ClassLabel | Value):
            continue
        columns[name] = list(rows.select_columns([name])[:][name])
        if isinstance(inner, ClassLabel):
            names, where = list(inner.names), Path("the hub's set")
            columns[name] = [_named_class(v, names, where, name) for v in columns[name]]
    return columns


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
