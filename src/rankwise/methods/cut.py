"""LoRA, cut after training to the smallest size that held-out rows call as good.

One training; then an order of all its rank-1 pieces by what some held-out rows say
(`rankwise.surgeon`), the quality of several sizes on other rows (`rankwise.choose`), and the
smallest that is as good. Every other size is a cut of the same order.
"""

import math
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rankwise.errors import DataError, RankwiseError
from rankwise.methods.base import Kept, LoraMethod, Setting, flag
from rankwise.methods.ordered import check_budget, hand_over_ordered

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer

    from rankwise.adapter import Adapter
    from rankwise.choose import Curve
    from rankwise.orders import Ordered
    from rankwise.plan import RankPlan
    from rankwise.rows import TwoSets

NOTHING = (
    "no row tells any size from another: the training has learned nothing, or the rows are too "
    "few. So no size is called as good, and without a budget all pieces are kept; train longer, or "
    "at a higher learning rate"
)
LEAST_ROWS = 64  # half of them order, half judge
LEAST_BATCHES = 32  # for the spread of a loss that is known by batch alone


@dataclass(frozen=True)
class CutByData(LoraMethod):
    """Trains LoRA of rank r on all linear layers, and keeps the smallest cut that is as good.

    "As good" is a statement about an interval, not about two means: the lower end of the paired
    95 % interval of the difference to all pieces, over the rows that judge, lies within the margin.

    Raises:
        RankwiseError: a flag out of range. DataError: too few held-out rows.

    Example:
        >>> fitted = rankwise.fit("cut", "rows.csv", model="roberta-base", output_dir="runs/first")
        >>> fitted.curve.sizes
        (2592, 5184, 10368, 20736, 41472, 82944, 165888, 331776)
    """

    title: ClassVar[str] = "LoRA, cut by data"
    source: ClassVar[str] = "docs/cut.md"
    claim: ClassVar[str] = "cutting"
    chooses: ClassVar[bool] = True
    takes_validation: ClassVar[bool] = True
    shards: ClassVar[bool] = True

    budget: int | None = flag(
        None, "hand over this size, in parameters, whatever the curve says", after=True
    )
    margin: float | None = flag(
        None, "how much worse than all pieces is as good, in the metric's units; without it, 0.01, "
        "or one standard error of the metric where the rows cannot tell 0.01; of a loss, 1 %",
        after=True,
    )  # fmt: skip
    sizes: int = flag(8, "sizes on the curve, each half of the one before", after=True)
    order_rows: int = flag(
        400, "held-out rows that make the order, at most half; the rest judge", after=True
    )
    heal: float = flag(
        0.0, "train the cut on, for this share of the steps, and keep that where it is better on "
        "the rows that judge; the other sizes stay as they are", after=True
    )  # fmt: skip
    validation_fraction: float = flag(
        0.2, "share of the training rows that is held out, where there are no validation rows"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.margin is not None and not 0 <= self.margin < float("inf"):
            raise RankwiseError(f"margin is {self.margin}; it has to be at least 0")
        if not 0 <= self.heal < 1:
            raise RankwiseError(f"heal is {self.heal}; it is a share, at least 0 and below 1")
        for name, least in (("sizes", 2), ("order_rows", LEAST_ROWS // 2)):
            if getattr(self, name) < least:
                raise RankwiseError(f"{name} is {getattr(self, name)}; it has to be >= {least}")

    def check(self, model: "nn.Module", setting: Setting) -> None:
        from rankwise.sharded import sharding

        plan = self.start(model, setting)
        self.halves(setting)
        if self.heal and sharding(setting.args):
            raise RankwiseError("heal trains a cut on, which FSDP cannot shard; leave heal out")
        check_budget(self.budget, plan)

    def halves(self, setting: Setting) -> "TwoSets":
        """The held-out rows that make the order (`train`), and those that judge it (`validation`).

        Raises:
            DataError: too few for both.
        """
        from rankwise.rows import hold_out

        count = len(setting.held_out)
        if count < LEAST_ROWS:
            share = self.validation_fraction
            raise DataError(
                f"{count} held-out rows are too few: half of at least {LEAST_ROWS} order the "
                f"pieces and half judge the cuts; give {math.ceil(LEAST_ROWS / share)} training "
                f"rows (validation_fraction={share:g} of them is held out), a larger "
                f"validation_fraction, or {LEAST_ROWS} validation rows"
            )
        order = min(self.order_rows, count // 2)
        return hold_out(setting.held_out, count - order, setting.args.seed)

    def keep(self, trainer: Any, plan: "RankPlan | None", setting: Setting) -> Kept:
        from accelerate.utils import broadcast_object_list

        from rankwise.batches import batches_of
        from rankwise.choose import default_margin, smallest_as_good
        from rankwise.surgeon import order

        assert plan is not None
        rows = self.halves(setting)
        model = trainer.accelerator.unwrap_model(trainer.model)
        batches = batches_of(trainer, rows.train)
        bar = trainer.is_world_process_zero() and not setting.args.disable_tqdm
        # By rounding alone processes could come to different orders; all take the first one's.
        [ordered] = broadcast_object_list([order(model, batches, bar=bar, seed=setting.args.seed)])
        cuts = self.cuts(ordered)
        found = _measured(trainer, cuts, rows.validation, setting)
        alike = len(set(found.values)) == 1 and not any(found.difference_errors)
        if self.budget is not None:
            small = ordered.cut(self.budget)
        else:
            small = cuts[max(cuts) if alike else smallest_as_good(found, self.margin)]
        kept = replace(small.as_plan(plan.scaling), r=self.r)
        margin = default_margin(found) if self.margin is None else self.margin
        figures: dict[str, Any] = {
            "margin": margin,
            "learned_nothing": alike,  # as far as these rows can tell
            "order_rows": len(rows.train),
            "picked_by": "as good" if self.budget is None else "budget",
            "choice": NOTHING
            if alike
            else _said(found, kept, ordered, margin, asked=self.budget is not None),
        }
        if self.heal:
            small, figures["heal"] = self._healed(trainer, small, rows.validation, setting)
            figures["choice"] += _said_healed(figures["heal"])
        return Kept(kept, found, figures, found=(ordered, small))

    def _healed(
        self, trainer: Any, small: "Adapter", rows: Any, setting: Setting
    ) -> "tuple[Adapter, dict[str, Any]]":
        """The cut trained on, or as it was where that is no better; and what both score on `rows`.

        At the training's own rate and schedule, warmed up anew. `trainer.model` carries it
        afterwards.
        """
        from tempfile import TemporaryDirectory

        from transformers import set_seed

        from rankwise.adapter import Adapter
        from rankwise.lora import swap_adapter
        from rankwise.trainer import FiniteTrainer, replaced

        steps = max(1, round(self.heal * trainer.state.max_steps))
        args = replaced(setting.args, max_steps=steps, save_strategy="no")
        set_seed(args.seed)
        with TemporaryDirectory() as folder:
            small.save(Path(folder) / "cut")
            swap_adapter(trainer, Path(folder) / "cut", trainable=True)
        again = FiniteTrainer(trainer.model, args, train_dataset=setting.train, **setting.options)
        before = again.evaluate(rows)[f"eval_{setting.metric}"]
        again.train()
        after = again.evaluate(rows)[f"eval_{setting.metric}"]
        kept = after > before if setting.greater_is_better else after < before
        about = {"steps": steps, "metric": setting.metric, "before": before, "after": after}
        return (Adapter.of(trainer.model) if kept else small), about | {"kept": kept}

    def cuts(self, ordered: "Ordered") -> dict[int, "Adapter"]:
        """The adapter at each size of the curve, by its parameters."""
        from rankwise.errors import AdapterError

        found = {}
        for halvings in range(self.sizes):
            try:
                small = ordered.cut(ordered.order.parameters >> halvings)
            except AdapterError:  # no piece fits
                break
            found[small.parameters] = small
        return found

    def rivals(self, kept: Kept) -> dict[str, "Adapter"]:
        from rankwise.orders import Ordered, at_random, by_sigma

        ordered, small = kept.found
        whole, size = ordered.adapter, small.parameters
        if size == whole.parameters and not kept.figures.get("heal", {}).get("kept"):
            return {}  # nothing was cut: every order's cut to this size is this adapter
        factors = whole.factors()
        orders = {"one threshold on σ": by_sigma(factors), "random order": at_random(factors)}
        found = {"all pieces": whole}
        for name, by in orders.items():
            if by.pieces[by.sequence[0][0]].cost <= size:  # else it has no cut so small
                found[name] = Ordered(whole, by).cut(size)
        return found

    def hand_over(self, trainer: "Trainer", kept: Kept, folder: Path) -> None:
        hand_over_ordered(trainer, kept, folder)


def _said_healed(found: Mapping[str, Any]) -> str:
    change = f"{found['metric']} {found['before']:.4f} -> {found['after']:.4f} on the same rows"
    kept = "which is kept" if found["kept"] else "which is not kept"
    return f"; trained on for {found['steps']} steps: {change}, {kept}"


def _measured(trainer: Any, cuts: "Mapping[int, Adapter]", rows: Any, setting: Setting) -> "Curve":
    """The quality of each cut, written into the trained model in turn."""
    from rankwise.choose import measure_sizes
    from rankwise.curvature import read, write
    from rankwise.orders import padded

    model = trainer.accelerator.unwrap_model(trainer.model)
    whole, args = read(model), trainer.args
    if trainer.compute_metrics is None:  # one batch would have an interval of no width
        size = max(1, min(args.per_device_eval_batch_size, len(rows) // LEAST_BATCHES))
        trainer.args = copy(args)  # not replace: a new TrainingArguments resets accelerate's state
        trainer.args.per_device_eval_batch_size = size

    def set_size(size: int) -> None:
        factors = cuts[size].factors()
        write(model, {name: padded(factors.get(name), f) for name, f in whole.items()})

    try:
        return measure_sizes(
            trainer,
            rows,
            set_size,
            sorted(cuts),
            unit="parameters",
            metric=setting.metric,
            greater_is_better=setting.greater_is_better,
            score_rows=setting.score_rows,
        )
    finally:
        trainer.args = args
        write(model, whole)


def _said(found: "Curve", plan: "RankPlan", ordered: "Ordered", margin: float, asked: bool) -> str:
    """The verdict in words; of a size that was asked for, the figures without a verdict."""
    ranks, modules = plan.ranks.values(), len(ordered.order.pieces)
    low_rank = 0 if len(ranks) < modules else min(ranks)
    size = (
        f"{plan.parameters:,} of {ordered.order.parameters:,} parameters (rank {low_rank} to "
        f"{max(ranks)}, {len(ranks)} of {modules} modules)"
    )
    if plan.parameters not in found.sizes:
        return f"{size}, as asked for; its size is not on the curve"
    i = found.sizes.index(plan.parameters)
    _, low, high = found.difference(plan.parameters)
    if not found.greater_is_better:  # the difference of the two values as they stand there
        low, high = 0.0 - high, 0.0 - low
    rows = f"{found.rows:,} held-out rows"
    if i == len(found.sizes) - 1 and not asked:
        return (
            f"{size}: no smaller size could be shown to lose at most {margin:.4f} of "
            f"{found.metric} on {rows}"
        )
    verdict = ", as asked for" if asked else f" are as good as all, to a margin of {margin:.4f}"
    return (
        f"{size}{verdict}: {found.metric} {found.values[i]:.4f} against "
        f"{found.values[-1]:.4f}, paired 95 % interval of the difference {low:+.4f} to "
        f"{high:+.4f} on {rows}"
    )
