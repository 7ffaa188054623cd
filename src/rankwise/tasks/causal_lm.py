"""Causal language models: learn a text, or a completion after its prompt."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset, Features, Value
from torch.nn import functional
from transformers import DataCollatorForSeq2Seq, EvalPrediction, PreTrainedTokenizerBase

from rankwise.errors import DataError
from rankwise.tasks.classification import first_output

logger = logging.getLogger(__name__)

IGNORED = -100


def features(text_columns: Sequence[str]) -> Features:
    """The columns of a split."""
    return Features({name: Value("string") for name in text_columns})


def encode(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    text_columns: Sequence[str],
    max_length: int,
) -> Dataset:
    """Token ids and labels, with EOS learned after a text that fits in max_length.

    One column: all tokens are learned. Two: the prompt's labels are -100 and the completion is
    learned; the two are tokenized apart and joined with nothing between, so that the prompt is
    what it will be at inference. A text or completion too long is cut at its end; a row is left
    out, and counted in a warning, when it has nothing to learn: the prompt fills max_length, or
    the text is a single token.

    Raises:
        DataError: no row is left.
    """
    prompt, text = (None, text_columns[0]) if len(text_columns) == 1 else text_columns

    def batch_features(batch: dict[str, list[Any]]) -> dict[str, Any]:
        texts = _ids(tokenizer, batch[text], special=prompt is None)
        starts: list[list[int]] = [[] for _ in texts]
        if prompt is not None:
            starts = _ids(tokenizer, batch[prompt], special=True)
        pairs = [
            _join(start, ids, tokenizer.eos_token_id, max_length)
            for start, ids in zip(starts, texts, strict=True)
        ]
        # The first token has nothing before it to be predicted from.
        pairs = [pair for pair in pairs if any(label != IGNORED for label in pair[1][1:])]
        return {
            "input_ids": [ids for ids, _ in pairs],
            "attention_mask": [[1] * len(ids) for ids, _ in pairs],
            "labels": [labels for _, labels in pairs],
        }

    encoded = rows.map(batch_features, batched=True, remove_columns=rows.column_names)
    _report_dropped(len(rows), len(encoded), max_length)
    return encoded


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], special: bool) -> list[list[int]]:
    """Ids with the BOS the tokenizer sets, if special, and never an EOS."""
    # verbose=False: a text over the model's length is cut later, no need to warn of it.
    encoded = tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
    eos = tokenizer.eos_token_id
    return [ids[:-1] if ids and ids[-1] == eos else ids for ids in encoded]


def _join(
    start: list[int], ids: list[int], eos: int | None, max_length: int
) -> tuple[list[int], list[int]]:
    learned = ids if eos is None else [*ids, eos]
    labels = [IGNORED] * len(start) + learned
    return (start + learned)[:max_length], labels[:max_length]


def _report_dropped(before: int, after: int, max_length: int) -> None:
    if after == 0:
        raise DataError(
            f"all {before} rows have nothing to learn within max_length={max_length} tokens "
            "(prompts too long, or texts of one token); raise max_length"
        )
    if after < before:
        logger.warning(
            "left out %d of %d rows with nothing to learn within max_length=%d tokens",
            *(before - after, before, max_length),
        )


def data_collator(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[Any]], Any]:
    """Pads a batch to its longest row, labels with -100."""
    # Not DataCollatorForLanguageModeling: that one rewrites the labels, prompts included, and
    # unlearns EOS where it is also the padding.
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)


def perplexity(loss: float) -> float:
    """exp of a mean loss a token, in nats; inf where that is too large for a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def preprocess_logits(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """(batch, 2): each row's summed loss in nats and its number of learned tokens.

    Trainer's preprocess_logits_for_metrics. Keeps an evaluation from holding logits
    (batch, seq, vocabulary), and makes the mean one over tokens, however they are batched.
    """
    if isinstance(logits, tuple):
        logits = logits[0]
    sums = [
        # A row at a time: the float32 copy of the logits is the largest thing here.
        functional.cross_entropy(
            row[:-1].float(), targets[1:], ignore_index=IGNORED, reduction="sum"
        )
        for row, targets in zip(logits, labels, strict=True)
    ]
    counts = (labels[:, 1:] != IGNORED).sum(dim=1)
    return torch.stack([torch.stack(sums).float(), counts.float()], dim=1)


def compute_metrics(metrics: Sequence[str]) -> Callable[[EvalPrediction], dict[str, float]]:
    """perplexity, and loss as the exact mean over all learned tokens, in nats.

    Needs preprocess_logits in the trainer. There "loss" takes the place of Trainer's own
    eval_loss, which is a mean of batch means.
    """

    def measure(output: EvalPrediction) -> dict[str, float]:
        total, tokens = first_output(output).sum(axis=0, dtype="float64")
        loss = float(total / tokens)
        values = {"perplexity": perplexity(loss), "loss": loss}
        return {name: values[name] for name in metrics}

    return measure
