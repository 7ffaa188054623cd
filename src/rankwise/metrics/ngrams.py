"""BLEU by sacrebleu, and NIST in both variants of mteval-v13a, on its tokens."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest

from rankwise.metrics.figure import Figure, check_pairs, needs

Words = Sequence[str]


def bleu(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    tokenize: str = "13a",
    name: str = "bleu",
) -> Figure:
    """Corpus BLEU of lower-cased texts, from 0 to 1.

    Papineni et al. (2002), computed by sacrebleu. An empty reference is one of length 0, as
    `multi-bleu.perl` and mteval have it.

    Args:
        hypotheses: one text each.
        references: of each hypothesis one or more texts.
        tokenize: sacrebleu's name of a tokenizer; "none" for texts that are tokenised.
        name: of the figure.

    Raises:
        RankwiseError: sacrebleu is missing. DataError: lengths differ, or a row has no reference.

    Example:
        >>> bleu(["the cat sat on the mat"], [["the cat sat on the mat"]]).value
        1.0
    """
    check_pairs(hypotheses, references)
    with needs("sacrebleu"):
        from sacrebleu.metrics.bleu import BLEU
    # force: it need not warn of texts that are tokenised, as these benchmarks' are
    metric = BLEU(lowercase=True, tokenize=tokenize, force=True)
    # None, unlike "", is no reference at all.
    columns = [list(column) for column in zip_longest(*references)]
    found = metric.corpus_score(list(hypotheses), columns)
    return Figure(name, found.score / 100, str(metric.get_signature()))


def nist(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[Figure, Figure]:
    """NIST-5 of lower-cased texts, from 0 up: mteval-v13a's figure, and that of its Python port.

    Doddington (2002). The two differ in the length that a short output is measured by: mteval (in
    Perl, what the E2E challenge published) takes the mean over all references of the corpus, the
    port (`measure_scores.py -p`, what LoRA's repository runs) the mean of each row's.

    Args:
        hypotheses: one text each.
        references: of each hypothesis one or more texts.

    Returns:
        "nist" and "nist_python".

    Raises:
        RankwiseError: sacrebleu, whose 13a tokenizer is used, is missing. DataError: lengths
            differ, or a row has no reference.
    """
    check_pairs(hypotheses, references)
    with needs("sacrebleu"):
        from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
    split = Tokenizer13a()

    hyps = [split(text).lower().split() for text in hypotheses]
    refs = [[split(text).lower().split() for text in row] for row in references]
    gain = _information_a_word(hyps, refs)
    length = sum(map(len, hyps))
    lengths = [[len(words) for words in row] for row in refs]
    by_corpus = len(hyps) * sum(map(sum, lengths)) / sum(map(len, lengths))
    by_row = sum(sum(row) / len(row) for row in lengths)
    signature = "case:lc|order:5|tok:13a|length:{}"
    return (
        Figure("nist", gain * _brevity(length, by_corpus), signature.format("corpus")),
        Figure("nist_python", gain * _brevity(length, by_row), signature.format("row")),
    )


_ORDER = 5


def _counts(words: Words) -> Counter[tuple[str, ...]]:
    return Counter(
        tuple(words[start : start + n])
        for n in range(1, _ORDER + 1)
        for start in range(len(words) - n + 1)
    )


def _information_a_word(hyps: Sequence[Words], refs: Sequence[Sequence[Words]]) -> float:
    """Sum over n of the information of matched n-grams, by the number of n-grams put out."""
    of_rows = [[_counts(words) for words in row] for row in refs]
    corpus: Counter[tuple[str, ...]] = Counter()
    for row in of_rows:
        for counts in row:
            corpus.update(counts)
    words = sum(count for gram, count in corpus.items() if len(gram) == 1)

    def information(gram: tuple[str, ...]) -> float:
        before = corpus[gram[:-1]] if len(gram) > 1 else words
        return math.log2(before / corpus[gram])

    matched, put_out = [0.0] * _ORDER, [0] * _ORDER
    for hyp, row in zip(hyps, of_rows, strict=True):
        most: Counter[tuple[str, ...]] = Counter()
        for counts in row:
            most |= counts
        for gram, count in _counts(hyp).items():
            put_out[len(gram) - 1] += count
            if gram in most:
                matched[len(gram) - 1] += min(count, most[gram]) * information(gram)
    return sum(m / n for m, n in zip(matched, put_out, strict=True) if n)


def _brevity(length: float, wanted: float) -> float:
    """1 at the wanted length, 1/2 at two thirds of it."""
    if length == 0:
        return 0.0
    beta = math.log(0.5) / math.log(1.5) ** 2
    return math.exp(beta * math.log(min(1.0, length / wanted)) ** 2) if wanted else 1.0
