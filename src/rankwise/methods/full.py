"""Full fine-tuning: every parameter of the model, saved as transformers saves models."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rankwise.errors import OutputError
from rankwise.methods.base import Method, Setting

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class FullFineTuning(Method):
    """All parameters move, the task head's among them.

    It changes the model that it is given: load that anew for another method.

    Example:
        >>> FullFineTuning().load(base, Path("runs/full/model")).num_labels
        2
    """

    title: ClassVar[str] = "full fine-tuning"
    usual_rate: ClassVar[float] = 1e-4
    product: ClassVar[str] = "model"
    stock: ClassVar[str] = "transformers"

    def attach(self, model: "nn.Module", plan: Any, setting: Setting) -> "nn.Module":
        return model.requires_grad_(True)

    def load(self, model: "nn.Module", folder: Path) -> "nn.Module":
        """The model in the folder; the base model lends its class alone.

        Raises:
            OutputError: no model there.
        """
        if not (folder / "config.json").is_file():
            raise OutputError(f"no model in {folder}; give the folder of a full fine-tuning")
        kind: Any = type(model)
        device = next(model.parameters()).device
        return kind.from_pretrained(str(folder), dtype="auto").to(device)
