"""What a trained model scores on a job's evaluation rows: loss, metrics, generated texts."""

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer

from rankwise.choose import resampled
from rankwise.decoding import drop_partial, generate_rows
from rankwise.errors import DivergedError
from rankwise.job import Job, evaluation_rows


def evaluate(job: Job, trainer: Trainer) -> dict[str, float]:
    """The loss and the task's metrics on the evaluation rows, by their own names.

    Raises:
        DivergedError: the loss is not finite.
    """
    return _predicted(job, trainer)[1]


def evaluated(job: Job, trainer: Trainer) -> dict[str, Any]:
    """`evaluate`'s metrics, and the main one on resamples of the rows, as a record holds them."""
    output, metrics = _predicted(job, trainer)
    sample = resampled(job.task.score_rows(output), len(job.evaluation))
    return {"metrics": metrics, "resampled": tuple(round(float(x), 6) for x in sample)}


def _predicted(job: Job, trainer: Trainer) -> tuple[Any, dict[str, float]]:
    """The predictions for the evaluation rows, and what `evaluate` says of them."""
    output: Any = trainer.predict(job.evaluation, metric_key_prefix="eval")
    raw = output.metrics or {}
    if not math.isfinite(raw["eval_loss"]):
        raise DivergedError(
            f"the loss on the {job.split} rows is {raw['eval_loss']} after training; lower "
            f"--learning_rate (now {job.args.learning_rate:g})"
        )
    names = [name for name in job.task.metrics if f"eval_{name}" in raw]
    metrics = {"loss": raw["eval_loss"]} | {name: float(raw[f"eval_{name}"]) for name in names}
    return output, metrics


def generation(job: Job, model: nn.Module, file: Path, resume: bool) -> dict[str, Any]:
    """The official figures of the texts that a model generates for the evaluation rows.

    Of a task of another kind, or a job that wants the loss alone, nothing. Texts go
    to `file`; see `rankwise.decoding.generate_rows`.

    Returns:
        "metrics", their "signatures", "decoding", and "generation_seconds".
    """
    if not job.task.generates or job.decoding is None:
        return {}
    task: Any = job.task
    _, rows = evaluation_rows(task, job.split)
    started = time.perf_counter()
    texts = generate_rows(model, job.tokenizer, task, rows, job.decoding, file, resume)
    seconds = round(time.perf_counter() - started, 3)
    figures = task.score_texts(rows, texts)
    drop_partial(file)
    return {
        "metrics": {figure.name: figure.value for figure in figures},
        "signatures": {figure.name: figure.signature for figure in figures},
        "decoding": asdict(job.decoding),
        "generation_seconds": seconds,
    }
