"""Nested training as a Trainer (arXiv 2210.07558), and the trained adapter at every rank.

An adapter trained so is *nested*: for each b of the range its first b rank-1 pieces are an adapter
of their own. It is an ordinary PEFT adapter at the largest rank; `rankwise.adapter` cuts the others
out of it.
"""

from collections.abc import Callable, Iterable, Mapping
from operator import index
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from rankwise.adapter import NESTED, Adapter, card_header
from rankwise.choose import Curve, Loss, ScoreRows, measure_sizes
from rankwise.errors import AdapterError, RankwiseError
from rankwise.files import write_text
from rankwise.gate import attach_nested, bake, keep_first
from rankwise.lora import ADAPTER, check_fits, factors
from rankwise.methods import from_description
from rankwise.plan import RankPlan
from rankwise.trainer import GatedTrainer, labelled

CARD = """# Nested LoRA adapter

The first b of its {} rank-1 pieces are an adapter for every rank b that `nested_plan.json` names.
As it stands it is a stock PEFT adapter of the largest rank; another one:
`rankwise cut --adapter FOLDER --rank 2 --output_dir DIR`.
"""


class DrawsRanks(Protocol):
    """What a NestedTrainer asks of a method."""

    @property
    def frozen(self) -> bool: ...

    def draw(self, r: int, seed: int, step: int) -> int: ...

    def trained(self, r: int) -> list[int]: ...

    def describe(self) -> dict[str, Any]: ...


class NestedTrainer(GatedTrainer):
    """Trains all ranks of a range at once: one drawn rank b per optimizer step (algorithm 1).

    Outside of training steps the model stands at the largest rank; `set_ranks` changes that.

    Args:
        model: PEFT model built at the plan; it gets nested gates.
        args: TrainingArguments; `args.seed` draws the ranks.
        plan: the same rank for every entry, the largest that is trained.
        method: the distribution of b, and what moves.
        configuration: what a checkpoint has to agree with to be resumed.
        trained: the model carries an adapter that was trained before; `train` then does nothing.
        **trainer: of transformers.Trainer.
    """

    def __init__(
        self,
        model: PeftModel,
        args: TrainingArguments,
        *,
        plan: RankPlan,
        method: DrawsRanks,
        configuration: Mapping[str, Any],
        trained: bool = False,
        **trainer: Any,
    ):
        gated = attach_nested(model, plan)
        super().__init__(model, args, configuration=configuration, **trainer)
        self.gated, self.method, self.r = gated, method, plan.r
        self._trained = trained
        trained_ranks = {"trained_ranks": method.trained(plan.r)}
        about = plan.provenance | {"method": method.describe()} | trained_ranks
        self.plan = plan.with_ranks(plan.ranks, **about)
        self._factors = factors(model)
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
        return super().evaluation_loop(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self._trained:
            return None
        try:
            found = super().train(*args, **kwargs)
        finally:
            self.set_ranks(self.r)
        self.stop_unless_finite_parameters()
        return found

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
    put back after each step, bit for bit. The optimizer's own state (its running means) is left as
    the optimizer computed it.

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


def curve(
    trainer: NestedTrainer,
    dataset: Any,
    *,
    ranks: Iterable[int] | None = None,
    metric: str | None = None,
    greater_is_better: bool | None = None,
    score_rows: ScoreRows | None = None,
) -> Curve:
    """Evaluates a nested adapter at every rank of its range; the model ends at the largest.

    Args:
        trainer: what `rankwise.train` with a nested method returned.
        dataset: rows with labels, ready for the model.
        ranks: which ranks; None is all that were trained.
        metric, greater_is_better, score_rows: what counts, see `choose.measure_sizes`.

    Raises:
        RankwiseError: a rank that was not trained, a metric that is not computed.
        DivergedError: the metric is not finite at some rank.

    Example:
        >>> curve(trainer, validation, metric="accuracy").values
        (0.71, 0.74, 0.75, 0.75)
    """
    if not isinstance(trainer, NestedTrainer):
        raise RankwiseError(
            f"{type(trainer).__name__} trained one rank; a curve over ranks needs a nested adapter"
        )
    trained = trainer.method.trained(trainer.r)
    wanted = trained if ranks is None else sorted({index(b) for b in ranks})
    if odd := [b for b in wanted if b not in trained]:
        raise RankwiseError(f"rank {odd[0]} was not trained; there are {trained}")
    try:
        return measure_sizes(
            trainer,
            dataset,
            trainer.set_ranks,
            wanted,
            unit="rank",
            metric=metric,
            greater_is_better=greater_is_better,
            score_rows=score_rows,
        )
    finally:
        trainer.set_ranks(trainer.r)


def size_loss(trainer: NestedTrainer, dataset: Any) -> Loss:
    """The mean loss of a nested adapter on some rows, as a function of the ranks by entry.

    The model stands at the largest rank again after each call.

    Args:
        trainer: what `rankwise.train` with a nested method returned.
        dataset: rows with labels, ready for the model.

    Example:
        >>> size_loss(trainer, rows)(trainer.plan.ranks)
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


def load_nested(
    model: PreTrainedModel, folder: str | Path, *, args: TrainingArguments, **trainer: Any
) -> NestedTrainer:
    """A nested adapter from disk on its base model: to measure, not to train anew.

    Args:
        model: the base model; it carries the adapter afterwards.
        folder: what `save_nested` wrote, `nested/` of a run.
        args: TrainingArguments, for the evaluation.
        **trainer: passed on to transformers.Trainer (`compute_metrics`, `data_collator`, ...).

    Returns:
        The trainer as the training left it, for `curve` and `ranks_by_layer`.

    Raises:
        AdapterError: no nested adapter there. PlanError: it is for another model.

    Example:
        >>> trainer = rankwise.load_nested(base, "runs/d/nested", args=args)
        >>> rankwise.curve(trainer, other_rows).values
        (0.41, 0.38, 0.38, 0.37)
    """
    adapter = Adapter.load(folder)
    if adapter.plan is None:
        raise AdapterError(f"{folder} holds an adapter of one rank; give nested/ of a run")
    method: Any = from_description(adapter.plan.provenance.get("method"))
    args = method.arguments(labelled(args))
    check_fits(model, adapter.plan)
    return NestedTrainer(
        PeftModel.from_pretrained(model, str(folder), is_trainable=True),
        args,
        plan=adapter.plan,
        method=method,
        configuration={},
        trained=True,
        **trainer,
    )
