"""What a method is: a frozen dataclass whose fields are its flags, and the slots that it fills.

`rankwise.fit` and `rankwise.search` run the slots in this order, and know no method by name:

    plan    = method.start(model, setting)              # the ranks that it trains at, if any
    adapted = method.attach(model, plan, setting)       # what becomes trainable
    trainer = method.trainer(adapted, plan, setting)    # how that moves
    kept    = method.keep(trainer, plan, setting)       # which ranks stay, by held-out rows
    method.hand_over(trainer, kept, folder)             # the adapter, and what other sizes need

Where `anew` is set, the kept plan is trained from scratch instead of being handed over. Nothing in
this folder imports torch, transformers or PEFT before a slot is called, so that flags and their
help are there at once.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, get_type_hints

from rankwise.errors import RankwiseError
from rankwise.given import fits, shown, words_for

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer, TrainingArguments

    from rankwise.adapter import Adapter
    from rankwise.choose import Curve, ScoreRows
    from rankwise.plan import RankPlan

AnyMethod = TypeVar("AnyMethod", bound="Method")


def flag(default: Any, text: str, *, path: bool = False, after: bool = False) -> Any:
    """A field of a method.

    Args:
        default: its default.
        text: its help on the command line.
        path: whether it names a file or folder, which the record then holds by its last part.
        after: whether it acts only when the training is over, in `keep` and later: a stopped run
            may go on with another value.
    """
    return field(default=default, metadata={"help": text, "path": path, "after": after})


@dataclass(frozen=True)
class Setting:
    """What a method is given of a run, beside the model.

    Attributes:
        train: rows to train on, ready for the model.
        held_out: rows to choose on, none of which are trained on; None where the method chooses
            nothing.
        args: TrainingArguments; `args.seed` also draws factors, ranks and splits.
        task_type: PEFT's.
        metric: what sizes are compared by, as `compute_metrics` names it, or "loss".
        greater_is_better: its direction.
        score_rows: see `choose.measure_sizes`.
        options: for Trainer: `data_collator`, `compute_metrics`, `callbacks`, ...
        provenance: where a plan that comes of it is from, as JSON holds it.
        configuration: what a checkpoint has to agree with to be resumed.
    """

    train: Any
    held_out: Any
    args: "TrainingArguments"
    task_type: str | None = None
    metric: str = "loss"
    greater_is_better: bool = False
    score_rows: "ScoreRows | None" = None
    options: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    configuration: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Kept:
    """What a method chose.

    Attributes:
        plan: the ranks that stay; None where the method has no ranks.
        curve: the quality of every size that was compared, where some were.
        figures: more that the choice rests on, as JSON holds it.
        found: what `hand_over` of the same method needs of it.
    """

    plan: "RankPlan | None" = None
    curve: "Curve | None" = None
    figures: Mapping[str, Any] = field(default_factory=dict)
    found: Any = None


_NARROW = 1024  # hidden units, up to which the usual rates hold as they are
_SLOTS: set[str] = set()  # no flag may have the name of a slot


@dataclass(frozen=True)
class Method:
    """The slots, each with what most methods do; a method overrides what is its own.

    Attributes that are no flags, stated by a class about itself:
        title: its name in tables and cards.
        source: where it is described.
        claim: what has to pay for the method to be worth it, for the verdict; "" for a baseline.
        anew: whether the kept plan is trained from scratch, on all rows, as plain LoRA.
        chooses: whether `keep` needs held-out rows.
        takes_validation: whether the task's validation rows choose, where they are not the ones
            that are evaluated; else a share of the training rows does.
        usual_rate: AdamW's learning rate where the user gives none; see `rate_for`.
        shards: whether it works where FSDP gives each process a part of every parameter.
        resumable: whether a checkpoint of its training can be gone on with.
        product: name of the folder that `hand_over` writes.
        stock: who reads that without rankwise: "peft", "transformers", or "" for nobody.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        taken = [name for name in vars(cls).get("__annotations__", {}) if name in _SLOTS]
        if taken:
            raise TypeError(f"{cls.__name__}: {taken[0]!r} is a slot; name the flag otherwise")

    def __post_init__(self) -> None:
        kinds = get_type_hints(type(self))
        for f in fields(self):
            value = getattr(self, f.name)
            if not fits(value, kinds[f.name]):
                what = words_for(kinds[f.name])
                raise RankwiseError(f"{f.name} is {shown(value)}; it has to be {what}")
            if isinstance(value, float) and not math.isfinite(value):
                raise RankwiseError(f"{f.name} is {value}; it has to be a finite number")

    title: ClassVar[str] = ""
    source: ClassVar[str] = ""
    claim: ClassVar[str] = ""
    anew: ClassVar[bool] = False
    chooses: ClassVar[bool] = False
    takes_validation: ClassVar[bool] = False
    usual_rate: ClassVar[float] = 1e-3
    shards: ClassVar[bool] = False
    resumable: ClassVar[bool] = True
    product: ClassVar[str] = "adapter"
    stock: ClassVar[str] = "peft"

    @property
    def held_out_share(self) -> float:
        """Share of the training rows that the method chooses on, where it chooses."""
        return float(getattr(self, "validation_fraction", 0.1))

    def rate_for(self, config: Any) -> float:
        """The learning rate where the user gives none.

        It is `usual_rate` for models up to 1,024 wide (docs/compare.md has what was measured), and
        falls as width^-0.78 from there on: "LoRA Without Regret" (Schulman et al., 2025) fits this
        exponent to the best rates of Llama models, of LoRA and of full fine-tuning alike.

        Args:
            config: the base model's; a model without `hidden_size` counts as narrow.

        Example:
            >>> LoRA().rate_for(AutoConfig.from_pretrained("meta-llama/Llama-3.1-8B"))  # 4,096 wide
            0.00034
        """
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        width = getattr(text, "hidden_size", None) or _NARROW
        return float(f"{self.usual_rate * min(1.0, (_NARROW / width) ** 0.78):.2g}")

    def describe(self) -> dict[str, Any]:
        """The class and its flags, as JSON holds them; of a path the last part alone."""
        flags = asdict(self)
        for f in fields(self):
            if f.metadata.get("path") and flags[f.name] is not None:
                flags[f.name] = Path(flags[f.name]).name
        return {"name": type(self).__name__, **flags}

    def trained_by(self) -> dict[str, Any]:
        """The class and those flags that its training hangs on: of a path, what lies there."""
        from rankwise.files import content

        flags = {f.name: getattr(self, f.name) for f in fields(self) if not f.metadata.get("after")}
        for f in fields(self):
            if f.metadata.get("path") and flags.get(f.name) is not None:
                flags[f.name] = f"of sha256 {content(Path(flags[f.name]))[:12]}"
        return {"name": type(self).__name__, **flags}

    def with_flags(self: AnyMethod, **flags: Any) -> AnyMethod:
        """The same with other values of some flags.

        Raises:
            RankwiseError: a flag that the method does not have, or a value out of range.
        """
        known = {f.name for f in fields(self)}
        if odd := sorted(set(flags) - known):
            raise RankwiseError(
                f"{self.title or type(self).__name__} has no flag {odd[0]!r}; it has "
                f"{', '.join(sorted(known)) or 'none'}"
            )
        return replace(self, **flags)

    def check(self, model: "nn.Module", setting: Setting) -> None:
        """Raises RankwiseError, before any long work, where the method cannot do what is asked."""

    def arguments(self, args: "TrainingArguments") -> "TrainingArguments":
        """The user's TrainingArguments with what the method needs; refused where it cannot work."""
        return args

    def start(self, model: "nn.Module", setting: Setting) -> "RankPlan | None":
        """The ranks that are trained; None for a method without ranks."""
        return None

    def attach(self, model: "nn.Module", plan: "RankPlan | None", setting: Setting) -> "nn.Module":
        """Makes a base model trainable the method's way, and returns it."""
        raise NotImplementedError

    def trainer(self, model: "nn.Module", plan: "RankPlan | None", setting: Setting) -> "Trainer":
        """The Trainer that moves the parameters; it is not started here."""
        from rankwise.trainer import FiniteTrainer

        return FiniteTrainer(
            model,
            setting.args,
            configuration=setting.configuration or None,
            train_dataset=setting.train,
            **setting.options,
        )

    def keep(self, trainer: "Trainer", plan: "RankPlan | None", setting: Setting) -> Kept:
        """The ranks that stay after training."""
        return Kept(plan)

    def choose(
        self, model: "nn.Module", setting: Setting, resume: str | bool | None = None
    ) -> Kept:
        """Attach, train and keep in one: what a search is. The model is as before afterwards.

        Args:
            model: base model.
            setting: with held-out rows where the method chooses.
            resume: a checkpoint folder to go on from, or True for the last one.
        """
        from transformers import set_seed

        from rankwise.lora import restored
        from rankwise.trainer import run_training

        plan = self.start(model, setting)
        set_seed(setting.args.seed)
        with restored(model):
            trainer = self.trainer(self.attach(model, plan, setting), plan, setting)
            run_training(trainer, resume)
            if setting.options.get("trainer_class") is not None:  # its rows, prepared by it
                from rankwise.batches import documents

                setting = replace(setting, held_out=documents(trainer.eval_dataset))
            return self.keep(trainer, plan, setting)

    def hand_over(self, trainer: "Trainer", kept: Kept, folder: Path) -> None:
        """Writes `folder/<product>`, and leaves `trainer.model` computing what lies there."""
        from rankwise.sharded import gathered

        model = trainer.accelerator.unwrap_model(trainer.model)
        model.save_pretrained(str(folder / self.product), **gathered(model))

    def rivals(self, kept: Kept) -> "Mapping[str, Adapter]":
        """Other adapters out of the same training, of the same size: what tables set beside it."""
        return {}

    def label(self, plan: "RankPlan | None") -> str:
        """What tables call an arm that this method trained."""
        return self.title

    def says(self, plan: "RankPlan") -> str:
        """What a card says of where a plan's ranks come from."""
        return self.title

    def load(self, model: "nn.Module", folder: Path) -> "nn.Module":
        """A base model with what `hand_over` wrote.

        Args:
            model: base model; it may be changed.
            folder: the one named `product`.
        """
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(model, str(folder))
        check_whole(loaded, folder)
        return loaded


