"""GGUF files of adapters, as llama.cpp and Ollama read them: written and read back."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rankwise.adapter import Factors
from rankwise.errors import ExportError
from rankwise.files import temporary_name

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# transformers' model type -> llama.cpp's architecture, and whether llama.cpp keeps the rows of
# query and key in its own order, so that B's have to be put into it.
ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "smollm3": ("smollm3", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
    "gemma": ("gemma", False),
    "gemma2": ("gemma2", False),
    "gemma3_text": ("gemma3", False),
    "phi3": ("phi3", False),
    "gpt2": ("gpt2", False),
}


def gguf_package() -> Any:
    """The package `gguf`. Raises ExportError where it is not installed."""
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ExportError(
            "GGUF needs the package gguf; run: pip install 'rankwise[gguf]'"
        ) from error


def check_architecture(config: PretrainedConfig) -> tuple[str, bool]:
    """llama.cpp's name of a model's architecture, and whether it permutes query and key.

    Raises:
        ExportError: one that is not known here.
    """
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise ExportError(
            f"no GGUF is known here for a model of type {kind!r}, only for "
            f"{', '.join(ARCHITECTURES)}; take --to merged and llama.cpp's own converter"
        )
    return ARCHITECTURES[kind]


def _names(config: PretrainedConfig, modules: list[str]) -> dict[str, str]:
    """llama.cpp's tensor of every module."""
    gguf = gguf_package()
    arch, _ = check_architecture(config)
    kinds = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[arch], config.num_hidden_layers)
    found = {}
    for module in modules:
        name = table.get_name(module)
        tied = module == "lm_head" and config.tie_word_embeddings
        if name is None or tied or name.startswith("token_embd"):
            raise ExportError(
                f"llama.cpp has no tensor for {module!r} that an adapter could change; take --to "
                "merged and llama.cpp's own converter, or train without that module"
            )
        found[module] = name
    return found


def permuted(b: Tensor, heads: int) -> Tensor:
    """Rows of a rotated projection as llama.cpp keeps them: pairs side by side in each head.

    transformers rotates the first half of a head against the second half, llama.cpp each even row
    against the odd one after it.
    """
    return b.view(heads, 2, -1, b.shape[1]).transpose(1, 2).reshape(b.shape)


def unpermuted(b: Tensor, heads: int) -> Tensor:
    """The inverse of `permuted`."""
    return b.view(heads, -1, 2, b.shape[1]).transpose(1, 2).reshape(b.shape)


def _heads(config: PretrainedConfig, module: str) -> int | None:
    """Heads of a module whose rows are permuted, None for any other."""
    if not check_architecture(config)[1]:
        return None
    by_leaf = {
        "q_proj": config.num_attention_heads,
        "k_proj": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
    }
    return by_leaf.get(module.rpartition(".")[2])


def write_gguf(
    path: Path, factors: dict[str, Factors], config: PretrainedConfig, alpha: float
) -> None:
    """Writes an adapter's factors as a GGUF file, through a temporary name.

    Args:
        path: of the file.
        factors: by module; all of one rank, their scaling in B.
        config: of the base model.
        alpha: llama.cpp divides it by the rank of each tensor.

    Raises:
        ExportError: an architecture or a module that llama.cpp cannot take.
    """
    gguf = gguf_package()
    names = _names(config, list(factors))
    with temporary_name(path) as temporary:
        writer = gguf.GGUFWriter(temporary, check_architecture(config)[0])
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for module, f in factors.items():
            heads = _heads(config, module)
            b = f.b if heads is None else permuted(f.b, heads)
            kind = torch.float16 if f.b.dtype == torch.float16 else torch.float32
            for side, tensor in (("a", f.a), ("b", b)):
                name = f"{names[module]}.weight.lora_{side}"
                writer.add_tensor(name, tensor.to(kind).contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read_gguf(path: Path, config: PretrainedConfig, modules: list[str]) -> dict[str, Factors]:
    """The factors of a GGUF file by module, with the scaling that llama.cpp gives them.

    Args:
        path: of the file.
        config: of the base model.
        modules: those that the adapter may have.

    Raises:
        ExportError: no adapter, or one with tensors of no such module.
    """
    gguf = gguf_package()
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError) as error:
        raise ExportError(f"cannot read {path}: {str(error).splitlines()[0]}") from error
    alpha = reader.get_field(gguf.Keys.Adapter.LORA_ALPHA)
    if alpha is None:
        raise ExportError(f"{path} holds no LoRA adapter")
    there = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    found = {}
    for module, name in _names(config, modules).items():
        a, b = (there.pop(f"{name}.weight.lora_{side}", None) for side in "ab")
        if a is None or b is None:
            continue
        heads = _heads(config, module)
        b = b if heads is None else unpermuted(b, heads)
        found[module] = Factors(a, b, float(alpha.contents()) / len(a))
    if there:
        raise ExportError(f"{path} has the tensor {min(there)!r}, which the adapter lacks")
    return found
