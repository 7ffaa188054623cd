"""DyLoRA (arXiv 2210.07558): one training run, an adapter for every rank of a range afterwards.

Each optimizer step draws a rank b and trains the first b rank-1 pieces of every layer alone:
h = W0 x + (α/b) B[:, :b] A[:b, :] x (the paper's algorithm 1). The loop is in `rankwise.nested`.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from rankwise.errors import RankwiseError

Distribution = Literal["uniform", "geometric"]


@dataclass(frozen=True)
class DyLoRA:
    """Which rank is trained at each step, and what moves then.

    Args:
        r_min: the smallest rank drawn, at least 1; the largest is the r of the plan.
        distribution: of b: `"uniform"`, or `"geometric"`, P(b) ∝ p (1-p)^(b-1) within the range.
        p: of the geometric distribution, above 0 and below 1.
        weights: one probability per rank from r_min to r, instead of a distribution.
        frozen: only the b-th column of B and the b-th row of A move in a step (the paper's
            "frozen" mode, the cheaper update); every other one is unchanged bit for bit, weight
            decay and momentum included. The task head moves in every step.

    Raises:
        RankwiseError: a value out of range.

    Source: arXiv 2210.07558, algorithm 1.

    Example:
        >>> trainer = rankwise.train(model, plan, rows, args=args, method=DyLoRA(frozen=True))
    """

    r_min: int = 1
    distribution: Distribution = "uniform"
    p: float = 0.15
    weights: tuple[float, ...] | None = None
    frozen: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.r_min, int) or self.r_min < 1:
            raise RankwiseError(f"r_min is {self.r_min!r}; a rank is an integer of at least 1")
        if self.distribution not in ("uniform", "geometric"):
            raise RankwiseError(
                f"distribution is {self.distribution!r}; take uniform or geometric, or weights"
            )
        if self.weights is not None and self.distribution != "uniform":
            raise RankwiseError("weights are a distribution of their own; leave the other out")
        if self.weights is not None:  # a list, or numpy's numbers, which JSON does not hold
            object.__setattr__(self, "weights", tuple(map(float, self.weights)))
        if not 0 < self.p < 1:
            raise RankwiseError(f"p is {self.p}; it has to lie between 0 and 1")
        if self.weights is not None and not all(0 <= w <= 1 for w in self.weights):
            raise RankwiseError(f"weights are {self.weights}; each has to lie from 0 to 1")
        if self.weights is not None and abs(sum(self.weights) - 1) > 1e-6:
            raise RankwiseError(f"weights sum to {sum(self.weights):g}; they have to sum to 1")
        if self.weights is not None and self.weights[-1] == 0:
            raise RankwiseError(
                "the last weight is 0, so the largest rank would never be trained; lower r instead"
            )

    def probabilities(self, r: int) -> dict[int, float]:
        """The probability of every b from r_min to r.

        Raises:
            RankwiseError: r_min above r, or another number of weights than of ranks.

        Example:
            >>> DyLoRA(weights=(0.25, 0.75), r_min=3).probabilities(4)
            {3: 0.25, 4: 0.75}
        """
        if self.r_min > r:
            raise RankwiseError(f"r_min is {self.r_min}, above the largest rank {r}")
        ranks = range(self.r_min, r + 1)
        if self.weights is not None:
            if len(self.weights) != len(ranks):
                raise RankwiseError(
                    f"there are {len(self.weights)} weights for the {len(ranks)} ranks "
                    f"{self.r_min} to {r}; give one for each"
                )
            return {b: w / sum(self.weights) for b, w in zip(ranks, self.weights, strict=True)}
        if self.distribution == "uniform":
            return dict.fromkeys(ranks, 1 / len(ranks))
        geometric = {b: self.p * (1 - self.p) ** (b - 1) for b in ranks}
        total = sum(geometric.values())
        return {b: weight / total for b, weight in geometric.items()}

    def trained(self, r: int) -> list[int]:
        """The ranks that are ever drawn, in ascending order."""
        return [b for b, p in self.probabilities(r).items() if p > 0]

    def describe(self) -> dict[str, Any]:
        """The settings as JSON holds them in a plan's provenance."""
        return {"name": "dylora", **asdict(self)}

    def draw(self, r: int, seed: int, step: int) -> int:
        """b of one optimizer step: a function of seed and step, and of nothing else.

        So all layers, micro-batches and processes of a step share it, and a resumed run draws what
        the run that was never stopped would have drawn.
        """
        probabilities = self.probabilities(r)
        rng = np.random.default_rng([seed, step])
        return int(rng.choice(list(probabilities), p=list(probabilities.values())))
