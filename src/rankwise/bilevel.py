"""The two-level loop, in which factors and head learn on D_tr and gates on D_val, as a Trainer.

One optimizer step (arXiv 2403.09113, algorithm 1):

1. forward and backward of the training batch at (θ, β): Trainer's own pass, which leaves
   ∇_θ L_train for the parameters' step and ∇_β L_train for the finite difference;
2. the hypergradient of the validation loss through θ' = θ - η ∇_θ L_train (`rankwise.hypergrad`);
3. one AdamW step of θ with ∇_θ L_train and of β with the hypergradient, at two learning rates.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import TrainingArguments

from rankwise.gate import LearnedGate, gate_values
from rankwise.hypergrad import RADIUS, RADIUS_BF16, Estimator, TrainGradient, hypergradient
from rankwise.trainer import GatedTrainer


@dataclass(frozen=True)
class MicroBatch:
    """What it takes to compute the loss of a training micro-batch again, dropout masks included."""

    inputs: dict[str, Any]
    num_items: Any
    rng: tuple[Tensor, Tensor | None]


class LearnsGates(Protocol):
    """What a SearchTrainer asks of a method."""

    @property
    def estimator(self) -> Estimator: ...

    @property
    def gate_learning_rate(self) -> float: ...

    @property
    def gate_weight_decay(self) -> float: ...

    @property
    def lookahead(self) -> float | None: ...

    @property
    def radius(self) -> float | None: ...

    @property
    def two_sided(self) -> bool: ...

    def kept(self, alpha: list[float]) -> list[int]: ...


class SearchTrainer(GatedTrainer):
    """Trains LoRA factors and task head on D_tr while the gates learn on D_val.

    Args:
        model: PEFT model with gates attached.
        args: TrainingArguments.
        gated: what `attach` returned.
        method: the gate's method.
        validation_dataset: D_val.
        configuration: what a checkpoint has to agree with to be resumed.
        **trainer: of transformers.Trainer.
    """

    def __init__(
        self,
        model: PeftModel,
        args: TrainingArguments,
        *,
        gated: Mapping[str, LearnedGate],
        method: LearnsGates,
        validation_dataset: Any,
        configuration: Mapping[str, Any],
        **trainer: Any,
    ):
        super().__init__(model, args, configuration=configuration, **trainer)
        self.gated, self.method = gated, method
        self.betas = [gate.beta for gate in gated.values()]
        meta = {id(beta) for beta in self.betas}
        self.parameters = [p for p in model.parameters() if p.requires_grad and id(p) not in meta]
        # columns that the model does not take go the way that Trainer's own loaders send them
        self._collate = self.data_collator
        if trainer.get("trainer_class") is not None:  # it has prepared the rows, as it does D_tr
            validation_dataset = self.eval_dataset
        if isinstance(validation_dataset, Dataset):
            validation_dataset = self._remove_unused_columns(validation_dataset)
        else:
            self._collate = self._get_collator_with_removed_columns(self.data_collator)
        self.validation_dataset = validation_dataset
        coarse = args.bf16 or any(p.dtype == torch.bfloat16 for p in model.parameters())
        self._radius = method.radius or (RADIUS_BF16 if coarse else RADIUS)
        self._micro_batches: list[MicroBatch] = []
        self._order: dict[int, np.ndarray] = {}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's optimizer for θ, with a group of its own for β."""
        for beta in self.betas:
            beta.requires_grad_(False)
        optimizer = super().create_optimizer(model)
        for beta in self.betas:
            beta.requires_grad_(True)
        optimizer.add_param_group(
            {
                "params": self.betas,
                "lr": self.method.gate_learning_rate,
                "weight_decay": self.method.gate_weight_decay,
            }
        )
        return optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        model.train()
        if callable(getattr(self.optimizer, "train", None)):  # schedule-free optimizers
            self.optimizer.train()
        inputs = self._prepare_inputs(inputs)
        with self._attention():
            rng = _rng_state(self.args.device)
            loss = self._scaled_loss(model, inputs, num_items_in_batch)
            self.accelerator.backward(loss)
            loss = loss.detach()  # lets go of the graph before the passes that follow
            self._stop_unless_finite(loss)
            self._micro_batches.append(MicroBatch(inputs, num_items_in_batch, rng))
            if self.accelerator.sync_gradients:  # the last micro-batch of this optimizer step
                self._set_meta_gradients(self.accelerator.unwrap_model(model))
        return loss

    def _set_meta_gradients(self, model: nn.Module) -> None:
        """Replaces ∇_β L_train, which the backward pass left in β.grad, by the hypergradient."""
        batches = self._validation_batches(len(self._micro_batches))
        items = self._get_num_items_in_batch(batches, self.args.device)
        train = [self._replayed(model, batch) for batch in self._micro_batches]
        val = [lambda b=b: self._scaled_loss(model, b, items) for b in batches]
        lookahead = self.method.lookahead
        found = hypergradient(
            self.method.estimator,
            self.parameters,
            self.betas,
            train,
            val,
            self.optimizer.param_groups[0]["lr"] if lookahead is None else lookahead,
            train_gradient=TrainGradient(_grads(self.parameters), _grads(self.betas)),
            radius=self._radius,
            two_sided=self.method.two_sided,
            reduce=self._mean_over_processes,
        )
        for beta, gradient in zip(self.betas, found, strict=True):
            beta.grad = gradient
        self._micro_batches.clear()

    def _replayed(self, model: nn.Module, batch: MicroBatch) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            with _replaying(batch.rng, self.args.device):
                return self._scaled_loss(model, batch.inputs, batch.num_items)

        return loss

    def _scaled_loss(self, model: nn.Module, inputs: dict[str, Any], num_items: Any) -> Tensor:
        """Loss of a micro-batch, scaled so that the micro-batches of a step add up to its mean.

        The rule is Trainer.training_step's; it is needed apart from the backward pass here.
        """
        with self.compute_loss_context_manager():
            # a copy: label smoothing pops the labels, and this batch will be seen again
            loss = self.compute_loss(model, {**inputs}, num_items_in_batch=num_items)
        scaled = self.loss_is_scaled_for_ga
        if scaled is None:
            scaled = (self.model_accepts_loss_kwargs and num_items is not None) or (
                self.compute_loss_func is not None
            )
        return loss if scaled else loss / self.current_gradient_accumulation_steps

    def _validation_batches(self, count: int) -> list[dict[str, Any]]:
        """As many batches of D_val as the training step had, chosen by the step's number alone.

        Nothing about them has to be saved for a resumed search to see the same ones.
        """
        size = self.args.per_device_train_batch_size
        world, rank = self.args.world_size, self.args.process_index
        n = len(self.validation_dataset)
        batches = []
        for i in range(count):
            # numbered as if every step had all its micro-batches: the last step of an epoch may
            # have fewer, and the batches of the steps after it do not depend on how many
            number = self.state.global_step * self.args.gradient_accumulation_steps + i
            first = (number * world + rank) * size
            rows = [self._order_of(p // n)[p % n] for p in range(first, first + min(size, n))]
            batches.append(self._collate([self.validation_dataset[int(row)] for row in rows]))
        return [self._prepare_inputs(batch) for batch in batches]

    def _order_of(self, sweep: int) -> np.ndarray:
        """The order of D_val's rows in its sweep-th pass."""
        if sweep not in self._order:
            rng = np.random.default_rng([self.args.seed, sweep])
            self._order = {
                **{s: o for s, o in self._order.items() if s >= sweep - 1},
                sweep: rng.permutation(len(self.validation_dataset)),
            }
        return self._order[sweep]

    def _mean_over_processes(self, tensors: list[Tensor]) -> list[Tensor]:
        if self.args.world_size == 1:
            return tensors
        flat = torch.cat([t.reshape(-1) for t in tensors])
        flat = self.accelerator.reduce(flat, reduction="mean")
        parts = flat.split([t.numel() for t in tensors])
        return [p.view_as(t) for p, t in zip(parts, tensors, strict=True)]

    def _attention(self) -> AbstractContextManager[Any]:
        """Fused attention has no second derivative; the plain kernel has."""
        exact = self.method.estimator == "exact"
        return sdpa_kernel(SDPBackend.MATH) if exact else nullcontext()

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        # β's gradient lives on another scale and must not shrink θ's.
        return self.accelerator.clip_grad_norm_(self.parameters, self.args.max_grad_norm)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean rank that the current α would give."""
        kept = [len(self.method.kept(a)) for a in gate_values(self.gated).values()]
        super().log(logs | {"mean_rank": round(sum(kept) / len(kept), 4)}, start_time)


def _grads(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors]


def _rng_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The state of the CPU's generator and of the accelerator's, which draws the dropout masks."""
    if device.type == "cpu":
        return torch.get_rng_state(), None
    return torch.get_rng_state(), torch.get_device_module(device).get_rng_state()


def _set_rng_state(rng: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(rng[0])
    if rng[1] is not None:
        torch.get_device_module(device).set_rng_state(rng[1])


@contextmanager
def _replaying(rng: tuple[Tensor, Tensor | None], device: torch.device) -> Iterator[None]:
    """Random numbers from a recorded state on; the running state is untouched."""
    running = _rng_state(device)
    _set_rng_state(rng, device)
    try:
        yield
    finally:
        _set_rng_state(running, device)
