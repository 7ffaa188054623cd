"""METEOR 1.5 for English, written from its papers; the tables are read from pycocoevalcap's wheel.

M. Denkowski and A. Lavie, "Meteor Universal: Language Specific Translation Evaluation for Any
Target Language" (2014), and for the alignment "Meteor 1.3" (2011). Words and phrases of a
hypothesis are aligned to a reference in four ways (the same word, the same stem, a common WordNet
synset, a pair of the paraphrase table); from the alignment come a weighted F-mean and a penalty for
fragments. The papers leave open when a word is left out and how ties are broken: both are done here
as the reference program does it, written from a description in words.
"""

from __future__ import annotations

import gzip
import importlib.util
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

from rankwise.metrics.figure import Figure, check_pairs, needs

# Parameters of the English ranking task, table 2 of the 2014 paper.
ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
EXACT, STEM, SYNONYM, PARAPHRASE = range(4)
WEIGHTS = (1.0, 0.6, 0.8, 0.6)
BEAM = 40
JAR = "meteor-1.5.jar"  # in the wheel; its word lists are read, no code of it is run
_LONGEST_PHRASE = 7  # in words, of the paraphrase table

# A table with these names is in the wheel; without it METEOR is another measure, so named.
COMPLETE, INCOMPLETE = "meteor", "meteor_without_paraphrases"


class Match(NamedTuple):
    """Words [start, start + length) of the hypothesis and [at, at + size) of the reference."""

    start: int
    length: int
    at: int
    size: int
    module: int


@dataclass(frozen=True)
class Tables:
    """What words mean the same. Empty tables leave the same word and the same stem.

    Attributes:
        function_words: words that count a third of a content word (1 - DELTA against DELTA).
        synsets: word -> numbers of its WordNet synsets.
        irregular: inflected form -> base forms (WordNet's exceptions).
        paraphrases: phrase -> phrases, in the table's order; only of those that the scored texts
            hold.
    """

    function_words: Set[str] = frozenset()
    synsets: Mapping[str, Set[str]] = field(default_factory=dict)
    irregular: Mapping[str, Set[str]] = field(default_factory=dict)
    paraphrases: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @cached_property
    def meanings(self) -> dict[str, frozenset[str]]:
        """Synsets of a word and of its base form, filled in as words come."""
        return {}

    def meaning(self, word: str) -> frozenset[str]:
        """The synsets of a word: of the word as it is and of its base form."""
        if word not in self.meanings:
            bases = {word, *self._bases(word)}
            found = (self.synsets.get(base, frozenset()) for base in bases)
            self.meanings[word] = frozenset().union(*found)
        return self.meanings[word]

    def _bases(self, word: str) -> Iterable[str]:
        """WordNet's rules of detachment: an exception, or the first ending that leaves a word."""
        if word in self.irregular:
            return self.irregular[word]
        if len(word) > 2 and not word.endswith("ss"):
            for ending, instead in _ENDINGS:
                base = word[: len(word) - len(ending)] + instead
                if word.endswith(ending) and base in self.synsets:
                    return (base,)
        return ()


