"""The methods by the names that `fit`, `search` and `--method` take. This is the one place that
lists them; each is a file in this folder, and its fields are its flags."""

from collections.abc import Mapping
from typing import Any

from rankwise.errors import RankwiseError
from rankwise.given import shown
from rankwise.methods.adalora import AdaLoRA
from rankwise.methods.autolora import AutoLoRA
from rankwise.methods.base import Kept, LoraMethod, Method, Setting
from rankwise.methods.compacter import Compacter
from rankwise.methods.cut import CutByData
from rankwise.methods.dylora import DyLoRA
from rankwise.methods.eva import EVA
from rankwise.methods.flop import FLOP
from rankwise.methods.full import FullFineTuning
from rankwise.methods.houlsby import Houlsby
from rankwise.methods.ia3 import IA3
from rankwise.methods.lora import LoRA, LoraGrid, RandomPlan
from rankwise.methods.ordered import OrderMethod, RandomCut, SigmaCut
from rankwise.methods.prompts import LlamaAdapter, PrefixTuning, PromptTuning, PTuning
from rankwise.methods.svd import SvdCut

METHODS: dict[str, Method] = {
    "cut": CutByData(),
    "lora": LoRA(),
    "lora-grid": LoraGrid(),
    "random": RandomPlan(),
    "svd": SvdCut(),
    "svd-energy": SvdCut(energy=0.9),
    "svd-threshold": SigmaCut(),
    "random-order": RandomCut(),
    "autolora": AutoLoRA(),
    "autolora-unconstrained": AutoLoRA(gate="unconstrained"),
    "autolora-sigmoid": AutoLoRA(gate="sigmoid"),
    "autolora-first-order": AutoLoRA(estimator="first_order"),
    "dylora": DyLoRA(),
    "dylora-frozen": DyLoRA(frozen=True),
    "adalora": AdaLoRA(),
    "eva": EVA(),
    "flop": FLOP(),
    "houlsby": Houlsby(),
    "compacter": Compacter(),
    "full": FullFineTuning(),
    "prefix-tuning": PrefixTuning(),
    "prompt-tuning": PromptTuning(),
    "p-tuning": PTuning(),
    "llama-adapter": LlamaAdapter(),
    "ia3": IA3(),
}

DEFAULT = "cut"  # of fit and run
DEFAULT_SEARCH = "autolora"  # of search

_CLASSES = {type(method).__name__: type(method) for method in METHODS.values()}


def by_name(method: str | Method, **flags: Any) -> Method:
    """The method of that name, or the one that is given, with other values of some flags.

    Raises:
        RankwiseError: no such name, no such flag, or a value out of range.

    Example:
        >>> by_name("lora", r=4).r
        4
    """
    if isinstance(method, Method):
        return method.with_flags(**flags)
    if isinstance(method, type) and issubclass(method, Method):
        raise RankwiseError(f"method is the class {method.__name__}; give {method.__name__}()")
    if not isinstance(method, str) or method not in METHODS:
        raise RankwiseError(f"method is {shown(method)}; give one of {', '.join(METHODS)}")
    return METHODS[method].with_flags(**flags)


def from_description(about: Any) -> Method:
    """The method that `Method.describe` wrote down.

    Raises:
        RankwiseError: no such method, or flags that it does not have.
    """
    settings = dict(about) if isinstance(about, Mapping) else {}
    name = settings.pop("name", "")
    kind = _CLASSES.get(name) if isinstance(name, str) else None
    if kind is None:
        raise RankwiseError(
            f"{str(about)[:200]!r} describes no method; there are {', '.join(sorted(_CLASSES))}"
        )
    try:
        return kind().with_flags(**settings)
    except (TypeError, ValueError) as error:
        raise RankwiseError(
            f"{str(about)[:200]!r} describes no method: {' '.join(str(error).split())}"
        ) from error


__all__ = [
    "DEFAULT",
    "DEFAULT_SEARCH",
    "EVA",
    "FLOP",
    "IA3",
    "METHODS",
    "AdaLoRA",
    "AutoLoRA",
    "Compacter",
    "CutByData",
    "DyLoRA",
    "FullFineTuning",
    "Houlsby",
    "Kept",
    "LlamaAdapter",
    "LoRA",
    "LoraGrid",
    "LoraMethod",
    "Method",
    "OrderMethod",
    "PTuning",
    "PrefixTuning",
    "PromptTuning",
    "RandomCut",
    "RandomPlan",
    "Setting",
    "SigmaCut",
    "SvdCut",
    "by_name",
    "from_description",
]
