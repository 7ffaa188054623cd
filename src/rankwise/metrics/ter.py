"""TER: edits and shifts of words that turn an output into a reference, a corpus at a time.

M. Snover et al., "A Study of Translation Edit Rate with Targeted Human Annotation" (2006). The
search for shifts is greedy and follows tercom's limits, as sacrebleu's does, and gives sacrebleu's
counts. sacrebleu takes minutes for a test set, for it computes an edit distance after every
candidate shift in Python. Here the candidates of many pairs are one array, and numpy fills the same
row of all their tables at once.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rankwise.metrics.figure import Figure, check_pairs

if TYPE_CHECKING:
    import numpy as np

# tercom's limits, in words; the last is sacrebleu's, for outputs that say a word over and over.
LONGEST_SHIFT, FARTHEST_SHIFT, BEAM, MOST_CANDIDATES = 10, 50, 25, 1000

_FAR = 1 << 20  # more than any distance
_CELLS = 1 << 21  # of tables that are filled at once

Words = list[int]


def ter(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Figure:
    """TER of a corpus, from 0 up, 0 for equal texts: fewest edits over mean reference lengths.

    Args:
        hypotheses: tokenised texts; case does not count.
        references: of each hypothesis one or more such texts. Empty ones do not count.

    Raises:
        DataError: lengths differ, or a row has no reference.

    Example:
        >>> ter(["on the mat the cat sat"], [["the cat sat on the mat"]]).value  # one shift
        0.16666666666666666
    """
    check_pairs(hypotheses, references)
    edits, length = count_edits(hypotheses, references)
    value = edits / length if length else float(edits > 0)
    return Figure("ter", value, "case:lc|tok:tercom|norm:no|punct:yes|asian:no|search:numpy")


def count_edits(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[int, float]:
    """The fewest edits of every row, summed, and the sum of the rows' mean reference lengths."""
    number: dict[str, int] = defaultdict(lambda: len(number))

    def words(text: str) -> Words:
        return [number[word] for word in text.lower().split()]

    pairs, rows = [], []
    length = 0.0
    for row, (text, texts) in enumerate(zip(hypotheses, references, strict=True)):
        hyp = words(text)
        refs = [ref for ref in map(words, texts) if ref] or [[]]
        length += sum(map(len, refs)) / len(refs)
        for ref in refs:
            pairs.append(Pair(hyp, ref))
            rows.append(row)
    search(pairs)
    fewest: dict[int, int] = {}
    for row, pair in zip(rows, pairs, strict=True):
        fewest[row] = min(pair.edits, fewest.get(row, pair.edits))
    return sum(fewest.values()), length


@dataclass
class Pair:
    """An output, as far as it is shifted, and a reference, both as numbers of words.

    Attributes:
        hyp, ref: the words.
        shifts: done so far.
        tried: candidates so far.
        edits: shifts and the edit distance that is left, once the search is over.
    """

    hyp: Words
    ref: Words
    shifts: int = 0
    tried: int = 0
    edits: int = 0


@dataclass
class _Candidates:
    """What may be shifted in a pair.

    Attributes:
        distance: before a shift.
        places: (length, start, target) of every candidate.
        texts: the output after each.
    """

    distance: int
    places: list[tuple[int, int, int]] = field(default_factory=list)
    texts: list[Words] = field(default_factory=list)


def search(pairs: Sequence[Pair]) -> None:
    """Shifts as long as the distance falls, in all pairs side by side; fills in `edits`."""
    active = []
    for pair in pairs:
        if pair.ref and pair.hyp:
            active.append(pair)
        else:
            pair.edits = max(len(pair.hyp), len(pair.ref))
    while active:
        found = [
            _candidates(pair, trace) for pair, trace in zip(active, _traces(active), strict=True)
        ]
        texts = [(text, p.ref) for p, f in zip(active, found, strict=True) for text in f.texts]
        distances = iter(_distances(texts))
        still = []
        for pair, these in zip(active, found, strict=True):
            after = [next(distances) for _ in these.texts]
            if _shift(pair, these, after):
                still.append(pair)
            else:
                pair.edits = pair.shifts + these.distance
        active = still


