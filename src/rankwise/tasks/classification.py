"""Classification: one text or a pair, one of several classes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rankwise.errors import DataError
from rankwise.tasks import texts
from rankwise.tasks.base import Task
from rankwise.tasks.checks import Rows
from rankwise.tasks.metrics import first_output

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from transformers import EvalPrediction, PreTrainedTokenizerBase


class Classification(Task):
    """Rows of one or two texts and a label that is a class; labels become class numbers."""

    kind = "classification"
    task_type = "SEQ_CLS"
    auto_class = "AutoModelForSequenceClassification"
    package = "sklearn"

    def number(self, rows: dict[str, Rows]) -> tuple[dict[str, Rows], tuple[str, ...]]:
        """The splits with class numbers as labels, and the class names in their order.

        Without label_names the classes are those of train: sorted, numbers by value.

        Raises:
            DataError: a label is missing, a list, a fraction or not one of the classes.
        """
        label, from_train = self.label, self.label_names is None
        values = {split: _class_values(there, label, split) for split, there in rows.items()}
        for split, found in values.items():
            _check_types(found, label, split)
        if self.label_names is None:
            if "train" not in values:
                raise DataError("the classes are unknown without train rows; give label_names=")
            order = sorted(set(values["train"]), key=lambda v: (isinstance(v, str), v))
            names = tuple(str(value) for value in order)
        else:
            names = self.label_names
        numbered = {
            split: {**there, label: _class_numbers(values[split], names, split, from_train)}
            for split, there in rows.items()
        }
        return numbered, names

    def default_metrics(self) -> tuple[str, ...]:
        return ("accuracy", "f1")

    def features(self) -> Features:
        return texts.text_features(self.text_columns, self.label, "int64")

    def check_varied(self) -> None:
        if self.train is not None:
            texts.check_two_labels(self.train, self.label, self.label_names)

    def tokenize(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> Dataset:
        return texts.encode_texts(rows, tokenizer, self.text_columns, self.label, max_length)

    def head(self) -> dict[str, Any]:
        """The kind of problem too: transformers writes it into the config at the first loss, and
        a run that goes on after its last step has none."""
        return super().head() | {"problem_type": "single_label_classification"}

    def data_collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[Any]], Any]:
        return texts.pad_texts(tokenizer)

    def answer(self, logits: Any, labels: Any) -> dict[str, Any]:
        """The likeliest class by name, and its probability."""
        names, p = self.label_names or (), logits.softmax(-1)
        return {"label": names[int(p.argmax())], "probability": round(float(p.max()), 6)}

    def measure(self, output: EvalPrediction) -> dict[str, float]:
        """accuracy, f1 and matthews_correlation of logits (rows, classes).

        f1 is that of class 1 with two classes (as GLUE has it), else the mean over classes.
        """
        from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

        average = "binary" if len(self.label_names or ()) == 2 else "macro"
        functions: dict[str, Callable[[Any, Any], Any]] = {
            "accuracy": accuracy_score,
            "f1": lambda y, p: f1_score(y, p, average=average, zero_division=0),
            "matthews_correlation": matthews_corrcoef,
        }
        predicted = first_output(output).argmax(axis=-1)
        return {name: float(functions[name](output.label_ids, predicted)) for name in self.metrics}

    def floor(self, train: Dataset, rows: Dataset) -> dict[str, float]:
        """Those of the commonest class of the training rows, said of every row."""
        import numpy as np
        from transformers import EvalPrediction

        labels = np.asarray(rows["labels"])
        logits = np.zeros((len(labels), len(self.label_names or ())))
        logits[:, np.bincount(np.asarray(train["labels"])).argmax()] = 1
        return self.measure(EvalPrediction(logits, labels))


def _class_values(rows: Rows, label: str, split: str) -> list[Any]:
    values = texts.read_labels(rows, label, split)
    return [_class_value(value, label, split, n) for n, value in enumerate(values, 1)]


def _class_value(value: Any, label: str, split: str, row: int) -> int | str:
    if isinstance(value, (list, dict)):
        raise DataError(
            f"{split} row {row}: {label!r} is a {type(value).__name__}; give one label a row, or "
            "kind='tagging' with a text column of token lists"
        )
    if isinstance(value, float):
        if not value.is_integer():
            raise DataError(
                f"{split} row {row}: {label!r} is {value}, not a class; use kind='regression'"
            )
        return int(value)
    # bool before int: True is an int too, but its name is "True".
    return value if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _check_types(values: list[Any], label: str, split: str) -> None:
    """Raises DataError where one name stands for two labels: the number 1 and the text "1"."""
    first: dict[str, tuple[int, Any]] = {}
    for row, value in enumerate(values, 1):
        before, other = first.setdefault(str(value), (row, value))
        if type(other) is not type(value):
            raise DataError(
                f"{split} rows {before} and {row}: {label!r} is {other!r} in one and {value!r} in "
                "the other, a number and a text; write all labels as the same type"
            )


def _class_numbers(
    values: list[Any], names: tuple[str, ...], split: str, from_train: bool
) -> list[int]:
    # Whole numbers are class numbers only under given names such as "entailment". Names that are
    # numbers themselves ("1", "2", "3") are matched as names: class 0 there is the label 1.
    named = not from_train and not any(re.fullmatch(r"-?\d+", name) for name in names)
    if named and all(isinstance(value, int) for value in values):
        index: dict[Any, int] = {number: number for number in range(len(names))}
    else:
        values = [str(value) for value in values]
        index = {name: number for number, name in enumerate(names)}
    unknown = sorted({str(value) for value in values if value not in index})
    if unknown:
        known = "the labels in train" if from_train else "label_names"
        raise DataError(
            f"{split} has labels that are not among {known} ({', '.join(names[:20])}): "
            f"{', '.join(unknown[:10])}; correct them or give label_names= with all classes"
        )
    return [index[value] for value in values]
