"""The choice among the sizes of one trained adapter: curve, pick, ranks by layer in a budget.

For every method whose one training gives several sizes. Two sizes are compared row by row on the
same rows: what counts is the standard error of the difference, not that of each.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rankwise.errors import DivergedError, PlanError, RankwiseError
from rankwise.plan import RankPlan, within_budget
from rankwise.reading import as_json

if TYPE_CHECKING:
    from transformers import TrainingArguments
    from transformers.trainer_utils import EvalLoopOutput

    from rankwise.trainer import FiniteTrainer

RESAMPLES = 100  # of the bootstrap behind a standard error, which is then known to 7 %
CONFIDENCE = 1.96  # standard errors on each side of a 95 % interval

Loss = Callable[[Mapping[str, int]], float]
ScoreRows = Callable[[Any], Callable[[np.ndarray], float]]


@dataclass(frozen=True)
class Curve:
    """The quality of one trained adapter at each of its sizes, without retraining.

    Attributes:
        metric: the one that counts, "loss" where nothing else was computed.
        greater_is_better: its direction.
        unit: of the sizes: "rank", or "parameters".
        sizes: in ascending order.
        metrics: all metrics at each size, the mean loss among them.
        standard_errors: of `metric` at each size: over bootstrap resamples of the rows, or for the
            loss over batches.
        difference_errors: standard error of the difference between each size and the largest, row
            by row on the same resamples; 0 for the largest.
        rows: rows that it was measured on.
    """

    metric: str
    greater_is_better: bool
    unit: Literal["rank", "parameters"]
    sizes: tuple[int, ...]
    metrics: tuple[dict[str, float], ...]
    standard_errors: tuple[float, ...]
    difference_errors: tuple[float, ...]
    rows: int

    @property
    def values(self) -> tuple[float, ...]:
        """The metric that counts, at each size."""
        return tuple(found[self.metric] for found in self.metrics)

    def difference(self, size: int) -> tuple[float, float, float]:
        """How much better `size` is than the largest size: (mean, low, high) of a 95 % interval.

        In the metric's units; positive is better, whatever the metric's direction.

        Example:
            >>> curve.difference(31_000)
            (-0.001, -0.005, 0.004)
        """
        i = self.sizes.index(size)
        sign = 1 if self.greater_is_better else -1
        mean = sign * (self.values[i] - self.values[-1])
        width = CONFIDENCE * self.difference_errors[i]
        return mean, mean - width, mean + width

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it: lists for tuples."""
        return as_json(asdict(self))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "Curve":
        """The inverse of `to_dict`."""
        listed: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
        return cls(**listed)


def measure_sizes(
    trainer: "FiniteTrainer",
    dataset: Any,
    set_size: Callable[[int], None],
    sizes: Sequence[int],
    *,
    unit: Literal["rank", "parameters"],
    metric: str | None = None,
    greater_is_better: bool | None = None,
    score_rows: ScoreRows | None = None,
) -> Curve:
    """Evaluates an adapter at each of its sizes, on the same rows. The model ends at the largest.

    Args:
        trainer: a trained one.
        dataset: rows with labels, ready for the model.
        set_size: makes the trainer's model an adapter of this size.
        sizes: in ascending order.
        unit: of the sizes.
        metric: the name under which the trainer's `compute_metrics` returns what counts; None is
            `args.metric_for_best_model`, or else the loss.
        greater_is_better: direction of the metric; None is `args.greater_is_better` where the
            metric is that of `args`, or else False for names that end in "loss" or "perplexity".
        score_rows: of predictions, the metric of any choice of their rows, where that is quicker
            than to compute it anew; None does that.

    Raises:
        RankwiseError: no sizes, no rows, or a metric that is not computed.
        DivergedError: the metric is not finite at some size.
    """
    if not sizes or len(dataset) == 0:
        raise RankwiseError(f"there are no {unit}s, or no rows, to measure; give some of both")
    metric, greater_is_better = what_counts(trainer.args, metric, greater_is_better)
    found, samples = [], []
    try:
        for size in sizes:
            set_size(size)
            output = trainer.measure(dataset, loss_only=trainer.compute_metrics is None)
            values = _plain(output.metrics or {})
            if metric not in values:
                there = ", ".join(sorted(values)) or "nothing; do the rows have labels?"
                raise RankwiseError(f"metric is {metric!r}, but compute_metrics gives {there}")
            for name in {metric, "loss"} & set(values):
                if not np.isfinite(values[name]):
                    raise DivergedError(f"{name} is {values[name]} at {unit} {size} after training")
            found.append(values)
            samples.append(_resampled(trainer, metric, output, score_rows))
    finally:
        set_size(sizes[-1])
    errors = [_spread(sample) for sample in samples]
    gaps = [_spread(sample - samples[-1]) for sample in samples]
    return Curve(
        metric,
        greater_is_better,
        unit,
        tuple(sizes),
        tuple(found),
        tuple(errors),
        tuple(gaps),
        len(dataset),
    )


def what_counts(
    args: "TrainingArguments", metric: str | None, greater_is_better: bool | None
) -> tuple[str, bool]:
    """The metric that counts and its direction, from TrainingArguments where they are not given."""
    best = (args.metric_for_best_model or "loss").removeprefix("eval_")
    metric = (metric or best).removeprefix("eval_")
    if greater_is_better is None and metric == best:
        greater_is_better = args.greater_is_better
    if greater_is_better is None:
        greater_is_better = not metric.endswith(("loss", "perplexity"))
    return metric, greater_is_better


def _plain(metrics: Mapping[str, float]) -> dict[str, float]:
    """Trainer's metrics under their own names, without what describes the machine."""
    names = {name: name.removeprefix("eval_") for name in metrics}
    timing = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    return {
        plain: float(metrics[name])
        for name, plain in names.items()
        if plain not in timing and isinstance(metrics[name], Real)  # a score by class is none
    }


def _resampled(
    trainer: "FiniteTrainer", metric: str, output: "EvalLoopOutput", score_rows: ScoreRows | None
) -> np.ndarray:
    """Numbers whose standard deviation is the metric's standard error, alike for every size.

    The metric of seeded bootstrap resamples of the rows; where rows cannot be resampled, what the
    batches' mean losses say of their mean.
    """
    compute, labels = trainer.compute_metrics, output.label_ids
    if compute is not None and labels is not None:
        score = (score_rows or scored_anew(compute, metric))(output)
        sample = resampled(score, len(labels[0] if isinstance(labels, tuple) else labels))
        if len(sample):
            return sample
    losses = trainer.batch_losses()
    return losses / len(losses) ** 0.5  # their spread is then that of their mean


def resampled(score: Callable[[np.ndarray], float], count: int) -> np.ndarray:
    """A metric of seeded bootstrap resamples of `count` rows; empty where it is not finite.

    The same draws for the same count: of two models, the differences of these numbers have the
    spread of the difference of the two metrics, row by row.

    Args:
        score: the metric of the rows at these indices, an index as often as it is drawn.
        count: of rows.
    """
    if not np.isfinite(score(np.arange(count))):
        return np.array([])
    rng = np.random.default_rng(0)
    return np.array([score(rng.integers(count, size=count)) for _ in range(RESAMPLES)])


def interval(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Half the width of the 95 % interval of a difference, from resamples of the same rows."""
    return CONFIDENCE * _spread(np.subtract(ours, theirs))


def scored_anew(compute: Callable[[Any], Mapping[str, float]], metric: str) -> ScoreRows:
    """`score_rows` of a metric of which nothing more is known than how it is computed."""
    from transformers import EvalPrediction

    def score_rows(output: Any) -> Callable[[np.ndarray], float]:
        def score(rows: np.ndarray) -> float:
            sample = EvalPrediction(
                _take_rows(output.predictions, rows), _take_rows(output.label_ids, rows)
            )
            return _plain(compute(sample)).get(metric, float("nan"))

        return score

    return score_rows


def _spread(sample: np.ndarray) -> float:
    finite = sample[np.isfinite(sample)]  # a resample may lack a class
    return float(np.std(finite, ddof=1)) if len(finite) > 1 else 0.0


def _take_rows(arrays: Any, rows: np.ndarray) -> Any:
    """Some rows of predictions or labels, which may be several arrays."""
    if isinstance(arrays, tuple):
        return tuple(_take_rows(array, rows) for array in arrays)
    return arrays[rows]


def pick(curve: Curve, tolerance: float | None = None) -> int:
    """The smallest size whose metric lies within a tolerance of the best size's.

    Args:
        curve: quality at every size.
        tolerance: in the metric's own units, at least 0; None is one standard error of the metric
            at the best size.

    Raises:
        RankwiseError: a negative tolerance.

    Example:
        >>> pick(curve)
        3
    """
    if tolerance is not None and not tolerance >= 0:
        raise RankwiseError(f"tolerance is {tolerance}; it has to be >= 0")
    sign = 1 if curve.greater_is_better else -1
    signed = [sign * value for value in curve.values]
    best = int(np.argmax(signed))
    allowed = curve.standard_errors[best] if tolerance is None else tolerance
    return next(
        size
        for size, value in zip(curve.sizes, signed, strict=True)
        if value >= signed[best] - allowed
    )


POINT = 0.01


def default_margin(curve: Curve) -> float:
    """What `smallest_as_good` allows where no margin is given, in the metric's units."""
    if curve.metric.endswith(("loss", "perplexity")):
        return POINT * abs(curve.values[-1])
    return max(POINT, curve.standard_errors[-1])


def smallest_as_good(curve: Curve, margin: float | None = None) -> int:
    """The smallest size that is as good as the largest, by paired intervals.

    From the largest size down, the first whose interval of the difference to the largest reaches
    below the margin ends the walk: testing in this fixed sequence, a size is called as good by
    mistake no more often than one interval alone would (Maurer, Hothorn and Lehmacher 1995).

    Args:
        curve: quality at every size.
        margin: how much worse still counts as good, in the metric's units, at least 0; None is
            0.01, or one standard error of the metric at the largest size where that is more: rows
            that cannot tell an accuracy to a point cannot tell a difference of one. For a loss or a
            perplexity it is 1 % of it: rows differ by far more than sizes do, so that its own
            standard error says nothing of how well a difference is known.

    Raises:
        RankwiseError: a negative margin.

    Example:
        >>> smallest_as_good(curve, margin=0.005)
        31104
    """
    if margin is not None and not margin >= 0:
        raise RankwiseError(f"margin is {margin}; it has to be >= 0")
    if margin is None:
        margin = default_margin(curve)
    found = curve.sizes[-1]
    for size in reversed(curve.sizes):
        if curve.difference(size)[1] < -margin:
            break
        found = size
    return found


@dataclass(frozen=True)
class ByLayer:
    """What `ranks_by_layer` found.

    Attributes:
        plan: the better of the two below on the rows that decide.
        by_layer: ranks layer by layer, chosen greedily.
        uniform: the largest single rank within the budget.
        by_layer_loss, uniform_loss: losses of the two, each as a whole, on the rows that decide.
        losses: by entry and rank, the loss with that entry alone at another rank than `uniform`.
    """

    plan: RankPlan
    by_layer: RankPlan
    uniform: RankPlan
    by_layer_loss: float
    uniform_loss: float
    losses: dict[str, dict[int, float]]

    @property
    def pays(self) -> bool:
        """Whether ranks by layer had the lower loss on the rows that decide."""
        return self.by_layer_loss < self.uniform_loss


def ranks_by_layer(
    loss: Loss,
    plan: RankPlan,
    budget: int,
    ranks: Sequence[int] | None = None,
    check: Loss | None = None,
) -> ByLayer:
    """The ranks by layer that a budget allows, by marginal loss per parameter.

    First the loss with each entry alone moved through its ranks, all others at the uniform rank of
    the budget: entries x ranks evaluations. Then the greedy of `plan.within_budget`, twice: from
    the smallest rank everywhere, and from the uniform rank, because many cheap pieces taken early
    can leave no room for a dear one that is worth more. Of the two, the plan with the lower sum of
    losses is taken. Last, the loss of that plan as a whole is compared with the uniform rank's.

    Args:
        loss: ranks by entry -> mean loss on validation rows, always the same ones.
        plan: the adapter's; its ranks are the largest.
        budget: LoRA parameters in all.
        ranks: those that were trained; None is all up to the plan's.
        check: the same on other rows, which decide. Ranks nearly always look better than uniform
            ones on the rows that they were chosen on; None decides on those all the same.

    Raises:
        PlanError: a budget outside what the trained ranks can take.
        DivergedError: a loss is not finite.

    Example:
        >>> losses = [size_loss(trainer, rows) for rows in (half, other_half)]
        >>> ranks_by_layer(losses[0], trainer.plan, 20_000, check=losses[1]).plan.parameters
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
    costs = {name: entry.cost for name, entry in plan.modules.items()}
    chosen = min(
        (
            within_budget(losses, costs, budget, begin)
            for begin in (dict.fromkeys(start, trained[0]), start)
        ),
        key=lambda found: sum(losses[name][b] for name, b in found.items()),
    )
    by_layer = plan.with_ranks(chosen, method="by layer", budget=budget)
    uniform_loss = here if check is None else _finite(check, start)
    by_layer_loss = uniform_loss if chosen == start else _finite(check or loss, chosen)
    better = by_layer if by_layer_loss < uniform_loss else uniform
    return ByLayer(better, by_layer, uniform, by_layer_loss, uniform_loss, losses)


def uniform_within(plan: RankPlan, budget: int, ranks: Sequence[int] | None = None) -> RankPlan:
    """The largest single rank that a budget of parameters allows.

    Args:
        plan: its modules are taken.
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


def _finite(loss: Loss, ranks: Mapping[str, int]) -> float:
    """The loss at these ranks; NaN would win or lose every comparison by chance."""
    value = loss(ranks)
    if not math.isfinite(value):
        raise DivergedError(
            f"the validation loss is {value} at the ranks {dict(ranks)}; lower the learning rate "
            "and train the adapter anew"
        )
    return value