def _shift(pair: Pair, found: _Candidates, distances: Sequence[int]) -> bool:
    """Does the best shift; False where none helps, or too many were tried."""
    if not found.texts or pair.tried >= MOST_CANDIDATES:
        return False
    # The largest gain, then the longest shift, then the first start and the first target; of equal
    # ones (the same words) the text decides nothing.
    best = min(
        range(len(distances)),
        key=lambda n: (
            distances[n],
            -found.places[n][0],
            found.places[n][1],
            found.places[n][2],
        ),
    )
    if distances[best] >= found.distance:
        return False
    pair.hyp, pair.shifts = found.texts[best], pair.shifts + 1
    return True


def _candidates(pair: Pair, trace: tuple[int, str]) -> _Candidates:
    """Runs of words that stand elsewhere in the reference, where both places are wrong now."""
    distance, operations = trace
    found = _Candidates(distance)
    if distance == 0:
        return found
    at, wrong_hyp, wrong_ref = _alignment(operations)
    last = -1
    for start, there, length in _common_runs(pair.hyp, pair.ref):
        if length == 1 and pair.tried >= MOST_CANDIDATES:
            break
        right = not any(wrong_hyp[start : start + length])
        if right or not any(wrong_ref[there : there + length]):
            continue
        if start <= at[there] < start + length:  # it stands in its own place
            continue
        last = -1
        for offset in range(-1, length):
            if there + offset >= len(at):
                break
            target = 0 if there + offset < 0 else at[there + offset] + 1
            if target == last:
                continue
            last = target
            pair.tried += 1
            found.places.append((length, start, target))
            found.texts.append(_moved(pair.hyp, start, length, target))
        if pair.tried >= MOST_CANDIDATES:
            break
    return found


def _common_runs(hyp: Words, ref: Words) -> Iterator[tuple[int, int, int]]:
    """(start in hyp, start in ref, length) of every run of words that both have."""
    places: dict[int, list[int]] = defaultdict(list)
    for j, word in enumerate(ref):
        places[word].append(j)
    for i, word in enumerate(hyp):
        for j in places.get(word, ()):
            if abs(i - j) > FARTHEST_SHIFT:
                continue
            most = min(LONGEST_SHIFT, len(hyp) - i, len(ref) - j)
            length = 0
            while length < most and hyp[i + length] == ref[j + length]:
                length += 1
                yield i, j, length


def _moved(words: Words, start: int, length: int, target: int) -> Words:
    """`words` with [start, start + length) put before `target`; beyond its end, `target` counts on
    the words that are left."""
    run, rest = words[start : start + length], words[:start] + words[start + length :]
    if target > start + length:
        target -= length
    return rest[:target] + run + rest[target:]


def _alignment(operations: str) -> tuple[list[int], list[bool], list[bool]]:
    """For each word of the reference the one of the output it is at, and which words are wrong.

    Operations are those that turn the output into the reference: " " and "s" take a word of both,
    "d" drops one of the output, "i" puts in one of the reference.
    """
    at: list[int] = []
    wrong_hyp: list[bool] = []
    wrong_ref: list[bool] = []
    for operation in operations:
        if operation != "i":
            wrong_hyp.append(operation != " ")
        if operation != "d":
            at.append(len(wrong_hyp) - 1)
            wrong_ref.append(operation != " ")
    return at, wrong_hyp, wrong_ref


# Edit distances


