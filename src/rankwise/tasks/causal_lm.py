"""Causal language models: learn a text, or a completion after its prompt."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rankwise.errors import DataError
from rankwise.tasks.base import IGNORED, Task
from rankwise.tasks.checks import Rows, check_texts
from rankwise.tasks.metrics import first_output

if TYPE_CHECKING:
    import torch
    from datasets import Dataset, Features
    from transformers import EvalPrediction, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def perplexity(loss: float) -> float:
    """exp of a mean loss a token, in nats; inf where that is too large for a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def sum_losses(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """(batch, 2): each row's summed loss in nats and its number of learned tokens.

    Trainer's preprocess_logits_for_metrics. Keeps an evaluation from holding logits
    (batch, seq, vocabulary), and makes the mean one over tokens, however they are batched.
    """
    import torch
    from torch.nn import functional

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


class CausalLM(Task):
    """Rows of a text, or of a prompt and its completion; there are no labels."""

    kind = "causal_lm"
    task_type = "CAUSAL_LM"
    auto_class = "AutoModelForCausalLM"
    labelled = False

    def number(self, rows: dict[str, Rows]) -> tuple[dict[str, Rows], None]:
        """The splits as they are."""
        return rows, None

    def default_metrics(self) -> tuple[str, ...]:
        return ("perplexity", "loss")

    def features(self) -> Features:
        from datasets import Features, Value

        return Features({name: Value("string") for name in self.text_columns})

    def tokenize(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> Dataset:
        """Token ids and labels, with EOS learned after a text that fits in max_length.

        One column: all tokens are learned. Two: the prompt's labels are -100 and the completion
        is learned; the two are tokenized apart and joined with nothing between, so that the
        prompt is what it will be at inference. A text or completion too long is cut at its end;
        a row is left out, and counted in a warning, when it has nothing to learn: the prompt
        fills max_length, or the text is a single token.

        Raises:
            DataError: no row is left.
        """
        *prompts, text = self.text_columns
        prompt = prompts[0] if prompts else None

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
        self._report(len(rows), len(encoded), max_length)
        return encoded

    def _report(self, before: int, after: int, max_length: int) -> None:
        _report_dropped(before, after, max_length)

    def predict(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        rows: Rows,
        max_length: int = 128,
        batch_size: int = 32,
        max_new_tokens: int = 64,
        **_: Any,
    ) -> list[dict[str, Any]]:
        """The likeliest completion of each row's first text column, token by token.

        Prompts are tokenized as in training, and padded on the left.
        """
        import torch

        from rankwise.decoding import left_padded

        every = self.prompts(tokenizer, rows)
        pad = tokenizer.pad_token_id or 0
        found = []
        for start in range(0, len(every), batch_size):
            inputs, mask = left_padded(every[start : start + batch_size], pad)
            with torch.no_grad():
                out = model.eval().generate(
                    input_ids=inputs.to(model.device),
                    attention_mask=mask.to(model.device),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    pad_token_id=pad,
                )
            texts = tokenizer.batch_decode(out[:, inputs.shape[1] :], skip_special_tokens=True)
            found += [{"completion": text} for text in texts]
        return found

    def prompts(self, tokenizer: PreTrainedTokenizerBase, rows: Rows) -> list[list[int]]:
        """A slot: the ids that a completion goes on from, for each row."""
        name = self.text_columns[0]
        check_texts(rows, name, "input")
        return _ids(tokenizer, rows[name], special=True)

    def data_collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[Any]], Any]:
        from transformers import DataCollatorForSeq2Seq

        # Not DataCollatorForLanguageModeling: that one rewrites the labels, prompts included, and
        # unlearns EOS where it is also the padding.
        return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)

    def head(self) -> dict[str, Any]:
        """Nothing: the head is the model's own."""
        return {}

    @property
    def preprocess_logits(self) -> Callable[[Any, torch.Tensor], torch.Tensor]:
        """Logits (batch, seq, vocabulary) to (batch, 2): see sum_losses."""
        return sum_losses

    def measure(self, output: EvalPrediction) -> dict[str, float]:
        """perplexity, and loss as the exact mean over all learned tokens, in nats.

        Of what preprocess_logits gave, (rows, 2). "loss" takes the place of Trainer's own
        eval_loss, which is a mean of batch means.
        """
        total, tokens = first_output(output).sum(axis=0, dtype="float64")
        loss = float(total / tokens)
        values = {"perplexity": perplexity(loss), "loss": loss}
        return {name: values[name] for name in self.metrics}


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[list[int]]:
    """Token ids of prompts, as `CausalLM.tokenize` has them before the completion."""
    return _ids(tokenizer, prompts, special=True)


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
