"""LoRA cut after training by the singular values of its own updates: no data decide."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from rankwise.errors import PlanError, RankwiseError
from rankwise.methods.base import Kept, LoraMethod, Setting, flag
from rankwise.plan import RankPlan

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer

    from rankwise.adapter import Adapter


@dataclass(frozen=True)
class SvdCut(LoraMethod):
    """LoRA of rank r, then the best approximation of lower rank (Eckart and Young), layer by layer.

    At most one of rank, energy and budget; without any, rank r / 2.

    Example:
        >>> rankwise.fit(SvdCut(energy=0.9), "rows.csv", model="roberta-base", output_dir="runs/e")
    """

    title: ClassVar[str] = "LoRA, cut by SVD"
    source: ClassVar[str] = "Eckart and Young 1936; PEFT's convert_to_lora"

    rank: int | None = flag(None, "this rank everywhere; without a size, r / 2", after=True)
    energy: float | None = flag(
        None,
        "the smallest rank of each module that keeps this share of its update's energy",
        after=True,
    )
    budget: int | None = flag(
        None, "at most so many parameters, by energy per parameter", after=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        ways = [name for name in ("rank", "energy", "budget") if getattr(self, name) is not None]
        if len(ways) > 1:
            raise RankwiseError(f"{ways[0]} and {ways[1]} both choose the size; give one")
        if self.rank is not None and not 1 <= self.rank <= self.r:
            raise RankwiseError(f"rank is {self.rank}; the adapter has ranks 1 to r = {self.r}")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise RankwiseError(f"energy is {self.energy}; it has to be above 0 and at most 1")

    def check(self, model: "nn.Module", setting: Setting) -> None:
        least = RankPlan.uniform(self.start(model, setting), 1).parameters
        if self.budget is not None and self.budget < least:
            raise PlanError(
                f"budget is {self.budget}; rank 1 in every module takes {least:,} parameters"
            )

    def keep(self, trainer: "Trainer", plan: "RankPlan | None", setting: Setting) -> Kept:
        from rankwise.adapter import Adapter

        assert plan is not None
        adapter = Adapter.of(trainer.accelerator.unwrap_model(trainer.model))
        cut = self._cut(adapter, plan)
        return Kept(replace(cut.as_plan(plan.scaling), r=self.r), found=(adapter, cut))

    def _cut(self, adapter: "Adapter", plan: "RankPlan") -> "Adapter":
        if self.budget is not None:
            # a fused layer stores zeros, which the plan does not count
            ratio = adapter.parameters / plan.parameters
            return adapter.truncate_svd(budget=min(round(self.budget * ratio), adapter.parameters))
        if self.energy is not None:
            return adapter.truncate_svd(energy=self.energy)
        return adapter.truncate_svd(self.rank or max(1, self.r // 2))

    def hand_over(self, trainer: "Trainer", kept: Kept, folder: Path) -> None:
        from rankwise.lora import swap_adapter

        whole, cut = kept.found
        whole.save(folder / "whole")
        cut.save(folder / "adapter")
        swap_adapter(trainer, folder / "adapter")

    def label(self, plan: "RankPlan | None") -> str:
        return self.title + (", energy" if self.energy is not None else "")
