"""FLOP (arXiv 1910.04732) on LoRA's rank axis: hard-concrete gates that are driven to a size.

Gates, factors and the multipliers of an augmented Lagrangian train together while the target size
falls to what was asked for; then the gates are fixed, and the pieces that stayed open train on.
The loop is in `rankwise.methods.hard_concrete`.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rankwise.errors import RankwiseError
from rankwise.methods.base import Kept, LoraMethod, Setting, flag

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer, TrainingArguments

    from rankwise.plan import RankPlan


@dataclass(frozen=True)
class FLOP(LoraMethod):
    """One training that ends at a size: ranks by layer, 0 among them.

    Raises:
        RankwiseError: a flag out of range; in `check`, a budget that no piece or every piece fits.

    Source: Wang, Wohlwend and Lei, arXiv 1910.04732; the gates are those of Louizos, Welling and
    Kingma, arXiv 1712.01312. There a weight matrix is factored and pruned; here it is LoRA's B A.

    Example:
        >>> FLOP(budget=50_000, r=16)
    """

    title: ClassVar[str] = "FLOP"
    source: ClassVar[str] = "arXiv 1910.04732; gates: arXiv 1712.01312"
    claim: ClassVar[str] = "choosing ranks"

    budget: int | None = flag(None, "size to end at, in parameters; without it, keep_share")
    keep_share: float = flag(0.5, "size to end at, as a share of that at rank r")
    gate_learning_rate: float = flag(0.1, "learning rate of the gates' log alpha")
    multiplier_learning_rate: float = flag(0.1, "learning rate of the Lagrangian's multipliers")
    warmup_share: float = flag(0.3, "share of the steps over which the target falls to that size")
    hard_share: float = flag(0.3, "share of the steps, the last, that train under fixed gates")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.keep_share <= 1:
            raise RankwiseError(
                f"keep_share is {self.keep_share}; it has to be above 0 and at most 1"
            )
        for name in ("gate_learning_rate", "multiplier_learning_rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise RankwiseError(f"{name} is {getattr(self, name)}; it has to be above 0")
        for name in ("warmup_share", "hard_share"):
            if not 0 <= getattr(self, name) < 1:
                raise RankwiseError(
                    f"{name} is {getattr(self, name)}; it has to be at least 0 and below 1"
                )
        if self.warmup_share + self.hard_share >= 1:
            raise RankwiseError(
                f"warmup_share + hard_share is {self.warmup_share + self.hard_share:g}; it has to "
                "be below 1, so that the gates meet the whole target before they are fixed"
            )

    def target(self, plan: "RankPlan") -> int:
        """The size to end at, in parameters.

        Raises:
            RankwiseError: no piece fits, or a budget above the size at rank r.
        """
        full = plan.parameters
        target = int(self.keep_share * full) if self.budget is None else self.budget
        if target > full:
            raise RankwiseError(
                f"budget is {target}, but rank {self.r} everywhere has {full} parameters; lower "
                "the budget, or raise r"
            )
        least = min(entry.cost for entry in plan.modules.values())
        if target < least:
            raise RankwiseError(
                f"a size of {target} parameters has no room for a piece: the smallest takes "
                f"{least}; raise budget or keep_share"
            )
        return target

    def check(self, model: "nn.Module", setting: Setting) -> None:
        plan = self.start(model, setting)
        assert plan is not None
        self.target(plan)

    def arguments(self, args: "TrainingArguments") -> "TrainingArguments":
        if args.fp16:
            raise RankwiseError(
                "fp16 scales losses, which the gates' Lagrangian does not see; use bf16 or float32"
            )
        return args

    def trainer(self, model: "nn.Module", plan: "RankPlan | None", setting: Setting) -> "Trainer":
        from rankwise.methods.hard_concrete import FlopTrainer

        assert plan is not None
        return FlopTrainer(
            model,
            setting.args,
            plan=plan,
            method=self,
            configuration=dict(setting.configuration),
            train_dataset=setting.train,
            **setting.options,
        )

    def keep(self, trainer: Any, plan: "RankPlan | None", setting: Setting) -> Kept:
        from rankwise.gate import gate_values

        assert plan is not None
        opened, values = trainer.opened(), gate_values(trainer.gates)
        modules = {
            name: replace(entry, rank=len(opened[name]), gate=tuple(values[name]))
            for name, entry in plan.modules.items()
        }
        multipliers = trainer.multipliers
        figures = {
            "target": trainer.target,
            "expected_size": trainer.size().item() * plan.parameters,
            "multipliers": [multipliers.first.item(), multipliers.second.item()],
        }
        kept = replace(plan, modules=modules, provenance={"method": self.describe()})
        return Kept(kept, figures=figures)

    def hand_over(self, trainer: Any, kept: Kept, folder: Path) -> None:
        from rankwise.gate import bake
        from rankwise.lora import drop

        assert kept.plan is not None
        model = trainer.accelerator.unwrap_model(trainer.model)
        drop(model, kept.plan)
        bake(model, trainer.opened())
        del model.multipliers
        super().hand_over(trainer, kept, folder)
