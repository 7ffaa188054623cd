"""Figures of generated texts, each with the signature of how it was computed.

A metric is a function of its module: `ngrams.bleu`, `ngrams.nist`, `captions.rouge_l`,
`captions.cider`, `meteor.meteor`, `ter.ter`. `score` computes those of a benchmark.
"""

from rankwise.metrics.figure import Figure
from rankwise.metrics.suites import SUITES, score

__all__ = ["SUITES", "Figure", "score"]
