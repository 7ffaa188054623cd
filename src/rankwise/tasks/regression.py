"""Regression: one text or a pair, a score."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rankwise.errors import DataError
from rankwise.tasks import texts
from rankwise.tasks.base import Task
from rankwise.tasks.checks import Rows
from rankwise.tasks.metrics import first_output

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase


class Regression(Task):
    """Rows of one or two texts and a label that is a number; labels become floats."""

    kind = "regression"
    task_type = "SEQ_CLS"
    auto_class = "AutoModelForSequenceClassification"
    package = "scipy"

    def number(self, rows: dict[str, Rows]) -> tuple[dict[str, Rows], None]:
        """The splits with floats as labels; scores have no names.

        Raises:
            DataError: a label is missing or not a finite number.
        """
        label = self.label
        scores = {
            split: {**there, label: _scores(there, label, split)} for split, there in rows.items()
        }
        return scores, None

    def default_metrics(self) -> tuple[str, ...]:
        return ("pearson", "spearman")

    def features(self) -> Features:
        return texts.text_features(self.text_columns, self.label, "float32")

    def check_varied(self) -> None:
        if self.train is not None:
            texts.check_two_labels(self.train, self.label, None)

    def tokenize(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> Dataset:
        return texts.encode_texts(rows, tokenizer, self.text_columns, self.label, max_length)

    def data_collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[Any]], Any]:
        return texts.pad_texts(tokenizer)

    def head(self) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def prepare_head(self, model: PreTrainedModel, new_parameter_names: set[str]) -> None:
        """Sets the bias of a new head to the mean score in train.

        From zero, the first hundred steps push the factors to make up for the offset, and at
        LoRA's learning rates they seldom come back: every input gets the same score.
        """
        import torch

        if self.train is None:
            return
        scores = self.train[self.label]
        mean = sum(scores) / len(scores)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                new = name in new_parameter_names
                if new and name.endswith("bias") and parameter.numel() == 1:
                    parameter.fill_(mean)

    def answer(self, logits: Any, labels: Any) -> dict[str, Any]:
        """The score."""
        return {"score": round(float(logits[0]), 6)}

    def measure(self, output: EvalPrediction) -> dict[str, float]:
        """pearson and spearman of scores (rows, 1).

        0.0 when all scores or all labels are equal, where a correlation is not defined.
        """
        import numpy as np
        from scipy.stats import pearsonr, spearmanr

        functions: dict[str, Callable[[Any, Any], Any]] = {
            "pearson": pearsonr,
            "spearman": spearmanr,
        }
        predicted = np.asarray(first_output(output), dtype=np.float64).reshape(-1)
        labels = np.asarray(output.label_ids, dtype=np.float64).reshape(-1)
        if np.ptp(predicted) == 0 or np.ptp(labels) == 0:
            return dict.fromkeys(self.metrics, 0.0)
        return {name: float(functions[name](predicted, labels)[0]) for name in self.metrics}


def _scores(rows: Rows, label: str, split: str) -> list[float]:
    values = texts.read_labels(rows, label, split)
    for row, value in enumerate(values, 1):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            raise DataError(
                f"{split} row {row}: {label!r} is {value!r}, not a finite number; "
                "correct it or use kind='classification'"
            )
    return [float(value) for value in values]
