"""The flags that commands share, as dataclasses; a method's own are the fields of its class."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from rankwise.errors import RankwiseError


def flag(default: Any, text: str, *, path: bool = False) -> Any:
    """A flag: its default, its help, and whether it is a path, whose `~` is the home folder."""
    return field(default=default, metadata={"help": text, "path": path})


@dataclass
class ModelArguments:
    """The base model."""

    model_name_or_path: str | None = flag(None, "hub id or folder of the base model", path=True)
    gguf_file: str | None = flag(None, "name of a GGUF file in it, loaded as float32")
    model_revision: str | None = flag(None, "branch, tag or commit on the hub")
    trust_remote_code: bool = flag(False, "run code that the model or data set brings along")
    attn_implementation: str | None = flag(None, "sdpa, eager, flash_attention_2, ...")
    dtype: str | None = flag(None, "type of the frozen weights: float32, bfloat16, ...")
    load_in_4bit: bool = flag(
        False, "keep the frozen weights in 4 bits, as QLoRA does (needs rankwise[bnb])"
    )


@dataclass
class DataArguments:
    """A known task, or files of your own."""

    task: str | None = flag(
        None, "a known task: glue/rte, glue/mrpc, jnlpba, ...; or chat, for conversations in files"
    )
    data_dir: str | None = flag(
        None,
        "folder with train, validation and test as .jsonl, .csv or .parquet; instead of the hub",
        path=True,
    )
    train_file: str | None = flag(
        None, "training rows of your own: .jsonl, .csv or .parquet", path=True
    )
    validation_file: str | None = flag(
        None, "rows to evaluate on; without any, a tenth of train", path=True
    )
    test_file: str | None = flag(None, "further rows to evaluate on", path=True)
    text_column: tuple[str, ...] = flag((), "column of the text, or two columns of a pair of texts")
    label_column: str | None = flag(None, "column of the label")
    label_names: tuple[str, ...] = flag(
        (), "classes in the order of their numbers; without it, sorted"
    )
    kind: str | None = flag(
        None,
        "what kind of task: classification, regression, tagging, causal_lm or chat; else told "
        "from the columns",
    )
    max_length: int = flag(128, "tokens; longer rows are cut")
    max_train_samples: int | None = flag(None, "use at most this many training rows")
    max_eval_samples: int | None = flag(None, "use at most this many rows of each evaluation split")
    eval_split: Literal["auto", "validation", "test"] = flag(
        "auto", "rows that the figures come from; auto is test where it has labels, else validation"
    )


@dataclass
class FitArguments:
    """Training, with transformers' names and meanings."""

    learning_rate: float | None = flag(
        None,
        "AdamW's learning rate of factors and head; without it, what is usual for the method (1e-3 "
        "for LoRA's kind), less for models wider than 1,024",
    )
    num_train_epochs: float = flag(3.0, "passes over the training rows")
    max_steps: int = flag(-1, "optimizer steps; overrides num_train_epochs")
    per_device_train_batch_size: int = flag(32, "rows per device and forward pass")
    per_device_eval_batch_size: int = flag(64, "rows per device in evaluation")
    gradient_accumulation_steps: int = flag(1, "forward passes per optimizer step")
    weight_decay: float = flag(0.0, "AdamW's, of factors and head")
    lr_scheduler_type: str = flag("linear", "linear, cosine, constant_with_warmup, ...")
    warmup_steps: float = flag(0.06, "steps, or below 1 the share of all steps")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this length")
    bf16: bool = flag(False, "mixed precision in bfloat16")
    gradient_checkpointing: bool = flag(False, "compute activations again to save memory")
    group_by_length: bool = flag(False, "batches of rows of like length: less padding")
    seed: int = flag(42, "of the split, the head, the factors, the order and the dropout")
    use_cpu: bool = flag(False, "leave the accelerator alone")
    logging_steps: float = flag(50, "steps between two log lines")
    save_steps: float = flag(200, "steps between two checkpoints")
    report_to: str = flag("none", "wandb, tensorboard, ...; none")
    training_arguments: dict | None = flag(
        None, "any other field of transformers.TrainingArguments, as JSON: '{\"adam_beta2\": 0.98}'"
    )


