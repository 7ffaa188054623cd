"""rankwise: LoRA ranks chosen from your data."""

from rankwise import elastic
from rankwise.adapter import Adapter
from rankwise.errors import (
    AdapterError,
    CheckpointError,
    DataError,
    DivergedError,
    ModelError,
    OutputError,
    PlanError,
    RankwiseError,
)
from rankwise.gate import attach, bake
from rankwise.lora import build, check, uniform
from rankwise.methods import METHODS, AutoLoRA, DyLoRA
from rankwise.nested import Curve, curve, pick
from rankwise.plan import Entry, RankPlan
from rankwise.training import load_nested, search, train

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "Adapter",
    "AdapterError",
    "AutoLoRA",
    "CheckpointError",
    "Curve",
    "DataError",
    "DivergedError",
    "DyLoRA",
    "Entry",
    "ModelError",
    "OutputError",
    "PlanError",
    "RankPlan",
    "RankwiseError",
    "attach",
    "bake",
    "build",
    "check",
    "curve",
    "elastic",
    "load_nested",
    "pick",
    "search",
    "train",
    "uniform",
]
