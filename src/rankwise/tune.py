"""The learning rate of one method on one task, chosen on held-out training rows (`run --tune`).

Optuna proposes, its journal on disk remembers: several processes share one search, and one that
was killed is gone on with. A trial that falls behind the others' median is stopped early.
"""

import math
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from transformers import TrainerCallback

from rankwise.errors import DivergedError, OutputError, PlanError, RankwiseError
from rankwise.job import Job
from rankwise.methods import Method
from rankwise.reading import as_json
from rankwise.rows import hold_out
from rankwise.stages import run_method
from rankwise.trainer import replaced

HELD_OUT, MOST = 0.1, 1000  # share of the training rows that judges, and how many at most
FIRST = (1, 3, 1 / 3, 10)  # times the given rate: tried before anything is proposed
LOOKS = 4  # at each trial: after a quarter of its steps, ...
WAIT = 0.5  # seconds between two looks at what other processes do


@dataclass(frozen=True)
class Tuned:
    """What a search found.

    Attributes:
        learning_rate: the best.
        metric: by which.
        trials: rate, value and loss on the held-out rows, and "complete", "pruned" or "failed",
            in the order in which they began.
        rows: held out.
    """

    learning_rate: float
    metric: str
    trials: list[dict[str, Any]]
    rows: int


def tune(
    method: Method, job: Job, folder: Path, trials: int, rates: tuple[float, float] = (1e-5, 3e-2)
) -> Tuned:
    """The rate of AdamW that does best on held-out training rows.

    Every process that calls this with the same folder takes its share of the trials, and waits for
    those of the others.

    Args:
        method: what is trained.
        job: on what; its evaluation rows are not looked at. `job.args.learning_rate` is tried
            first, then 3, 10 and 30 times as much.
        folder: of the search; made where it is missing.
        trials: how many, over all processes.
        rates: the range, tried on a log scale.

    Raises:
        RankwiseError: Optuna is not installed, a range that is none, or no trial worked.
        OutputError: the folder holds a search of something else.

    Source: arXiv 1907.10902 (Optuna); tree-structured Parzen estimator and median pruner.
    """
    if not 0 < rates[0] < rates[1] or trials < 1:
        raise RankwiseError(
            f"--tune is {trials} and --tune_rates are {rates}; give at least one trial and a range"
        )
    parts = _held_out(job)
    study = _study(method, job, folder, rates)
    while (number := _ask(study, folder, trials)) is not None:
        trial, lock = number
        try:
            _run(study, trial, method, replace(job, **parts), folder / f"trial-{trial.number}")
        finally:
            lock.release()
            shutil.rmtree(folder / f"trial-{trial.number}", ignore_errors=True)
    return _found(study, job, len(parts["evaluation"]))


def _held_out(job: Job) -> dict[str, Any]:
    count = max(1, min(MOST, round(len(job.train_rows) * HELD_OUT)))
    if count >= len(job.train_rows):
        raise RankwiseError(
            f"{len(job.train_rows)} training rows are too few to hold some out; leave out --tune"
        )
    parts = hold_out(job.train_rows, count, job.args.seed)
    about = {"train": parts.train, "evaluation": parts.validation, "validation": None}
    return about | {"split": "held-out training"}


def _study(method: Method, job: Job, folder: Path, rates: tuple[float, float]) -> Any:
    """The search of this folder, new or as other processes and an earlier one left it."""
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise RankwiseError(
            "--tune needs optuna, which is not installed; run: pip install 'rankwise[tune]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    folder.mkdir(parents=True, exist_ok=True)
    about = as_json(_about(method, job, rates))
    with FileLock(folder / "study.lock"):
        study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(folder / "journal.log"))),
            study_name="learning_rate",
            direction="maximize" if job.task.greater_is_better else "minimize",
            load_if_exists=True,
            # a process that comes later proposes other rates than those before it
            sampler=optuna.samplers.TPESampler(seed=job.args.seed, n_startup_trials=len(FIRST)),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=len(FIRST)),
        )
        saved = study.user_attrs.get("about")
        if saved is None:
            study.set_user_attr("about", about)
            first = [job.args.learning_rate * times for times in FIRST]
            for rate in dict.fromkeys(min(max(rate, rates[0]), rates[1]) for rate in first):
                study.enqueue_trial({"learning_rate": rate})
        elif saved != about:
            odd = next(key for key in about if saved.get(key) != about[key])
            raise OutputError(
                f"the search in {folder} had another {odd}; give another --output_dir, or remove it"
            )
        if len(study.trials) > len(FIRST):
            study.sampler = optuna.samplers.TPESampler(
                seed=job.args.seed + len(study.trials), n_startup_trials=len(FIRST)
            )
    return study


