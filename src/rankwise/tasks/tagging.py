"""Token tagging: one tag a word, scored on its first sub-token, measured by entity."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rankwise.errors import DataError, ModelError
from rankwise.tasks.base import IGNORED, Task
from rankwise.tasks.checks import Rows, check_column
from rankwise.tasks.metrics import first_output

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset, Features
    from transformers import EvalPrediction, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# What marks a space before a token in byte-level BPE and in SentencePiece.
_SPACE_MARKS = ("Ġ", "▁")


class Tagging(Task):
    """Rows of a list of tokens and a list of tags; tags become their numbers."""

    kind = "tagging"
    task_type = "TOKEN_CLS"
    auto_class = "AutoModelForTokenClassification"
    package = "seqeval"
    most_texts = 1

    @property
    def tokens(self) -> str:
        """The column of token lists."""
        return self.text_columns[0]

    def number(self, rows: dict[str, Rows]) -> tuple[dict[str, Rows], tuple[str, ...]]:
        """The splits with lists of tag numbers as labels, and the tag names in their order.

        Without label_names the tags are those of train, sorted. Rows without tokens are left out.

        Raises:
            DataError: tokens and tags do not match, a tag is missing or not known, or tags are
                numbers and label_names does not say what they mean.
        """
        label, from_train = self.label, self.label_names is None
        rows = {split: _checked(there, self.tokens, label, split) for split, there in rows.items()}
        names = self.label_names if self.label_names is not None else _found_tags(rows, label)
        numbered = {
            split: {**there, label: _tag_numbers(there[label], names, split, from_train)}
            for split, there in rows.items()
        }
        return numbered, names

    def default_metrics(self) -> tuple[str, ...]:
        """Entity metrics where the tags are of the B-/I- kind; else accuracy a token."""
        marks = ("B-", "I-", "E-", "S-", "L-", "U-")
        if all(name == "O" or name[:2] in marks for name in self.label_names or ()):
            return ("f1", "precision", "recall", "accuracy")
        return ("accuracy",)

    def features(self) -> Features:
        from datasets import Features, Sequence, Value

        tags = Sequence(Value("int64"))
        return Features({self.tokens: Sequence(Value("string")), self.label: tags})

    def check_varied(self) -> None:
        if self.train is None:
            return
        found = {tag for tags in self.train[:][self.label] for tag in tags}
        if len(found) < 2:
            only = (self.label_names or ())[next(iter(found))]
            raise DataError(
                f"every token of the {len(self.train)} train rows has the tag {only!r}, "
                "so there is nothing to learn; give rows with two tags or more"
            )

    def tokenize(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> Dataset:
        """Sub-token ids; labels are the word's tag on its first sub-token and -100 elsewhere.

        Words beyond max_length are neither trained on nor scored; how many rows lose some is
        logged.

        Raises:
            ModelError: the tokenizer cannot tell which word a sub-token is of.
        """
        if not tokenizer.is_fast:
            raise ModelError(
                f"{type(tokenizer).__name__} cannot say which word a token is of; tagging needs a "
                "tokenizer with a tokenizer.json (a fast one)"
            )
        tokens, label = self.tokens, self.label
        space = " " if _lacks_space(tokenizer) else ""

        def batch_features(batch: dict[str, list[Any]]) -> dict[str, Any]:
            words = [[space + word for word in row] for row in batch[tokens]]
            encoded = tokenizer(
                words, is_split_into_words=True, truncation=True, max_length=max_length
            )
            encoded["labels"] = [
                _align(encoded.word_ids(n), tags) for n, tags in enumerate(batch[label])
            ]
            return dict(encoded)

        encoded = rows.map(batch_features, batched=True, remove_columns=rows.column_names)
        _report_cut(rows[:][label], encoded[:]["labels"], max_length)
        return encoded

    def data_collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[Any]], Any]:
        from transformers import DataCollatorForTokenClassification

        return DataCollatorForTokenClassification(tokenizer)

    def score_rows(self, output: EvalPrediction) -> Callable[[np.ndarray], float]:
        """As in Task. Entities are counted once a row, not once a resample: 100 times quicker."""
        if self.main_metric not in ("f1", "precision", "recall"):
            return super().score_rows(output)
        import numpy as np
        from seqeval.metrics.sequence_labeling import get_entities

        true, guess = ([set(get_entities(row)) for row in rows] for rows in self._tags(output))
        both = np.array([len(t & g) for t, g in zip(true, guess, strict=True)])
        there, found = np.array([len(t) for t in true]), np.array([len(g) for g in guess])
        of = {"f1": (there + found) / 2, "precision": found, "recall": there}[self.main_metric]

        def score(rows: np.ndarray) -> float:
            return float(both[rows].sum() / max(of[rows].sum(), 1e-9))

        return score

    def _tags(self, output: EvalPrediction) -> tuple[list[list[str]], list[list[str]]]:
        """The names of the true and the predicted tags, of the tokens that count."""
        names = self.label_names or ()
        predicted = first_output(output).argmax(axis=-1)
        kept = output.label_ids != IGNORED
        true = [[names[n] for n in row[k]] for row, k in zip(output.label_ids, kept, strict=True)]
        guess = [[names[n] for n in row[k]] for row, k in zip(predicted, kept, strict=True)]
        return true, guess

    def check_texts(self, rows: dict[str, Rows]) -> None:
        """Lists of tokens, which `number` checks with their tags; here only those without any."""
        for split in rows.keys() & {"input"}:
            check_column(rows[split], self.tokens, split)
            for row, words in enumerate(rows[split][self.tokens], 1):
                _check_row(words, [0] * len(words or []), self.tokens, self.label, f"row {row}")

    def blank(self, rows: Rows) -> list[Any]:
        return [[0] * len(words) for words in rows[self.tokens]]

    def answer(self, logits: Any, labels: Any) -> dict[str, Any]:
        """A tag for each word, as far as max_length reaches."""
        names = self.label_names or ()
        return {"tags": [names[n] for n in logits.argmax(-1)[labels != IGNORED].tolist()]}

    def measure(self, output: EvalPrediction) -> dict[str, float]:
        """f1, precision and recall of whole entities (exact span and type), accuracy of tokens.

        From logits (rows, tokens, tags) and labels (rows, tokens) with -100 where none counts.
        """
        from seqeval.metrics import f1_score, precision_score, recall_score

        functions: dict[str, Callable[..., Any]] = {
            "f1": f1_score,
            "precision": precision_score,
            "recall": recall_score,
        }
        predicted, kept = first_output(output).argmax(axis=-1), output.label_ids != IGNORED
        true, guess = self._tags(output)
        accuracy = float((predicted == output.label_ids)[kept].mean()) if kept.any() else 0.0
        return {
            name: accuracy
            if name == "accuracy"
            else float(functions[name](true, guess, zero_division=0))
            for name in self.metrics
        }

    def floor(self, train: Dataset, rows: Dataset) -> dict[str, float]:
        """Without any entity found."""
        return dict.fromkeys(("f1", "precision", "recall"), 0.0)


def _found_tags(rows: dict[str, Rows], label: str) -> tuple[str, ...]:
    if "train" not in rows:
        raise DataError("the tags are unknown without train rows; give label_names=")
    found = {tag for tags in rows["train"][label] for tag in tags}
    if any(isinstance(tag, int) for tag in found):
        raise DataError(
            f"the tags in {label!r} are numbers; give label_names= in the order of the numbers"
        )
    return tuple(sorted(found))


def _checked(rows: Rows, tokens: str, label: str, split: str) -> Rows:
    for name in (tokens, label):
        check_column(rows, name, split)
    for row, (words, tags) in enumerate(zip(rows[tokens], rows[label], strict=True), 1):
        _check_row(words, tags, tokens, label, f"{split} row {row}")
    keep = [n for n, words in enumerate(rows[tokens]) if words]
    if not keep:
        raise DataError(f"{split} has no row with a token; give rows with tokens")
    dropped = len(rows[tokens]) - len(keep)
    if dropped:
        logger.info("left out %d %s rows without tokens", dropped, split)
    return {name: [rows[name][n] for n in keep] for name in (tokens, label)}


def _check_row(words: Any, tags: Any, tokens: str, label: str, where: str) -> None:
    for name, values, item in ((tokens, words, str), (label, tags, (str, int))):
        if not isinstance(values, list):
            raise DataError(
                f"{where}: {name!r} is {_what(values)}, not a list; tagging needs a list of tokens "
                "and a list of tags (JSON lines or Parquet, not CSV)"
            )
        for value in values:
            if not isinstance(value, item) or isinstance(value, bool):
                raise DataError(f"{where}: {name!r} holds {value!r}; mend or leave out the row")
    if len(words) != len(tags):
        raise DataError(
            f"{where}: {len(words)} tokens but {len(tags)} tags; give each token one tag"
        )


def _what(value: Any) -> str:
    return "empty" if value is None else f"of type {type(value).__name__}"


def _tag_numbers(
    rows: list[list[Any]], names: tuple[str, ...], split: str, from_train: bool
) -> list[list[int]]:
    index: dict[Any, int] = {name: number for number, name in enumerate(names)}
    # Names and numbers cannot be mixed up here: a tag's name is never an int.
    index.update((number, number) for number in range(len(names)))
    unknown = sorted({str(tag) for tags in rows for tag in tags if tag not in index})
    if unknown:
        known = "the tags in train" if from_train else "label_names"
        raise DataError(
            f"{split} has tags that are not among {known} ({', '.join(names[:20])}): "
            f"{', '.join(unknown[:10])}; correct them or give label_names= with all tags"
        )
    return [[index[tag] for tag in tags] for tags in rows]


def _lacks_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    # RoBERTa and GPT-2 read a word without its space as the tail of the one before, unless they
    # were loaded with add_prefix_space=True. The words then get their space here.
    inside = "".join(tokenizer.tokenize("a a"))
    alone = tokenizer(["a"], is_split_into_words=True, add_special_tokens=False)["input_ids"]
    first = "".join(tokenizer.convert_ids_to_tokens(alone))
    return any(mark in inside for mark in _SPACE_MARKS) and not first.startswith(_SPACE_MARKS)


def _align(word_ids: list[int | None], tags: list[int]) -> list[int]:
    labels = []
    previous: int | None = None
    for word in word_ids:
        labels.append(IGNORED if word is None or word == previous else tags[word])
        previous = word
    return labels


def _report_cut(tags: list[list[int]], labels: list[list[int]], max_length: int) -> None:
    pairs = zip(tags, labels, strict=True)
    short = sum(len(row) > sum(n != IGNORED for n in kept) for row, kept in pairs)
    if short:
        logger.warning(
            "%d of %d rows have words that are not scored: beyond max_length=%d, or without a "
            "token of their own",
            *(short, len(tags), max_length),
        )
