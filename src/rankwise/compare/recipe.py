"""Recipes: a YAML file that says what is compared, read and checked before anything runs."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rankwise.cli.arguments import DataArguments, FitArguments, ModelArguments, check_ranges
from rankwise.cli.flags import read_values
from rankwise.decoding import Decoding
from rankwise.errors import RankwiseError
from rankwise.methods import METHODS, Method, by_name
from rankwise.reading import read_yaml
from rankwise.tasks.known import KNOWN, known_name

KEYS = "model data_dir tasks methods seeds budget rates training tune max_length generation".split()
SIZES = ("r", "rank", "budget", "energy", "plan")
"""Flags by which a method says its own size; the recipe's budget is for those that do not."""
TUNE = ("held_out", "num_train_epochs", "max_steps")


@dataclass(frozen=True)
class TaskEntry:
    """A task of a recipe.

    Attributes:
        label: its name in files and tables.
        data: where its rows are, as the flags of `rankwise run` say it.
        training: what differs from the recipe's own training.
    """

    label: str
    data: DataArguments
    training: Mapping[str, Any]

    @property
    def generates(self) -> bool:
        """Whether texts are generated and scored."""
        kind = KNOWN[known_name(self.data.task)].kind if self.data.task else self.data.kind
        return kind == "generation"


@dataclass(frozen=True)
class MethodEntry:
    """A method of a recipe.

    Attributes:
        label: its name in files and tables.
        method: with its flags.
        given: the flags that the recipe gives.
        same_size_as: label of the method whose parameters are this one's budget, or None.
        rates: learning rates that are tried; one is taken as it is, and without any the one that
            is usual for the method.
    """

    label: str
    method: Method
    given: frozenset[str]
    same_size_as: str | None
    rates: tuple[float, ...]


@dataclass(frozen=True)
class Recipe:
    """What is compared.

    Attributes:
        path: the file.
        model: the base model.
        tasks, methods: in the order of the file.
        seeds: of training. The first also draws rows: every seed sees the same ones.
        training: the flags of `rankwise run` that all cells share.
        tune: of the cells that choose a learning rate: `held_out`, the share of the training rows
            that judges it, and what differs from the training (`num_train_epochs`, `max_steps`).
        decoding: how texts are generated on test rows.
    """

    path: Path
    model: ModelArguments
    tasks: tuple[TaskEntry, ...]
    methods: tuple[MethodEntry, ...]
    seeds: tuple[int, ...]
    training: Mapping[str, Any]
    tune: Mapping[str, Any]
    decoding: Decoding


def read_recipe(
    path: str | Path,
    data_dir: str | None = None,
    model: str | None = None,
    trust_remote_code: bool = False,
) -> Recipe:
    """Reads and checks a recipe.

    Args:
        path: a YAML file.
        data_dir: instead of the recipe's own: holds a folder a task.
        model: instead of the recipe's own.
        trust_remote_code: run code that the model or a data set brings along; no recipe says so
            itself.

    Raises:
        RankwiseError: no such file, not YAML, or a key, method, task, flag or value that is none;
            the message names it and the nearest that there is.

    Example:
        >>> read_recipe("minilm.yaml", data_dir="data").seeds
        (0, 1, 2)
    """
    raw = _yaml(Path(path))
    where = Path(path).name
    _known(where, "key", raw, KEYS)
    given = {key: value for key, value in raw.items() if key in ("data_dir", "max_length")}
    rows = read_values(where, DataArguments(), given)
    folder = data_dir or rows.get("data_dir")
    training = read_values(f"{where}: training", FitArguments(), _mapping(where, raw, "training"))
    seeds = _seeds(where, raw.get("seeds", [0]))
    rates = _rates(where, raw.get("rates", []))
    if "seed" in training:
        raise RankwiseError(f"{where}: training has a seed; give seeds: [...] beside it")
    if rates and "learning_rate" in training:
        raise RankwiseError(f"{where}: training has a learning_rate, and rates are given too")
    if "learning_rate" in training:
        rates = _rates(where, training.pop("learning_rate"))
    tune = _tune(where, _mapping(where, raw, "tune"))
    generation = _mapping(where, raw, "generation")
    with _place(f"{where}: generation"):
        decoding = Decoding(**read_values(f"{where}: generation", Decoding(), generation))
    max_length = rows.get("max_length", DataArguments().max_length)
    recipe = Recipe(
        Path(path),
        replace(_model(where, raw.get("model"), model), trust_remote_code=trust_remote_code),
        tuple(_tasks(where, raw.get("tasks"), folder, max_length)),
        tuple(_methods(where, raw.get("methods"), rates, raw.get("budget"))),
        seeds,
        training,
        tune,
        decoding,
    )
    _check_paths(where, recipe)
    looks = {key: value for key, value in tune.items() if key != "held_out"}
    for task in recipe.tasks:
        flags = {**recipe.training, **task.training}
        with _place(f"{where}: tasks.{task.label}"):
            check_ranges([FitArguments(**flags), task.data])
        with _place(f"{where}: tune"):
            check_ranges([FitArguments(**flags | looks)])
    return recipe