def check_whole(model: Any, folder: Path) -> None:
    """Raises AdapterError where a PEFT model was loaded from half an adapter, or from NaN.

    PEFT itself leaves what the file lacks as it was drawn, and says so in a warning.
    """
    import torch
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    from rankwise.errors import AdapterError

    wanted = get_peft_model_state_dict(model)
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        there = set(file.keys())
    if lacking := sorted(set(wanted) - there):
        raise AdapterError(f"{folder} lacks {lacking[0]!r}; the file is incomplete, copy it again")
    if odd := sorted(there - set(wanted)):
        raise AdapterError(
            f"{folder} has {odd[0]!r}, unlike the model; it was trained on another one"
        )
    for name, tensor in wanted.items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{folder} has NaN or infinite weights in {name!r}; train it anew")


_SLOTS |= {name for name, value in vars(Method).items() if callable(value) and name[0] != "_"}


@dataclass(frozen=True)
class LoraMethod(Method):
    """A method that trains LoRA's rank-1 pieces: what all of these share."""

    r: int = flag(8, "rank: the largest where ranks are chosen, else that of every module")
    lora_alpha: float | None = flag(None, "LoRA's alpha at rank r; without it, 2 r")
    lora_dropout: float = flag(0.0, "dropout in front of the adapters")
    target_modules: tuple[str, ...] | str | None = flag(
        "all-linear", "modules to adapt, by name or suffix, or all-linear"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.target_modules, list | tuple):
            names = tuple(self.target_modules)
            if names == ("all-linear",):  # as the command line gives it
                object.__setattr__(self, "target_modules", "all-linear")
            else:
                object.__setattr__(self, "target_modules", names or None)
        if not isinstance(self.r, int) or self.r < 1:
            raise RankwiseError(f"r is {self.r!r}; a rank has to be an integer of at least 1")
        if self.lora_alpha is not None and not 0 < self.lora_alpha < float("inf"):
            raise RankwiseError(f"lora_alpha is {self.lora_alpha}; it has to be > 0")
        budget = getattr(self, "budget", None)  # of those that take one
        if budget is not None and budget < 1:
            raise RankwiseError(f"budget is {budget}; it has to be at least 1")
        if not 0 <= self.lora_dropout < 1:
            raise RankwiseError(
                f"lora_dropout is {self.lora_dropout}; it has to be at least 0 and below 1"
            )

    @property
    def scaling(self) -> float:
        """lora_alpha / r, kept by every module whatever rank it ends at."""
        return 2.0 if self.lora_alpha is None else self.lora_alpha / self.r

    def start(self, model: "nn.Module", setting: Setting) -> "RankPlan":
        from rankwise.lora import uniform

        plan = uniform(
            model, self.r, target_modules=self.target_modules, lora_alpha=self.lora_alpha
        )
        return replace(plan, provenance={})  # the run's own says more

    def attach(self, model: "nn.Module", plan: "RankPlan | None", setting: Setting) -> "nn.Module":
        from rankwise.lora import build

        assert plan is not None
        return build(model, plan, task_type=setting.task_type, lora_dropout=self.lora_dropout)
