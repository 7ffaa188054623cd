"""The tokenizer and the model of a task, from a folder or the hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from rankwise import fourbit
from rankwise.errors import ModelError
from rankwise.tasks.base import Task

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# What transformers raises for a missing, foreign or damaged model, or a package it lacks.
_LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)


def load_tokenizer(
    model_name_or_path: str | Path,
    *,
    gguf_file: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with EOS as the padding where it has none (GPT-2, Llama).

    It needs no add_prefix_space=True for tagging: encode gives each word its space itself.

    Args:
        model_name_or_path: a folder or a hub id.
        gguf_file: a file name in it, for a GGUF model.
        revision: of the hub repository.
        trust_remote_code: whether code from the repository may run.

    Raises:
        ModelError: it cannot be loaded, or has neither a padding nor an EOS token.
    """
    from transformers import AutoTokenizer

    options = _options(gguf_file=gguf_file, revision=revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(model_name_or_path), trust_remote_code=trust_remote_code, **options
        )
    except _LOAD_ERRORS as error:
        raise _not_loaded("tokenizer", model_name_or_path, error) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ModelError(
            f"{str(model_name_or_path)!r} has no vocabulary: no tokenizer.json or the like; "
            "save the tokenizer beside the model"
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(
                f"the tokenizer of {str(model_name_or_path)!r} has neither a pad nor an EOS "
                "token; set pad_token in its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(
    model_name_or_path: str | Path,
    *,
    gguf_file: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **more: Any,
) -> PretrainedConfig:
    """The model's configuration, without its weights.

    Args:
        model_name_or_path, gguf_file, revision, trust_remote_code: as `load_tokenizer`.
        **more: values that it takes instead of the model's own.

    Raises:
        ModelError: it cannot be loaded.
    """
    from transformers import AutoConfig

    options = _options(gguf_file=gguf_file, revision=revision)
    try:
        return AutoConfig.from_pretrained(
            str(model_name_or_path), trust_remote_code=trust_remote_code, **options, **more
        )
    except _LOAD_ERRORS as error:
        raise _not_loaded("configuration", model_name_or_path, error) from error


def load_model(
    task: Task,
    model_name_or_path: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    gguf_file: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    dtype: torch.dtype | str | None = None,
    load_in_4bit: bool = False,
    device: torch.device | str | None = None,
) -> PreTrainedModel:
    """The model with the head the task needs; its config holds the task's label names.

    A new regression head that has a bias starts at the mean score of `task.train`.

    Args:
        task: gives the head and its size.
        model_name_or_path: a folder or a hub id.
        tokenizer: what load_tokenizer gave; its padding becomes the model's, which a decoder
            needs to find the last token it classifies by.
        gguf_file: a file name in it, for a GGUF model.
        revision: of the hub repository.
        trust_remote_code: whether code from the repository may run.
        attn_implementation: "sdpa", "eager", ...; default transformers' own choice.
        dtype: of the weights; default transformers' own choice.
        load_in_4bit: keep the weights of linear layers in 4 bits, see `rankwise.fourbit`.
        device: where a model in 4 bits is put; default transformers' own choice.

    Raises:
        ModelError: it cannot be loaded, or has no such head.
    """
    import transformers

    name = str(model_name_or_path)
    source = _options(gguf_file=gguf_file, revision=revision)
    source["trust_remote_code"] = trust_remote_code
    loading = _options(attn_implementation=attn_implementation, dtype=dtype)
    if gguf_file is not None and load_in_4bit:
        raise ModelError(
            f"{gguf_file} is quantised itself; load_in_4bit takes a model in safetensors"
        )
    if gguf_file is not None and hasattr(transformers, "GgufConfig"):
        # Newer releases leave the weights packed where they can, and mark them as no good to train.
        loading["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        config = load_config(name, **source, **task.head())
        _check_decoder(task, name, config)
        auto = getattr(transformers, task.auto_class)
        if load_in_4bit:
            loading |= fourbit.how_to_load(auto, config, dtype, device)
        model, info = auto.from_pretrained(
            name, config=config, output_loading_info=True, **source, **loading
        )
    except ModelError:
        raise
    except _LOAD_ERRORS as error:
        raise _not_loaded(f"model for {task.kind}", model_name_or_path, error) from error
    model.config.pad_token_id = tokenizer.pad_token_id
    task.prepare_head(model, set(info["missing_keys"]))
    return fourbit.prepare(model) if fourbit.is_4bit(model) else model


def _check_decoder(task: Task, name: str, config: Any) -> None:
    """Raises ModelError where a text is to be learned by an encoder, which sees what it predicts.

    transformers would load BERT with a language model's head, and the loss would mean nothing.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    decodes = any(getattr(config, key, False) for key in ("is_decoder", "is_encoder_decoder"))
    if task.task_type != "CAUSAL_LM" or not masked or decodes:
        return
    columns = f" among the columns {', '.join(task.found)}" if task.found else ""
    raise ModelError(
        f"{name!r} is an encoder ({config.model_type}), which is no causal language model, and no "
        f"label column was found{columns}; give label_column=, or a decoder such as GPT-2 or Llama"
    )


def _options(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _not_loaded(what: str, name: str | Path, error: BaseException) -> ModelError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ModelError(
        f"cannot load the {what} from {str(name)!r} ({reason}); "
        "give a folder with config.json and weights, or a hub id"
    )
