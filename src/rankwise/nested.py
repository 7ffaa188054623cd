"""DyLoRA's training as a Trainer, the quality of the trained adapter at every rank, and the pick.

An adapter trained so is *nested*: for each b of the range its first b rank-1 pieces are an adapter
of their own. It is an ordinary PEFT adapter at the largest rank; `rankwise.adapter` cuts the others
out of it.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from numbers import Real
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import EvalPrediction, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from rankwise.adapter import NESTED, card_header
from rankwise.errors import DivergedError, RankwiseError
from rankwise.files import write_text
from rankwise.gate import attach_nested, bake, keep_first
from rankwise.lora import ADAPTER, factors
from rankwise.methods import DyLoRA
from rankwise.plan import RankPlan
from rankwise.trainer import GatedTrainer

RESAMPLES = 100  # of the bootstrap behind a standard error, which is then known to 7 %
FEW_BATCHES = 8  # too few for the standard error of a mean over batches

logger = logging.get_logger(__name__)


CARD = """# Nested LoRA adapter

Trained by DyLoRA: the first b of its {} rank-1 pieces are an adapter for every rank b that
`nested_plan.json` names. As it stands it is a stock PEFT adapter of the largest rank; another one:
`rankwise truncate --adapter FOLDER --r 2 --output_dir DIR`.
"""


class NestedTrainer(GatedTrainer):
    """Trains all ranks of a range at once: one drawn rank b per optimizer step (algorithm 1).

    Outside of training steps the model stands at the largest rank; `set_ranks` changes that.

    Args:
        model: PEFT model built at the plan; it gets nested gates.
        args: TrainingArguments; `args.seed` draws the ranks.
        plan: the same rank for every entry, the largest that is trained.
        method: the distribution of b, and what moves.
        configuration: what a checkpoint has to agree with to be resumed.
        **trainer: of transformers.Trainer.
    """

    def __init__(
        self,
        model: PeftModel,
        args: TrainingArguments,
        *,
        plan: RankPlan,
        method: DyLoRA,
        configuration: dict[str, Any],
        **trainer: Any,
    ):
        gated = attach_nested(model, plan)
        super().__init__(model, args, configuration=configuration, **trainer)
        self.gated, self.method, self.r = gated, method, plan.r
        about = plan.provenance | {"method": method.describe()}
        self.plan = plan.with_ranks(plan.ranks, **about)
        self._factors = factors(model)
        self._batch_losses: list[Tensor] = []
        self._confined = False

    def set_ranks(self, ranks: int | Mapping[str, int]) -> None:
        """Makes the model an adapter of rank b, until the next training step or evaluation in one.

        Args:
            ranks: one b for all, or one per plan entry, each from 1 to the plan's rank.

        Raises:
            PlanError: a rank out of that range, or names that are not the plan's.

        Example:
            >>> trainer.set_ranks(2)
            >>> trainer.evaluate(rows)["eval_loss"]
            0.48
        """
        keep_first(self.gated, ranks)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        if self.method.frozen and not self._confined:  # a second train() keeps the optimizer
            move_only(optimizer, self._moving)
            self._confined = True
        return optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        # before the forward pass, whose recomputation under checkpointing has to see the same b,
        # and alike for every micro-batch of the step
        self.set_ranks(self._drawn())
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.method.frozen and self.accelerator.sync_gradients:
            for parameter, axis, pieces in self._moving():  # the others must not count in clipping
                if parameter.grad is not None:
                    kept = parameter.grad.index_select(axis, pieces)
                    parameter.grad.zero_().index_copy_(axis, pieces, kept)
        return loss

    def _drawn(self) -> int:
        return self.method.draw(self.r, self.args.seed, self.state.global_step)

    def _moving(self) -> Iterable[tuple[Tensor, int, Tensor]]:
        """(A or B, its rank axis, indices on it of the b-th piece of every entry)."""
        b = self._drawn()
        for name, (a, b_matrix) in self._factors.items():
            starts = np.cumsum([0, *self.gated[name].sizes[:-1]])
            pieces = torch.as_tensor(starts + b - 1, device=a.device)
            yield a, 0, pieces
            yield b_matrix, 1, pieces

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        if self.is_in_train:
            self.set_ranks(self.r)
        self._batch_losses.clear()
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        loss, logits, labels = super().prediction_step(*args, **kwargs)
        if loss is not None:
            self._batch_losses.append(loss.detach().float().mean())
        return loss, logits, labels

    def loss_standard_error(self) -> float:
        """Of the last evaluation's mean loss, from the spread between its batches; 0 for one."""
        losses = self.accelerator.gather(torch.stack(self._batch_losses).to(self.args.device))
        if len(losses) < FEW_BATCHES:
            logger.warning_once(
                f"the standard error of the loss comes from {len(losses)} evaluation batches; "
                "lower per_device_eval_batch_size, or give compute_metrics"
            )
        return float(losses.std() / len(losses) ** 0.5) if len(losses) > 1 else 0.0

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            found = super().train(*args, **kwargs)
        finally:
            self.set_ranks(self.r)
        self.stop_unless_finite_parameters()
        return found

    def measure(self, dataset: Any, loss_only: bool = False) -> EvalLoopOutput:
        """Evaluates the model as it stands; without predictions where the loss is all there is."""
        loader = self.get_test_dataloader(dataset)
        return self.evaluation_loop(
            loader, "Evaluation", prediction_loss_only=loss_only, metric_key_prefix="eval"
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's name for `save_nested`; Trainer itself calls it for checkpoints."""
        if _internal_call and output_dir is not None:  # a checkpoint; a push to the hub has none
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            self.save_nested(output_dir or str(self.args.output_dir))

    def save_nested(self, folder: str | Path) -> None:
        """Writes the trained adapter, from which `Adapter.truncate` cuts every rank of its range.

        An ordinary PEFT adapter of the largest rank, and `nested_plan.json`, which says what was
        trained. Call it on the main process.

        Args:
            folder: made where there is none; files of these names in it are replaced.

        Example:
            >>> trainer.save_nested("nested")
            >>> Adapter.load("nested").truncate(2).save("adapter-2")
        """
        folder = Path(folder)
        self.set_ranks(self.r)
        model = self.accelerator.unwrap_model(self.model)
        bake(model)
        try:
            model.save_pretrained(str(folder))
            base = model.peft_config[ADAPTER].base_model_name_or_path
            write_text(folder / "README.md", card_header(base) + CARD.format(self.r))
            self.plan.save(folder / NESTED)
        finally:  # new gates: the trainer can go on evaluating
            self.gated = attach_nested(model, self.plan)
            self._factors = factors(model)


def move_only(
    optimizer: torch.optim.Optimizer, moving: Callable[[], Iterable[tuple[Tensor, int, Tensor]]]
) -> None:
    """Confines an optimizer's steps to some indices of some parameters, whatever the optimizer.

    A gradient of zero does not keep AdamW still (momentum, weight decay), so what is not to move is
    put back after each step, bit for bit. The optimizer's state goes on as under that gradient.

    Args:
        optimizer: its step gets hooks.
        moving: called before each step: (parameter, axis, indices on that axis that may move).
    """
    before: list[tuple[Tensor, int, Tensor, Tensor]] = []

    def remember(*_: Any) -> None:
        before[:] = [(p, axis, pieces, p.detach().clone()) for p, axis, pieces in moving()]

    @torch.no_grad()
    def put_back(*_: Any) -> None:
        for parameter, axis, pieces, value in before:
            moved = parameter.index_select(axis, pieces)
            parameter.copy_(value.index_copy(axis, pieces, moved))

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(put_back)


@dataclass(frozen=True)
class Curve:
    """The quality of one nested adapter at every rank, without retraining.

    Attributes:
        metric: the one that counts, "loss" where nothing else was computed.
        greater_is_better: its direction.
        ranks: in ascending order.
        metrics: all metrics at each rank, the mean loss among them.
        standard_errors: of `metric` at each rank: over bootstrap resamples of the rows, or for the
            loss over batches.
        rows: rows that it was measured on.
    """

    metric: str
    greater_is_better: bool
    ranks: tuple[int, ...]
    metrics: tuple[dict[str, float], ...]
    standard_errors: tuple[float, ...]
    rows: int

    @property
    def values(self) -> tuple[float, ...]:
        """The metric that counts, at each rank."""
        return tuple(found[self.metric] for found in self.metrics)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it: lists for tuples."""
        return json.loads(json.dumps(asdict(self)))


def curve(
    trainer: NestedTrainer,
    dataset: Any,
    *,
    ranks: Iterable[int] | None = None,
    metric: str | None = None,
    greater_is_better: bool | None = None,
) -> Curve:
    """Evaluates a nested adapter at every rank of its range; the model ends at the largest.

    Args:
        trainer: what `rankwise.train(..., method="dylora")` returned.
        dataset: rows with labels, ready for the model.
        ranks: which ranks; None is all that were trained.
        metric: the name under which the trainer's `compute_metrics` returns what counts; None is
            `args.metric_for_best_model`, or else the loss.
        greater_is_better: direction of the metric; None is `args.greater_is_better` where the
            metric is that of `args`, or else False for names that end in "loss" or "perplexity".

    Raises:
        RankwiseError: a rank that was not trained, a metric that is not computed.
        DivergedError: the metric is not finite at some rank.

    Example:
        >>> curve(trainer, validation, metric="accuracy").values
        (0.71, 0.74, 0.75, 0.75)
    """
    if not isinstance(trainer, NestedTrainer):
        raise RankwiseError(
            f"{type(trainer).__name__} trained one rank; a curve needs train(..., method='dylora')"
        )
    trained = trainer.method.trained(trainer.r)
    wanted = trained if ranks is None else sorted({index(b) for b in ranks})
    if not wanted or len(dataset) == 0:
        raise RankwiseError("there are no ranks, or no rows, to measure; give some of both")
    if odd := [b for b in wanted if b not in trained]:
        raise RankwiseError(f"rank {odd[0]} was not trained; there are {trained}")
    best = (trainer.args.metric_for_best_model or "loss").removeprefix("eval_")
    metric = (metric or best).removeprefix("eval_")
    if greater_is_better is None and metric == best:
        greater_is_better = trainer.args.greater_is_better
    if greater_is_better is None:
        greater_is_better = not metric.endswith(("loss", "perplexity"))
    found, errors = [], []
    try:
        for b in wanted:
            trainer.set_ranks(b)
            output = trainer.measure(dataset, loss_only=trainer.compute_metrics is None)
            values = _plain(output.metrics or {})
            if metric not in values:
                there = ", ".join(sorted(values)) or "nothing; do the rows have labels?"
                raise RankwiseError(f"metric is {metric!r}, but compute_metrics gives {there}")
            for name in {metric, "loss"} & set(values):
                if not np.isfinite(values[name]):
                    raise DivergedError(f"{name} is {values[name]} at rank {b} after training")
            found.append(values)
            errors.append(_standard_error(trainer, metric, output))
    finally:
        trainer.set_ranks(trainer.r)
    return Curve(
        metric, greater_is_better, tuple(wanted), tuple(found), tuple(errors), len(dataset)
    )


def _plain(metrics: Mapping[str, float]) -> dict[str, float]:
    """Trainer's metrics under their own names, without what describes the machine."""
    names = {name: name.removeprefix("eval_") for name in metrics}
    timing = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    return {
        plain: float(metrics[name])
        for name, plain in names.items()
        if plain not in timing and isinstance(metrics[name], Real)  # a score by class is none
    }


def _standard_error(trainer: NestedTrainer, metric: str, output: EvalLoopOutput) -> float:
    """Standard deviation of a metric over bootstrap resamples of the evaluated rows, seeded."""
    compute, labels = trainer.compute_metrics, output.label_ids
    if compute is None or labels is None:
        return trainer.loss_standard_error()

    def measured(rows: np.ndarray) -> float:
        sample = EvalPrediction(_take(output.predictions, rows), _take(labels, rows))
        return _plain(compute(sample)).get(metric, float("nan"))

    count = len(labels[0] if isinstance(labels, tuple) else labels)
    if not np.isfinite(measured(np.arange(count))):
        return trainer.loss_standard_error()
    rng = np.random.default_rng(0)
    values = [measured(rng.integers(count, size=count)) for _ in range(RESAMPLES)]
    finite = [value for value in values if np.isfinite(value)]  # a resample may lack a class
    return float(np.std(finite, ddof=1)) if len(finite) > 1 else 0.0


def _take(arrays: Any, rows: np.ndarray) -> Any:
    if isinstance(arrays, tuple):
        return tuple(_take(array, rows) for array in arrays)
    return arrays[rows]


def pick(curve: Curve, tolerance: float | None = None) -> int:
    """The smallest rank whose metric lies within a tolerance of the best rank's.

    Args:
        curve: quality at every rank.
        tolerance: in the metric's own units, at least 0; None is one standard error of the metric
            at the best rank.

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
        b for b, value in zip(curve.ranks, signed, strict=True) if value >= signed[best] - allowed
    )
