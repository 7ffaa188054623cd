"""Bottleneck adapters in a Transformer's blocks, dense or Kronecker-factored: made, saved, loaded.

An adapter computes h + up(act(down(h))) on the output of a sub-layer, before the block adds its
input to it. PEFT has no such adapter, so these have a small format of their own.
"""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rankwise.errors import AdapterError, ModelError
from rankwise.files import new_folder, write_json
from rankwise.lora import HEADS
from rankwise.reading import read_json

FORMAT, WEIGHTS, CONFIG = "rankwise-bottleneck/1", "bottleneck.safetensors", "bottleneck.json"

# By model type: where the blocks are, and the modules in a block that give out what attention and
# the feed-forward computed. Dropout, where a block has it there, is the last of these.
_BERT = ("layer", ("attention.output.dropout", "output.dropout"))
_GPT2 = ("h", ("attn.resid_dropout", "mlp.dropout"))
_LLAMA = ("layers", ("self_attn.o_proj", "mlp.down_proj"))
BLOCKS = {
    "bert": _BERT,
    "camembert": _BERT,
    "electra": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "gpt2": _GPT2,
    "gemma": _LLAMA,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


@dataclass(frozen=True)
class Layout:
    """What adapters are made of, as their configuration file holds it.

    Attributes:
        bottleneck: width m of the bottleneck.
        nonlinearity: a name of `ACTIVATIONS`.
        layer_norms: whether the model's layer norms are trained, and saved, along.
        n: terms of a Kronecker-factored matrix; None for dense matrices.
    """

    bottleneck: int
    nonlinearity: str
    layer_norms: bool
    n: int | None = None


class DenseLinear(nn.Linear):
    """A dense layer that starts near zero, in float32.

    Its start is Houlsby et al.'s (section 3.6): a Gaussian of standard deviation 0.01, cut off at
    two standard deviations; a bias of 0.
    """

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.01, a=-0.02, b=0.02)
        nn.init.zeros_(self.bias)


