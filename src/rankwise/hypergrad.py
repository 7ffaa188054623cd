"""Gradients of a validation loss through one look-ahead step of the parameters.

Plain functions over lists of tensors and loss closures; nothing in this file knows of LoRA. The
problem is the two-level one of arXiv 2403.09113 (eq. 4 and 5): with parameters θ,
meta-parameters β and a look-ahead learning rate η,

    θ'(β) = θ - η ∇_θ L_train(θ, β)                                         (eq. 4)
    hypergradient = d/dβ L_val(θ'(β), β)                                    (eq. 5)
                  = ∂_β L_val(θ', β) - η ∂_β[ ∇_θ L_train(θ, β) · v ],  v = ∇_θ' L_val(θ', β)

The three estimators differ in the second term: computed by a second backward pass (`exact`), by a
difference of two gradients (`finite_difference`), or dropped together with the look-ahead
(`first_order`, η = 0).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["finite_difference", "exact", "first_order"]
ESTIMATORS: tuple[Estimator, ...] = ("finite_difference", "exact", "first_order")

Loss = Callable[[], Tensor]
"""A closure that computes a scalar loss at the current values of parameters and meta-parameters."""

Reduce = Callable[[list[Tensor]], list[Tensor]]
"""Averages a list of gradients over processes; `autograd.grad` bypasses DDP's own averaging."""

# Euclidean length of the perturbation of θ, whatever the length of v. 0.01 is DARTS' choice;
# benchmarks/hypergrad_accuracy.py measures it again for LoRA factors, together with the longer one
# that bfloat16's coarser rounding needs.
RADIUS = 1e-2
RADIUS_BF16 = 1e-1


@dataclass(frozen=True)
class TrainGradient:
    """∇L_train at (θ, β), as the training step has it at hand before the optimizer moves.

    Attributes:
        parameters: one gradient per tensor of θ, of its shape.
        meta: one gradient per tensor of β, of its shape.
    """

    parameters: Sequence[Tensor]
    meta: Sequence[Tensor]


def hypergradient(
    estimator: Estimator,
    parameters: Sequence[Tensor],
    meta: Sequence[Tensor],
    train_losses: Sequence[Loss],
    val_losses: Sequence[Loss],
    learning_rate: float,
    *,
    train_gradient: TrainGradient | None = None,
    radius: float = RADIUS,
    two_sided: bool = False,
    reduce: Reduce = list,
) -> list[Tensor]:
    """Gradient of the validation loss with respect to β through one look-ahead step of θ.

    Several closures in `train_losses` or `val_losses` are micro-batches: their losses add up. A
    closure that draws random numbers (dropout) has to draw the same ones each time it is called.

    Args:
        estimator: `"finite_difference"`, `"exact"` or `"first_order"`.
        parameters: θ, leaf tensors that require grad. Moved in place during the call, and restored
            bit for bit when it returns or raises.
        meta: β, leaf tensors that require grad.
        train_losses: L_train = Σ of the closures.
        val_losses: L_val = Σ of the closures.
        learning_rate: η of the look-ahead step. Unused by `"first_order"`.
        train_gradient: ∇L_train at (θ, β) where it is at hand. Saves `finite_difference` one
            forward-backward pass over `train_losses`, and `exact` the same.
        radius: Euclidean length of the perturbation of θ in `finite_difference`.
        two_sided: central instead of one-sided differences: one more pass, error O(radius²)
            instead of O(radius).
        reduce: averages a list of tensors over processes.

    Returns:
        One tensor per tensor of `meta`, of its shape.

    Raises:
        ValueError: unknown estimator.

    Source: arXiv 2403.09113, eq. 4 and 5; the finite difference is that of DARTS (arXiv
        1806.09055, eq. 8).

    Example:
        >>> w = torch.tensor([1.0], requires_grad=True)
        >>> b = torch.tensor([2.0], requires_grad=True)
        >>> train, val = (lambda: (w * b).sum()), (lambda: (w**2).sum())
        >>> hypergradient("exact", [w], [b], [train], [val], learning_rate=0.1)  # -2η(w - ηb)
        [tensor([-0.1600])]
    """
    if estimator == "first_order":
        return reduce(_gradient(val_losses, meta))
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator is {estimator!r}; it has to be one of {', '.join(ESTIMATORS)}")
    if train_gradient is None:
        both = reduce(_gradient(train_losses, [*parameters, *meta]))
        train_gradient = TrainGradient(both[: len(parameters)], both[len(parameters) :])

    with _moved(parameters, train_gradient.parameters, -learning_rate):  # eq. 4
        both = reduce(_gradient(val_losses, [*parameters, *meta]))
    v, direct = both[: len(parameters)], both[len(parameters) :]

    if estimator == "exact":
        mixed = reduce(_mixed_exact(parameters, meta, train_losses, v))
    else:
        norm = float(torch.linalg.vector_norm(torch.stack([t.norm() for t in v])))
        if norm == 0.0:
            return direct
        mixed = _mixed_difference(
            parameters, meta, train_losses, v, radius / norm, train_gradient, two_sided, reduce
        )
    return [d - learning_rate * m for d, m in zip(direct, mixed, strict=True)]  # eq. 5


