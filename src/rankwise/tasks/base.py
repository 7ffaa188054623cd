"""Task: what all kinds of task share, and the slots that each kind fills in its own file."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from rankwise.errors import DataError, RankwiseError
from rankwise.tasks.checks import Rows, check_texts
from rankwise.tasks.metrics import find_metric

if TYPE_CHECKING:
    import numpy as np
    import torch
    from datasets import Dataset, Features
    from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

# The label of a token that is neither learned nor scored.
IGNORED = -100


@dataclass(frozen=True)
class Task(ABC):
    """One data set and what is asked of it. Rows hold only the text and label columns.

    Labels in the splits are already numbers: a class number (classification), a float
    (regression) or a list of class numbers, one a token (tagging).

    Attributes:
        name: "glue/mrpc", "jnlpba", or the stem of the user's own file or folder.
        text_columns: one or two text columns (classification, regression), one column of
            token lists (tagging), or a text column or a prompt and a completion column
            (causal_lm).
        label_column: None for causal_lm.
        label_names: in the order of the class numbers; None for regression and causal_lm.
        metrics: the first is the main one; see `rankwise.tasks.METRICS`.
        train: None when only an evaluation set was given.
        validation: None when only a test set was given.
        test: None when there is none, or its labels are hidden.
        found: all columns that the rows had, for messages.

    A kind of task is a subclass in a file of its own. It fills the abstract methods, may replace
    those marked as a slot, and says in class attributes:
        kind: its name, also for the user.
        task_type: PEFT's name for it.
        auto_class: the class in transformers that has its head.
        package: what its metrics are computed with; None for nothing beyond the library's own.
        labelled: whether its rows have a label column.
        most_texts: how many text columns it can take.
        generates: whether texts are generated and scored; see `rankwise.tasks.Generation`.

    Example:
        >>> task = load_task("mrpc", data_dir="rows/mrpc")
        >>> rows = task.encode(task.train, tokenizer, max_length=128)
        >>> model = load_model(task, "roberta-base", tokenizer=tokenizer)
        >>> Trainer(model, args, train_dataset=rows, compute_metrics=task.compute_metrics())
    """

    name: str
    text_columns: tuple[str, ...]
    label_column: str | None
    label_names: tuple[str, ...] | None
    metrics: tuple[str, ...]
    train: Dataset | None = None
    validation: Dataset | None = None
    test: Dataset | None = None
    found: tuple[str, ...] = ()

    kind: ClassVar[str]
    task_type: ClassVar[str]
    auto_class: ClassVar[str]
    package: ClassVar[str | None] = None
    labelled: ClassVar[bool] = True
    most_texts: ClassVar[int] = 2
    generates: ClassVar[bool] = False

    @property
    def main_metric(self) -> str:
        """The metric a model is chosen by, as compute_metrics names it (no "eval_")."""
        return self.metrics[0]

    @property
    def greater_is_better(self) -> bool:
        """The direction of the main metric."""
        return find_metric(self.main_metric).greater_is_better

    @property
    def columns(self) -> tuple[str, ...]:
        """The text columns, then the label column where there is one."""
        return self.text_columns + (() if self.label_column is None else (self.label_column,))

    @property
    def label(self) -> str:
        """The label column of a kind that has one.

        Raises:
            DataError: the task was made without one.
        """
        if self.label_column is None:
            raise DataError(f"the {self.kind} task {self.name!r} has no label_column; give one")
        return self.label_column

    def describe(self) -> dict[str, Any]:
        """All but the rows, as a dict that JSON can hold; see `rankwise.tasks.from_description`."""
        return {
            "name": self.name,
            "kind": self.kind,
            "text_columns": list(self.text_columns),
            "label_column": self.label_column,
            "label_names": None if self.label_names is None else list(self.label_names),
            "metrics": list(self.metrics),
        }

    # Rows

    @classmethod
    def learned(cls, rows: Rows, text_column: str | Sequence[str] | None) -> Rows:
        """A slot: the columns of a split under the names that those of train have."""
        return rows

    def check_texts(self, rows: dict[str, Rows]) -> None:
        """A slot: raises DataError, naming the row, where a text is missing or not a string."""
        for split, there in rows.items():
            for name in self.text_columns:
                check_texts(there, name, split)

    @abstractmethod
    def number(self, rows: dict[str, Rows]) -> tuple[dict[str, Rows], tuple[str, ...] | None]:
        """The splits with numbers for labels, and the label names in the order of the numbers.

        Where `label_names` is None the names are those found in train.

        Raises:
            DataError: a label is missing, malformed or unknown.
        """

    @abstractmethod
    def default_metrics(self) -> tuple[str, ...]:
        """What rows of the user's own are judged by, the main one first."""

    @abstractmethod
    def features(self) -> Features:
        """The columns of a numbered split and their types."""

    # B027: an empty slot is not forgotten, there is nothing to do unless a kind says so.
    def check_varied(self) -> None:  # noqa: B027
        """A slot: raises DataError when all labels in train are the same."""

    # Features

    def encode(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int = 128
    ) -> Dataset:
        """Features of a split of the task, one row each, not padded.

        Columns: input_ids and attention_mask, lists of int of the same length, at most
        max_length; token_type_ids if the tokenizer gives them; labels: int (classification),
        float (regression), or a list of int as long as input_ids with -100 where nothing is
        learned (tagging: all but a word's first token; causal_lm: the prompt). For causal_lm,
        rows with nothing to learn are left out and counted in a warning.

        Args:
            rows: train, validation or test of this task, or rows like them.
            tokenizer: what load_tokenizer gave.
            max_length: in tokens, special ones included; default 128.

        Raises:
            DataError: max_length does not suit the tokenizer, a column is missing or no row is
                left.
            ModelError: tagging with a tokenizer that cannot tell words apart.
        """
        _check_length(tokenizer, max_length, pair=len(self.text_columns) == 2)
        for name in self.columns:
            if name not in rows.column_names:
                raise DataError(
                    f"the rows have no column {name!r}, only {', '.join(rows.column_names)}; "
                    "encode the splits of load_task"
                )
        return self.tokenize(rows, tokenizer, max_length)

    @abstractmethod
    def tokenize(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> Dataset:
        """What encode gives back, for rows and a length that encode has checked."""

    @abstractmethod
    def data_collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[Any]], Any]:
        """Encoded rows to a batch of tensors (batch, longest); labels are padded with -100."""

    # Predictions

    def blank(self, rows: Rows) -> list[Any]:
        """A slot: labels for rows without any, of the form that `tokenize` takes."""
        return [0] * len(rows[self.text_columns[0]])

    def answer(self, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        """A slot: what is predicted of one row, from its logits and the labels of `blank`."""
        raise NotImplementedError

    def predict(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        rows: Rows,
        max_length: int = 128,
        batch_size: int = 32,
        **_: Any,
    ) -> list[dict[str, Any]]:
        """A slot: what the model says of each row, in the rows' order.

        Args:
            model: with the task's head, or an adapter on it.
            tokenizer: the model's.
            rows: the text columns; labels are not looked at.
            max_length: tokens; longer rows are cut.
            batch_size: rows in a forward pass.

        Raises:
            DataError: a text column is missing, or a text in it.
        """
        import torch
        from datasets import Dataset
        from torch.utils.data import DataLoader

        self.check_texts({"input": rows})
        there = {name: rows[name] for name in self.text_columns} | {self.label: self.blank(rows)}
        encoded = self.encode(Dataset.from_dict(there), tokenizer, max_length)
        collate: Any = self.data_collator(tokenizer)
        found = []
        for batch in DataLoader(encoded, batch_size, collate_fn=collate):  # type: ignore[arg-type]
            labels = batch.pop("labels")
            with torch.no_grad():
                logits = model.eval()(**batch.to(model.device)).logits.float().cpu()
            found += [self.answer(*pair) for pair in zip(logits, labels, strict=True)]
        return found

    # The model

    def head(self) -> dict[str, Any]:
        """A slot: what the model's config has to say of the head; here one output a label name."""
        names = dict(enumerate(self.label_names or ()))
        return {"id2label": names, "label2id": {name: number for number, name in names.items()}}

    def prepare_head(  # noqa: B027
        self, model: PreTrainedModel, new_parameter_names: set[str]
    ) -> None:
        """A slot: sets where a new head starts.

        Args:
            model: changed in place.
            new_parameter_names: those that were not in the checkpoint.
        """

    # Measures

    def check_metrics(self) -> None:
        """Call before long work.

        Raises:
            RankwiseError: a package that the task's metrics need is not installed.
        """
        try:
            if self.package is not None:
                importlib.import_module(self.package)
        except ImportError as error:
            raise RankwiseError(
                f"{', '.join(self.metrics)} of {self.name} need {self.package}, which is not "
                "installed; run: pip install 'rankwise[metrics]'"
            ) from error

    def compute_metrics(self) -> Callable[[EvalPrediction], dict[str, float]]:
        """Trainer's compute_metrics: predictions to the task's metrics by name (no "eval_").

        Their ranges are in `rankwise.tasks.METRICS`.

        Raises:
            RankwiseError: as check_metrics.
        """
        self.check_metrics()
        return self.measure

    @abstractmethod
    def measure(self, output: EvalPrediction) -> dict[str, float]:
        """The task's metrics of what the model gave for a whole split."""

    def score_rows(self, output: EvalPrediction) -> Callable[[np.ndarray], float]:
        """The main metric of any choice of the rows, given their indices; a kind may be quicker."""
        from rankwise.choose import scored_anew

        return scored_anew(self.measure, self.main_metric)(output)

    def floor(self, train: Dataset, rows: Dataset) -> dict[str, float]:
        """A slot: the metrics on encoded rows of a model that looks at no text, as far as known.

        Here 0 for a metric whose range says that it is 0 for chance.
        """
        return {name: 0.0 for name in self.metrics if "0 for" in find_metric(name).range}

    @property
    def preprocess_logits(self) -> Callable[[Any, torch.Tensor], torch.Tensor] | None:
        """A slot: Trainer's preprocess_logits_for_metrics, where logits are too large to keep.

        It takes logits and labels of a batch and gives what measure gets; None keeps the logits.
        """
        return None


def _check_length(tokenizer: PreTrainedTokenizerBase, max_length: int, pair: bool) -> None:
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    least = special + (2 if pair else 1)
    if max_length < least:
        raise DataError(
            f"max_length={max_length} leaves no room for text beside {special} special tokens; "
            f"give {least} or more"
        )
    if max_length > tokenizer.model_max_length:
        raise DataError(
            f"max_length={max_length} is more than the {tokenizer.model_max_length} tokens the "
            "model takes; give at most that"
        )