@dataclass
class OutputArguments:
    """Where results go."""

    output_dir: str | None = flag(None, "folder for the results; has to be new or empty", path=True)
    overwrite_output_dir: bool = flag(False, "replace the results that are in output_dir")
    resume_from_checkpoint: bool = flag(False, "go on with the run that stopped in output_dir")
    push_to_hub: str | None = flag(
        None, "repository on the hub that the adapter's folder goes to, once the run is finished"
    )


@dataclass
class ControlArguments:
    """What to compare with."""

    control: tuple[str, ...] = flag(
        ("lora",),
        "methods trained beside it, at its size where they take one; name:flag=value,... sets "
        "flags (lora:r=4); none for no control",
    )


@dataclass
class TuneArguments:
    """The learning rate."""

    tune: int = flag(
        0,
        "so many trials choose the learning rate first, on held-out training rows; of each control "
        "too. The same command, started several times, shares them",
    )
    tune_rates: tuple[float, ...] = flag((1e-5, 3e-2), "lowest and highest rate that is tried")


@dataclass
class AdapterArguments:
    """An adapter on disk."""

    adapter: str | None = flag(
        None, "folder of a PEFT adapter, or of a run that made one", path=True
    )


@dataclass
class CutArguments:
    """To what the adapter is cut; give one."""

    rank: int | None = flag(None, "this rank everywhere")
    energy: float | None = flag(
        None, "the smallest rank of each module that keeps this share of its update's energy"
    )
    budget: int | None = flag(None, "at most so many LoRA parameters in all")
    keep: float | None = flag(None, "at most this share of the LoRA parameters")
    plan: str | None = flag(
        None, "plan.json with the ranks of a nested adapter's modules", path=True
    )
    svd: bool = flag(False, "cut a nested or ordered adapter by SVD, as if it were neither")


_ABOVE_0 = (
    "learning_rate per_device_train_batch_size per_device_eval_batch_size "
    "gradient_accumulation_steps max_length max_train_samples max_eval_samples logging_steps "
    "save_steps"
).split()
_AT_LEAST_0 = "weight_decay warmup_steps max_grad_norm".split()


def check_ranges(parts: Sequence[Any]) -> None:
    """Raises RankwiseError, naming the flag, where a number is out of its range."""
    values = {key: value for part in parts for key, value in vars(part).items()}
    for key in _ABOVE_0:
        if (value := values.get(key)) is not None and not 0 < value < math.inf:
            raise RankwiseError(f"--{key} is {value}; it has to be a number > 0")
    for key in _AT_LEAST_0:
        if (value := values.get(key)) is not None and not 0 <= value < math.inf:
            raise RankwiseError(f"--{key} is {value}; it has to be at least 0")
    seed = values.get("seed")
    if seed is not None and not 0 <= seed < 2**32:
        raise RankwiseError(f"--seed is {seed}; it has to be at least 0 and below {2**32}")
    fraction = values.get("validation_fraction")
    if fraction is not None and not 0 < fraction < 1:
        raise RankwiseError(f"--validation_fraction is {fraction}; it has to lie between 0 and 1")
    steps = values.get("max_steps", 1)
    if steps == 0 or steps < -1:
        raise RankwiseError(
            f"--max_steps is {steps}; give at least 1, or -1 to train num_train_epochs"
        )
    if steps < 0 and not 0 < values["num_train_epochs"] < math.inf:
        epochs = values["num_train_epochs"]
        raise RankwiseError(f"--num_train_epochs is {epochs}; it has to be > 0")


def flags_elsewhere() -> dict[str, str]:
    """Every flag that some command or method has, and who, for messages and shared files."""
    from rankwise.methods import METHODS

    found: dict[str, str] = {}
    for name, method in METHODS.items():
        for f in fields(method):
            found.setdefault(f.name, f"method {name}")
    found |= {f.name: "rankwise cut" for f in fields(CutArguments) if f.name not in found}
    found |= {"adapter": "rankwise cut and evaluate", "control": "rankwise run", "method": "run"}
    shared = (ModelArguments, DataArguments, FitArguments, OutputArguments)
    for part in shared:
        found |= {f.name: "run, search and train" for f in fields(part)}
    return found


def required(value: Any, name: str, command: str) -> Any:
    """The value of a flag that a command cannot do without."""
    if value is None:
        raise RankwiseError(f"rankwise {command} needs --{name}; see rankwise {command} --help")
    return value