def _about(method: Method, job: Job, rates: tuple[float, float]) -> dict[str, Any]:
    """What a search that is gone on with has to share."""
    from rankwise.job import recorded

    return {
        "method": method.describe(),
        "task": job.task.describe(),
        "model": job.source.name_or_path,
        "training": recorded(job.args),
        "rows": len(job.train_rows),
        "rates": list(rates),
    }


def _ask(study: Any, folder: Path, trials: int) -> tuple[Any, FileLock] | None:
    """The next trial and its lock; None where all are over, those of other processes too."""
    from optuna.trial import TrialState

    while True:
        with FileLock(folder / "study.lock"):
            for dead in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                with _free(folder, dead.number) as free:  # its process was killed
                    if free:
                        study.tell(dead.number, state=TrialState.FAIL)
                        study.enqueue_trial(dead.system_attrs.get("fixed_params") or dead.params)
            all_of = study.get_trials(deepcopy=False)
            # one that a kill stopped is tried again, and not counted
            counted = [t for t in all_of if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
            running = [t for t in all_of if t.state is TrialState.RUNNING]
            if len(counted) + len(running) < trials:
                trial = study.ask()
                lock = FileLock(folder / f"trial-{trial.number}.lock")
                lock.acquire()
                return trial, lock
        if not running:
            return None
        time.sleep(WAIT)


@contextmanager
def _free(folder: Path, number: int) -> Iterator[bool]:
    lock = FileLock(folder / f"trial-{number}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _run(study: Any, trial: Any, method: Method, job: Job, folder: Path) -> None:
    """One training at one rate, and what it scored on the held-out rows."""
    import optuna

    low, high = study.user_attrs["about"]["rates"]
    rate = trial.suggest_float("learning_rate", low, high, log=True)
    metric = job.task.main_metric
    args = replaced(
        job.args,
        learning_rate=rate,
        eval_strategy="steps",
        eval_steps=1 / LOOKS,
        disable_tqdm=True,
        save_strategy="no",
    )
    watch = {"callbacks": [_Watch(trial, metric)], "eval_dataset": job.evaluation}
    worst = -math.inf if job.task.greater_is_better else math.inf
    try:
        result = run_method(method, replace(job, args=args, trainer=watch), folder)
    except optuna.TrialPruned:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    except PlanError:  # of the size, whatever the rate
        study.tell(trial, worst)
        raise
    except (DivergedError, RankwiseError) as error:
        trial.set_user_attr("error", " ".join(str(error).split()))
        study.tell(trial, worst)
    else:
        value = result.metrics[metric]
        trial.set_user_attr("loss", result.metrics["loss"])
        study.tell(trial, value if math.isfinite(value) else worst)


class _Watch(TrainerCallback):
    """Hands the held-out metric of each look to Optuna, which may stop the trial."""

    def __init__(self, trial: Any, metric: str):
        self.trial, self.metric, self.looks = trial, metric, 0

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Mapping[str, float], **kwargs: Any
    ) -> None:
        import optuna

        value = metrics.get(f"eval_{self.metric}")
        if state.global_step >= state.max_steps or value is None or not math.isfinite(value):
            return
        self.trial.report(value, self.looks)
        self.looks += 1
        if self.trial.should_prune():
            raise optuna.TrialPruned


def _found(study: Any, job: Job, rows: int) -> Tuned:
    from optuna.trial import TrialState

    states = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned"}
    trials = []
    for trial in study.get_trials(deepcopy=False):
        if trial.state in states:
            worked = trial.value is not None and math.isfinite(trial.value)
            failed = trial.state is TrialState.COMPLETE and not worked
            about = {"learning_rate": trial.params["learning_rate"]}
            about["value"] = trial.value if worked else None
            about["loss"] = trial.user_attrs.get("loss")
            trials.append(about | {"state": "failed" if failed else states[trial.state]})
    done = [t for t in trials if t["state"] == "complete"]
    if not done:
        errors = [t.user_attrs["error"] for t in study.trials if "error" in t.user_attrs]
        raise RankwiseError(f"no learning rate worked; the first: {(errors or ['none'])[0]}")
    sign = 1 if job.task.greater_is_better else -1
    # by so few rows many do equally well: of these the one of the lowest loss
    best = max(done, key=lambda t: (sign * t["value"], -t["loss"]))
    return Tuned(best["learning_rate"], job.task.main_metric, trials, rows)
