"""The stages of a method in a folder: choose, train, hand over, evaluate, record.

A stage that a stopped run had finished is not repeated, and one that it was in goes on from its
last checkpoint.
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, Trainer, set_seed

from rankwise.adapter import OTHER_SIZES
from rankwise.beside import TASK
from rankwise.evaluation import evaluated, generation
from rankwise.files import write_json
from rankwise.job import GENERATIONS, Job, asked, recorded, split_rows
from rankwise.lora import swap_adapter
from rankwise.methods import Kept, LoRA, Method, by_name
from rankwise.plan import RankPlan
from rankwise.reading import as_json, read_json
from rankwise.report.memory import Peak, peak_memory
from rankwise.result import Result
from rankwise.trainer import drop_damaged, run_training
from rankwise.training import model_name, setting_of, with_provenance


def run_method(
    method: Method,
    job: Job,
    folder: Path,
    resume: bool = False,
    base: PreTrainedModel | None = None,
    name: str | None = None,
    rows: Dataset | None = None,
) -> Result:
    """The stages of one method in a folder: choose, train, hand over, evaluate.

    Leaves `adapter/`, `plan.json` where the method has ranks, `result.json`, and what other sizes
    are cut from. Where `result.json` is there already, it is read and nothing else happens.

    Args:
        method: what to run.
        job: on what.
        folder: made where it is missing.
        resume: go on from the checkpoints in it.
        base: the base model where it is loaded already; used up.
        name: what tables call it; None is the method's own label.
        rows: training rows; None is all of the job's.
    """
    done = folder / "result.json"
    if _go_on(method, folder) and done.is_file():
        found = Result.load(done)
        if found.method == as_json(method.describe()):
            return found
        done.unlink()  # flags that act after training have changed: that much is done again
    job = job if rows is None else replace(job, train=rows)
    base = base if base is not None else job.fresh_model()
    plan: RankPlan | None = None
    searched: dict[str, Any] = {}
    final = method
    if method.anew:
        plan, searched = choose_stage(method, job, folder, resume, base)
        dropout = getattr(method, "lora_dropout", 0.0)
        final = LoRA(lora_dropout=dropout)
    result = _train_stage(final, job, folder, resume, base, plan)
    return _record(method, result, searched, folder, name)


def _go_on(method: Method, folder: Path) -> bool:
    """Whether what lies in a stage's folder is of this method; what is of another goes.

    A control at another size, say, because the method beside it now hands over another one.
    """
    file, now = folder / "method.json", as_json(method.trained_by())
    if file.is_file() and read_json(file) == now:
        return True
    for name in ("result.json", "plan.json"):
        (folder / name).unlink(missing_ok=True)
    for name in ("search", "training", method.product, *OTHER_SIZES):
        shutil.rmtree(folder / name, ignore_errors=True)
    write_json(file, now)
    return False


def choose_stage(
    method: Method, job: Job, folder: Path, resume: bool, base: PreTrainedModel
) -> tuple[RankPlan, dict[str, Any]]:
    """Chooses ranks and writes plan.json; read, where a resumed run has it already."""
    figures, scratch = folder / "search" / "figures.json", folder / "search"
    if figures.is_file():
        return RankPlan.load(folder / "plan.json"), read_json(figures)
    args = method.arguments(job.arguments(scratch))
    with measured(args.device) as cost:
        setting = setting_of(
            method, base, split_rows(method, job), args, job.options(), **asked(job)
        )
        kept = method.choose(base, setting, _checkpoint(method, scratch, resume))
    assert kept.plan is not None
    plan = with_provenance(kept.plan, setting)
    plan.save(folder / "plan.json")
    found = {
        "search_seconds": cost["seconds"],
        "search_peak_memory_bytes": cost["bytes"],
        "held_out": len(setting.held_out),
        **_choice(kept),
    }
    write_json(figures, found)
    return plan, found


def _choice(kept: Kept) -> dict[str, Any]:
    return {
        "curve": None if kept.curve is None else kept.curve.to_dict(),
        "figures": dict(kept.figures),
    }


def _checkpoint(method: Method, folder: Path, resume: bool) -> bool:
    """Whether there is a whole checkpoint that the method can go on from; others go.

    Else a stage starts over, and gives what it would have given.
    """
    found = drop_damaged(folder) is not None and resume and method.resumable
    if not found:
        for path in folder.glob("checkpoint-*"):
            shutil.rmtree(path)
    return found


def _train_stage(
    method: Method,
    job: Job,
    folder: Path,
    resume: bool,
    base: PreTrainedModel,
    plan: RankPlan | None,
) -> dict[str, Any]:
    """Trains, keeps, hands over and evaluates; the record's fields that come of that."""
    scratch = folder / "training"
    args = method.arguments(job.arguments(scratch))
    data = split_rows(method, job)
    with measured(args.device) as cost:
        setting = setting_of(method, base, data, args, job.options(), **asked(job))
        given = plan if plan is not None else method.start(base, setting)
        set_seed(args.seed)
        trainer = method.trainer(method.attach(base, given, setting), given, setting)
        run_training(trainer, _checkpoint(method, scratch, resume))
    for config in getattr(trainer.model, "peft_config", {}).values():
        config.base_model_name_or_path = job.source.name_or_path
        config.revision = job.source.revision
    started = time.perf_counter()
    kept = method.keep(trainer, given, setting)
    if plan is None and kept.plan is not None:
        kept = replace(kept, plan=with_provenance(kept.plan, setting))
    seconds = round(time.perf_counter() - started, 3)
    ranked = kept.plan is not None
    head = sum(
        p.numel()
        for n, p in trainer.model.named_parameters()
        if p.requires_grad and not (ranked and "lora_" in n)
    )
    _hand_over(method, job, trainer, kept, folder)
    lora = kept.plan.parameters if kept.plan is not None else None
    found = evaluated(job, trainer)
    texts = generation(job, trainer.model, folder / GENERATIONS, resume)
    return {
        "method": method,
        "job": job,
        "plan": kept.plan,
        "rows": {
            "train": len(data.train),
            "held_out": len(data.validation),
            "evaluated": len(job.evaluation),
        },
        "metrics": found["metrics"] | texts.pop("metrics", {}),
        "resampled": found["resampled"],
        "generation": texts,
        "rivals": _rivals(method, job, trainer, kept, head),
        "trainable_parameters": (lora or 0) + head,
        "lora_parameters": lora,
        "cost": {
            "search_seconds": seconds if method.chooses else 0.0,
            "train_seconds": cost["seconds"],
            "peak_memory_bytes": cost["bytes"],
            "peak_memory_of": cost["of"],
            "steps": trainer.state.global_step,
        },
        "resumed": resume,
        **_choice(kept),
    }