def _yaml(path: Path) -> dict[str, Any]:
    raw = read_yaml(path, _RecipeError)
    if not isinstance(raw, dict):
        raise RankwiseError(f"{path} holds a {type(raw).__name__}; a recipe maps keys to values")
    return raw


class _RecipeError(RankwiseError):
    """Says that it was the recipe."""

    def __init__(self, message: str):
        super().__init__(message.replace("cannot read ", "cannot read the recipe ", 1))


@contextmanager
def _place(where: str) -> Iterator[None]:
    """What is refused in the block is said to be there, as a key and not as a flag."""
    try:
        yield
    except RankwiseError as error:
        said = str(error)
        said = said if said.startswith(where) else f"{where}: {said.removeprefix('--')}"
        raise RankwiseError(said) from error


def _check_paths(where: str, recipe: Recipe) -> None:
    """Raises RankwiseError at a path that no system call takes, before files are looked for."""
    named = {"model": recipe.model.model_name_or_path}
    for task in recipe.tasks:
        for key in ("data_dir", "train_file", "validation_file", "test_file"):
            named[f"tasks.{task.label}.{key}"] = getattr(task.data, key)
    for key, path in named.items():
        try:
            os.stat(path or "")
        except FileNotFoundError:
            continue  # is said when it is read, with what there is
        except (OSError, ValueError) as error:
            said = getattr(error, "strerror", None) or error
            raise RankwiseError(f"{where}: {key} is {path!r}: {said}; give another") from error


def nearest(name: str, known: Sequence[str]) -> str:
    """`; did you mean ...?` where a known name is near, else the known names."""
    near = get_close_matches(str(name), known, 1, 0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}"


