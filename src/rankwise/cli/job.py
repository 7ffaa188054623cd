"""Flags to a `Job`: the task, the base model and the TrainingArguments that they name."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.cli.arguments import (
    DataArguments,
    FitArguments,
    ModelArguments,
    OutputArguments,
    check_ranges,
    flag,
    required,
)
from rankwise.cli.flags import Group, parse, read_flag
from rankwise.decoding import Decoding
from rankwise.errors import RankwiseError
from rankwise.methods import METHODS, Method, by_name

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from rankwise.job import Job, Source


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
    **defaults: Any,
) -> list[Any]:
    """A method, model, data, fit and output flags, and those of `more`, in this order.

    The flags of the method that `--method` names are there, and no other's.

    Args:
        command, description, argv: as `flags.parse`.
        method: its name where `--method` is not given; "" for a command without a method.
        more: instances of further flag classes.
        **defaults: of the command, by flag.
    """
    name = read_flag(command, argv, "method", method) if method else ""
    groups = [
        Group("model", ModelArguments()),
        Group("data", DataArguments()),
        Group("training", FitArguments()),
        Group("output", OutputArguments()),
        *(Group((type(part).__doc__ or "").rstrip(".").lower(), part) for part in more),
    ]
    if not name:
        parts = parse(command, description, groups, argv, **defaults)
        check_ranges(parts)
        return parts
    like = by_name(name)
    known = {f.name for f in fields(like)} | {f.name for g in groups for f in fields(g.like)}
    which = Group("method", MethodArgument(method))
    flags = {k: v for k, v in defaults.items() if k in known}
    title = f"{like.title} ({like.source})" if like.source else like.title
    groups = [which, Group(title, like), *groups]
    _, chosen, *parts = parse(command, description, groups, argv, **flags)
    check_ranges([chosen, *parts])
    return [chosen, *parts]


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
    from rankwise import tasks
    from rankwise.cli import quiet
    from rankwise.job import load_job

    quiet()
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
    loaded = tasks.load_task(data.task, **(options | task))
    args = training_arguments(fit)
    of_rows = data.max_length, data.eval_split
    return load_job(loaded, source(model), args, *of_rows, command, decoding)


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
    if secret := [key for key in extra if key.endswith("token")]:
        raise RankwiseError(f"--training_arguments: {secret[0]} would be written to metrics.json")
    defaults = {f.name: f.default for f in fields(TrainingArguments)}
    for key, value in extra.items():
        if isinstance(defaults.get(key), int | float) and not isinstance(value, int | float):
            raise RankwiseError(f"--training_arguments: {key} is {value!r}; it has to be a number")
    if values.pop("group_by_length"):
        values["train_sampling_strategy"] = "group_by_length"
    common = {
        "output_dir": "unused",
        "disable_tqdm": False,
        "save_total_limit": 2,
        "label_names": ["labels"],
        "dataloader_pin_memory": not fit.use_cpu and torch.cuda.is_available(),
    }
    try:
        args = TrainingArguments(**(common | values | extra))
    except (TypeError, ValueError) as error:
        raise RankwiseError(f"TrainingArguments: {' '.join(str(error).split())}") from error
    args._n_gpu = min(args.n_gpu, 1)  # several visible GPUs would mean DataParallel
    return args


def settings_of(method: Method, *parts: Any) -> dict[str, Any]:
    """A run's flags, which a run that goes on has to share; of a plan what the file holds."""
    flags = {key: value for part in parts for key, value in asdict(part).items()}
    about: dict[str, Any] = {"name": type(method).__name__, **asdict(method)}
    if (file := about.get("plan")) is not None:
        about["plan"] = "of sha256 " + sha256(Path(file).read_bytes()).hexdigest()[:12]
    return flags | {"method": about}