def _groups(sizes: Sequence[tuple[int, int]]) -> Iterator[list[int]]:
    """Pairs of equal output length and like reference length, in groups of at most _CELLS cells."""
    order = sorted(range(len(sizes)), key=lambda n: sizes[n])
    group: list[int] = []
    for n in order:
        rows, columns = sizes[n]
        if group and (
            rows != sizes[group[0]][0] or (len(group) + 1) * (rows + 1) * (columns + 1) > _CELLS
        ):
            yield group
            group = []
        group.append(n)
    if group:
        yield group


def _distances(pairs: Sequence[tuple[Words, Words]]) -> list[int]:
    """The edit distance of every pair."""
    import numpy as np

    found = [0] * len(pairs)
    for group in _groups([(len(hyp), len(ref)) for hyp, ref in pairs]):
        for row, lengths in _rows([pairs[n] for n in group]):
            last = row, lengths
        row, lengths = last
        for n, distance in zip(group, row[np.arange(len(group)), lengths].tolist(), strict=True):
            found[n] = distance
    return found


def _traces(pairs: Sequence[Pair]) -> list[tuple[int, str]]:
    """The edit distance of every pair, and the operations that it counts."""
    import numpy as np

    found: list[tuple[int, str]] = [(0, "")] * len(pairs)
    for group in _groups([(len(pair.hyp), len(pair.ref)) for pair in pairs]):
        tables = np.stack(
            [row for row, _ in _rows([(pairs[n].hyp, pairs[n].ref) for n in group])], 1
        )
        for table, n in zip(tables, group, strict=True):
            pair = pairs[n]
            cells = table[:, : len(pair.ref) + 1].tolist()
            found[n] = cells[-1][-1], _trace(cells, pair.hyp, pair.ref)
    return found


def _rows(pairs: Sequence[tuple[Words, Words]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Row by row the distance tables of pairs whose outputs are equally long.

    A row is (pairs, longest reference + 1): distances of the output's first i words to the first j
    of the reference, with the reference lengths (pairs,). Beyond the beam around the diagonal it is
    _FAR.
    """
    import numpy as np

    hyps = np.array([hyp for hyp, _ in pairs], dtype=np.int32)
    lengths = np.array([len(ref) for _, ref in pairs])
    count, words, longest = len(pairs), hyps.shape[1], int(lengths.max())
    refs = np.full((count, longest), -1, dtype=np.int32)
    for n, (_, ref) in enumerate(pairs):
        refs[n, : len(ref)] = ref
    column = np.arange(longest + 1, dtype=np.int32)
    row = np.broadcast_to(column, (count, longest + 1)).copy()
    yield row, lengths
    ratio = lengths / words
    width = np.where(ratio / 2 > BEAM, np.ceil(ratio / 2 + BEAM), BEAM)
    beamed = longest > BEAM
    for i in range(1, words + 1):
        new = row + 1
        np.minimum(new[:, 1:], row[:, :-1] + (refs != hyps[:, i - 1, None]), out=new[:, 1:])
        if beamed:
            middle = np.floor(i * ratio)
            low, high = middle - width, middle + width
            if i == words:
                high = np.full(count, math.inf)
            outside = (column < low[:, None]) | (column >= high[:, None])
            new[outside] = _FAR
        # Words put in: the least over all j' <= j of new[j'] + (j - j').
        new = np.minimum.accumulate(new - column, axis=1) + column
        if beamed:
            new[outside] = _FAR
        row = new
        yield row, lengths


def _trace(cells: list[list[int]], hyp: Words, ref: Words) -> str:
    """One cheapest way back through a table: both words where that is as cheap, else a drop."""
    i, j = len(hyp), len(ref)
    operations = []
    while i or j:
        here = cells[i][j]
        if i and j and here == cells[i - 1][j - 1] + (hyp[i - 1] != ref[j - 1]):
            operations.append(" " if hyp[i - 1] == ref[j - 1] else "s")
            i, j = i - 1, j - 1
        elif i and here == cells[i - 1][j] + 1:
            operations.append("d")
            i -= 1
        else:
            operations.append("i")
            j -= 1
    return "".join(reversed(operations))
