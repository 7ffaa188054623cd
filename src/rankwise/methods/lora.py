"""LoRA (arXiv 2106.09685) at one rank, at a plan's ranks, at ranks drawn by chance, or at the best
of a grid of ranks: what every other method is compared with."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rankwise.errors import PlanError, RankwiseError
from rankwise.methods.base import Kept, LoraMethod, Setting, flag
from rankwise.plan import RankPlan

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class LoRA(LoraMethod):
    """Plain LoRA: every rank-1 piece trained together, nothing chosen.

    Example:
        >>> rankwise.fit(LoRA(r=4), "rows.csv", model="roberta-base", output_dir="runs/lora")
    """

    title: ClassVar[str] = "LoRA"
    source: ClassVar[str] = "arXiv 2106.09685"
    shards: ClassVar[bool] = True

    budget: int | None = flag(None, "parameters: the one rank nearest to so many, instead of r")
    plan: str | None = flag(None, "plan.json to train at, instead of r", path=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.plan is None:
            return
        for name in ("r", "lora_alpha", "target_modules", "budget"):
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise PlanError(f"{name} is decided by the plan {self.plan}; give one of the two")

    def start(self, model: "nn.Module", setting: Setting) -> RankPlan:
        from rankwise.lora import check_fits

        if self.plan is not None:
            plan = RankPlan.load(self.plan)
            check_fits(model, plan)
            plan.lora_config()  # refuses a plan of zeros
            return plan
        plan = super().start(model, setting)
        if self.budget is None:
            return plan
        least = RankPlan.uniform(plan, 1).parameters
        if self.budget < least / 2 and self.target_modules == "all-linear":
            # rank 1 everywhere is too large: query and value alone
            plan = LoRA(self.r, self.lora_alpha, target_modules=None).start(model, setting)
        return nearest(plan, self.budget)

    def label(self, plan: RankPlan | None) -> str:
        ranks = set() if plan is None else set(plan.ranks.values())
        return f"LoRA r={ranks.pop()}" if len(ranks) == 1 else "LoRA at a plan"


@dataclass(frozen=True)
class RandomPlan(LoraMethod):
    """LoRA at a plan drawn uniformly from all plans of one size, with ranks up to r.

    The control of every method that chooses ranks: a choice that does not beat it chose nothing.
    """

    title: ClassVar[str] = "random plan"

    budget: int | None = flag(None, "parameters of the plan; without it, those of rank r / 2")

    def start(self, model: "nn.Module", setting: Setting) -> RankPlan:
        whole = super().start(model, setting)
        budget = self.budget or nearest(whole, whole.parameters // 2).parameters
        if budget in (RankPlan.uniform(whole, 1).parameters, whole.parameters):
            raise PlanError(f"there is one plan alone of {budget:,} parameters; none can be drawn")
        plan = RankPlan.random(whole, setting.args.seed, budget)
        return replace(plan, r=whole.r, provenance={})


@dataclass(frozen=True)
class LoraGrid(LoraMethod):
    """LoRA trained at each rank of a grid; the best on held-out rows is trained anew on all.

    What choosing a rank costs without a method for it (AutoLoRA's table 5): every training counts.
    """

    title: ClassVar[str] = "LoRA, grid over ranks"
    source: ClassVar[str] = "arXiv 2403.09113, table 5"
    anew: ClassVar[bool] = True
    chooses: ClassVar[bool] = True
    resumable: ClassVar[bool] = False  # but for whole ranks

    ranks: tuple[int, ...] = flag(tuple(range(1, 17)), "ranks that are tried")
    validation_fraction: float = flag(0.1, "share of the training rows that judges the ranks")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "ranks", tuple(sorted(set(map(int, self.ranks)))))
        if not self.ranks or self.ranks[0] < 1:
            raise RankwiseError(f"ranks are {self.ranks}; give integers of at least 1")

    def start(self, model: "nn.Module", setting: Setting) -> RankPlan:
        """Every module at the largest rank of the grid, at the scaling of r."""
        top = self.ranks[-1]
        return LoRA(r=top, lora_alpha=self.scaling * top, target_modules=self.target_modules).start(
            model, setting
        )

    def choose(
        self, model: "nn.Module", setting: Setting, resume: str | bool | None = None
    ) -> Kept:
        whole, scores = self.start(model, setting), {}
        folder = Path(setting.args.output_dir)
        for rank in self.ranks:
            scores[rank] = self._score(model, RankPlan.uniform(whole, rank), setting, folder)
        sign = 1 if setting.greater_is_better else -1
        best = max(self.ranks, key=lambda rank: (sign * scores[rank][setting.metric], -rank))
        plan = RankPlan.uniform(whole, best)
        figures = {"grid": {str(rank): found for rank, found in scores.items()}}
        return Kept(replace(plan, r=self.ranks[-1], provenance={}), figures=figures)

    def _score(
        self, model: "nn.Module", plan: RankPlan, setting: Setting, folder: Path
    ) -> dict[str, Any]:
        """The held-out metrics of LoRA at one rank, kept in a file for a run that goes on."""
        from transformers import set_seed

        from rankwise.files import write_json
        from rankwise.lora import restored
        from rankwise.reading import read_json
        from rankwise.trainer import replaced

        file = folder / f"rank-{max(plan.ranks.values())}.json"
        if file.is_file():
            return read_json(file)
        set_seed(setting.args.seed)
        # a rank is trained to its end or anew: its checkpoints would be taken for the next one's
        setting = replace(setting, args=replaced(setting.args, save_strategy="no"))
        with restored(model):
            trainer = self.trainer(self.attach(model, plan, setting), plan, setting)
            trainer.train()
            raw = trainer.evaluate(setting.held_out)
        clock = ("runtime", "time", "per_second", "epoch")  # Trainer's own, no measure of a rank
        found = {
            name.removeprefix("eval_"): value
            for name, value in raw.items()
            if isinstance(value, float) and not name.endswith(clock)
        }
        write_json(file, found)
        return found


def nearest(plan: RankPlan, budget: int) -> RankPlan:
    """The uniform plan of the same modules whose parameters are nearest to a budget, rank >= 1."""
    one = RankPlan.uniform(plan, 1).parameters
    near = RankPlan.uniform(plan, max(1, round(budget / one)))
    return replace(near, r=max(plan.r, *near.ranks.values()), provenance={})
