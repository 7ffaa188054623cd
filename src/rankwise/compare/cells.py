"""The cells of a recipe: their names, what each waits for, and the file that each leaves.

A cell is one method on one task with one seed, at a learning rate that is given (it only helps to
choose) or chosen (it counts). Its name ends in a hash of all that decides what it runs, so a cell
that is there need not be run again, in whichever recipe it stands.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path
from re import ASCII, sub
from typing import Any

from rankwise.cli.arguments import DataArguments, FitArguments, ModelArguments
from rankwise.compare.recipe import MethodEntry, Recipe, TaskEntry
from rankwise.errors import OutputError, ResultError
from rankwise.files import write_json
from rankwise.reading import as_json, read_json
from rankwise.result import Result

FAILURE = "rankwise-failure/1"
# Of a run's flags, those that a figure does not hang on, and those that say where things lie.
_FREE = set(
    "logging_steps save_steps report_to per_device_eval_batch_size use_cpu "
    "generation_batch_size".split()
)
_PATHS = set("data_dir train_file validation_file test_file".split())


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        name: of its file, without .json.
        task, method: of the recipe.
        fit: training flags; the learning rate is the first of the method's until one is chosen,
            None for the usual one.
        data_seed: draws the rows, the same for every seed.
        held_out: share of the training rows that judges a rate; None for a cell that counts.
        rates: cells that judge a rate each, by rate; empty where there is nothing to choose.
        size_of: cell whose LoRA parameters are this one's budget, or None.
        spec: all that the hash is of, as JSON holds it.
    """

    name: str
    task: TaskEntry
    method: MethodEntry
    fit: FitArguments
    data_seed: int
    held_out: float | None = None
    rates: Mapping[float, str] = field(default_factory=dict)
    size_of: str | None = None
    spec: Mapping[str, Any] = field(default_factory=dict)

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the cells that have to be there before."""
        return (*self.rates.values(), *([self.size_of] if self.size_of else []))


@dataclass(frozen=True)
class Failure:
    """A cell without a result.

    Attributes:
        cell: its spec.
        error: in one line.
        again: whether the same call would fail again: a diverged loss, a budget that does not fit.
            Else the process broke down, and the cell is tried anew by the next start.
    """

    cell: Mapping[str, Any]
    error: str
    again: bool


def cells_of(recipe: Recipe) -> list[Cell]:
    """All cells of a recipe, each after those that it waits for."""
    found: dict[str, Cell] = {}
    by_label = {entry.label: entry for entry in recipe.methods}
    first = recipe.seeds[0]

    def add(cell: Cell) -> str:
        found.setdefault(cell.name, cell)
        return cell.name

    def final(task: TaskEntry, method: MethodEntry, seed: int) -> str:
        rates: dict[float, str] = {}
        if len(method.rates) > 1:
            size = size_for(task, method, first)
            share = recipe.tune["held_out"]
            for rate in method.rates:
                rates[rate] = add(_cell(recipe, task, method, first, (rate,), share, size))
        size = size_for(task, method, seed)
        return add(_cell(recipe, task, method, seed, method.rates, None, size, rates))

    def size_for(task: TaskEntry, method: MethodEntry, seed: int) -> str | None:
        other = method.same_size_as
        return None if other is None else final(task, by_label[other], seed)

    # the seeds outside, so that a grid that is stopped has whole comparisons
    for seed in recipe.seeds:
        for task in recipe.tasks:
            for method in recipe.methods:
                final(task, method, seed)
    return list(found.values())


def _cell(
    recipe: Recipe,
    task: TaskEntry,
    method: MethodEntry,
    seed: int,
    rates: tuple[float, ...],
    held_out: float | None,
    size_of: str | None,
    judged: Mapping[float, str] | None = None,
) -> Cell:
    tune = {key: value for key, value in recipe.tune.items() if key != "held_out"}
    if "num_train_epochs" in tune:
        tune.setdefault("max_steps", -1)  # steps of the whole training would override them
    flags = {**recipe.training, **task.training, **(tune if held_out is not None else {})}
    fit = FitArguments(**flags, learning_rate=rates[0] if rates else None, seed=seed)
    spec: dict[str, Any] = {
        "model": _model(recipe.model),
        "task": {"label": task.label, **_data(task.data)},
        "method": {"label": method.label, **_method(method)},
        "training": {k: v for k, v in asdict(fit).items() if k not in {*_FREE, "learning_rate"}},
        "data_seed": recipe.seeds[0],
        "rates": list(rates) or {"usual": method.method.rate_for(None)},
        "judged_by": sorted((judged or {}).values()),
        "held_out": held_out,
        "size_of": size_of,
    }
    if task.generates and held_out is None:
        how = asdict(recipe.decoding)
        spec["generation"] = {k: v for k, v in how.items() if k not in _FREE}
    spec = as_json(spec)
    parts = [task.label, method.label, f"seed{seed}"]
    parts += [f"rate{rates[0]:g}"] if held_out is not None else []
    name = "-".join([*map(_safe, parts), digest(spec)])
    return Cell(name, task, method, fit, recipe.seeds[0], held_out, judged or {}, size_of, spec)


def _safe(label: str) -> str:
    """A part of a file's name on every system: ASCII, no hidden file, not too long."""
    plain = sub(r"[^\w.]+", "_", label, flags=ASCII)[:60]
    return f"_{plain}" if plain.startswith(".") else plain


