"""ROUGE-L and CIDEr by pycocoevalcap, on the tokens of its PTB tokenizer but without its Java."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version
from typing import Any

from rankwise.metrics.figure import Figure, check_pairs, needs

# Lower-cased tokens that the evaluation of COCO captions leaves out. Brackets stay: they are
# -lrb- and -rrb- by then.
_PUNCTUATION = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}

_ABBREVIATION = (
    r"(?:[A-Za-z]\.)*[A-Za-z]|Mrs?|Ms|Drs?|St|Jr|Sr|Inc|Co|Corp|Ltd|Prof|Gen|Gov|Sen|Rep|Rev|Capt"
    r"|Col|Lt|Sgt|No|vs|etc|al|sq|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec|Ave|Blvd|Rd|Mt|Ft"
)
# What Stanford's PTBTokenizer does otherwise than nltk's.
_RULES = [
    (re.compile(pattern), instead)
    for pattern, instead in (
        ("\u00a3", " # "),
        ("[\u2013\u2014]", " -- "),
        ("\u2019", "'"),
        # A full stop inside the text, too, unless it is an abbreviation's,
        (rf"(?<![\w.])(?!(?:{_ABBREVIATION})\.)([^\s]*?[^\s.])\.+(?=\s|$|['\"])", r"\1 . "),
        # which keeps its own at the end.
        (rf"(?<![\w.])((?:{_ABBREVIATION})\.)\s*$", r"\1 ."),
        (r"(?<!\S)\.(?=[A-Za-z])", " . "),
        (r"(?<=\w)-(?=\s|$)", " - "),
        (r"(\.\d+)(?=(?:mm?|km|kg|cm|g|ft)\b)", r"\1 "),
    )
]


@lru_cache(maxsize=1)
def _treebank() -> Any:
    with needs("nltk"):
        from nltk.tokenize import NLTKWordTokenizer
    return NLTKWordTokenizer()


def ptb_tokens(text: str) -> list[str]:
    """Penn Treebank tokens in lower case, without punctuation.

    Example:
        >>> ptb_tokens("It isn't dear: under £20.")
        ['it', 'is', "n't", 'dear', 'under', '#', '20']
    """
    for pattern, instead in _RULES:
        text = pattern.sub(instead, text)
    tokens = (token.lower() for token in _treebank().tokenize(text, convert_parentheses=True))
    return [token for token in tokens if token not in _PUNCTUATION]


def rouge_l(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Figure:
    """ROUGE-L, from 0 to 1: the mean over rows of an F that weighs recall more.

    Precision and recall of a row are each the best over its references.

    Lin (2004) as the caption evaluation has it (beta = 1.2), computed by pycocoevalcap.

    Args:
        hypotheses: texts of PTB tokens, one blank between two.
        references: of each hypothesis one or more such texts.

    Raises:
        RankwiseError: pycocoevalcap is missing. DataError: lengths differ, or a row has no
            reference.
    """
    check_pairs(hypotheses, references)
    with needs("pycocoevalcap"):
        from pycocoevalcap.rouge.rouge import Rouge
    value, _ = Rouge().compute_score(*_by_row(hypotheses, references))
    return Figure("rouge_l", float(value), _signature("beta:1.2"))


def cider(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Figure:
    """CIDEr, from 0 to 10: mean cosine of tf-idf vectors of 1- to 4-grams with the references'.

    Vedantam et al. (2015), computed by pycocoevalcap; documents are the rows' references.

    Args, Raises: as `rouge_l`.
    """
    check_pairs(hypotheses, references)
    with needs("pycocoevalcap"):
        from pycocoevalcap.cider.cider import Cider
    value, _ = Cider().compute_score(*_by_row(hypotheses, references))
    return Figure("cider", float(value), _signature("df:corpus"))


def _by_row(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    refs = {row: list(texts) for row, texts in enumerate(references)}
    return refs, {row: [text] for row, text in enumerate(hypotheses)}


def _signature(more: str) -> str:
    return f"{more}|tok:ptb-nltk|case:lc|version:pycocoevalcap-{version('pycocoevalcap')}"
