"""AutoLoRA (arXiv 2403.09113): a selection variable per rank-1 piece, learned on validation data.

A method is a small frozen object that says what its gate is, who moves it, and how it becomes
ranks; the loop around it is in `rankwise.training`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rankwise.errors import RankwiseError
from rankwise.hypergrad import ESTIMATORS, Estimator

GateKind = Literal["softmax", "unconstrained", "sigmoid"]


@dataclass(frozen=True)
class AutoLoRA:
    """How AutoLoRA's gate α is made from β, how β moves, and when a rank-1 piece is kept.

    Args:
        gate: `"softmax"`, α = softmax(β) per layer (eq. 3); or an ablation of section 5.5:
            `"unconstrained"`, α = β; `"sigmoid"`, α = sigmoid(β) by element.
        estimator: of the hypergradient, see `rankwise.hypergrad`; `"first_order"` is the ablation
            η = 0.
        learning_rate: AdamW's learning rate for β; 1e-3 in the paper.
        weight_decay: AdamW's for β; 0, so that a β that gets no gradient stays where it is.
        lookahead: η of the look-ahead step (eq. 4); None takes the parameters' current learning
            rate, as the paper does.
        radius: length of the finite difference's step, in units of the parameters; None is 0.01,
            or 0.1 under bf16.
        two_sided: central differences: a fourth forward-backward pass per step.

    Raises:
        RankwiseError: a value out of range.

    Source: arXiv 2403.09113, sections 4.2 to 4.4 and 5.5.

    Example:
        >>> plan = rankwise.search(model, train, method=AutoLoRA(gate="sigmoid"))
    """

    gate: GateKind = "softmax"
    estimator: Estimator = "finite_difference"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    lookahead: float | None = None
    radius: float | None = None
    two_sided: bool = False

    def __post_init__(self) -> None:
        if self.gate not in ("softmax", "unconstrained", "sigmoid"):
            raise RankwiseError(f"gate is {self.gate!r}; take softmax, unconstrained or sigmoid")
        if self.estimator not in ESTIMATORS:
            raise RankwiseError(f"estimator is {self.estimator!r}; take {', '.join(ESTIMATORS)}")
        for name in ("weight_decay", "lookahead"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise RankwiseError(f"AutoLoRA's {name} is {value}; it has to be >= 0")
        for name in ("learning_rate", "radius"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise RankwiseError(f"AutoLoRA's {name} is {value}; it has to be > 0")

    def activation(self, beta: Tensor) -> Tensor:
        """β (k,) of one layer -> α (k,)."""
        if self.gate == "softmax":
            return torch.softmax(beta, dim=0)  # eq. 3
        return torch.sigmoid(beta) if self.gate == "sigmoid" else beta

    def initial(self, k: int) -> float:
        """Starting β: every piece alike; 1/k where α is β itself, so that Σα = 1 as for softmax."""
        return 1.0 / k if self.gate == "unconstrained" else 0.0

    def kept(self, alpha: list[float]) -> list[int]:
        """Pieces of one layer that stay, 0-based: α_j >= threshold (section 4.4), at least one.

        The threshold is 1/k for softmax, Σα/k without the constraint, 0.5 for the sigmoid. Where
        rounding leaves none, the largest α stays.
        """
        k = len(alpha)
        threshold = {"softmax": 1 / k, "unconstrained": sum(alpha) / k, "sigmoid": 0.5}[self.gate]
        kept = [j for j, a in enumerate(alpha) if a >= threshold]
        return kept or [max(range(k), key=alpha.__getitem__)]