def _rivals(
    method: Method, job: Job, trainer: Trainer, kept: Kept, head: int
) -> list[dict[str, Any]]:
    """What else the same training could have given, measured on the same rows."""
    found = []
    for name, adapter in method.rivals(kept).items():
        with TemporaryDirectory() as scratch:
            adapter.save(Path(scratch) / "adapter")
            swap_adapter(trainer, Path(scratch) / "adapter")
        size = adapter.parameters
        about = {"name": name, **evaluated(job, trainer), "lora_parameters": size}
        ranks = {module: f.rank for module, f in adapter.factors().items()}
        found.append(about | {"trainable_parameters": size + head, "ranks": ranks})
    return found


def _hand_over(method: Method, job: Job, trainer: Trainer, kept: Kept, folder: Path) -> None:
    """The method's hand-over, into folders that hold nothing of a run that was killed in it."""
    for name in (method.product, *OTHER_SIZES):
        shutil.rmtree(folder / name, ignore_errors=True)
    method.hand_over(trainer, kept, folder)
    for name in (method.product, *OTHER_SIZES):
        if (folder / name).is_dir():
            describe_adapter(job, folder / name, method)


def describe_adapter(job: Job, folder: Path, method: Method) -> None:
    """Writes beside an adapter what its task was, for `rankwise evaluate`."""
    about = job.task.describe() | {"max_length": job.max_length, "method": method.describe()}
    about["gguf_file"] = job.source.gguf_file
    about["load_in_4bit"] = job.source.load_in_4bit
    base = job.source.name_or_path
    if not Path(base).exists():  # of a folder, PEFT's own config alone says where
        about["base"] = base
    write_json(folder / TASK, about)
    if folder.name == method.product:
        job.tokenizer.save_pretrained(str(folder))


def _record(
    method: Method, found: dict[str, Any], searched: dict[str, Any], folder: Path, name: str | None
) -> Result:
    """The record of a finished method, written beside its adapter."""
    job, plan = found["job"], found["plan"]
    if plan is not None:
        plan.save(folder / "plan.json")
        # beside the weights too, for whoever gets those alone
        plan.save(folder / method.product / "plan.json")
    if method.anew:
        found["cost"] |= {k: v for k, v in searched.items() if k.startswith("search_")}
        found |= {"curve": searched["curve"], "figures": searched["figures"]}
        found["rows"] |= {"held_out": searched["held_out"]}
    result = Result(
        name=name or method.label(plan),
        method=method.describe(),
        claim=method.claim,
        task=job.task.describe(),
        model=model_name(job.source.name_or_path),
        rows=found["rows"],
        split=job.split,
        training=recorded(job.args),
        metrics=found["metrics"],
        resampled=found["resampled"],
        trainable_parameters=found["trainable_parameters"],
        lora_parameters=found["lora_parameters"],
        ranks=None if plan is None else plan.ranks,
        cost=found["cost"],
        curve=found["curve"],
        figures=found["figures"],
        about={
            "command": job.command,
            "threads": torch.get_num_threads(),
            "resumed": found["resumed"],
            "max_length": job.max_length,
            "floor": job.task.floor(job.train_rows, job.evaluation),
            "load_in_4bit": job.source.load_in_4bit,
            "versions": {p: version(p) for p in ("rankwise", "torch", "transformers", "peft")},
            **job.about,
            **found["generation"],
        },
    )
    rivals = [replace(result, claim="", curve=None, figures={}, **r) for r in found["rivals"]]
    result = Result.from_dict(result.with_controls(rivals, "").to_dict())
    result.save(folder / "result.json")
    return result


@contextmanager
def measured(device: torch.device) -> Iterator[dict[str, Any]]:
    """Seconds and peak memory of a block."""
    found: dict[str, Any] = {}
    peak: Peak = peak_memory(device)
    started = time.perf_counter()
    yield found
    found["seconds"] = round(time.perf_counter() - started, 3)
    found["bytes"], found["of"] = peak.read(), peak.of


def with_method(name: str | Method, like: Method, budget: int | None) -> Method:
    """A control: the method of that name with the flags that it shares with another.

    Args:
        name: of the control.
        like: the method that it is compared with; `r`, `lora_alpha`, ... are taken from it.
        budget: parameters, for a control that takes a budget.
    """
    control = by_name(name)
    shared = ("r", "lora_alpha", "lora_dropout", "target_modules")
    known = control.__dataclass_fields__
    flags = {key: getattr(like, key) for key in shared if key in known and hasattr(like, key)}
    if budget is not None and "budget" in known:
        flags["budget"] = budget
    return control.with_flags(**flags)
