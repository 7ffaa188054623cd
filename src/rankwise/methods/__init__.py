"""The methods by the names that `search(method=...)` and `--method` take; one file each."""

from rankwise.methods.autolora import AutoLoRA
from rankwise.methods.dylora import DyLoRA

Method = AutoLoRA | DyLoRA

METHODS: dict[str, Method] = {
    "autolora": AutoLoRA(),
    "autolora-unconstrained": AutoLoRA(gate="unconstrained"),
    "autolora-sigmoid": AutoLoRA(gate="sigmoid"),
    "autolora-first-order": AutoLoRA(estimator="first_order"),
    "dylora": DyLoRA(),
    "dylora-frozen": DyLoRA(frozen=True),
}

__all__ = ["METHODS", "AutoLoRA", "DyLoRA", "Method"]
