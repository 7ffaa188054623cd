"""Generation: a text for an input, learned from one reference and judged against several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rankwise.errors import DataError
from rankwise.metrics.suites import SUITES, check_packages, score
from rankwise.tasks.causal_lm import CausalLM, prompt_ids
from rankwise.tasks.checks import Rows, check_column
from rankwise.tasks.known import KNOWN

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from transformers import EvalPrediction, PreTrainedTokenizerBase

    from rankwise.metrics.figure import Figure

# Between an input and its text, and between the parts of an input that is a list.
END, BETWEEN = "\n", " && "
OTHER = "references"  # column with all references of a row, where the text column is not there
_GROUP = "group"


class Generation(CausalLM):
    """Rows of an input and a text for it; several references an input where they are evaluated.

    The input is a text or a list of texts, which are joined. References stand in the text column,
    as a list or one a row, or in a column `references`; in validation and test the rows of one
    input become one row. What is learned, and the loss, is that of the text alone, over every
    reference. The first metrics are the loss and its perplexity, by which sizes and learning rates
    are chosen; the figures of the generated texts are the official scorer's.
    """

    kind = "generation"
    generates = True

    @property
    def suite(self) -> str:
        """Whose scorer judges the texts; for rows of one's own it is the E2E challenge's."""
        return (KNOWN[self.name].suite if self.name in KNOWN else "") or "e2e"

    @classmethod
    def learned(cls, rows: Rows, text_column: str | Sequence[str] | None) -> Rows:
        """A split that has its references in the column `references` alone: they are the texts."""
        if isinstance(text_column, str) or not text_column or OTHER not in rows:
            return rows
        return {text_column[-1]: rows[OTHER], **rows}

    def check_texts(self, rows: dict[str, Rows]) -> None:
        """Raises DataError, naming the row, where an input or a reference is missing or no text."""
        source, target = self._columns()
        for split, there in rows.items():
            check_column(there, source, split)
            column = target if target in there else OTHER
            check_column(there, column, split)
            for name in (source, column):
                for row, value in enumerate(there[name], 1):
                    if not _texts(value):
                        raise DataError(
                            f"{split} row {row}: {name!r} is {_what(value)}, neither a text nor a "
                            "list of texts; mend or leave out the row"
                        )

    def number(self, rows: dict[str, Rows]) -> tuple[dict[str, Rows], None]:
        """The splits with an input as one text and a list of references a row."""
        source, target = self._columns()
        shaped: dict[str, Rows] = {}
        for split, there in rows.items():
            column = there[target] if target in there else there[OTHER]
            groups = self._groups(there, len(column))
            inputs = [BETWEEN.join(_texts(value)) for value in there[source]]
            lists = [[" ".join(text.split()) for text in _texts(value)] for value in column]
            if split != "train":
                inputs, lists, groups = _by_input(inputs, lists, groups)
            shaped[split] = {source: inputs, target: lists, _GROUP: groups}
        return shaped, None

    def _groups(self, rows: Rows, count: int) -> list[str]:
        """Seen or unseen for a set that has categories which are not in train; else one group."""
        known = KNOWN.get(self.name)
        if known is None or not known.unseen or "category" not in rows:
            return [""] * count
        return ["unseen" if name in known.unseen else "seen" for name in rows["category"]]

    def default_metrics(self) -> tuple[str, ...]:
        return ("loss", "perplexity", *SUITES["e2e"].names)

    def features(self) -> Features:
        from datasets import Features, Sequence, Value

        source, target = self._columns()
        text = Value("string")
        return Features({source: text, target: Sequence(text), _GROUP: text})

    def _columns(self) -> tuple[str, str]:
        if len(self.text_columns) != 2:
            raise DataError(
                f"generation needs two text columns, an input and a text, found "
                f"{', '.join(self.text_columns)}; give text_column= two names"
            )
        source, target = self.text_columns
        return source, target

    def tokenize(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> Dataset:
        """As a causal language model's prompt and completion, one row a reference."""
        from datasets import Dataset

        source, target = self._columns()
        pairs = [
            (a + END, text) for a, b in zip(rows[source], rows[target], strict=True) for text in b
        ]
        flat = {source: [pair[0] for pair in pairs], target: [pair[1] for pair in pairs]}
        return super().tokenize(Dataset.from_dict(flat), tokenizer, max_length)

    def measure(self, output: EvalPrediction) -> dict[str, float]:
        """loss and perplexity, as a causal language model's."""
        found = CausalLM(self.name, self.text_columns, None, None, ("loss", "perplexity"))
        values = found.measure(output)
        return {name: values[name] for name in self.metrics if name in values}

    # Texts

    def check_metrics(self) -> None:
        """Raises RankwiseError where a package that the figures need is not installed."""
        check_packages(self.suite)

    def prompts(self, tokenizer: PreTrainedTokenizerBase, rows: Rows | Dataset) -> list[list[int]]:
        """Token ids of each row's input, as they were before the text in training."""
        inputs = rows[self._columns()[0]]
        return prompt_ids(tokenizer, [BETWEEN.join(_texts(value)) + END for value in inputs])

    def shown(self, rows: Dataset) -> list[dict[str, Any]]:
        """Input and references of each row, for the file that the generated texts are kept in."""
        source, target = self._columns()
        pairs = zip(rows[source], rows[target], strict=True)
        return [{"input": text, "references": list(texts)} for text, texts in pairs]

    def score_texts(self, rows: Dataset, texts: Sequence[str]) -> list[Figure]:
        """The official scorer's figures; of a set with seen and unseen categories of each, too."""
        references = list(rows[self._columns()[1]])
        found = score(self.suite, texts, references)
        groups = list(rows[_GROUP])
        for group in sorted(set(groups) - {""}):
            at = [n for n, name in enumerate(groups) if name == group]
            part = score(self.suite, [texts[n] for n in at], [references[n] for n in at])
            found += [figure.of(group) for figure in part]
        return found


def _texts(value: Any) -> list[str]:
    """A text or a list of texts as a list; empty where it is neither, or one of them is blank."""
    values = value if isinstance(value, list) else [value]
    return values if all(isinstance(v, str) and v.strip() for v in values) else []


def _what(value: Any) -> str:
    return "empty" if value in (None, "", []) else f"{value!r}"[:60]


def _by_input(
    inputs: Sequence[str], references: Sequence[Sequence[str]], groups: Sequence[str]
) -> tuple[list[str], list[list[str]], list[str]]:
    """One row an input, in order of their first rows, each reference once.

    A row that has several references already is left as it is: DART's test set has inputs twice.
    """
    found: dict[Any, tuple[str, list[str], str]] = {}
    several = any(len(texts) > 1 for texts in references)
    for row, (text, texts, group) in enumerate(zip(inputs, references, groups, strict=True)):
        there = found.setdefault(row if several else text, (text, [], group))[1]
        there += [reference for reference in texts if several or reference not in there]
    columns = list(zip(*found.values(), strict=True))
    return list(columns[0]), list(columns[1]), list(columns[2])
