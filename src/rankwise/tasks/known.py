"""Public data sets by name: where each is, its columns, its labels and what it is judged by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rankwise.errors import DataError

SPLITS = ("train", "validation", "test")
Row = Mapping[str, Any]


@dataclass(frozen=True)
class KnownTask:
    """What is known of a public data set.

    Attributes:
        hub: what `datasets.load_dataset` takes.
        text_columns: one, or two for pairs.
        label_names: in the hub's order, so that class numbers mean the same everywhere; None for
            a regression.
        metrics: the first is the main one.
        kind: what is predicted, a name in `rankwise.tasks.KINDS`.
        label_column: its name in the hub's rows.
        hub_splits: the hub's names for train, validation and test.
        suite: for a generation task, whose scorer judges the texts; see `rankwise.metrics`.
        unseen: categories of its test rows that are not in train.
        flat: turns one nested row of the hub into flat rows; None where rows are flat there.
    """

    hub: tuple[str, ...]
    text_columns: tuple[str, ...]
    label_names: tuple[str, ...] | None
    metrics: tuple[str, ...]
    kind: str = "classification"
    label_column: str = "label"
    hub_splits: tuple[str, str, str] = SPLITS
    suite: str = ""
    unseen: tuple[str, ...] = ()
    flat: Callable[[Row], list[Row]] | None = None


def _webnlg(row: Row) -> list[Row]:
    """One row for each text; the test split repeats inputs, once of them without texts."""
    triples = next(iter(_within(row["modified_triple_sets"], "mtriple_set")), ())
    about = {"category": row["category"], "triples": list(triples)}
    return [about | {"text": text} for text in _within(row["lex"], "text") if triples]


def _dart(row: Row) -> list[Row]:
    triples = [" | ".join(triple) for triple in row["tripleset"]]
    texts = [text for text in _within(row["annotations"], "text") if text.strip()]
    return [{"triples": triples, "text": texts}] if texts else []


def _within(column: Any, name: str) -> list[Any]:
    """A column within a column, which is a dict of lists or, in newer sets, a list of dicts."""
    return list(column[name] if isinstance(column, Mapping) else (part[name] for part in column))


# Of generation tasks, the loss is the first: sizes and rates are chosen by it. METEOR has the name
# that its tables allow.
_LOSS = ("loss", "perplexity")
_METEOR = ("meteor", "meteor_without_paraphrases")
_TRIPLES = ("bleu", "bleu_given_references", *_METEOR, "ter")

# The metrics of the GLUE tasks are those of the benchmark.
KNOWN: dict[str, KnownTask] = {
    "glue/cola": KnownTask(
        hub=("glue", "cola"),
        text_columns=("sentence",),
        label_names=("unacceptable", "acceptable"),
        metrics=("matthews_correlation",),
    ),
    "glue/mnli": KnownTask(
        hub=("glue", "mnli"),
        text_columns=("premise", "hypothesis"),
        label_names=("entailment", "neutral", "contradiction"),
        metrics=("accuracy",),
        hub_splits=("train", "validation_matched", "test_matched"),
    ),
    "glue/mnli_mismatched": KnownTask(
        hub=("glue", "mnli"),
        text_columns=("premise", "hypothesis"),
        label_names=("entailment", "neutral", "contradiction"),
        metrics=("accuracy",),
        hub_splits=("train", "validation_mismatched", "test_mismatched"),
    ),
    "glue/mrpc": KnownTask(
        hub=("glue", "mrpc"),
        text_columns=("sentence1", "sentence2"),
        label_names=("not_equivalent", "equivalent"),
        metrics=("accuracy", "f1"),
    ),
    "glue/qnli": KnownTask(
        hub=("glue", "qnli"),
        text_columns=("question", "sentence"),
        label_names=("entailment", "not_entailment"),
        metrics=("accuracy",),
    ),
    "glue/qqp": KnownTask(
        hub=("glue", "qqp"),
        text_columns=("question1", "question2"),
        label_names=("not_duplicate", "duplicate"),
        metrics=("accuracy", "f1"),
    ),
    "glue/rte": KnownTask(
        hub=("glue", "rte"),
        text_columns=("sentence1", "sentence2"),
        label_names=("entailment", "not_entailment"),
        metrics=("accuracy",),
    ),
    "glue/sst2": KnownTask(
        hub=("glue", "sst2"),
        text_columns=("sentence",),
        label_names=("negative", "positive"),
        metrics=("accuracy",),
    ),
    "glue/stsb": KnownTask(
        hub=("glue", "stsb"),
        text_columns=("sentence1", "sentence2"),
        label_names=None,
        metrics=("spearman", "pearson"),
        kind="regression",
    ),
    "glue/wnli": KnownTask(
        hub=("glue", "wnli"),
        text_columns=("sentence1", "sentence2"),
        label_names=("not_entailment", "entailment"),
        metrics=("accuracy",),
    ),
    "jnlpba": KnownTask(
        hub=("jnlpba/jnlpba",),
        text_columns=("tokens",),
        label_names=(
            "O",
            *("B-DNA", "I-DNA", "B-RNA", "I-RNA", "B-cell_line", "I-cell_line"),
            *("B-cell_type", "I-cell_type", "B-protein", "I-protein"),
        ),
        metrics=("f1", "precision", "recall", "accuracy"),
        kind="tagging",
        label_column="ner_tags",
    ),
    "e2e_nlg": KnownTask(
        hub=("tuetschek/e2e_nlg",),
        text_columns=("meaning_representation", "human_reference"),
        label_names=None,
        metrics=(*_LOSS, "bleu", "nist", "nist_python", *_METEOR, "rouge_l", "cider"),
        kind="generation",
        suite="e2e",
    ),
    "web_nlg": KnownTask(
        hub=("webnlg-challenge/web_nlg", "webnlg_challenge_2017"),
        hub_splits=("train", "dev", "test"),
        flat=_webnlg,
        text_columns=("triples", "text"),
        label_names=None,
        metrics=(*_LOSS, *_TRIPLES, *(f"{m}_{p}" for p in ("seen", "unseen") for m in _TRIPLES)),
        kind="generation",
        suite="webnlg",
        unseen=("Artist", "Athlete", "CelestialBody", "MeanOfTransportation", "Politician"),
    ),
    "dart": KnownTask(
        hub=("Yale-LILY/dart",),
        flat=_dart,
        text_columns=("triples", "text"),
        label_names=None,
        metrics=(*_LOSS, *_TRIPLES),
        kind="generation",
        suite="dart",
    ),
}

_ALIASES = {"e2e": "e2e_nlg", "webnlg": "web_nlg"}


def known_name(task: str) -> str:
    """The full name of a known task ("mrpc" -> "glue/mrpc").

    Raises:
        DataError: no such task.
    """
    for name in (task, f"glue/{task}", _ALIASES.get(task, task)):
        if name in KNOWN:
            return name
    raise DataError(
        f"unknown task {task!r}; known: {', '.join(KNOWN)}; "
        "for rows of your own give data_dir= or train_file="
    )
