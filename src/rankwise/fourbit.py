"""Base models whose frozen weights are kept in 4 bits by bitsandbytes, as in QLoRA."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from rankwise.errors import ModelError

if TYPE_CHECKING:
    from torch import nn


def check_installed() -> None:
    """Raises ModelError where bitsandbytes is missing."""
    if find_spec("bitsandbytes") is None:
        raise ModelError("a base model in 4 bits needs bitsandbytes; pip install 'rankwise[bnb]'")


def how_to_load(auto: Any, config: Any, dtype: Any, device: Any) -> dict[str, Any]:
    """What `from_pretrained` takes to quantise a model as QLoRA does.

    NF4 with double quantisation; products are computed in `dtype`, or else in bfloat16 on an
    accelerator that has it and in float32 elsewhere. The output layer and a task's head stay as
    they are: transformers itself would quantise a new head that has a bias.

    Args:
        auto: transformers' class of the model. config: its config.
        dtype: of the products, and of the weights that are not quantised; None as said.
        device: where the model goes; None is transformers' own choice.

    Source: arXiv 2305.14314, sections 3 and 4.
    """
    import torch
    from transformers import BitsAndBytesConfig

    from rankwise.lora import HEADS

    check_installed()
    with torch.device("meta"):
        skeleton = auto.from_config(config)
    out = skeleton.get_output_embeddings()
    plain = [*HEADS, *(name for name, module in skeleton.named_modules() if module is out)]
    on_cpu = str(device) == "cpu" or not torch.cuda.is_available()
    compute = torch.float32 if on_cpu or not torch.cuda.is_bf16_supported() else torch.bfloat16
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute if dtype in (None, "auto") else dtype,
        llm_int8_skip_modules=plain,
    )
    where = {} if device is None else {"device_map": {"": device}}
    return {"quantization_config": quantised, **where}


def is_4bit(model: Any) -> bool:
    """Whether a model, or the base of a PEFT model, has weights in 4 bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False))


def prepare(model: Any) -> Any:
    """A model as PEFT advises to train on it: frozen, and in float32 where it is not quantised.

    Gradient checkpointing is TrainingArguments' own matter.
    """
    from peft import prepare_model_for_kbit_training

    keep_gradients(model)
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def keep_gradients(model: Any) -> None:
    """Keeps bitsandbytes, for good, from a kernel that has no gradient.

    On a CPU with AVX512-BF16, a layer that was called in eval mode without a gradient is packed
    for a bfloat16 kernel, and stays so: later, also in training, no gradient goes through it, and
    nothing says so (bitsandbytes 0.50.2). A state dict unpacks it.
    """
    for layer in model.modules():
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            layer.support_avx512bf16_for_cpu = False
            layer.state_dict()


def refuse_training(model: nn.Module, title: str) -> None:
    """Raises ModelError where a method trains other weights than an adapter's on a 4-bit base."""
    if is_4bit(model):
        raise ModelError(
            f"{title} trains weights that a base model in 4 bits cannot; take a method whose "
            "adapter PEFT reads (lora, cut, ...), or leave load_in_4bit out"
        )
