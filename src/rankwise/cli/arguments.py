"""The command line's flags, as dataclasses, and how a YAML file and flags become them."""

import json
import math
from argparse import Action, ArgumentDefaultsHelpFormatter, ArgumentTypeError
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from transformers import HfArgumentParser

from rankwise.errors import RankwiseError
from rankwise.methods import METHODS


def _flag(default: Any, text: str, **kwargs: Any) -> Any:
    return field(default=default, metadata={"help": text, **kwargs})


def _flags(text: str, *default: str) -> Any:
    return field(default_factory=lambda: list(default), metadata={"help": text})


@dataclass
class ModelArguments:
    """The base model."""

    _argument_group_name = "model"

    model_name_or_path: str | None = _flag(None, "hub id or folder of the base model")
    gguf_file: str | None = _flag(None, "name of a GGUF file in it, loaded as float32")
    model_revision: str | None = _flag(None, "branch, tag or commit on the hub")
    trust_remote_code: bool = _flag(False, "run code that the model or data set brings along")
    attn_implementation: str | None = _flag(None, "sdpa, eager, flash_attention_2, ...")
    dtype: str | None = _flag(None, "type of the frozen weights: float32, bfloat16, ...")


@dataclass
class DataArguments:
    """A known task, or files of your own."""

    _argument_group_name = "data"

    task: str | None = _flag(None, "a known task: glue/rte, glue/mrpc, glue/stsb, jnlpba, ...")
    data_dir: str | None = _flag(
        None,
        "folder with train, validation and test as .jsonl, .csv or .parquet; instead of the hub",
    )
    train_file: str | None = _flag(None, "training rows of your own: .jsonl, .csv or .parquet")
    validation_file: str | None = _flag(None, "rows to evaluate on; without any, a tenth of train")
    test_file: str | None = _flag(None, "further rows to evaluate on")
    text_column: list[str] = _flags("column of the text, or two columns of a pair of texts")
    label_column: str | None = _flag(None, "column of the label")
    label_names: list[str] = _flags("classes in the order of their numbers; without it, sorted")
    kind: Literal["classification", "regression", "tagging", "causal_lm"] | None = _flag(
        None, "what kind of task; without it, told from the columns"
    )
    max_length: int = _flag(128, "tokens; longer rows are cut")
    max_train_samples: int | None = _flag(None, "use at most this many training rows")
    max_eval_samples: int | None = _flag(
        None, "use at most this many rows of each evaluation split"
    )
    eval_split: Literal["auto", "validation", "test"] = _flag(
        "auto", "rows that the figures come from; auto is test where it has labels, else validation"
    )


@dataclass
class LoraArguments:
    """The adapters."""

    _argument_group_name = "LoRA"

    r: int = _flag(8, "rank: of a search the largest that it may give, of train the one of all")
    lora_alpha: float | None = _flag(None, "LoRA's alpha at rank r; without it, 2 r")
    lora_dropout: float = _flag(0.0, "dropout in front of the adapters")
    target_modules: list[str] = _flags(
        "modules to adapt, by name or suffix, or all-linear; without it, query and value"
    )


@dataclass
class SearchArguments:
    """How ranks are chosen."""

    _argument_group_name = "search"

    method: str = _flag("autolora", "one of: " + ", ".join(METHODS))
    validation_fraction: float | None = _flag(
        None,
        "share of the training rows that ranks are chosen on; without it, 0.5 for autolora, "
        "0.1 for dylora",
    )
    gate_learning_rate: float = _flag(1e-3, "AdamW's learning rate of the gates")
    estimator: Literal["finite_difference", "exact", "first_order"] | None = _flag(
        None, "of the hypergradient; without it, the method's own"
    )
    lookahead: float | None = _flag(
        None, "learning rate of the look-ahead step; without it, the parameters' current one"
    )
    search_learning_rate: float | None = _flag(None, "of the factors; without it, learning_rate")
    num_search_epochs: float | None = _flag(None, "passes over D_tr; without it, num_train_epochs")
    max_search_steps: int = _flag(-1, "optimizer steps of the search; overrides num_search_epochs")


