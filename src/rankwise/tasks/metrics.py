"""Every metric a task can be judged by, with its direction and range, in one table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rankwise.errors import RankwiseError

if TYPE_CHECKING:
    import numpy as np
    from transformers import EvalPrediction


@dataclass(frozen=True)
class Metric:
    """How the values of a metric are read.

    Attributes:
        greater_is_better: False where a smaller value is the better one.
        range: its smallest and largest value, and the unit, in words.
    """

    greater_is_better: bool
    range: str


_GENERATED: dict[str, Metric] = {
    "bleu": Metric(True, "from 0 to 1"),
    "bleu_given_references": Metric(True, "from 0 to 1, a missing reference is left out"),
    "nist": Metric(True, "from 0 up, in bits a word"),
    "nist_python": Metric(True, "from 0 up, in bits a word"),
    "meteor": Metric(True, "from 0 to 1"),
    "meteor_without_paraphrases": Metric(True, "from 0 to 1, not comparable with METEOR"),
    "rouge_l": Metric(True, "from 0 to 1"),
    "cider": Metric(True, "from 0 to 10"),
    "ter": Metric(False, "from 0 up, edits a word"),
}

METRICS: dict[str, Metric] = {
    "accuracy": Metric(True, "from 0 to 1, the share that is right"),
    "f1": Metric(True, "from 0 to 1"),
    "precision": Metric(True, "from 0 to 1"),
    "recall": Metric(True, "from 0 to 1"),
    "matthews_correlation": Metric(True, "from -1 to 1, 0 for chance"),
    "pearson": Metric(True, "from -1 to 1, 0 for no relation"),
    "spearman": Metric(True, "from -1 to 1, 0 for no relation"),
    "perplexity": Metric(False, "from 1 up, the size of the vocabulary for uniform guesses"),
    "loss": Metric(False, "from 0 up, in nats a token"),
    **_GENERATED,
    # WebNLG's categories that are in train, and those that are not
    **{f"{name}_{part}": of for name, of in _GENERATED.items() for part in ("seen", "unseen")},
}


def find_metric(name: str) -> Metric:
    """The row of METRICS.

    Raises:
        RankwiseError: no such metric, so that nobody can say which way it goes.
    """
    if name not in METRICS:
        raise RankwiseError(f"unknown metric {name!r}; choose one of {', '.join(METRICS)}")
    return METRICS[name]


def first_output(output: EvalPrediction) -> np.ndarray:
    """The logits; some models hand back hidden states after them."""
    predictions = output.predictions
    return predictions[0] if isinstance(predictions, tuple) else predictions
