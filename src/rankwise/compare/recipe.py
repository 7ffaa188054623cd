"""Recipes: a YAML file that says what is compared, read and checked before anything runs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rankwise.cli.arguments import DataArguments, FitArguments, ModelArguments, check_ranges
from rankwise.cli.flags import read_values
from rankwise.decoding import Decoding
from rankwise.errors import RankwiseError
from rankwise.methods import METHODS, Method, by_name
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


def read_recipe(path: str | Path, data_dir: str | None = None, model: str | None = None) -> Recipe:
    """Reads and checks a recipe.

    Args:
        path: a YAML file.
        data_dir: instead of the recipe's own: holds a folder a task.
        model: instead of the recipe's own.

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
    folder = data_dir or raw.get("data_dir")
    training = read_values(f"{where}: training", FitArguments(), _mapping(where, raw, "training"))
    seeds = tuple(_numbers(where, "seeds", raw.get("seeds", [0]), int))
    rates = tuple(_numbers(where, "rates", raw.get("rates", []), float))
    if len(set(seeds)) < len(seeds) or len(set(rates)) < len(rates) or not seeds:
        raise RankwiseError(f"{where}: seeds and rates are lists without repetitions")
    if "seed" in training:
        raise RankwiseError(f"{where}: training has a seed; give seeds: [...] beside it")
    if rates and "learning_rate" in training:
        raise RankwiseError(f"{where}: training has a learning_rate, and rates are given too")
    if "learning_rate" in training:
        rates = (training.pop("learning_rate"),)
    tune = _tune(where, _mapping(where, raw, "tune"))
    generation = _mapping(where, raw, "generation")
    decoding = Decoding(**read_values(f"{where}: generation", Decoding(), generation))
    max_length = raw.get("max_length", DataArguments().max_length)
    recipe = Recipe(
        Path(path),
        _model(where, raw.get("model"), model),
        tuple(_tasks(where, raw.get("tasks"), folder, max_length)),
        tuple(_methods(where, raw.get("methods"), rates, raw.get("budget"))),
        seeds,
        training,
        tune,
        decoding,
    )
    for task in recipe.tasks:
        fit = FitArguments(**(recipe.training | task.training))  # type: ignore[operator]
        check_ranges([fit, task.data])
    return recipe


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        raise RankwiseError(f"cannot read the recipe {path}: {said}") from error
    if not isinstance(raw, dict):
        raise RankwiseError(f"{path} holds a {type(raw).__name__}; a recipe maps keys to values")
    return raw


def nearest(name: str, known: Sequence[str]) -> str:
    """`; did you mean ...?` where a known name is near, else the known names."""
    near = get_close_matches(str(name), known, 1, 0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}"


def _known(where: str, what: str, names: Any, known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise RankwiseError(f"{where}: no {what} {name!r}{nearest(name, known)}")


def _mapping(where: str, raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise RankwiseError(f"{where}: {key} is {value!r}; it has to map names to values")
    return value


def _numbers(where: str, key: str, values: Any, kind: Callable[[Any], Any]) -> list[Any]:
    values = values if isinstance(values, list) else [values]
    try:
        found = [kind(value) for value in values]
    except (TypeError, ValueError) as error:
        raise RankwiseError(f"{where}: {key} are {values!r}; give a list of numbers") from error
    if any(not (number >= 0 if kind is int else 0 < number < 1e3) for number in found):
        raise RankwiseError(f"{where}: {key} are {values!r}; one is out of range")
    return found


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
    if isinstance(given, list):
        given = dict.fromkeys(map(str, given))
    if not isinstance(given, dict) or not given:
        raise RankwiseError(f"{where}: {key} is {given!r}; give a list of names, or name: {{...}}")
    return {str(label): _mapping(f"{where}: {key}", given, label) for label in given}


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
    if budget is not None and (not isinstance(budget, int) or budget < 1):
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
        own = tuple(_numbers(here, "rates", about["rates"], float)) if "rates" in about else rates
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
