"""Ranks by layer out of one nested adapter: which layer keeps how many pieces, within a budget.

Not in the DyLoRA paper. The pieces of every layer are ordered by training, so a layer l may keep
its first b_l. The loss on validation data says which layers a parameter is worth most to.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rankwise.errors import DivergedError, PlanError
from rankwise.nested import NestedTrainer
from rankwise.plan import RankPlan

Loss = Callable[[Mapping[str, int]], float]


@dataclass(frozen=True)
class Choice:
    """What `choose` found.

    Attributes:
        plan: the better of the two below on the validation rows.
        elastic: ranks by layer, chosen greedily.
        uniform: the largest single rank within the budget.
        elastic_loss, uniform_loss: losses of the two, each as a whole, on the rows that decide.
        losses: by entry and rank, the loss with that entry alone at another rank than `uniform`.
    """

    plan: RankPlan
    elastic: RankPlan
    uniform: RankPlan
    elastic_loss: float
    uniform_loss: float
    losses: dict[str, dict[int, float]]

    @property
    def pays(self) -> bool:
        """Whether ranks by layer had the lower loss on the rows that decide."""
        return self.elastic_loss < self.uniform_loss


def choose(
    loss: Loss,
    plan: RankPlan,
    budget: int,
    ranks: Sequence[int] | None = None,
    check: Loss | None = None,
) -> Choice:
    """The ranks of a nested adapter that a budget allows, by marginal loss per parameter.

    First the loss with each entry alone moved through its ranks, all others at the uniform rank of
    the budget: entries x ranks evaluations. Then, from the smallest rank everywhere, the step up of
    one entry that lowers its loss most per parameter is taken while it fits; a step may be of
    several ranks, so that a useless piece does not hide a useful one behind it. The same from the
    uniform rank, since many cheap pieces may leave no room for a dear one worth more; the plan with
    the lower sum of losses is taken. Last, the loss of the whole decides between it and the uniform
    rank.

    Args:
        loss: ranks by entry -> mean loss on validation rows, always the same ones.
        plan: the nested adapter's; its ranks are the largest.
        budget: LoRA parameters in all.
        ranks: those that were trained; None is all up to the plan's.
        check: the same on other rows, which decide. Ranks nearly always look better than uniform
            ones on the rows that they were chosen on; None decides on those all the same.

    Raises:
        PlanError: a budget outside what the trained ranks can take.
        DivergedError: a loss is not finite.

    Example:
        >>> losses = [validation_loss(trainer, rows) for rows in (half, other_half)]
        >>> choose(losses[0], trainer.plan, budget=20_000, check=losses[1]).plan.parameters
        19968
    """
    trained = sorted(ranks or range(1, plan.r + 1))
    uniform = uniform_within(plan, budget, trained)
    start = uniform.ranks
    here = _finite(loss, start)
    losses = {
        name: {b: here if b == start[name] else _finite(loss, {**start, name: b}) for b in trained}
        for name in plan.modules
    }
    chosen = min(
        (_greedy(plan, losses, budget, s) for s in (dict.fromkeys(start, trained[0]), start)),
        key=lambda found: sum(losses[name][b] for name, b in found.items()),
    )
    elastic = plan.with_ranks(chosen, method="elastic", budget=budget)
    uniform_loss = here if check is None else _finite(check, start)
    elastic_loss = uniform_loss if chosen == start else _finite(check or loss, chosen)
    better = elastic if elastic_loss < uniform_loss else uniform
    return Choice(better, elastic, uniform, elastic_loss, uniform_loss, losses)


def uniform_within(plan: RankPlan, budget: int, ranks: Sequence[int] | None = None) -> RankPlan:
    """The largest single rank of a nested adapter that a budget of parameters allows.

    Args:
        plan: the nested adapter's.
        budget: LoRA parameters in all, as the plan counts them.
        ranks: those that were trained; None is all up to the plan's.

    Raises:
        PlanError: a budget below the smallest rank, or above the largest.

    Example:
        >>> uniform_within(plan, budget=20_000).parameters
        18432
    """
    trained = sorted(ranks or range(1, plan.r + 1))
    one = RankPlan.uniform(plan, 1).parameters
    least, most = trained[0] * one, trained[-1] * one
    if not least <= budget <= most:
        raise PlanError(
            f"the budget is {budget:,} parameters; ranks {trained[0]} to {trained[-1]} of these "
            f"modules take {least:,} to {most:,}"
        )
    return RankPlan.uniform(plan, max(b for b in trained if b * one <= budget))


def validation_loss(trainer: NestedTrainer, dataset: Any) -> Loss:
    """The mean loss of a nested adapter on some rows, as a function of the ranks by entry.

    The model stands at the largest rank again after each call.

    Args:
        trainer: what `rankwise.train(..., method="dylora")` returned.
        dataset: rows with labels, ready for the model.

    Example:
        >>> validation_loss(trainer, rows)(trainer.plan.ranks)
        0.512
    """

    def loss(ranks: Mapping[str, int]) -> float:
        trainer.set_ranks(ranks)
        try:
            metrics = trainer.measure(dataset, loss_only=True).metrics or {}
        finally:
            trainer.set_ranks(trainer.r)
        return float(metrics["eval_loss"])

    return loss


def _finite(loss: Loss, ranks: Mapping[str, int]) -> float:
    """The loss at these ranks; NaN would win or lose every comparison by chance."""
    value = loss(ranks)
    if not math.isfinite(value):
        raise DivergedError(
            f"the validation loss is {value} at the ranks {dict(ranks)}; lower the learning rate "
            "and train the adapter anew"
        )
    return value


def _greedy(
    plan: RankPlan,
    losses: Mapping[str, Mapping[int, float]],
    budget: int,
    start: Mapping[str, int],
) -> dict[str, int]:
    """Ranks from `start` up: the step that lowers the loss most per parameter, while one fits."""
    ranks = dict(start)
    left = budget - sum(ranks[name] * entry.cost for name, entry in plan.modules.items())
    while True:
        steps = [
            (
                (losses[name][ranks[name]] - losses[name][b]) / ((b - ranks[name]) * entry.cost),
                name,
                b,
            )
            for name, entry in plan.modules.items()
            for b in losses[name]
            if b > ranks[name] and (b - ranks[name]) * entry.cost <= left
        ]
        gain, name, b = max(steps, key=lambda step: step[0], default=(0.0, "", 0))
        if gain <= 0:
            return ranks
        left -= (b - ranks[name]) * plan.modules[name].cost
        ranks[name] = b
