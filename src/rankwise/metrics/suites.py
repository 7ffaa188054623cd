"""What each benchmark of text generation is judged by, as its official scorer judges it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rankwise.errors import DataError
from rankwise.metrics.captions import cider, ptb_tokens, rouge_l
from rankwise.metrics.figure import Figure, check_pairs, needs
from rankwise.metrics.meteor import INCOMPLETE, meteor, tables_folder
from rankwise.metrics.ngrams import bleu, nist
from rankwise.metrics.ter import ter

Scorer = Callable[[Sequence[str], Sequence[Sequence[str]]], list[Figure]]


@dataclass(frozen=True)
class Suite:
    """The figures of one benchmark.

    Attributes:
        score: texts and their references to figures.
        names: of the figures, the main one first.
        packages: what they are computed with.
    """

    score: Scorer
    names: tuple[str, ...]
    packages: tuple[str, ...]


def score(
    suite: str, hypotheses: Sequence[str], references: Sequence[Sequence[str]]
) -> list[Figure]:
    """Every figure of a benchmark, for texts as a model gave them.

    Args:
        suite: a name in SUITES.
        hypotheses: one text each, a line each.
        references: of each hypothesis one text or more; blank ones are none.

    Raises:
        DataError: no such benchmark, lengths that differ, or a row without a reference.
        RankwiseError: a package is missing.

    Example:
        >>> {f.name: round(f.value, 4) for f in score("e2e", outputs, references)}
        {'bleu': 0.6593, 'nist': 8.6094, 'nist_python': 8.5923, 'meteor': 0.4483, ...}
    """
    if suite not in SUITES:
        raise DataError(f"no scorer {suite!r}; there are {', '.join(SUITES)}")
    given = [[text for text in row if text.strip()] for row in references]
    check_pairs(hypotheses, given)
    return SUITES[suite].score([" ".join(text.split()) for text in hypotheses], given)


def _e2e(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> list[Figure]:
    """As `measure_scores.py` of the E2E challenge: METEOR and the two below it on PTB tokens."""
    plain = [" ".join(ptb_tokens(text)) for text in hypotheses]
    plain_references = [[" ".join(ptb_tokens(text)) for text in row] for row in references]
    return [
        bleu(hypotheses, references),
        *nist(hypotheses, references),
        _with_tokens(meteor(plain, plain_references), "ptb-nltk"),
        rouge_l(plain, plain_references),
        cider(plain, plain_references),
    ]


_FIRST = 3  # references that the official scorers of WebNLG 2017 and DART read


def _webnlg(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> list[Figure]:
    """As the scripts of WebNLG 2017 and their copy for DART: three references, in lower case."""
    return _triples(hypotheses, references, ascii_only=True)


def _dart(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> list[Figure]:
    return _triples(hypotheses, references, ascii_only=False)


def _triples(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], ascii_only: bool
) -> list[Figure]:
    hyps = [split_words(text, ascii_only) for text in hypotheses]
    refs = [[split_words(text, ascii_only) for text in row[:_FIRST]] for row in references]
    # The scripts hand over three files, where a line without a reference is empty. multi-bleu.perl
    # takes that for a reference of length 0; TER's and METEOR's are left out.
    filled = [row + [""] * (_FIRST - len(row)) for row in refs]
    tokens = f"webnlg2017{'-ascii' if ascii_only else ''}"
    return [
        _with_tokens(bleu(hyps, filled, tokenize="none"), f"{tokens}|missing_refs:empty"),
        _with_tokens(
            bleu(hyps, refs, tokenize="none", name="bleu_given_references"),
            f"{tokens}|missing_refs:left_out",
        ),
        _with_tokens(meteor(hyps, refs), tokens),
        _with_tokens(ter(hyps, refs), tokens),
    ]


def split_words(text: str, ascii_only: bool) -> str:
    """Lower case with every mark that is neither letter nor digit apart; the same if done twice.

    Args:
        text: as it was written.
        ascii_only: letters beyond ASCII become their nearest in it.

    Example:
        >>> split_words("Suárez's 3.5%", ascii_only=True)
        "suarez ' s 3 . 5 %"
    """
    if ascii_only:
        with needs("anyascii"):
            from anyascii import anyascii
        text = anyascii(text)
    # Lower-cased, some letters are followed by a combining mark (U+0300 on), which stays with them.
    parts = re.split("([^\\w\u0300-\u036f])", text)
    return " ".join(" ".join(parts).lower().split())


def _with_tokens(figure: Figure, tokens: str) -> Figure:
    return Figure(figure.name, figure.value, f"{figure.signature}|input:{tokens}")


_E2E = ("bleu", "nist", "nist_python", "meteor", "rouge_l", "cider")
_TRIPLES = ("bleu", "bleu_given_references", "meteor", "ter")

SUITES: dict[str, Suite] = {
    "e2e": Suite(_e2e, _E2E, ("sacrebleu", "nltk", "snowballstemmer", "pycocoevalcap")),
    "webnlg": Suite(_webnlg, _TRIPLES, ("sacrebleu", "snowballstemmer", "anyascii")),
    "dart": Suite(_dart, _TRIPLES, ("sacrebleu", "snowballstemmer")),
}


def check_packages(suite: str) -> None:
    """Call before long work.

    Raises:
        RankwiseError: a package that the figures need is not installed.
    """
    from importlib import import_module

    for package in SUITES[suite].packages:
        with needs(package):
            import_module(package)


def figure_names(suite: str) -> tuple[str, ...]:
    """The names that `score` gives back here: METEOR has another one without its tables."""
    complete = tables_folder() is not None
    return tuple(
        INCOMPLETE if name == "meteor" and not complete else name for name in SUITES[suite].names
    )
