"""Figures of generated texts, each with the signature of how it was computed."""

from rankwise.metrics.captions import cider, rouge_l
from rankwise.metrics.figure import Figure
from rankwise.metrics.meteor import meteor
from rankwise.metrics.ngrams import bleu, nist
from rankwise.metrics.suites import SUITES, score
from rankwise.metrics.ter import ter

__all__ = ["SUITES", "Figure", "bleu", "cider", "meteor", "nist", "rouge_l", "score", "ter"]
