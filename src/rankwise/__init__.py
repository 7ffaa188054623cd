"""rankwise: how small a LoRA adapter can be, from your own data.

Names are looked up when they are first used: `import rankwise` itself loads nothing heavy.
"""

# Only what costs nothing is imported here: `rankwise --help` pays for it.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__version__ = "0.1.0"

# where each public name lives
_HOMES = {
    "rankwise.adapter": ("Adapter",),
    "rankwise.choose": ("ByLayer", "Curve", "pick", "ranks_by_layer", "smallest_as_good"),
    "rankwise.errors": (
        "AdapterError",
        "CheckpointError",
        "DataError",
        "DivergedError",
        "ExportError",
        "ModelError",
        "OutputError",
        "PlanError",
        "RankwiseError",
        "ResultError",
    ),
    "rankwise.fitting": ("Fitted", "fit"),
    "rankwise.gate": ("attach", "bake"),
    "rankwise.lora": ("build", "check", "uniform"),
    "rankwise.nested": ("curve", "load_nested", "size_loss"),
    "rankwise.orders": ("Order", "Ordered"),
    "rankwise.plan": ("Entry", "RankPlan"),
    "rankwise.predicting": ("load", "predict"),
    "rankwise.result": ("Result",),
    "rankwise.serving.export": ("Export", "export"),
    "rankwise.serving.verify": ("verify",),
    "rankwise.surgeon": ("order",),
    "rankwise.training": ("search", "train"),
}
_NAMES = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["METHODS", *sorted(_NAMES)]


def __getattr__(name: str) -> "Any":
    from importlib import import_module

    if name in _NAMES:
        value = getattr(import_module(_NAMES[name]), name)
    else:  # every method, by the name of its class, and METHODS
        methods = import_module("rankwise.methods")
        if name not in methods.__all__:
            raise AttributeError(f"module 'rankwise' has no attribute {name!r}")
        value = getattr(methods, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    from importlib import import_module

    return sorted({*globals(), *__all__, *import_module("rankwise.methods").__all__})