@dataclass
class NestedArguments:
    """DyLoRA: which ranks are trained, and which one is handed back."""

    _argument_group_name = "DyLoRA"

    r_min: int = _flag(1, "the smallest rank trained; the largest is r")
    rank_distribution: Literal["uniform", "geometric"] = _flag(
        "uniform", "of the rank drawn at each step"
    )
    geometric_p: float = _flag(0.15, "p of the geometric distribution")
    rank_weights: list[str] = _flags(
        "instead of a distribution: one probability per rank from r_min to r, summing to 1"
    )
    tolerance: float | None = _flag(
        None,
        "how far below the best rank's metric the picked rank may lie; without it, one standard "
        "error",
    )
    nested_adapter: str | None = _flag(
        None, "folder of a finished DyLoRA run: choose anew out of what it trained, on its rows"
    )
    pick_rank: int | None = _flag(None, "hand back this rank, whatever the curve says")
    budget: int | None = _flag(None, "hand back the largest rank of at most so many parameters")
    elastic: bool = _flag(
        False, "within the budget choose ranks layer by layer, by loss on the validation rows"
    )


@dataclass
class FitArguments:
    """Training, with transformers' names and meanings."""

    _argument_group_name = "training"

    learning_rate: float = _flag(1e-4, "AdamW's learning rate of factors and head")
    num_train_epochs: float = _flag(3.0, "passes over the training rows")
    max_steps: int = _flag(-1, "optimizer steps; overrides num_train_epochs")
    per_device_train_batch_size: int = _flag(32, "rows per device and forward pass")
    per_device_eval_batch_size: int = _flag(64, "rows per device in evaluation")
    gradient_accumulation_steps: int = _flag(1, "forward passes per optimizer step")
    weight_decay: float = _flag(0.0, "AdamW's, of factors and head")
    lr_scheduler_type: str = _flag("linear", "linear, cosine, constant_with_warmup, ...")
    warmup_steps: float = _flag(0.06, "steps, or below 1 the share of all steps")
    max_grad_norm: float = _flag(1.0, "gradients are clipped to this length")
    bf16: bool = _flag(False, "mixed precision in bfloat16")
    gradient_checkpointing: bool = _flag(False, "compute activations again to save memory")
    group_by_length: bool = _flag(False, "batches of rows of like length: less padding")
    seed: int = _flag(42, "of the split, the head, the factors, the order and the dropout")
    use_cpu: bool = _flag(False, "leave the accelerator alone")
    logging_steps: float = _flag(50, "steps between two log lines")
    save_steps: float = _flag(200, "steps between two checkpoints")
    report_to: str = _flag("none", "wandb, tensorboard, ...; none")
    training_arguments: dict | None = _flag(
        None, "any other field of transformers.TrainingArguments, as JSON: '{\"adam_beta2\": 0.98}'"
    )


@dataclass
class OutputArguments:
    """Where results go."""

    _argument_group_name = "output"

    output_dir: str | None = _flag(None, "folder for the results; has to be new or empty")
    overwrite_output_dir: bool = _flag(False, "replace the results that are in output_dir")
    resume_from_checkpoint: bool = _flag(False, "go on with the run that stopped in output_dir")


@dataclass
class PlanArguments:
    """What to train."""

    _argument_group_name = "plan"

    plan: str | None = _flag(None, "plan.json of a search; without it, rank r everywhere")


@dataclass
class ControlArguments:
    """What to compare with."""

    _argument_group_name = "controls"

    control: list[str] = _flags(
        "trained beside the plan, alike in all but ranks: uniform, random, for dylora also svd "
        "(LoRA of rank r, truncated); none for no control",
        "uniform",
    )
    control_r: int | None = _flag(
        None, "rank of the uniform control; without it, the one nearest the plan's size"
    )


@dataclass
class AdapterArguments:
    """What to evaluate."""

    _argument_group_name = "adapter"

    adapter: str | None = _flag(None, "folder of a PEFT adapter, or of a run that holds one")


@dataclass
class CutArguments:
    """To what the adapter is cut; give one."""

    _argument_group_name = "cut"

    r: int | None = _flag(None, "this rank everywhere")
    energy: float | None = _flag(
        None, "the smallest rank of each module that keeps this share of its update's energy"
    )
    budget: int | None = _flag(None, "at most so many LoRA parameters in all")
    plan: str | None = _flag(None, "plan.json with the ranks of a nested adapter's modules")
    svd: bool = _flag(False, "cut a nested adapter by SVD too, as if it were an ordinary one")


