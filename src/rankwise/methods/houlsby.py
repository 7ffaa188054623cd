"""Houlsby et al.'s adapters (arXiv 1902.00751): two small bottlenecks in every block.

One follows attention and one the feed-forward layer, before the block's input is added; the layer
norms and the head are trained along. The modules are in `rankwise.methods.bottleneck`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from rankwise.errors import RankwiseError
from rankwise.methods.base import Kept, Method, Setting, flag

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer

    from rankwise.methods.bottleneck import Layout
    from rankwise.plan import RankPlan


@dataclass(frozen=True)
class Houlsby(Method):
    """Bottleneck adapters h + W_up act(W_down h), two in each block.

    With hidden size d they cost 2 (2 d m + d + m) parameters a block, and the layer norms 2 d each.

    Raises:
        RankwiseError: a flag out of range. `check` and `attach` raise ModelError for a model whose
            blocks are not known.

    Source: arXiv 1902.00751, section 2.1 and figure 2; the start of the weights from section 3.6.

    Example:
        >>> Houlsby(bottleneck=8).attach(model, None, setting)
    """

    title: ClassVar[str] = "Houlsby's adapters"
    source: ClassVar[str] = "arXiv 1902.00751"
    stock: ClassVar[str] = ""

    bottleneck: int = flag(64, "width m of an adapter's bottleneck")
    nonlinearity: Literal["gelu", "relu", "silu", "tanh"] = flag(
        "gelu", "what the bottleneck goes through"
    )
    layer_norms: bool = flag(True, "train the model's layer norms as well")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bottleneck < 1:
            raise RankwiseError(
                f"bottleneck is {self.bottleneck!r}; it has to be an integer of at least 1"
            )

    def layout(self) -> "Layout":
        """The adapters that the flags ask for."""
        from rankwise.methods.bottleneck import Layout

        return Layout(self.bottleneck, self.nonlinearity, self.layer_norms)

    def check(self, model: "nn.Module", setting: Setting) -> None:
        from rankwise.methods.bottleneck import check

        check(model, self.layout())

    def attach(self, model: "nn.Module", plan: "RankPlan | None", setting: Setting) -> "nn.Module":
        from rankwise.methods.bottleneck import attach

        return attach(model, self.layout())

    def trainer(self, model: "nn.Module", plan: "RankPlan | None", setting: Setting) -> "Trainer":
        """A Trainer whose checkpoints hold what is trained, and not the frozen model."""
        from rankwise.trainer import GatedTrainer

        return GatedTrainer(
            model,
            setting.args,
            configuration=dict(setting.configuration),
            train_dataset=setting.train,
            **setting.options,
        )

    def hand_over(self, trainer: "Trainer", kept: Kept, folder: Path) -> None:
        from rankwise.methods.bottleneck import save

        save(trainer.accelerator.unwrap_model(trainer.model), self.layout(), folder / "adapter")

    def load(self, model: "nn.Module", folder: Path) -> "nn.Module":
        from rankwise.methods.bottleneck import load

        return load(model, folder)
