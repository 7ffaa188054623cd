"""Plans of whole linear modules: what methods take that PEFT's own layers train and rank."""

from typing import TYPE_CHECKING

from rankwise.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

    from rankwise.plan import RankPlan


def whole_modules(model: "nn.Module", plan: "RankPlan | None", title: str) -> "RankPlan":
    """The plan as it is, if every entry is a whole linear module (GPT-2's Conv1D among them).

    Raises:
        ModelError: an entry that is part of a fused module, or another kind of module.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    assert plan is not None
    for name, entry in plan.modules.items():
        if entry.rows is not None:
            raise ModelError(
                f"{title} cannot adapt {name!r}, a part of a module; name {entry.module!r}, or "
                "take all-linear"
            )
        if not isinstance(module := model.get_submodule(entry.module), nn.Linear | Conv1D):
            raise ModelError(
                f"{title} cannot adapt {name!r}, of type {type(module).__name__}; name linear "
                "modules alone"
            )
    return plan
