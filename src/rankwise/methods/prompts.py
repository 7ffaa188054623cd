"""Methods that train vectors beside the tokens: prefix, prompt and P-tuning, LLaMA-Adapter; PEFT's.

What each can do with the installed PEFT and transformers, run on tiny BERT, RoBERTa, GPT-2 and
Llama models:

    prefix tuning          every task of all four
    prompt and P-tuning    BERT and RoBERTa classification, GPT-2 and Llama language models
    LLaMA-Adapter          GPT-2 and Llama language models

`check` refuses the rest with its reason.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rankwise.errors import DataError, ModelError, RankwiseError
from rankwise.methods.base import Method, Setting, flag

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class _Virtual(Method):
    """What the three with virtual tokens in front of a row share."""

    usual_rate: ClassVar[float] = 1e-2

    num_virtual_tokens: int = flag(20, "trained vectors in front of every row")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_virtual_tokens < 1:
            raise RankwiseError(
                f"num_virtual_tokens is {self.num_virtual_tokens!r}; it has to be an integer of at "
                "least 1"
            )

    def config(self, task_type: str | None) -> Any:
        """PEFT's configuration of the method."""
        raise NotImplementedError

    def check(self, model: "nn.Module", setting: Setting) -> None:
        if setting.args.load_best_model_at_end and not self.resumable:
            raise RankwiseError(
                f"checkpoints of {self.title} lack what the vectors are computed from; leave "
                "load_best_model_at_end out"
            )
        _fits(model, (setting.train, setting.held_out), self.num_virtual_tokens, self.title)

    def attach(self, model: "nn.Module", plan: Any, setting: Setting) -> "nn.Module":
        from peft import get_peft_model

        return get_peft_model(model, self.config(setting.task_type))


@dataclass(frozen=True)
class PrefixTuning(_Virtual):
    """Keys and values of virtual tokens, trained in every layer.

    Source: arXiv 2101.00190, section 4.2.

    Example:
        >>> PrefixTuning(num_virtual_tokens=10, prefix_projection=True)
    """

    title: ClassVar[str] = "prefix tuning"
    source: ClassVar[str] = "arXiv 2101.00190"
    resumable: ClassVar[bool] = False  # under prefix_projection; checkpoints hold its result

    prefix_projection: bool = flag(False, "train them through an MLP, as the paper does (sec. 4.3)")
    encoder_hidden_size: int = flag(512, "hidden size of that MLP")

    def check(self, model: "nn.Module", setting: Setting) -> None:
        super().check(model, setting)
        if setting.args.gradient_checkpointing:
            raise RankwiseError(
                "prefix tuning hands its vectors over in the key-value cache, which "
                "gradient_checkpointing switches off; leave it out"
            )

    def config(self, task_type: str | None) -> Any:
        from peft import PrefixTuningConfig

        return PrefixTuningConfig(
            task_type=task_type,
            num_virtual_tokens=self.num_virtual_tokens,
            prefix_projection=self.prefix_projection,
            encoder_hidden_size=self.encoder_hidden_size if self.prefix_projection else None,
        )


@dataclass(frozen=True)
class _Embedded(_Virtual):
    """Virtual tokens at the input alone. They lengthen the row, which not every head survives."""

    def check(self, model: "nn.Module", setting: Setting) -> None:
        super().check(model, setting)
        if setting.task_type == "TOKEN_CLS":
            raise ModelError(
                f"{self.title} lengthens the rows, and PEFT does not lengthen their token labels; "
                "take prefix tuning"
            )
        if setting.task_type == "SEQ_CLS" and hasattr(model, "score"):
            raise ModelError(
                f"{self.title} hands {type(model).__name__} vectors in place of tokens, so it "
                "classifies by the padding behind a row; take prefix tuning"
            )

    def attach(self, model: "nn.Module", plan: Any, setting: Setting) -> "nn.Module":
        return _aligned(super().attach(model, plan, setting))

    def load(self, model: "nn.Module", folder: Path) -> "nn.Module":
        return _aligned(super().load(model, folder))


@dataclass(frozen=True)
class PromptTuning(_Embedded):
    """Embeddings of virtual tokens in front of the row's own.

    Source: arXiv 2104.08691, section 2.

    Example:
        >>> PromptTuning(num_virtual_tokens=100)
    """

    title: ClassVar[str] = "prompt tuning"
    source: ClassVar[str] = "arXiv 2104.08691"

    prompt_tuning_init: Literal["SAMPLE_VOCAB", "RANDOM"] = flag(
        "SAMPLE_VOCAB", "where they start: embeddings of tokens drawn at random, or noise"
    )

    def config(self, task_type: str | None) -> Any:
        from peft import PromptTuningConfig

        return PromptTuningConfig(
            task_type=task_type,
            num_virtual_tokens=self.num_virtual_tokens,
            prompt_tuning_init=self.prompt_tuning_init,
        )