class _HelpFormatter(ArgumentDefaultsHelpFormatter):
    """Every default, but not `(default: None)`, which the help text explains better."""

    def _get_help_string(self, action: Any) -> str | None:
        if action.default in (None, []) or action.required:
            return action.help
        return super()._get_help_string(action)

    def _format_action_invocation(self, action: Any) -> str:
        # argparse repeats the metavar for the --flag-with-dashes that HfArgumentParser also takes
        options = [o for o in action.option_strings if "_" in o or "-" not in o.lstrip("-")]
        if not options:
            return super()._format_action_invocation(action)
        if action.choices:
            shown = "{" + ",".join(map(str, action.choices)) + "}"
        else:
            shown = {int: "N", float: "X"}.get(action.type, "VALUE")  # type: ignore[call-overload]
        if action.nargs in (0, "?"):  # on and off
            return ", ".join(options)
        return ", ".join(options) + f" {shown}" + (" ..." if action.nargs == "+" else "")


class _Parser(HfArgumentParser):
    """Its errors are one line like all others."""

    def error(self, message: str) -> NoReturn:
        raise RankwiseError(f"{message}; see {self.prog} --help")


def parse(
    command: str, description: str, types: Sequence[type], argv: Sequence[str], **defaults: Any
) -> list[Any]:
    """Flags, over the YAML file of `--config`, over a command's own defaults, over the classes'.

    Raises:
        RankwiseError: a flag or a key that is unknown, or a value that is none; a config file that
            cannot be read.
        SystemExit: by argparse, for `--help`.
    """
    parser = _Parser(
        types,
        prog=f"rankwise {command}",
        usage=f"rankwise {command} [--flag value ...]",
        description=description,
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--config", help="YAML file of flags; flags on the command line win")
    parser.set_defaults(**defaults)
    actions = {action.dest: action for action in parser._actions}
    if "training_arguments" in actions:
        actions["training_arguments"].type = _json_object
    path = parser.parse_known_args(list(argv))[0].config
    flags = [] if path is None else _config_flags(path, actions)
    *parts, rest = parser.parse_args_into_dataclasses(
        [*flags, *argv], look_for_args_file=False, return_remaining_strings=True
    )
    if rest:
        parser.error(f"unknown flag {rest[0]}")
    parts = parts[: len(types)]  # what belongs to no class comes back as one more namespace
    _check_ranges(parts)
    return parts


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def _config_flags(path: str, actions: dict[str, Action]) -> list[str]:
    """A YAML file as flags, so that its values are read and checked as those of flags are."""
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RankwiseError(
            f"cannot read --config {path}: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(config, dict):
        raise RankwiseError(
            f"--config {path} holds a {type(config).__name__}; it has to map flags to values"
        )
    flags = []
    for key, value in config.items():
        if key in ("help", "config") or key not in actions:
            raise RankwiseError(f"--config {path} has {str(key)!r}, which is no flag; see --help")
        several = actions[key].nargs == "+"
        if isinstance(value, list) and not several:
            raise RankwiseError(f"--config {path}: {key} is {value}; it takes one value")
        if several and value not in (None, []):
            flags += [f"--{key}", *map(_text, value if isinstance(value, list) else [value])]
        elif not several and value is not None:
            flags.append(f"--{key}={_text(value)}")
    return flags


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool | dict) else str(value)


_POSITIVE = (
    "learning_rate search_learning_rate gate_learning_rate lora_alpha per_device_train_batch_size "
    "per_device_eval_batch_size gradient_accumulation_steps max_length num_search_epochs"
).split()


def _check_ranges(parts: Sequence[Any]) -> None:
    values = {key: value for part in parts for key, value in vars(part).items()}
    for key in _POSITIVE:
        value = values.get(key)
        if value is not None and not 0 < value < math.inf:
            raise RankwiseError(f"--{key} is {value}; it has to be a number > 0")
    for key, low, high in (("lora_dropout", 0, 1), ("seed", 0, 2**32), ("lookahead", 0, math.inf)):
        value = values.get(key)
        if value is not None and not low <= value < high:
            raise RankwiseError(f"--{key} is {value}; it has to be at least {low} and below {high}")
    fraction = values.get("validation_fraction")
    if fraction is not None and not 0 < fraction < 1:
        raise RankwiseError(f"--validation_fraction is {fraction}; it has to lie between 0 and 1")
    if values.get("max_steps", 1) <= 0 and not 0 < values["num_train_epochs"] < math.inf:
        epochs = values["num_train_epochs"]
        raise RankwiseError(f"--num_train_epochs is {epochs}; it has to be > 0")


def required(value: Any, flag: str, command: str) -> Any:
    """The value of a flag that a command cannot do without."""
    if value is None:
        raise RankwiseError(f"rankwise {command} needs --{flag}; see rankwise {command} --help")
    return value
