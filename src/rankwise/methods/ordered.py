"""LoRA, trained once and cut to a size by an order of its pieces that needs no data."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rankwise.errors import PlanError, RankwiseError
from rankwise.methods.base import Kept, LoraMethod, Setting, flag

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer

    from rankwise.adapter import Adapter
    from rankwise.orders import Order
    from rankwise.plan import RankPlan


@dataclass(frozen=True)
class OrderMethod(LoraMethod):
    """What every order of a trained adapter's pieces shares; a new one fills `order` alone.

    The run keeps `ordered/`, from which `rankwise cut` makes any other size by the same order.

    Raises:
        RankwiseError: rank and budget together, or a rank that the adapter does not have.
    """

    rank: int | None = flag(
        None, "so many pieces of every module; without a size, r / 2", after=True
    )
    budget: int | None = flag(None, "at most so many parameters, over all modules", after=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is not None and self.budget is not None:
            raise RankwiseError("rank and budget both choose the size; give one")
        if self.rank is not None and not 1 <= self.rank <= self.r:
            raise RankwiseError(f"rank is {self.rank}; the adapter has ranks 1 to r = {self.r}")

    def check(self, model: "nn.Module", setting: Setting) -> None:
        check_budget(self.budget, self.start(model, setting))

    def order(self, adapter: "Adapter", setting: Setting) -> "Order":
        """The order of the adapter's pieces, the most useful first."""
        raise NotImplementedError

    def keep(self, trainer: Any, plan: "RankPlan | None", setting: Setting) -> Kept:
        from rankwise.adapter import Adapter
        from rankwise.orders import Ordered

        assert plan is not None
        adapter = Adapter.of(trainer.accelerator.unwrap_model(trainer.model))
        ordered = Ordered(adapter, self.order(adapter, setting))
        if self.budget is None:
            small = ordered.cut(rank=self.rank or max(1, self.r // 2))
        else:
            small = ordered.cut(self.budget)
        return Kept(replace(small.as_plan(plan.scaling), r=self.r), found=(ordered, small))

    def hand_over(self, trainer: "Trainer", kept: Kept, folder: Path) -> None:
        hand_over_ordered(trainer, kept, folder)


def check_budget(budget: int | None, plan: "RankPlan") -> None:
    """Raises PlanError at a size that no cut of an adapter at this plan has."""
    least = max(entry.cost for entry in plan.modules.values())
    if budget is not None and not least <= budget <= plan.parameters:
        raise PlanError(
            f"budget is {budget}; cuts of this adapter have {least:,} to {plan.parameters:,} "
            "parameters"
        )


def hand_over_ordered(trainer: "Trainer", kept: Kept, folder: Path) -> None:
    """Writes `ordered/` and `adapter/` of `kept.found`, and loads the latter."""
    from rankwise.lora import swap_adapter

    ordered, small = kept.found
    ordered.save(folder / "ordered")
    small.save(folder / "adapter")
    swap_adapter(trainer, folder / "adapter")


@dataclass(frozen=True)
class SigmaCut(OrderMethod):
    """One threshold on the singular values s σ of all modules; a module may be left without any.

    The control of the cut by data.
    """

    title: ClassVar[str] = "LoRA, one threshold on σ"
    source: ClassVar[str] = "PARA, arXiv 2604.27796"

    def order(self, adapter: "Adapter", setting: Setting) -> "Order":
        from rankwise.orders import by_sigma

        return by_sigma(adapter.factors())


@dataclass(frozen=True)
class RandomCut(OrderMethod):
    """The SVD's pieces in random order: the control of all orders."""

    title: ClassVar[str] = "LoRA, random order"

    def order(self, adapter: "Adapter", setting: Setting) -> "Order":
        from rankwise.orders import at_random

        return at_random(adapter.factors(), setting.args.seed)
