"""load_task: from a name, a folder or files to the rows of a task, checked and numbered."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.errors import DataError
from rankwise.given import fits, shown, words_for
from rankwise.rows import TwoSets, hold_out
from rankwise.tasks.base import Task
from rankwise.tasks.checks import Rows, parse_numbers
from rankwise.tasks.columns import Columns, choose_columns
from rankwise.tasks.files import folder_files, read_file, read_hub, read_rows
from rankwise.tasks.kinds import find_kind
from rankwise.tasks.known import KNOWN, KnownTask, known_name

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

HELD_OUT = 0.1


def load_task(
    task: str | None = None,
    *,
    data_dir: str | Path | None = None,
    train_file: Any = None,
    validation_file: Any = None,
    test_file: Any = None,
    text_column: str | Sequence[str] | None = None,
    label_column: str | None = None,
    kind: str | None = None,
    label_names: Sequence[str] | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    test_size: float | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> Task:
    """Reads, checks and numbers the rows of a task.

    Rows come from the files if any is given, else from data_dir, else from the hub. Without
    validation rows a tenth of train, drawn with the seed, is held out for them.

    Args:
        task: a known task ("glue/rte", also "rte"; "jnlpba"); "chat" for conversations of your own;
            None for other rows of your own.
        data_dir: folder with train, validation and test .jsonl, .json, .csv or .parquet.
        train_file, validation_file, test_file: the same, one file a split, or the rows themselves
            (a datasets.Dataset, a DataFrame, a list of dicts). Train may be left out where only an
            evaluation is wanted (classes then need label_names).
        text_column: one or two names; default: inferred from the columns.
        label_column: default: "label" or "labels" ("ner_tags" or "tags" too for tags).
        kind: default: tagging for lists of tokens, regression for labels with fractions,
            causal_lm for prompt/completion or text without labels, else classification.
        label_names: the classes in the order of their numbers; default: those of the data set,
            or the sorted labels of train. What a saved model was trained with goes here.
        max_train_samples: at most so many train rows, drawn with the seed; default all.
        max_eval_samples: the same for validation and for test; default all.
        test_size: fraction of train, in (0, 1), held out as test where there is no test;
            default none.
        seed: of the held-out parts and samples; default 0.
        trust_remote_code: passed on to datasets.load_dataset; default False.

    Raises:
        DataError: files, columns, texts or labels are not as they should be.
    """
    if task == "chat":  # no data set, but a kind that people look for here
        task, kind = None, "chat"
    known = None if task is None else KNOWN[known_name(task)]
    _check_types(
        text_column=(text_column, str | tuple[str, ...] | None),
        label_column=(label_column, str | None),
        kind=(kind, str | None),
        label_names=(label_names, tuple[str, ...] | None),
        max_train_samples=(max_train_samples, int | None),
        max_eval_samples=(max_eval_samples, int | None),
        test_size=(test_size, float | None),
    )
    if test_size is not None and not 0 < test_size < 1:
        raise DataError(f"test_size={test_size} is not between 0 and 1; give a fraction of train")
    paths = {"train": train_file, "validation": validation_file, "test": test_file}
    files = {split: path for split, path in paths.items() if path is not None}
    rows = _read(known, data_dir, files, trust_remote_code)
    columns = _columns(rows, known, text_column, label_column, kind)
    empty = find_kind(columns.kind)(
        name=known_name(task) if task is not None else _name(data_dir, files),
        text_columns=columns.text,
        label_column=columns.label,
        label_names=None if label_names is None else tuple(label_names),
        metrics=(),
        found=tuple(next(iter(rows.values()))),
    )
    empty.check_texts(rows)
    if known and columns.label and "test" in rows:
        public = _drop_hidden(rows.pop("test"), columns.label)
        rows.update({} if public is None else {"test": public})
    named, rows = _number(empty, rows, known)
    splits = _cut(_datasets(named, rows), max_train_samples, max_eval_samples, test_size, seed)
    loaded = replace(named, **splits)
    loaded.check_varied()
    _report_overlap(loaded)
    return loaded


def _check_types(**given: tuple[Any, Any]) -> None:
    """Raises DataError at the first option that is of another type than it says."""
    for name, (value, kind) in given.items():
        if not fits(value, kind):
            raise DataError(f"{name} is {shown(value)}; it has to be {words_for(kind)}")


def _report_overlap(task: Task) -> None:
    """Warns where rows that are evaluated were trained on: their figures would say too much."""
    if task.train is None:
        return
    texts = task.text_columns
    seen = {repr(row) for row in zip(*(task.train[name] for name in texts), strict=True)}
    for split, rows in (("validation", task.validation), ("test", task.test)):
        if rows is None:
            continue
        known = sum(repr(row) in seen for row in zip(*(rows[name] for name in texts), strict=True))
        if known > len(rows) / 2:
            logger.warning(
                "%d of the %d %s rows are training rows too; what is measured on them says little "
                "of new ones",
                *(known, len(rows), split),
            )


def _name(data_dir: str | Path | None, files: dict[str, Any]) -> str:
    if files:
        first = next(iter(files.values()))
        return Path(first).stem if isinstance(first, str | Path) else "rows"
    return Path(data_dir or ".").resolve().name


def _read(
    known: KnownTask | None,
    data_dir: str | Path | None,
    files: dict[str, Any],
    trust_remote_code: bool,
) -> dict[str, Rows]:
    if data_dir is not None and files:
        raise DataError(
            f"both data_dir and {next(iter(files))}_file are given; give the folder or the files"
        )
    if files:
        return {
            split: read_file(given) if isinstance(given, str | Path) else read_rows(given)
            for split, given in files.items()
        }
    if data_dir is not None:
        found = folder_files(data_dir)
        return {split: read_file(path) for split, path in found.items()}
    if known is None:
        raise DataError(
            f"no data given; give a task by name ({', '.join(KNOWN)}), data_dir= or train_file="
        )
    return read_hub(known, trust_remote_code)


def _columns(
    rows: dict[str, Rows],
    known: KnownTask | None,
    text_column: str | Sequence[str] | None,
    label_column: str | None,
    kind: str | None,
) -> Columns:
    if known is not None:
        text_column = text_column or known.text_columns
        kind = kind or known.kind
        if find_kind(kind).labelled:
            label_column = label_column or known.label_column
    # The first split is train, unless only an evaluation is wanted.
    split = next(iter(rows))
    there = find_kind(kind).learned(rows[split], text_column) if kind else rows[split]
    return choose_columns(there, text_column, label_column, kind, split)


def _number(
    task: Task, rows: dict[str, Rows], known: KnownTask | None
) -> tuple[Task, dict[str, Rows]]:
    """The task with its label names and metrics, and the rows with numbers for labels."""
    names = task.label_names
    if names is not None and len(set(names)) < len(names):
        raise DataError(f"label_names has a name twice ({', '.join(names)}); name each once")
    # What is known of a data set says nothing where the user asks for another kind of task.
    as_known = known if known is not None and known.kind == task.kind else None
    if as_known and names is None:
        task = replace(task, label_names=as_known.label_names)
    rows, names = task.number(rows)
    task = replace(task, label_names=names)
    metrics = as_known.metrics if as_known else task.default_metrics()
    return replace(task, metrics=metrics), rows


def _datasets(task: Task, rows: dict[str, Rows]) -> dict[str, Dataset]:
    from datasets import Dataset

    features = task.features()
    return {
        split: Dataset.from_dict({name: there[name] for name in features}, features=features)
        for split, there in rows.items()
    }


def _cut(
    splits: dict[str, Dataset],
    max_train_samples: int | None,
    max_eval_samples: int | None,
    test_size: float | None,
    seed: int,
) -> dict[str, Dataset]:
    wanted = {"test": test_size, "validation": HELD_OUT}
    for split, fraction in wanted.items():
        if "train" in splits and split not in splits and fraction is not None:
            parts = _hold_out(splits["train"], fraction, seed, split)
            splits["train"], splits[split] = parts.train, parts.validation
    return {
        split: _sample(there, max_train_samples, seed, "max_train_samples")
        if split == "train"
        else _sample(there, max_eval_samples, seed, "max_eval_samples")
        for split, there in splits.items()
    }


def _drop_hidden(rows: Rows, label: str) -> Rows | None:
    """The rows whose label is public (GLUE hides test labels as -1); None when none is."""
    if label not in rows:
        return None
    values = parse_numbers(rows[label])
    keep = [n for n, value in enumerate(values) if value != -1]
    return {name: [column[n] for n in keep] for name, column in rows.items()} if keep else None


def _hold_out(rows: Dataset, fraction: float, seed: int, what: str) -> TwoSets:
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
    return hold_out(rows, size, seed)


def _sample(rows: Dataset, size: int | None, seed: int, option: str) -> Dataset:
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
