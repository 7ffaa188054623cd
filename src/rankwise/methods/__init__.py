"""The methods by the names that `search(method=...)` and `--method` take; one file each."""

from rankwise.methods.autolora import AutoLoRA

METHODS = {
    "autolora": AutoLoRA(),
    "autolora-unconstrained": AutoLoRA(gate="unconstrained"),
    "autolora-sigmoid": AutoLoRA(gate="sigmoid"),
    "autolora-first-order": AutoLoRA(estimator="first_order"),
}

__all__ = ["METHODS", "AutoLoRA"]