class KroneckerLinear(nn.Module):
    """x (..., in) -> W x + bias with W = Σ_i A_i ⊗ s_i t_iᵀ (Compacter, equation 4 and section 3).

    The A_i are small (a standard deviation of 0.01), so that W starts near zero.

    Args:
        rule: A, (n, n, n), the A_i one after the other; all layers of a model share this parameter.
        in_features, out_features: multiples of n.
    """

    def __init__(self, rule: nn.Parameter, in_features: int, out_features: int):
        super().__init__()
        n = len(rule)
        self.in_features, self.out_features = in_features, out_features
        self.rule = rule
        self.s = nn.Parameter(torch.empty(n, out_features // n))
        self.t = nn.Parameter(torch.empty(n, in_features // n))
        self.bias = nn.Parameter(torch.zeros(out_features))
        for factor in (self.s, self.t):  # Glorot's start of each s_i (out/n, 1) and t_i (1, in/n)
            bound = (6 / (1 + factor.shape[1])) ** 0.5
            nn.init.uniform_(factor, -bound, bound)

    def weight(self) -> Tensor:
        """W (out, in)."""
        blocks = torch.einsum("iab,ip,iq->apbq", self.rule, self.s, self.t)
        return blocks.reshape(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight(), self.bias)


class Bottleneck(nn.Module):
    """h (..., d) -> h + up(act(down(h))), computed in the type of its own parameters."""

    def __init__(self, layout: Layout, size: int, rule: nn.Parameter | None):
        super().__init__()

        def layer(inputs: int, outputs: int) -> DenseLinear | KroneckerLinear:
            if rule is None:
                return DenseLinear(inputs, outputs)
            return KroneckerLinear(rule, inputs, outputs)

        self.down = layer(size, layout.bottleneck)
        self.act = ACTIVATIONS[layout.nonlinearity]()
        self.up = layer(layout.bottleneck, size)

    def forward(self, h: Tensor) -> Tensor:
        x = h.to(self.down.bias.dtype)
        return h + self.up(self.act(self.down(x))).to(h.dtype)


class Adapted(nn.Module):
    """A module of the base model, with an adapter on what it gives out."""

    def __init__(self, inner: nn.Module, adapter: Bottleneck):
        super().__init__()
        self.inner, self.adapter = inner, adapter

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.adapter(self.inner(*args, **kwargs))


def sites(model: nn.Module) -> list[str]:
    """Names of the modules that get an adapter on their output, two in each block.

    Raises:
        ModelError: the model's type is not known, or it has adapters already.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in BLOCKS:
        raise ModelError(
            f"bottleneck adapters do not know where to go in a model of type {kind!r}; "
            f"they know {', '.join(sorted(BLOCKS))}"
        )
    if any(isinstance(module, Adapted) for module in model.modules()):
        raise ModelError("the model already has bottleneck adapters; pass the base model")
    blocks, outputs = BLOCKS[kind]
    ends = "|".join(map(re.escape, outputs))
    pattern = re.compile(rf"(.+\.)?{blocks}\.\d+\.({ends})")
    found = [name for name, _ in model.named_modules() if pattern.fullmatch(name)]
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no modules {blocks}.N.{outputs[0]}; pass a model of "
            "transformers as it was loaded, without wrappers"
        )
    return found


def check(model: nn.Module, layout: Layout) -> None:
    """Raises ModelError where adapters of this layout cannot be put on this base model."""
    sites(model)
    size = _hidden_size(model)
    for what, number in (("bottleneck", layout.bottleneck), ("the model's hidden size", size)):
        if layout.n is not None and number % layout.n:
            raise ModelError(
                f"{what} is {number}, which n = {layout.n} does not divide; take another n"
            )


def attach(model: nn.Module, layout: Layout) -> nn.Module:
    """Puts adapters on a base model and makes these, the head and the layer norms trainable.

    Everything else is frozen. The head is what is called `classifier`, `score` or `qa_outputs`.

    Args:
        model: a transformers model of a type in `BLOCKS`; it is changed in place, and returned.
        layout: of all its adapters.

    Raises:
        ModelError: see `check`; the model is as before then.
    """
    check(model, layout)
    rule = None
    if layout.n is not None:
        rule = nn.Parameter(torch.empty(layout.n, layout.n, layout.n).normal_(std=0.01))
    model.requires_grad_(False)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in HEADS or (layout.layer_norms and _is_norm(module)):
            module.requires_grad_(True)
    device = next(model.parameters()).device
    for name in sites(model):
        inner = model.get_submodule(name)
        adapter = Bottleneck(layout, _hidden_size(model), rule)
        device = next((p.device for p in inner.parameters()), device)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Adapted(inner, adapter.to(device)))
    return model


def _hidden_size(model: nn.Module) -> int:
    config: Any = model.config
    return config.hidden_size


def _is_norm(module: nn.Module) -> bool:
    """LayerNorm, and the RMSNorm that each Llama-like family defines for itself."""
    return type(module).__name__.endswith(("LayerNorm", "RMSNorm"))


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What is trained, by name; a parameter that adapters share is there once."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def save(model: nn.Module, layout: Layout, folder: str | Path) -> None:
    """Writes adapters, head and layer norms, through a temporary name; an old folder goes.

    Args:
        model: what `attach` returned.
        layout: what it was given.
        folder: gets `bottleneck.safetensors` and `bottleneck.json`.
    """
    with new_folder(Path(folder)) as work:
        tensors = {name: p.detach().contiguous() for name, p in trainable(model)}
        save_file(tensors, work / WEIGHTS, metadata={"format": "pt"})
        config: Any = model.config
        about = {"format": FORMAT, "model_type": config.model_type, **asdict(layout)}
        write_json(work / CONFIG, about)


def load(model: nn.Module, folder: str | Path) -> nn.Module:
    """Puts saved adapters, with their head and layer norms, on a fresh base model.

    Args:
        model: base model of the type that they were trained on; changed in place, and returned.
        folder: what `save` wrote.

    Raises:
        AdapterError: nothing there, damaged, or for another model.

    Example:
        >>> model = load(AutoModelForSequenceClassification.from_pretrained(base), "run/adapter")
    """
    folder = Path(folder)
    layout, tensors = _read(folder, model)
    attach(model, layout)
    wanted = dict(trainable(model))
    if odd := sorted(set(wanted) ^ set(tensors)):
        where = "lacks" if odd[0] in wanted else "has, unlike the model,"
        raise AdapterError(f"{folder} {where} {odd[0]!r}; it was trained on another model")
    for name, parameter in wanted.items():
        if parameter.shape != tensors[name].shape:
            raise AdapterError(
                f"{name!r} is {tuple(tensors[name].shape)} in {folder} and "
                f"{tuple(parameter.shape)} in the model; it was trained on another model"
            )
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name])
    return model


def _read(folder: Path, model: nn.Module) -> tuple[Layout, dict[str, Tensor]]:
    """The layout and the tensors in a folder, which have to be for a model of this type."""
    try:
        about = read_json(folder / CONFIG)
        if not isinstance(about, dict) or about.pop("format", None) != FORMAT:
            raise ValueError(f"{CONFIG} is not of the format {FORMAT}")
        trained_on = about.pop("model_type", None)
        layout = Layout(**about)
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise AdapterError(
            f"cannot read the adapter in {folder}: {error}; give a folder with {CONFIG} and "
            f"{WEIGHTS}"
        ) from error
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if trained_on != kind:
        raise AdapterError(
            f"{folder} was trained on a model of type {trained_on!r}, and this one is {kind!r}; "
            "load the base model that it was trained on"
        )
    return layout, tensors
