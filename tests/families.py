"""Tiny random models of each family, batches for them, and short trainings. No downloads."""

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    RobertaConfig,
    TrainerCallback,
    TrainingArguments,
)

VOCABULARY, LENGTH = 60, 9


@dataclass(frozen=True)
class Family:
    name: str
    config: Any
    auto: Any
    entries: tuple[str, ...]
    """Endings of the entries that the default targets give, once per layer."""

    def model(self, seed: int = 0) -> PreTrainedModel:
        torch.manual_seed(seed)
        return self.auto.from_config(deepcopy(self.config))  # Trainer writes into it


def _sized(kind: Any, **more: Any) -> Any:
    return kind(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        pad_token_id=0,
        max_position_embeddings=32,
        **more,
    )


def _gpt2(**more: Any) -> GPT2Config:
    return GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        **more,
    )


def _llama(**more: Any) -> LlamaConfig:
    return _sized(LlamaConfig, num_key_value_heads=1, bos_token_id=1, eos_token_id=1, **more)


BERT, GPT2, LLAMA = ("query", "value"), ("c_attn.q", "c_attn.v"), ("q_proj", "v_proj")
SEQ, TAG, LM = (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForCausalLM,
)
FAMILIES = [
    Family("bert-classification", _sized(BertConfig, num_labels=3), SEQ, BERT),
    Family("bert-tagging", _sized(BertConfig, num_labels=3), TAG, BERT),
    Family("roberta-classification", _sized(RobertaConfig, num_labels=3), SEQ, BERT),
    Family("gpt2-classification", _gpt2(num_labels=3), SEQ, GPT2),
    Family("gpt2-lm", _gpt2(), LM, GPT2),
    Family("llama-classification", _llama(num_labels=3), SEQ, LLAMA),
    Family("llama-lm", _llama(), LM, LLAMA),
]


def family(name: str) -> Family:
    found = next(f for f in FAMILIES if f.name == name)
    return replace(found, config=deepcopy(found.config))  # tests change it


def rows(of: Family, count: int = 24, seed: int = 0) -> Dataset:
    """Rows that can be learned: the label follows from the tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, VOCABULARY, (count, LENGTH), generator=generator)
    if of.auto is SEQ:
        labels = tokens[:, 1] % 3
    elif of.auto is TAG:
        labels = tokens % 3
    else:
        labels = tokens
    return Dataset.from_dict(
        {
            "input_ids": tokens.tolist(),
            "attention_mask": torch.ones_like(tokens).tolist(),
            "labels": labels.tolist(),
        }
    )


def batch(of: Family, count: int = 5, seed: int = 1) -> dict[str, torch.Tensor]:
    """Inputs without labels."""
    table = rows(of, count, seed).with_format("torch")
    return {name: table[name][:] for name in ("input_ids", "attention_mask")}


def without_dropout(of: Family) -> PreTrainedModel:
    model = of.model()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def arguments(folder: Any, **changes: Any) -> TrainingArguments:
    """A few steps at a constant rate on the CPU; nothing saved, nothing printed."""
    settings = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(**(settings | changes))


class StopAfter(TrainerCallback):
    """Ctrl-C at the end of a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt
