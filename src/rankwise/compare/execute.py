"""One cell, from its recipe to its file."""

import os
import platform
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from rankwise.cli import quiet
from rankwise.cli.job import source, task_of, training_arguments
from rankwise.compare.cells import (
    Cell,
    Failure,
    cell_file,
    is_over,
    read_cell,
    set_aside,
    texts_file,
    write_failure,
)
from rankwise.compare.recipe import Recipe
from rankwise.errors import CheckpointError, DivergedError, RankwiseError
from rankwise.evaluation import evaluate
from rankwise.job import GENERATIONS, Job, load_job
from rankwise.methods import Method
from rankwise.result import Result
from rankwise.rows import hold_out
from rankwise.stages import run_method
from rankwise.tasks.metrics import find_metric
from rankwise.trainer import replaced


def execute(
    recipe: Recipe, cells: Mapping[str, Cell], name: str, folder: Path, workers: int = 1
) -> Result | Failure:
    """Runs a cell, and first the cells that it waits for and that are not there.

    Where another process is at one of them, waits for it. What stops a cell is written down in
    place of its result; only Ctrl-C and the end of the process leave it as if it had not begun.

    Args:
        recipe: of the cells.
        cells: all of them, by name.
        name: of the one to run.
        folder: holds `cells/`, and `work/` with what is under way.
        workers: processes on this machine, for the record.
    """
    cell, path = cells[name], cell_file(folder, name)
    for other in cell.needs:
        if not is_over(_read(folder, other)):
            execute(recipe, cells, other, folder, workers)
    work = folder / "work" / name
    work.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{work}.lock"):
        found = _read(folder, name)
        if found is not None and is_over(found):
            return found
        try:
            result = _run(recipe, cell, folder, work, workers)
        except (RankwiseError, DivergedError) as error:
            failure = Failure(cell.spec, " ".join(str(error).split()), again=True)
        except Exception as error:
            import traceback

            traceback.print_exc()
            said = " ".join(f"{type(error).__name__}: {error}".split())
            failure = Failure(cell.spec, said[:1000], again=False)
        else:
            if (work / GENERATIONS).is_file():
                (work / GENERATIONS).replace(texts_file(folder, name))
            result.save(path)
            shutil.rmtree(work, ignore_errors=True)
            return result
        write_failure(path, failure)
        shutil.rmtree(work, ignore_errors=True)
        return failure


def _read(folder: Path, name: str) -> Result | Failure | None:
    set_aside(folder, name)
    return read_cell(cell_file(folder, name))


def _run(recipe: Recipe, cell: Cell, folder: Path, work: Path, workers: int) -> Result:
    rate, judged = _rate(cell, folder)
    method = _sized(cell, folder)
    job = cell_job(recipe, cell, rate)
    resume = any(work.rglob("checkpoint-*")) or any(work.rglob("figures.json"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        result = run_method(method, job, work, resume, name=cell.method.label)
    except CheckpointError:  # of another version of a package, say
        shutil.rmtree(work)
        work.mkdir()
        result = run_method(method, job, work, name=cell.method.label)
    about = {
        "cell": {"name": cell.name, "recipe": recipe.path.name, "spec": dict(cell.spec)},
        "judged": judged,
        "floor": floor(job) if cell.held_out is None else {},
        "machine": machine(workers),
    }
    return replace(result, about=result.about | about)


def _rate(cell: Cell, folder: Path) -> tuple[float | None, dict[str, float | str]]:
    """The learning rate, None for the usual one, and what each that was tried scored held out.

    Raises:
        RankwiseError: no rate worked. RuntimeError: one was never tried to the end.
    """
    if not cell.rates:
        return cell.fit.learning_rate, {}
    judged: dict[str, float | str] = {}
    scores: dict[float, tuple[float, float]] = {}
    for rate, name in cell.rates.items():
        found = read_cell(cell_file(folder, name))
        if isinstance(found, Result):
            metric = found.task["metrics"][0]
            sign = 1 if find_metric(metric).greater_is_better else -1
            judged[f"{rate:g}"] = found.metrics[metric]
            scores[rate] = (sign * found.metrics[metric], -found.metrics["loss"])
        elif isinstance(found, Failure) and found.again:
            judged[f"{rate:g}"] = found.error
        else:
            raise RuntimeError(f"the cell {name}, which judges a learning rate, broke down")
    if not scores:
        raise RankwiseError(f"no learning rate worked; the first: {next(iter(judged.values()))}")
    return max(scores, key=scores.__getitem__), judged


def _sized(cell: Cell, folder: Path) -> Method:
    """The method, at the size of another cell where it is a control of that."""
    if cell.size_of is None:
        return cell.method.method
    found = read_cell(cell_file(folder, cell.size_of))
    if not isinstance(found, Result):
        raise RankwiseError(f"there is no size to take over: {cell.size_of} failed")
    if found.lora_parameters is None:
        raise RankwiseError(f"{cell.size_of} has no LoRA parameters, so no size to take over")
    return cell.method.method.with_flags(budget=found.lora_parameters)


def cell_job(recipe: Recipe, cell: Cell, rate: float | None, most: int | None = None) -> Job:
    """The rows and the model of a cell.

    Args:
        recipe, cell: which.
        rate: learning rate; None is the method's usual one.
        most: use no more rows of a split: for a look at whether it can work.

    Raises:
        RankwiseError: anything that is wrong with them.
    """
    quiet()
    fit, data = replace(cell.fit, learning_rate=rate), cell.task.data
    if most is not None:
        train = min(most, data.max_train_samples or most)
        data = replace(data, max_train_samples=train, max_eval_samples=min(most, 64))
    task = task_of(recipe.model, data, fit, seed=cell.data_seed)
    split = data.eval_split
    if cell.held_out is not None:
        if task.train is None:
            raise RankwiseError(f"{cell.task.label} has no training rows to choose a rate on")
        count = max(1, round(len(task.train) * cell.held_out))
        parts = hold_out(task.train, count, cell.data_seed)
        task, split = (
            replace(task, train=parts.train, validation=parts.validation, test=None),
            ("validation"),
        )
    args = replaced(training_arguments(fit), disable_tqdm=True)
    of_rows = data.max_length, split
    job = load_job(task, source(recipe.model), args, *of_rows, "compare", recipe.decoding)
    job = job.at_rate(rate, cell.method.method)
    if cell.held_out is None:
        return job
    # the loss judges a rate: no need for texts
    return replace(job, split="held-out training", decoding=None)


def floor(job: Job) -> dict[str, float]:
    """What a model that was taught nothing scores on the evaluated rows, by metric.

    What the task says of chance, or, where it says nothing of its main metric (a language model's
    perplexity), the figures of the base model as it is; no texts are generated for that.
    """
    found = job.task.floor(job.train_rows, job.evaluation)
    if job.task.main_metric in found:
        return found
    from transformers import Trainer

    return evaluate(job, Trainer(job.fresh_model(), job.args, **job.options()))


def machine(workers: int) -> dict[str, Any]:
    """What the seconds of a cell hang on."""
    import torch

    processor = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        processor = names[0] if names else processor
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"processor": processor, "cores": os.cpu_count(), "gpu": gpu, "workers": workers}
