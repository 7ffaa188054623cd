"""Hard-concrete gates on LoRA's rank axis, and the Trainer that drives them to a size (FLOP).

Each rank-1 piece has a gate g between 0 and 1 that is exactly 0 or 1 with a probability of its own
(Louizos et al., arXiv 1712.01312). The probability that g > 0 is smooth in the gate's parameter, so
the expected size of the adapter is too, and FLOP (arXiv 1910.04732) holds it at a target by an
augmented Lagrangian. For the rest of the run the gates are fixed, and the factors train on alone.
"""

import math
from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainingArguments

from rankwise.errors import RankwiseError
from rankwise.gate import Gate, attach_gates
from rankwise.methods.flop import FLOP
from rankwise.plan import RankPlan
from rankwise.trainer import GatedTrainer

# Louizos et al., section 4: temperature, and the interval that a gate is stretched to.
BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
START = math.log(0.95 / 0.05)  # log α of a new gate, as FLOP's authors have it: nearly always open
EDGE = 1e-6  # uniform draws keep this far from 0 and 1, whose logits are infinite


def open_probability(log_alpha: Tensor) -> Tensor:
    """P(g > 0) = sigmoid(log α - β log(-γ / ζ)), Louizos et al.'s equation 12."""
    return torch.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))


def stretched(logits: Tensor) -> Tensor:
    """A sigmoid stretched to (γ, ζ) and cut to [0, 1] (equation 11; of log α alone, 13)."""
    return (torch.sigmoid(logits) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def lagrangian(size: Tensor, target: float, first: Tensor, second: Tensor) -> Tensor:
    """λ₁ (t - s) + λ₂ (t - s)² of an expected size t and a target s (FLOP, section 3.2)."""
    return first * (size - target) + second * (size - target) ** 2


class HardConcrete(Gate):
    """g drawn by the concrete distribution in a training step, and deterministic outside of one.

    log α is kept in float32 whatever the type of B.

    Attributes:
        noise: the logits of this step's uniform draws, length k; None outside of a step.
        fixed: g from the hard part of training on; None before.
    """

    def __init__(
        self, names: list[str], sizes: list[int], mask: Tensor | None, device: torch.device
    ):
        super().__init__(names, sizes, mask)
        self.log_alpha = nn.Parameter(torch.full((sum(sizes),), START, device=device))
        self.noise: Tensor | None = None
        self.fixed: Tensor | None = None

    def values(self) -> Tensor:
        if self.fixed is not None:
            return self.fixed
        if self.noise is None:
            return stretched(self.log_alpha)
        return stretched((self.log_alpha + self.noise) / BETA)  # equation 10


class Multipliers(nn.Module):
    """λ₁ and λ₂, 0 at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))


def draws(seed: int, step: int, count: int) -> Tensor:
    """Logits of uniform draws (count,), a function of seed and step and of nothing else.

    So all micro-batches and processes of a step share them, recomputed activations see them again,
    and a resumed run draws what the run that was never stopped would have drawn.
    """
    u = np.random.default_rng([seed, step]).uniform(EDGE, 1 - EDGE, count)
    return torch.tensor(np.log(u / (1 - u)), dtype=torch.float32)


def open_pieces(log_alpha: Sequence[float], costs: Sequence[int], target: int) -> list[int]:
    """Which pieces stay open for good: most expected L0 per parameter first, while they fit.

    A piece whose deterministic gate is shut takes no room.

    Args:
        log_alpha: of every piece.
        costs: parameters of every piece.
        target: parameters in all.

    Returns:
        Indices in ascending order.

    Example:
        >>> open_pieces([2.0, -5.0, 1.0, 3.0], [10, 10, 10, 10], target=25)
        [0, 3]
    """
    logits = torch.tensor(log_alpha, dtype=torch.float64)
    chance, gate = open_probability(logits).tolist(), stretched(logits).tolist()
    found, left = [], target
    for j in sorted(range(len(costs)), key=lambda j: -chance[j] / costs[j]):
        if gate[j] > 0 and costs[j] <= left:
            found.append(j)
            left -= costs[j]
    return sorted(found)


class FlopTrainer(GatedTrainer):
    """Trains factors, gates and multipliers together, then the factors under gates fixed hard.

    Sizes in the Lagrangian are shares of the whole adapter, so that the multipliers' learning rate
    means the same for every model.

    Args:
        model: PEFT model built at the plan; it gets hard-concrete gates, and `multipliers`.
        args: TrainingArguments; `args.seed` draws the noise of the gates.
        plan: ranks that the pieces start at.
        method: learning rates, and the shares of the run.
        configuration: what a checkpoint has to agree with to be resumed.
        **trainer: of transformers.Trainer.
    """

    def __init__(
        self,
        model: PeftModel,
        args: TrainingArguments,
        *,
        plan: RankPlan,
        method: FLOP,
        configuration: dict[str, Any],
        **trainer: Any,
    ):
        self.target = method.target(plan)
        self.gates = attach_gates(model, plan, HardConcrete)
        self.multipliers = Multipliers()
        model.add_module("multipliers", self.multipliers)  # so that a checkpoint holds them
        super().__init__(model, args, configuration=configuration, **trainer)
        self.plan, self.method = plan, method
        names = [(n, r) for g in self.gates.values() for n, r in zip(g.names, g.sizes, strict=True)]
        self.costs = [plan.modules[name].cost for name, rank in names for _ in range(rank)]
        self._grouped = False

    def size(self) -> Tensor:
        """The expected L0 norm of the gates, in parameters, as a share of the whole adapter."""
        chances = torch.cat([open_probability(g.log_alpha) for g in self.gates.values()])
        shares = torch.tensor(self.costs, dtype=chances.dtype) / sum(self.costs)
        return shares.to(chances.device) @ chances

    def target_share(self) -> float:
        """The target of this step, as a share: it falls from 1 to the target, linearly."""
        warm = self.method.warmup_share * self.state.max_steps
        done = min(1.0, self.state.global_step / warm) if warm > 0 else 1.0
        return 1 - done * (1 - self.target / self.plan.parameters)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of `args`, in which gates and multipliers have rates of their own."""
        optimizer = super().create_optimizer(model)
        if self._grouped:  # a second train() keeps the optimizer
            return optimizer
        self._grouped = True
        alphas = [gate.log_alpha for gate in self.gates.values()]
        multipliers = list(self.multipliers.parameters())
        apart = {id(p) for p in [*alphas, *multipliers]}
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in apart]
        for params, rate in (
            (alphas, self.method.gate_learning_rate),
            (multipliers, self.method.multiplier_learning_rate),
        ):
            optimizer.add_param_group({"params": params, "lr": rate, "weight_decay": 0.0})
        return optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        step, steps = self.state.global_step, self.state.max_steps
        if step >= steps - int(self.method.hard_share * steps):
            self.fix()
            return super().training_step(model, inputs, num_items_in_batch)
        noise = draws(self.args.seed, step, len(self.costs)).to(self.args.device)
        counts = [sum(gate.sizes) for gate in self.gates.values()]
        for gate, part in zip(self.gates.values(), noise.split(counts), strict=True):
            gate.noise = part
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        finally:
            for gate in self.gates.values():
                gate.noise = None
        if self.accelerator.sync_gradients:  # once a step, however many micro-batches it has
            self.add_lagrangian()
        return loss

    def add_lagrangian(self) -> None:
        """Adds the Lagrangian's gradient: the gates descend on it, the multipliers ascend.

        It is added by hand, after the processes have averaged theirs, and is alike in all of them.
        """
        first, second = self.multipliers.first, self.multipliers.second
        alphas = [gate.log_alpha for gate in self.gates.values()]
        value = lagrangian(self.size(), self.target_share(), first, second)
        grads = torch.autograd.grad(value, [*alphas, first, second])
        signs = [1] * len(alphas) + [-1, -1]
        for p, grad, sign in zip([*alphas, first, second], grads, signs, strict=True):
            p.grad = sign * grad if p.grad is None else p.grad + sign * grad

    @torch.no_grad()
    def fix(self) -> None:
        """Fixes the gates: the top pieces at their deterministic value, the others at 0.

        Gates and multipliers have no gradient from here on, so no optimizer moves them, and a
        resumed run finds the same pieces again.

        Raises:
            RankwiseError: every gate is shut.
        """
        gates = list(self.gates.values())
        if all(gate.fixed is not None for gate in gates):
            return
        log_alpha = torch.cat([gate.log_alpha for gate in gates])
        kept = open_pieces(log_alpha.tolist(), self.costs, self.target)
        if not kept:
            raise RankwiseError(
                "FLOP shut every gate; lower gate_learning_rate or multiplier_learning_rate"
            )
        fixed = torch.zeros_like(log_alpha)
        fixed[kept] = stretched(log_alpha[kept])
        for gate, part in zip(gates, fixed.split([sum(g.sizes) for g in gates]), strict=True):
            gate.fixed = part

    def opened(self) -> dict[str, list[int]]:
        """The pieces that stay, by plan entry; the gates are fixed if they were not."""
        self.fix()
        found = {}
        for gate in self.gates.values():
            starts = chain([0], accumulate(gate.sizes))
            for name, start, size in zip(gate.names, starts, gate.sizes, strict=False):
                g = gate.values()[start : start + size].tolist()
                found[name] = [j for j, value in enumerate(g) if value > 0]
        return found
