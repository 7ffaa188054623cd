"""Flags to a `Job`: the task, the base model and the TrainingArguments that they name."""

import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from rankwise.cli.arguments import (
    DataArguments,
    FitArguments,
    ModelArguments,
    OutputArguments,
    check_ranges,
    flag,
    flags_elsewhere,
    required,
)
from rankwise.cli.flags import Group, parse, read_flag
from rankwise.cli.launched import check_launcher, own_output
from rankwise.decoding import Decoding
from rankwise.errors import RankwiseError
from rankwise.launched import processes
from rankwise.methods import METHODS, Method, by_name

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from rankwise.job import Job, Source
    from rankwise.tasks import Task


@dataclass
class MethodArgument:
    """Which method."""

    method: str = flag("", "its flags are the ones below; one of: " + ", ".join(METHODS))


def parse_job(
    command: str,
    description: str,
    argv: Sequence[str],
    *,
    method: str,
    more: Sequence[Any] = (),
    hidden: Iterable[str] = (),
    **defaults: Any,
) -> list[Any]:
    """A method, model, data, fit and output flags, and those of `more`, in this order.

    The flags of the method that `--method` names are there, and no other's.

    Args:
        command, description, argv: as `flags.parse`.
        method: its name where `--method` is not given; "" for a command without a method.
        more: instances of further flag classes.
        hidden: flags that the command has no use for; see `Group`.
        **defaults: of the command, by flag.
    """
    name = read_flag(command, argv, "method", method) if method else ""
    unused, elsewhere = frozenset(hidden), flags_elsewhere()
    groups = [
        Group("model", ModelArguments(), unused),
        Group("data", DataArguments(), unused),
        Group("training" if method else "evaluation", FitArguments(), unused),
        Group("output", OutputArguments(), unused),
        *(Group(_first_line(part), part) for part in more),
    ]
    if not name:
        parts = parse(command, description, groups, argv, elsewhere, **defaults)
        check_ranges(parts)
        own_output(parts[3])
        check_launcher(f"rankwise {command}")
        return parts
    like = by_name(name)
    known = {f.name for f in fields(like)} | {f.name for g in groups for f in fields(g.like)}
    which = Group("method", MethodArgument(method))
    flags = {k: v for k, v in defaults.items() if k in known}
    title = f"{like.title} ({like.source})" if like.source else like.title
    groups = [which, Group(title, like), *groups]
    _, chosen, *parts = parse(command, description, groups, argv, elsewhere, **flags)
    check_ranges([chosen, *parts])
    own_output(parts[3])
    check_launcher(chosen.title, able=chosen.shards)
    return [chosen, *parts]


def _first_line(part: Any) -> str:
    """What a group of flags is called: the beginning of its docstring."""
    return (type(part).__doc__ or " ").splitlines()[0].rstrip(".").lower()


def load(
    command: str,
    model: ModelArguments,
    data: DataArguments,
    fit: FitArguments,
    decoding: Decoding | None = None,
    **task: Any,
) -> "Job":
    """Reads and encodes the rows; everything that can be wrong with them is found here.

    Args:
        command: for the message where a flag is missing, and for the record.
        model, data, fit, decoding: the flags.
        **task: overrides for `tasks.load_task` (an adapter's own labels).
    """
    required(model.model_name_or_path, "model_name_or_path", command)
    from rankwise.cli import quiet
    from rankwise.job import load_job

    quiet()
    loaded = task_of(model, data, fit, **task)
    args = training_arguments(fit)
    of_rows = data.max_length, data.eval_split
    return load_job(loaded, source(model), args, *of_rows, command, decoding)


def task_of(model: ModelArguments, data: DataArguments, fit: FitArguments, **task: Any) -> "Task":
    """The rows that the flags name; `task` overrides what goes to `tasks.load_task`."""
    from rankwise import tasks

    options: dict[str, Any] = {
        "data_dir": data.data_dir,
        "train_file": data.train_file,
        "validation_file": data.validation_file,
        "test_file": data.test_file,
        "text_column": data.text_column or None,
        "label_column": data.label_column,
        "label_names": data.label_names or None,
        "kind": data.kind,
        "max_train_samples": data.max_train_samples,
        "max_eval_samples": data.max_eval_samples,
        "seed": fit.seed,
        "trust_remote_code": model.trust_remote_code,
    }
    return tasks.load_task(data.task, **(options | task))


def source(model: ModelArguments) -> "Source":
    """Where the base model comes from."""
    from rankwise.job import Source

    about = asdict(model)
    return Source(
        about.pop("model_name_or_path") or "", revision=about.pop("model_revision"), **about
    )


def training_arguments(fit: FitArguments) -> "TrainingArguments":
    """transformers' TrainingArguments of the flags; the output folder is each stage's own."""
    import torch
    from transformers import TrainingArguments

    values = asdict(fit)
    extra = values.pop("training_arguments") or {}
    ours = {*values, "output_dir", "save_strategy", "label_names", "eval_strategy"}
    if clash := sorted(set(extra) & ours):
        raise RankwiseError(f"--training_arguments: {clash[0]} is set elsewhere; leave it out")
    if sent := [key for key in extra if key.startswith(("push_to_hub", "hub_"))]:
        raise RankwiseError(f"--training_arguments: {sent[0]} is none here; give --push_to_hub")
    if secret := [key for key in extra if key.endswith("token")]:
        raise RankwiseError(f"--training_arguments: {secret[0]} would be written to metrics.json")
    kinds = typing.get_type_hints(TrainingArguments)
    for key, value in extra.items():
        if (wanted := _mistyped(value, kinds.get(key, Any))) is not None:
            raise RankwiseError(f"--training_arguments: {key} is {value!r}; it has to be {wanted}")
    if fit.learning_rate is None:  # Job.at_rate sets it, once the method is known
        del values["learning_rate"]
    if values.pop("group_by_length"):
        values["train_sampling_strategy"] = "group_by_length"
    common = {
        "output_dir": "unused",
        "disable_tqdm": False,
        "save_total_limit": 2,
        "label_names": ["labels"],
        "dataloader_pin_memory": not fit.use_cpu and torch.cuda.is_available(),
    }
    if processes() > 1 and (fit.use_cpu or not torch.cuda.is_available()):
        common["ddp_backend"] = "gloo"
    try:
        args = TrainingArguments(**(common | values | extra))
    except (TypeError, ValueError) as error:
        raise RankwiseError(f"TrainingArguments: {' '.join(str(error).split())}") from error
    args._n_gpu = min(args.n_gpu, 1)  # several visible GPUs would mean DataParallel
    return args


def _mistyped(value: Any, kind: Any) -> str | None:
    """What a value should be, in words, where it cannot be of a kind; None where it may be."""
    kinds = typing.get_args(kind) if typing.get_origin(kind) in _UNIONS else (kind,)
    plain = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    if value is None or not all(k in plain or k is type(None) for k in kinds):
        return None
    if isinstance(value, bool):
        fits = bool in kinds
    elif isinstance(value, int):
        fits = int in kinds or float in kinds
    else:
        fits = isinstance(value, tuple(kinds))
    return None if fits else " or ".join(plain[k] for k in kinds if k in plain)


_UNIONS = (typing.Union, types.UnionType)


def settings_of(method: Method, *parts: Any) -> dict[str, Any]:
    """A run's flags: those that a run that goes on has to share, and those that act afterwards."""
    flags = {key: value for part in parts for key, value in asdict(part).items()}
    return flags | {"method": method.trained_by(), "after": method.describe()}
