"""Figure: a value with the signature of how it was computed; and what every metric checks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rankwise.errors import DataError, RankwiseError


@dataclass(frozen=True)
class Figure:
    """One figure of a corpus.

    Attributes:
        name: as in `rankwise.tasks.METRICS`, which says its direction.
        value: from 0 to 1 for a share, never in percent.
        signature: implementation, version and tokenisation, as sacrebleu writes them; equal
            signatures make figures comparable.
    """

    name: str
    value: float
    signature: str

    def of(self, part: str) -> Figure:
        """The same figure, named as that of a part of the rows."""
        return Figure(f"{self.name}_{part}", self.value, f"{self.signature}|rows:{part}")


@contextmanager
def needs(package: str) -> Iterator[None]:
    """Around an import: a missing package is one line that says what to install.

    Raises:
        RankwiseError: the package is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise RankwiseError(
            f"this metric needs {package}, which is not installed ({error}); "
            "run: pip install 'rankwise[generation]'"
        ) from error


def check_pairs(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Raises DataError: lengths differ, there is nothing to score, a row has no reference, or what
    stands there is no text."""
    if isinstance(hypotheses, str) or not all(isinstance(text, str) for text in hypotheses):
        raise DataError("the hypotheses are not a list of texts; give one text each")
    if len(hypotheses) != len(references):
        raise DataError(
            f"there are {len(hypotheses)} hypotheses and {len(references)} groups of references; "
            "give one hypothesis for each group"
        )
    if not hypotheses:
        raise DataError("there are no hypotheses to score")
    for row, there in enumerate(references, 1):
        if not there or isinstance(there, str):
            raise DataError(f"row {row} has no list of references; give one reference or more")
        if odd := [text for text in there if not isinstance(text, str)]:
            raise DataError(f"row {row} has the reference {odd[0]!r}, which is no text")