@dataclass(frozen=True)
class PTuning(_Embedded):
    """Embeddings of virtual tokens, trained through a small network that is thrown away afterwards.

    Source: arXiv 2103.10385, section 2.2.

    Example:
        >>> PTuning(encoder_reparameterization_type="LSTM")
    """

    title: ClassVar[str] = "P-tuning"
    source: ClassVar[str] = "arXiv 2103.10385"
    resumable: ClassVar[bool] = False  # checkpoints hold the network's result alone

    encoder_reparameterization_type: Literal["MLP", "LSTM"] = flag("MLP", "that network")
    encoder_hidden_size: int = flag(128, "its hidden size")

    def config(self, task_type: str | None) -> Any:
        from peft import PromptEncoderConfig

        return PromptEncoderConfig(
            task_type=task_type,
            num_virtual_tokens=self.num_virtual_tokens,
            encoder_reparameterization_type=self.encoder_reparameterization_type,
            encoder_hidden_size=self.encoder_hidden_size,
        )


@dataclass(frozen=True)
class LlamaAdapter(Method):
    """Prompts that the topmost layers attend to, behind a gate that starts at zero.

    Source: arXiv 2303.16199, section 3; 10 prompts in 30 of LLaMA-7B's 32 layers.

    Example:
        >>> LlamaAdapter(adapter_len=10, adapter_layers=30)
    """

    title: ClassVar[str] = "LLaMA-Adapter"
    source: ClassVar[str] = "arXiv 2303.16199"
    usual_rate: ClassVar[float] = 1e-2

    adapter_len: int = flag(10, "prompts in a layer")
    adapter_layers: int | None = flag(None, "layers, from the top; without it, 30 or all there are")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("adapter_len", "adapter_layers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RankwiseError(f"{name} is {value!r}; it has to be an integer of at least 1")

    def check(self, model: "nn.Module", setting: Setting) -> None:
        from peft.tuners.adaption_prompt.config import TRANSFORMERS_MODEL_CONFIG as known

        config: Any = model.config
        if config.model_type not in known:
            raise ModelError(
                f"LLaMA-Adapter is there for {', '.join(known)} alone; the model is of type "
                f"{config.model_type!r}"
            )
        if setting.task_type != "CAUSAL_LM":
            raise ModelError(
                f"PEFT's LLaMA-Adapter neither trains nor saves the head of {type(model).__name__};"
                " take it for language models"
            )
        if (self.adapter_layers or 1) > (layers := config.num_hidden_layers):
            raise ModelError(f"adapter_layers is {self.adapter_layers}; the model has {layers}")

    def attach(self, model: "nn.Module", plan: Any, setting: Setting) -> "nn.Module":
        from peft import AdaptionPromptConfig, get_peft_model

        config: Any = model.config
        return get_peft_model(
            model,
            AdaptionPromptConfig(
                task_type=setting.task_type,
                adapter_len=self.adapter_len,
                adapter_layers=self.adapter_layers or min(30, config.num_hidden_layers),
            ),
        )


def _fits(model: "nn.Module", tables: Iterable[Any], more: int, title: str) -> None:
    """Raises DataError where a row and the virtual tokens exceed the model's positions.

    The model itself would say so in the middle of training, by an index out of range.
    """
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    for table in tables:
        if limit is None or "input_ids" not in (getattr(table, "column_names", None) or ()):
            continue
        if (longest := max(map(len, table["input_ids"]), default=0)) + more > limit:
            raise DataError(
                f"{title} adds {more} virtual tokens to rows of up to {longest}, and the model has "
                f"{limit} positions; cut the rows to {limit - more} or add fewer"
            )


def _aligned(model: "nn.Module") -> "nn.Module":
    """A language model whose logits are those of the row's own tokens again.

    PEFT's have the virtual tokens' in front, which no measure of the row's labels expects.
    """
    config = model.peft_config["default"]  # type: ignore[index]
    virtual = config.num_virtual_tokens  # type: ignore[union-attr]

    def strip(module: "nn.Module", inputs: Any, output: Any) -> Any:
        if output.logits.dim() == 3:
            output.logits = output.logits[:, virtual:]
        return output

    model.register_forward_hook(strip)
    return model
