"""LoRA cut after training by the singular values of its own updates: no data decide."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rankwise.errors import RankwiseError
from rankwise.methods.base import Kept, LoraMethod, Setting, flag

if TYPE_CHECKING:
    from transformers import Trainer

    from rankwise.adapter import Adapter
    from rankwise.plan import RankPlan


@dataclass(frozen=True)
class SvdCut(LoraMethod):
    """LoRA of rank r, then the best approximation of lower rank (Eckart and Young), layer by layer.

    At most one of rank, energy and budget; without any, rank r / 2.

    Example:
        >>> rankwise.fit(SvdCut(energy=0.9), "rows.csv", model="roberta-base", output_dir="runs/e")
    """

    title: ClassVar[str] = "LoRA, cut by SVD"
    source: ClassVar[str] = "Eckart and Young 1936; PEFT's convert_to_lora; arXiv 2604.27796"

    rank: int | None = flag(None, "this rank everywhere")
    energy: float | None = flag(
        None, "the smallest rank of each module that keeps this share of its update's energy"
    )
    budget: int | None = flag(None, "at most so many parameters, by energy per parameter")
    threshold: bool = flag(
        False, "within the budget, one threshold on the singular values of all modules (PARA): a "
        "module may be left without an adapter"
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        ways = [name for name in ("rank", "energy", "budget") if getattr(self, name) is not None]
        if len(ways) > 1:
            raise RankwiseError(f"{ways[0]} and {ways[1]} both choose the size; give one")
        if self.threshold and ways and ways != ["budget"]:
            raise RankwiseError(f"threshold cuts to a budget; leave {ways[0]} out")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise RankwiseError(f"energy is {self.energy}; it has to be above 0 and at most 1")

    def keep(self, trainer: "Trainer", plan: "RankPlan | None", setting: Setting) -> Kept:
        from rankwise.adapter import Adapter

        assert plan is not None
        whole = Path(str(setting.args.output_dir)) / "whole"
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(str(whole))
        adapter = Adapter.load(whole)
        cut = self._cut(adapter, plan)
        return Kept(replace(cut.as_plan(plan.scaling), r=self.r), found=(adapter, cut))

    def _cut(self, adapter: "Adapter", plan: "RankPlan") -> "Adapter":
        budget = self.budget
        if budget is None and self.threshold:
            budget = plan.parameters // 2
        if budget is not None:
            # a fused layer stores zeros, which the plan does not count
            stored = min(round(budget * adapter.parameters / plan.parameters), adapter.parameters)
            if self.threshold:
                return adapter.truncate_threshold(stored)
            return adapter.truncate_svd(budget=stored)
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
        how: Any = "one threshold" if self.threshold else "energy" if self.energy else None
        return self.title + (f", {how}" if how else "")