def _known(where: str, what: str, names: Any, known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise RankwiseError(f"{where}: no {what} {name!r}{nearest(name, known)}")


def _mapping(where: str, raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = {} if raw.get(key) is None else raw[key]
    if not isinstance(value, dict):
        raise RankwiseError(f"{where}: {key} is {value!r}; it has to map names to values")
    return value


def _seeds(where: str, values: Any) -> tuple[int, ...]:
    """One or several, each once. `seeds: 1.5` and `seeds: yes` are none."""
    found = values if isinstance(values, list) else [values]
    for value in found:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**32:
            raise RankwiseError(
                f"{where}: seeds has {value!r}; give whole numbers from 0 on, below {2**32}"
            )
    if not found or len(set(found)) < len(found):
        raise RankwiseError(f"{where}: seeds is {values!r}; give at least one, without repetitions")
    return tuple(found)


def _rates(where: str, values: Any) -> tuple[float, ...]:
    """Learning rates, one or several, each once. YAML reads 1e-4 as a text, 1.0e-4 as a number."""
    found = []
    for value in values if isinstance(values, list) else [values]:
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise RankwiseError(f"{where}: rates has {value!r}; give a list of numbers") from error
        if not 0 < number < 1e3:
            raise RankwiseError(
                f"{where}: rates has {value!r}, which is out of range; a learning rate is a number "
                "> 0 and < 1000"
            )
        found.append(number)
    if len(set(found)) < len(found):
        raise RankwiseError(f"{where}: rates is {values!r}; name each rate once")
    return tuple(found)


def _tune(where: str, given: dict[str, Any]) -> dict[str, Any]:
    _known(f"{where}: tune", "key", given, TUNE)
    share = given.get("held_out", 0.1)
    if not isinstance(share, float) or not 0 < share < 1:
        raise RankwiseError(f"{where}: tune.held_out is {share!r}; it has to lie between 0 and 1")
    rest = {key: value for key, value in given.items() if key != "held_out"}
    return {"held_out": share, **read_values(f"{where}: tune", FitArguments(), rest)}


def _model(where: str, given: Any, instead: str | None) -> ModelArguments:
    values = given if isinstance(given, dict) else {"model_name_or_path": given}
    found = ModelArguments(**read_values(f"{where}: model", ModelArguments(), values))
    if instead is not None:
        found = replace(found, model_name_or_path=instead)
    if found.model_name_or_path is None:
        raise RankwiseError(f"{where} names no model; give model: or --model_name_or_path")
    return found


def _entries(where: str, key: str, given: Any) -> dict[str, dict[str, Any]]:
    """A list of names, or a mapping of names to what is said of each."""
    labels = list(given) if isinstance(given, dict | list) else []
    if not labels:
        raise RankwiseError(f"{where}: {key} is {given!r}; give a list of names, or name: {{...}}")
    for label in labels:
        if not isinstance(label, str) or not label.strip():
            raise RankwiseError(f"{where}: {key} has the name {label!r}; a name is a text")
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise RankwiseError(f"{where}: {key} has {twice[0]!r} twice; leave one")
    about = given if isinstance(given, dict) else dict.fromkeys(labels)
    return {label: _mapping(f"{where}: {key}", about, label) for label in labels}


def _tasks(where: str, given: Any, folder: Any, max_length: Any) -> list[TaskEntry]:
    found = []
    keys = [f.name for f in fields(DataArguments)]
    for label, about in _entries(where, "tasks", given).items():
        here = f"{where}: tasks.{label}"
        _known(here, "key", about, [*keys, "training"])
        training = read_values(here, FitArguments(), _mapping(here, about, "training"))
        if odd := sorted({"learning_rate", "seed"} & set(training)):
            raise RankwiseError(f"{here}: {odd[0]} is the recipe's; give rates: or seeds: there")
        values = {k: v for k, v in about.items() if k != "training"}
        values.setdefault("max_length", max_length)
        data = DataArguments(**read_values(here, DataArguments(), values))
        found.append(TaskEntry(label, _placed(here, label, data, folder), training))
    return found


def _placed(here: str, label: str, data: DataArguments, folder: Any) -> DataArguments:
    """The data with its name known and its paths beside the recipe's data_dir."""
    own = data.train_file is not None or data.data_dir is not None
    name = data.task or ("" if own and label not in _names() else label)
    if name and name not in _names():
        raise RankwiseError(f"{here}: no task {name!r}{nearest(name, _names())}")
    data = replace(data, task=name or None)
    root = Path(folder or "")
    files: dict[str, Any] = {
        key: str(root / value)
        for key in ("data_dir", "train_file", "validation_file", "test_file")
        if (value := getattr(data, key)) is not None
    }
    if not own and folder is not None:
        files["data_dir"] = str(root / name.rpartition("/")[2])
    return replace(data, **files)


def _names() -> list[str]:
    return [*KNOWN, *(name.partition("/")[2] for name in KNOWN if "/" in name)]


def _methods(where: str, given: Any, rates: tuple[float, ...], budget: Any) -> list[MethodEntry]:
    whole = isinstance(budget, int) and not isinstance(budget, bool)
    if budget is not None and not (whole and 0 < budget < 2**63):
        raise RankwiseError(f"{where}: budget is {budget!r}; give a number of parameters")
    entries = _entries(where, "methods", given)
    raw: dict[str, tuple[Method, dict[str, Any], str | None, tuple[float, ...]]] = {}
    for label, about in entries.items():
        here = f"{where}: methods.{label}"
        name = str(about.get("method", label))
        if name not in METHODS:
            raise RankwiseError(f"{here}: no method {name!r}{nearest(name, list(METHODS))}")
        like = by_name(name)
        known = [f.name for f in fields(like)]
        ours = ("method", "same_size_as", "rates")
        _known(here, f"flag of {name}", about, [*known, *ours])
        flags = read_values(here, like, {k: v for k, v in about.items() if k not in ours})
        own = _rates(here, about["rates"]) if "rates" in about else rates
        if len(own) != len(rates) and (rates or len(own) > 1):
            raise RankwiseError(
                f"{here}: {len(own)} rates, where the recipe has {len(rates)}; every method is "
                "given as many"
            )
        other = about.get("same_size_as")
        if other is not None:
            _known(here, "method to be the size of", [other], [n for n in entries if n != label])
            if "budget" not in known:
                raise RankwiseError(f"{here}: {name} takes no budget, so no size of another")
        elif budget is not None and "budget" in known and not set(flags) & set(SIZES):
            flags["budget"] = budget
        try:
            raw[label] = (by_name(name, **flags), flags, other, own)
        except RankwiseError as error:
            raise RankwiseError(f"{here}: {error}") from error
    return [_entry(where, label, raw) for label in raw]


def _entry(where: str, label: str, raw: Mapping[str, Any]) -> MethodEntry:
    """With the shape of the method whose size it takes, where it says nothing else itself."""
    method, flags, other, rates = raw[label]
    if other is not None:
        if raw[other][2] is not None:
            raise RankwiseError(
                f"{where}: methods.{label} takes the size of {other}, which takes another's; "
                "name that one"
            )
        method = alike(method, raw[other][0], set(flags))
    return MethodEntry(label, method, frozenset(flags), other, rates)


def alike(method: Method, other: Method, given: set[str]) -> Method:
    """The method with the other's `r`, `lora_alpha`, dropout and modules, but for what is given."""
    shared = ("r", "lora_alpha", "lora_dropout", "target_modules")
    known = {f.name for f in fields(method)} - given
    taken = {key: getattr(other, key) for key in shared if key in known and hasattr(other, key)}
    return method.with_flags(**taken)