def digest(spec: Mapping[str, Any]) -> str:
    """What a cell's name ends in: sha256 of its spec as JSON with sorted keys, 8 digits."""
    return sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:8]


def _method(entry: MethodEntry) -> dict[str, Any]:
    about = entry.method.describe()
    plan = getattr(entry.method, "plan", None)
    if isinstance(plan, str):
        about["plan"] = _file(Path(plan))
    return about


def _data(data: DataArguments) -> dict[str, Any]:
    """The flags, with what is in the files in place of where they lie."""
    flags = {key: value for key, value in asdict(data).items() if key not in _PATHS}
    places = [Path(value) for key in sorted(_PATHS) if (value := getattr(data, key)) is not None]
    inside = [sorted(place.iterdir()) if place.is_dir() else [place] for place in places]
    files = [file for those in inside for file in those]
    rows = (".jsonl", ".json", ".csv", ".parquet")
    return flags | {"files": {file.name: _file(file) for file in files if file.suffix in rows}}


def _model(model: ModelArguments) -> dict[str, Any]:
    about = asdict(model)
    if not model.load_in_4bit:  # a later flag: cells that were run before it keep their names
        del about["load_in_4bit"]
    name = about["model_name_or_path"]
    folder = Path(name)
    about["model_name_or_path"] = folder.name if folder.is_dir() else name
    if folder.is_dir():
        kept = (".json", ".safetensors", ".bin", ".gguf")
        files = sorted(file for file in folder.iterdir() if file.suffix in kept)
        about["files"] = {file.name: _file(file) for file in files}
    return about


def _file(path: Path) -> str:
    """sha256 of a file, 12 digits; of a large one that of its size, its first and its last MiB."""
    if not path.is_file():
        return "missing"
    about = path.stat()
    return _sha256(path, about.st_size, about.st_mtime_ns)


@cache  # the time is there so that a file that changes is read again
def _sha256(path: Path, size: int, _: int) -> str:
    part = 2**20
    with path.open("rb") as file:
        if size <= 64 * part:
            return sha256(file.read()).hexdigest()[:12]
        digest = sha256(str(size).encode() + file.read(part))
        file.seek(-part, 2)
        digest.update(file.read())
    return digest.hexdigest()[:12]


def cell_file(folder: Path, name: str) -> Path:
    """The one file that a cell leaves."""
    return folder / "cells" / f"{name}.json"


def texts_file(folder: Path, name: str) -> Path:
    """The texts that a cell generated, beside its file."""
    return folder / "cells" / f"{name}.generations.jsonl"


def read_cell(path: Path) -> Result | Failure | None:
    """What a cell left; None where there is nothing yet.

    Raises:
        ResultError: a damaged file, or one of another schema; the message names it.
        OutputError: a folder in its place.
    """
    if path.is_dir():
        raise OutputError(f"{path} is a folder, and a cell's file goes there; move it away")
    if not path.is_file():
        return None
    raw = read_json(path, ResultError)
    if not isinstance(raw, dict) or raw.get("schema") != FAILURE:
        try:
            return Result.from_dict(raw)
        except ResultError as error:
            raise ResultError(f"{path}: {error}") from error
    kinds = {"cell": dict, "error": str, "again": bool}
    for key, kind in kinds.items():
        if not isinstance(raw.get(key), kind):
            raise ResultError(f"{path}: {key!r} is {raw.get(key)!r}, which is not of its type")
    return Failure(raw["cell"], raw["error"], raw["again"])


def write_failure(path: Path, failure: Failure) -> None:
    """Writes it as JSON, in place of a result."""
    write_json(path, {"schema": FAILURE, **asdict(failure)})


def is_over(found: Result | Failure | None) -> bool:
    """Whether a cell need not be run: it has a result, or would fail again."""
    return isinstance(found, Result) or (isinstance(found, Failure) and found.again)


def set_aside(folder: Path, name: str) -> str | None:
    """Moves a damaged file away, so that its cell is run again; says so in one line."""
    path = cell_file(folder, name)
    try:
        read_cell(path)
    except ResultError as error:
        aside = path.with_name(path.name + ".damaged")
        path.replace(aside)
        return f"{' '.join(str(error).split())}; it is now {aside.name}, and its cell is run again"
    return None