# Nouns, verbs, adjectives, in the order of WordNet's manual page morphy(7).
_ENDINGS = (
    *(("s", ""), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh")),
    *(("men", "man"), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", "")),
    *(("ing", "e"), ("ing", ""), ("er", ""), ("est", ""), ("er", "e"), ("est", "e")),
)


def meteor(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Figure:
    """METEOR 1.5 of a corpus, from 0 to 1; the best reference of each hypothesis counts.

    Comparable with published figures only where the package pycocoevalcap is there, whose wheel has
    the tables of paraphrases, synonyms and function words. Without, the figure is named
    `meteor_without_paraphrases` and says so: it lies lower.

    Args:
        hypotheses: one text each.
        references: of each hypothesis one or more texts.

    Raises:
        RankwiseError: snowballstemmer is missing.
        DataError: lengths differ, or a row has no reference.

    Example:
        >>> meteor(["the cat sat"], [["the cat sat", "a cat"]]).value
        1.0
    """
    check_pairs(hypotheses, references)
    folder = tables_folder()
    lists = abbreviations(folder)
    hyps = [tokenize(text, lists) for text in hypotheses]
    # dict.fromkeys: the same reference twice need not be aligned twice
    refs = [list(dict.fromkeys(tuple(tokenize(r, lists)) for r in rows)) for rows in references]
    tables = Tables()
    if folder is not None:
        tables = read_tables(folder, [*hyps, *(ref for rows in refs for ref in rows)])
    total = Statistics()
    for hyp, rows in zip(hyps, refs, strict=True):
        total += max((compare(hyp, ref, tables) for ref in rows), key=lambda found: found.score)
    with_tables = folder is not None
    name = COMPLETE if with_tables else INCOMPLETE
    modules = "exact+stem+synonym+paraphrase" if with_tables else "exact+stem|not_comparable:yes"
    return Figure(name, total.score, f"version:1.5|lang:en|task:rank|norm:yes|modules:{modules}")


# Tokens


_LETTERS = (
    "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u017e\u0400-\u0527"
    "\ua640-\ua66e\ua67e-\ua697\u1d00-\u1d7f"
)
_ELLIPSIS = "\ue000"  # a dot of several in a row, while full stops are looked for
# One after the other; what a rule has taken as a neighbour it does not take again.
_RULES = [
    (re.compile(pattern), instead)
    for pattern, instead in (
        (f"([^0-9{_LETTERS} \\t\\n\\v\\f\\r.'`,\u2018\u2019-])", r" \1 "),
        (r"\.{2,}", lambda m: f" {_ELLIPSIS * len(m[0])} "),
        (r"([^0-9]),([^0-9])", r"\1 , \2"),
        (r"([0-9]),([^0-9])", r"\1 , \2"),
        (r"([^0-9]),([0-9])", r"\1 , \2"),
        ("[`\u2018\u2019]", "'"),
        ("[\u201c\u201d]|''", ' " '),
        ("\u2013|--", "-"),
        (f"([0-9{_LETTERS}.])-([0-9{_LETTERS}])", r"\1 \2"),
        (f"([^{_LETTERS}])'([^{_LETTERS}])", r"\1 ' \2"),
        (f"([^0-9{_LETTERS}])'([{_LETTERS}])", r"\1 ' \2"),
        (f"([{_LETTERS}])'([^{_LETTERS}])", r"\1 ' \2"),
        (f"([{_LETTERS}])'([{_LETTERS}])", r"\1 '\2"),
        (r"([0-9])'s", r"\1 's"),
    )
]
_LETTER = re.compile(f"[{_LETTERS}]")


Abbreviations = tuple[frozenset[str], frozenset[str]]


def tokenize(text: str, lists: Abbreviations | None = None) -> list[str]:
    """Lower-case tokens with punctuation apart and unified, hyphenated words in their parts.

    Args:
        text: of one hypothesis or reference.
        lists: see `abbreviations`; None looks for them, which takes longer than the rest.
    """
    text = f" {text} "
    for pattern, instead in _RULES:
        text = pattern.sub(instead, text)
    words = re.split(r"[ \t\n\r\f]+", text)
    lists = abbreviations(tables_folder()) if lists is None else lists
    pairs = zip(words, [*words[1:], ""], strict=True)
    joined = " ".join(part for word, after in pairs for part in _stop(word, after, *lists))
    apart = re.split("[ \u00a0\u2000-\u200a\u202f\u205f\u3000]+", joined.replace(_ELLIPSIS, "."))
    return [word.lower() for word in apart if word]


def _stop(word: str, after: str, always: Set[str], before_number: Set[str]) -> tuple[str, ...]:
    """A word, and apart from it the full stop that ends a sentence with it.

    Args:
        word: may end in a full stop.
        after: the next word, or "".
        always, before_number: see `abbreviations`.
    """
    stem, dot, _ = word.rpartition(".")
    if not stem or not word.endswith("."):
        return (word,)
    if "." in stem and _LETTER.search(stem):
        return (word.replace(".", ""),)
    goes_on = re.match("[a-z]", after) or (stem in before_number and re.match("[0-9]", after))
    return (word,) if stem in always or goes_on else (stem, dot)


@cache
def abbreviations(folder: Path | None) -> Abbreviations:
    """Words whose full stop ends no sentence, and those where none does before a number."""
    if folder is None:
        return frozenset(), frozenset()
    lines = zipfile.ZipFile(folder / JAR).read("nonbreaking/english.prefixes").decode("utf-8")
    words = [line.split() for line in lines.splitlines() if line.strip() and line[0] != "#"]
    numeric = frozenset(word[0] for word in words if "#NUMERIC_ONLY#" in word)
    return frozenset(word[0] for word in words) - numeric, numeric


# Tables


def tables_folder() -> Path | None:
    """Where pycocoevalcap has METEOR's tables; None without that package."""
    found = importlib.util.find_spec("pycocoevalcap")
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(next(iter(found.submodule_search_locations))) / "meteor"
    there = (folder / "data" / "paraphrase-en.gz", folder / JAR)
    return folder if all(path.is_file() for path in there) else None


def read_tables(folder: Path, texts: Iterable[Sequence[str]]) -> Tables:
    """The tables, of the paraphrases those whose two sides are in the texts (some seconds)."""
    archive = zipfile.ZipFile(folder / JAR)

    def lines(name: str) -> list[str]:
        return archive.read(name).decode("utf-8").split("\n")

    synsets = lines("synonym/english.synsets")
    pairs = zip(synsets[::2], synsets[1::2], strict=False)
    irregular: dict[str, set[str]] = defaultdict(set)
    exceptions = lines("synonym/english.exceptions")
    for base, forms in zip(exceptions[::2], exceptions[1::2], strict=False):
        for form in forms.split():
            irregular[form].add(base)
    return Tables(
        frozenset(" ".join(lines("function/english.words")).split()),
        {word: frozenset(numbers.split()) for word, numbers in pairs},
        dict(irregular),
        _paraphrases(folder / "data" / "paraphrase-en.gz", texts),
    )


def _paraphrases(path: Path, texts: Iterable[Sequence[str]]) -> dict[str, list[str]]:
    """The table has three lines a pair: a probability, a phrase, a phrase."""
    phrases = {phrase for words in texts for phrase in _phrases(words)}
    found: dict[str, list[str]] = defaultdict(list)
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
        lines = map(str.rstrip, file)
        for _, one, other in zip(lines, lines, lines, strict=True):
            if one in phrases and other in phrases:
                found[one].append(other)
    return dict(found)


def _phrases(words: Sequence[str]) -> dict[str, list[tuple[int, int]]]:
    """Every run of words -> its places, as (start, length)."""
    found: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for length in range(1, _LONGEST_PHRASE + 1):
        for start in range(len(words) - length + 1):
            found[" ".join(words[start : start + length])].append((start, length))
    return found


# Alignment


@cache
def stem(word: str) -> str:
    """Snowball's English stem, as it was when METEOR 1.5 came out."""
    return str(_stemmer().stemWord(word))


@lru_cache(maxsize=1)
def _stemmer():  # type: ignore[no-untyped-def]
    with needs("snowballstemmer"):
        import snowballstemmer
    return snowballstemmer.stemmer("english")


def matches(hyp: Sequence[str], ref: Sequence[str], tables: Tables) -> list[Match]:
    """Every way in which words of the two can be aligned, in the order that breaks the last ties.

    A pair that two modules find, or the paraphrase table from both sides, is there twice;
    `_settled` relies on it.
    """
    found: list[list[Match]] = [[], [], []]
    alike = list(hyp) == list(ref)  # then the same words are all that is looked at
    for j, b in enumerate(ref):
        for i, a in enumerate(hyp):
            if a == b:
                found[EXACT].append(Match(i, 1, j, 1, EXACT))
            if a == b or alike:
                continue
            if stem(a) == stem(b):
                found[STEM].append(Match(i, 1, j, 1, STEM))
            if not tables.meaning(a).isdisjoint(tables.meaning(b)):
                found[SYNONYM].append(Match(i, 1, j, 1, SYNONYM))
    if tables.paraphrases and not alike:
        ours, theirs = _phrases(hyp), _phrases(ref)
        # by the place of the side that the table is entered by, then the length of its phrase
        first = sorted(_phrase_matches(theirs, ours, tables), key=lambda pair: pair[0])
        found.append([Match(*other, *one, PARAPHRASE) for one, other in first])
        second = sorted(_phrase_matches(ours, theirs, tables), key=lambda pair: pair[0])
        found.append([Match(*one, *other, PARAPHRASE) for one, other in second])
    return [match for module in found for match in module]


Place = tuple[int, int]  # of a phrase in its text: start, length


def _phrase_matches(
    ours: Mapping[str, list[Place]], theirs: Mapping[str, list[Place]], tables: Tables
) -> Iterable[tuple[Place, Place]]:
    """Places of a phrase of ours and of a paraphrase of it, in the table's order."""
    for phrase, places in ours.items():
        for other in tables.paraphrases.get(phrase, ()):
            for there in theirs.get(other, ()):
                for here in places:
                    yield here, there


def _settled(found: Sequence[Match], length: int, size: int) -> dict[int, Match]:
    """Matches of words that no other match wants, by their place in the reference."""
    wanted, offered = [0] * length, [0] * size
    for m in found:
        for i in range(m.start, m.start + m.length):
            wanted[i] += 1
        for j in range(m.at, m.at + m.size):
            offered[j] += 1
    return {
        m.at: m
        for m in found
        if max(wanted[m.start : m.start + m.length]) == 1
        and max(offered[m.at : m.at + m.size]) == 1
    }


# An alignment of the first words of the reference, while it is searched for: its cost; the words of
# the hypothesis that it takes, as bits; the next word of the hypothesis if the last word of the
# reference was matched, so that a match there goes on with the chunk, else -1; the next word of the
# reference; its matches as (the last one, those before), or None.
Partial = tuple[int, int, int, int, object]
# A match with the words of the hypothesis that it takes, what it gains, and its distance.
Option = tuple[Match, int, int, int]

# The criteria of the search in one number, the first the largest.
_WORD, _CHUNK = 1 << 60, 1 << 30


def align(hyp: Sequence[str], ref: Sequence[str], tables: Tables) -> list[Match]:
    """The alignment: each word in one match at most, found by a beam search over the reference.

    Matches of words that nothing else can take are settled beforehand. Among the others the order
    is: most words covered (of a match that is not exact, half of them, rounded down on each side),
    fewest chunks, the smallest distance, the order of `matches`. The distance is not what the paper
    says: a match adds the distance between its two places to the paths that tried it and went on
    otherwise, not to the path that takes it, so that the first of two alike is taken and not the
    nearest. It is the reference program's, so it is done here too.
    """
    found = matches(hyp, ref, tables)
    settled = _settled(found, len(hyp), len(ref))
    open_at: dict[int, list[Option]] = defaultdict(list)
    for m in found:
        open_at[m.at].append(_option(m))
    paths: list[Partial] = [(0, 0, -1, 0, None)]
    for j in range(len(ref)):
        grown: list[Partial] = []
        for path in sorted(paths, key=_cost)[:BEAM]:
            if path[3] > j:  # inside a phrase
                grown.append(path)
            elif j in settled:
                grown.append(_settle(path, open_at[j][0]))
            else:
                grown += _successors(path, open_at.get(j, ()))
        paths = grown
    ends = [_leave(path) for path in sorted(paths, key=_cost)[:BEAM]]
    return _unchain(min(ends, key=_cost)[-1])


def _cost(path: Partial) -> int:
    return path[0]


def _option(m: Match) -> Option:
    words = m.length + m.size if m.module == EXACT else m.length // 2 + m.size // 2
    return m, ((1 << m.length) - 1) << m.start, _WORD * words, abs(m.at - m.start)


def _successors(path: Partial, here: Sequence[Option]) -> Iterable[Partial]:
    """The path with each of the matches at its place, and last without any."""
    cost, taken, after, at, chain = path
    for m, words, gain, distance in here:
        if not taken & words:
            ended = 0 if after in (-1, m.start) else _CHUNK  # a chunk is counted where it ends
            new = m.start + m.length
            yield cost - gain + ended, taken | words, new, m.at + m.size, (m, chain)
            cost += distance
    yield _leave((cost, taken, after, at, chain))


def _settle(path: Partial, option: Option) -> Partial:
    """The path with a match that it has to take, which adds its distance."""
    cost, taken, after, at, chain = next(iter(_successors(path, [option])))
    return cost + option[-1], taken, after, at, chain


def _leave(path: Partial) -> Partial:
    """The path without a match of its next word, which ends a chunk."""
    cost, taken, after, at, chain = path
    return cost + (0 if after == -1 else _CHUNK), taken, -1, at + 1, chain


def _unchain(chain: object) -> list[Match]:
    found = []
    while isinstance(chain, tuple):
        match, chain = chain
        found.append(match)
    return sorted(found)


# The score


@dataclass
class Statistics:
    """What the score is computed from; of a corpus it is the sum over its hypotheses.

    Attributes:
        hyp, ref: content words and function words, counted.
        hyp_matched, ref_matched: the matched ones of these, by the weights of the modules.
        matched: matched words of both sides, unweighted.
        chunks: runs of matches that are contiguous and in the same order on both sides; 0 where
            hypothesis and reference are one match from end to end.
    """

    hyp: tuple[float, float] = (0, 0)
    ref: tuple[float, float] = (0, 0)
    hyp_matched: tuple[float, float] = (0, 0)
    ref_matched: tuple[float, float] = (0, 0)
    matched: int = 0
    chunks: int = 0

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(
            _sum(self.hyp, other.hyp),
            _sum(self.ref, other.ref),
            _sum(self.hyp_matched, other.hyp_matched),
            _sum(self.ref_matched, other.ref_matched),
            self.matched + other.matched,
            self.chunks + other.chunks,
        )

    @property
    def score(self) -> float:
        """(1 - Pen) F-mean, equations 1 to 5 of the 2014 paper."""
        precision = _share(self.hyp_matched, self.hyp)
        recall = _share(self.ref_matched, self.ref)
        if precision == 0 or recall == 0:
            return 0.0
        mean = precision * recall / (ALPHA * precision + (1 - ALPHA) * recall)
        return mean * (1 - GAMMA * (self.chunks / (self.matched / 2)) ** BETA)


def _sum(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    return a[0] + b[0], a[1] + b[1]


def _share(matched: tuple[float, float], all_words: tuple[float, float]) -> float:
    weight = (DELTA, 1 - DELTA)
    whole = sum(w * n for w, n in zip(weight, all_words, strict=True))
    part = sum(w * n for w, n in zip(weight, matched, strict=True))
    return part / whole if whole else 0.0


def compare(hyp: Sequence[str], ref: Sequence[str], tables: Tables) -> Statistics:
    """The statistics of one hypothesis against one reference, both as tokens."""
    found = align(hyp, ref, tables)
    function_words = tables.function_words
    hyp_matched, ref_matched = [0.0, 0.0], [0.0, 0.0]
    chunks, matched, after = 0, 0, (-1, -1)
    for m in found:
        for word in hyp[m.start : m.start + m.length]:
            hyp_matched[word in function_words] += WEIGHTS[m.module]
        for word in ref[m.at : m.at + m.size]:
            ref_matched[word in function_words] += WEIGHTS[m.module]
        chunks += after != (m.start, m.at)
        after = (m.start + m.length, m.at + m.size)
        matched += m.length + m.size
    if chunks == 1 and matched == len(hyp) + len(ref):
        chunks = 0
    return Statistics(
        _kinds(hyp, function_words),
        _kinds(ref, function_words),
        (hyp_matched[0], hyp_matched[1]),
        (ref_matched[0], ref_matched[1]),
        matched,
        chunks,
    )


def _kinds(words: Sequence[str], function_words: Set[str]) -> tuple[int, int]:
    count = sum(word in function_words for word in words)
    return len(words) - count, count