def _mixed_exact(
    parameters: Sequence[Tensor], meta: Sequence[Tensor], train_losses: Sequence[Loss], v: list
) -> list[Tensor]:
    """∂_β[∇_θ L_train · v] by differentiating the gradient, one micro-batch at a time."""
    total = [torch.zeros_like(m) for m in meta]
    for loss in train_losses:
        first = torch.autograd.grad(loss(), parameters, create_graph=True, allow_unused=True)
        dot = sum((g * u).sum() for g, u in zip(first, v, strict=True) if g is not None)
        if not isinstance(dot, Tensor) or not dot.requires_grad:
            continue  # this loss does not reach θ, so the mixed derivative is zero
        for t, g in zip(total, torch.autograd.grad(dot, meta, allow_unused=True), strict=True):
            if g is not None:
                t += g
    return total


def _mixed_difference(
    parameters: Sequence[Tensor],
    meta: Sequence[Tensor],
    train_losses: Sequence[Loss],
    v: list[Tensor],
    eps: float,
    train_gradient: TrainGradient,
    two_sided: bool,
    reduce: Reduce,
) -> list[Tensor]:
    """∂_β[∇_θ L_train · v] ≈ (∇_β L_train(θ + εv) - ∇_β L_train(θ)) / ε, or its central form."""
    with _moved(parameters, v, eps):
        ahead = reduce(_gradient(train_losses, meta))
    if not two_sided:
        return [(a - b) / eps for a, b in zip(ahead, train_gradient.meta, strict=True)]
    with _moved(parameters, v, -eps):
        behind = reduce(_gradient(train_losses, meta))
    return [(a - b) / (2 * eps) for a, b in zip(ahead, behind, strict=True)]


def _gradient(losses: Sequence[Loss], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Sum over the losses of their gradients; zeros for an input that a loss does not reach."""
    total: list[Tensor] = [torch.zeros_like(t) for t in inputs]
    for loss in losses:
        for t, g in zip(total, torch.autograd.grad(loss(), inputs, allow_unused=True), strict=True):
            if g is not None:
                t += g
    return total


@contextmanager
def _moved(tensors: Sequence[Tensor], direction: Sequence[Tensor], step: float) -> Iterator[None]:
    """Tensors moved by step x direction for the duration of the block.

    Restored from a copy rather than by moving back, which would leave a rounding error each time.
    """
    with torch.no_grad():
        before = [t.detach().clone() for t in tensors]
    try:
        with torch.no_grad():
            for t, d in zip(tensors, direction, strict=True):
                t.add_(d.to(t.dtype), alpha=step)
        yield
    finally:
        with torch.no_grad():
            for t, b in zip(tensors, before, strict=True):
                t.copy_(b)
