"""Compacter (arXiv 2106.04647): Houlsby's adapters of sums of Kronecker products.

W = Σ_i A_i ⊗ s_i t_iᵀ with i from 1 to n. The A_i, n x n each, are shared by all adapters of the
model, and the vectors s_i and t_i are each layer's own: O(n³) parameters, and O(k + d) a layer.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rankwise.errors import RankwiseError
from rankwise.methods.base import flag
from rankwise.methods.houlsby import Houlsby

if TYPE_CHECKING:
    from rankwise.methods.bottleneck import Layout


@dataclass(frozen=True)
class Compacter(Houlsby):
    """Houlsby's adapters with W = Σ_i A_i ⊗ s_i t_iᵀ instead of dense matrices.

    With hidden size d and bottleneck m they cost n³ parameters once, and 6 (d + m) a block: the
    vectors and biases of two layers in each of two adapters.

    Raises:
        RankwiseError: a flag out of range, n that does not divide the bottleneck. `check` and
            `attach` raise ModelError where n does not divide the model's hidden size.

    Source: arXiv 2106.04647, equations 3 to 5 and section 3.

    Example:
        >>> Compacter(bottleneck=24, n=4).attach(model, None, setting)
    """

    title: ClassVar[str] = "Compacter"
    source: ClassVar[str] = "arXiv 2106.04647"
    stock: ClassVar[str] = ""

    bottleneck: int = flag(24, "width m of an adapter's bottleneck, a multiple of n")
    n: int = flag(4, "terms of a Kronecker-factored matrix; divides bottleneck and hidden size")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n < 1:
            raise RankwiseError(f"n is {self.n!r}; it has to be an integer of at least 1")
        if self.bottleneck % self.n:
            raise RankwiseError(
                f"bottleneck is {self.bottleneck}, which n = {self.n} does not divide; take a "
                "multiple of n"
            )

    def layout(self) -> "Layout":
        from rankwise.methods.bottleneck import Layout

        return Layout(self.bottleneck, self.nonlinearity, self.layer_norms, self.n)
