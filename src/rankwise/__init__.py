"""rankwise: LoRA ranks chosen from your data."""

from rankwise.errors import (
    CheckpointError,
    DataError,
    DivergedError,
    ModelError,
    OutputError,
    PlanError,
    RankwiseError,
)
from rankwise.gates import attach, bake, build
from rankwise.methods import METHODS, AutoLoRA
from rankwise.plan import Entry, RankPlan
from rankwise.training import search, train

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "AutoLoRA",
    "CheckpointError",
    "DataError",
    "DivergedError",
    "Entry",
    "ModelError",
    "OutputError",
    "PlanError",
    "RankPlan",
    "RankwiseError",
    "attach",
    "bake",
    "build",
    "search",
    "train",
]
