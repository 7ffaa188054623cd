"""IA3 (arXiv 2205.05638): keys, values and feed-forward activations, scaled by trained vectors."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from rankwise.errors import ModelError, RankwiseError
from rankwise.methods.base import Method, Setting, flag

if TYPE_CHECKING:
    from torch import nn

# For types that PEFT has no default of: (key, value, second feed-forward layer) by common names.
COMMON = (
    ("key", "value", "output.dense"),
    ("k_proj", "v_proj", "down_proj"),
    ("k_proj", "v_proj", "fc2"),
    ("k_lin", "v_lin", "lin2"),
)


@dataclass(frozen=True)
class IA3(Method):
    """One vector a module: attention's keys and values are scaled, and what the second feed-forward
    layer takes in.

    Raises:
        RankwiseError: feedforward_modules that are not among target_modules.

    Source: arXiv 2205.05638, section 3.3; PEFT's modules by type of model. In GPT-2 these scale
    queries too, since one module computes all three.

    Example:
        >>> IA3(target_modules=("k_proj", "v_proj", "fc2"), feedforward_modules=("fc2",))
    """

    title: ClassVar[str] = "IA3"
    source: ClassVar[str] = "arXiv 2205.05638"
    usual_rate: ClassVar[float] = 1e-2

    target_modules: tuple[str, ...] | None = flag(
        None, "modules to scale, by name or suffix; without it, those of the model's type"
    )
    feedforward_modules: tuple[str, ...] | None = flag(
        None, "which of these are scaled at their input; the others are at their output"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "feedforward_modules"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if value else None)
        if odd := sorted(set(self.feedforward_modules or ()) - set(self.target_modules or ())):
            raise RankwiseError(
                f"feedforward_modules has {odd[0]!r}, which is not in target_modules; name it in "
                "both"
            )

    def modules(self, model: "nn.Module") -> tuple[list[str], list[str]]:
        """(target_modules, feedforward_modules) of a model.

        Raises:
            ModelError: neither PEFT nor this file knows names for such a model.
        """
        from peft.utils import constants

        if self.target_modules is not None:
            return list(self.target_modules), list(self.feedforward_modules or ())
        kind = str(getattr(getattr(model, "config", None), "model_type", None))
        if targets := constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.get(kind):
            inner = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(kind, [])
            return list(targets), list(inner)
        names = [f".{name}" for name, _ in model.named_modules()]
        for common in COMMON:
            if all(any(name.endswith(f".{end}") for name in names) for end in common):
                return list(common), [common[-1]]
        raise ModelError(
            f"no default modules of IA3 for a model of type {kind!r}; name target_modules and "
            "feedforward_modules"
        )

    def check(self, model: "nn.Module", setting: Setting) -> None:
        self.modules(model)

    def attach(self, model: "nn.Module", plan: Any, setting: Setting) -> "nn.Module":
        from peft import IA3Config, get_peft_model

        targets, inner = self.modules(model)
        config = IA3Config(
            task_type=setting.task_type, target_modules=targets, feedforward_modules=inner
        )
        try:
            return get_peft_model(model, config)
        except ValueError as error:  # a name that matches nothing
            raise ModelError(f"IA3: {error}".partition("\n")[0]) from error
