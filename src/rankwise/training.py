"""On a model and rows of the user's own: choose ranks (`search`), train at a plan's (`train`)."""

import inspect
from collections.abc import Mapping
from dataclasses import fields, replace
from hashlib import sha256
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, SchedulerType, Trainer, TrainingArguments, set_seed

from rankwise.choose import ScoreRows, what_counts
from rankwise.errors import DataError, PlanError, RankwiseError
from rankwise.fourbit import is_4bit, refuse_training
from rankwise.given import check_arguments, check_model, check_type, shown
from rankwise.methods import DEFAULT_SEARCH, Method, Setting, by_name
from rankwise.plan import RankPlan
from rankwise.rows import TwoSets, fingerprint, two_sets
from rankwise.sharded import refuse_sharded, sharding
from rankwise.trainer import (
    FiniteTrainer,
    decisive,
    default_arguments,
    labelled,
    run_training,
    task_type_of,
)


def search(
    model: PreTrainedModel,
    train_dataset: Any,
    *,
    method: str | Method = DEFAULT_SEARCH,
    validation_dataset: Any = None,
    validation_fraction: float | None = None,
    task_type: str | None = None,
    args: TrainingArguments | None = None,
    trainer_class: type[Trainer] | None = None,
    resume_from_checkpoint: str | bool | None = None,
    **options: Any,
) -> RankPlan:
    """Chooses the rank of every layer from data, and returns the plan.

    The model is as it was afterwards, on the device that Trainer put it on: adapters, gates and the
    head trained by the search are gone.

    Args:
        model: base model, without adapters.
        train_dataset: rows ready for the model (`input_ids`, `attention_mask`, `labels`), a
            `datasets.Dataset` or any dataset with a length and an index.
        method: a name from `rankwise.METHODS`, or a method with its flags.
        validation_dataset: rows that the choice is made on. None takes them from `train_dataset`.
        validation_fraction: share of `train_dataset` that becomes them where `validation_dataset`
            is None, drawn with `args.seed`. None is the method's own.
        task_type: PEFT's; None infers it from the model's class. It decides which head is trained
            along with the factors.
        args: the search's own TrainingArguments: learning rate of the parameters, epochs, batch
            size, precision, checkpoints, logging. None is 3 epochs of AdamW at the method's usual
            learning rate (1e-3 for LoRA's kind; `Method.rate_for`), batch 32, warmed up over 6 % of
            the steps.
        trainer_class: another library's Trainer, TRL's SFTTrainer for example, which prepares the
            rows (`prompt`/`completion`, `messages`, packing) and computes the loss; `args` are its.
        resume_from_checkpoint: a checkpoint folder of an earlier, interrupted search, or True for
            the last complete one in `args.output_dir`.
        **options: flags of the method (`r`, `lora_alpha`, `target_modules`, ...); all others are
            passed on to transformers.Trainer (`data_collator`, `processing_class`, ...).

    Returns:
        RankPlan with its provenance, the curve over sizes in it where the method compared some by
        `args.metric_for_best_model` (the loss where that is None).

    Raises:
        RankwiseError: arguments out of range, targets that match nothing, an empty split, a
            checkpoint of another configuration, a method that has no ranks. Raised before any
            training.
        DivergedError: the loss became NaN or infinite; names the step and the last checkpoint.

    Example:
        >>> plan = rankwise.search(model, train_dataset, data_collator=collator, r=8)
        >>> model = get_peft_model(model, plan.lora_config(task_type="SEQ_CLS"))
    """
    method, options = with_options(method, options)
    check_model(model)
    _check_weights(model)
    _check_task_type(task_type)
    with TemporaryDirectory() as scratch:
        if args is None:
            args = default_arguments(scratch, method.rate_for(getattr(model, "config", None)))
        check_arguments(args)
        args = method.arguments(args)
        refuse_sharded("rankwise.search", args)  # the model has to be as before afterwards
        fraction = method.held_out_share if validation_fraction is None else validation_fraction
        check_type("validation_fraction", fraction, Real, "a number between 0 and 1")
        _check_rows(model, train_dataset, trainer_class)
        data = two_sets(train_dataset, validation_dataset, fraction, args.seed)
        if trainer_class is not None:  # it prepares D_val as it prepares D_tr
            options |= {"trainer_class": trainer_class, "eval_dataset": data.validation}
        setting = setting_of(method, model, data, args, options, task_type or task_type_of(model))
        if "targets" not in setting.configuration:
            raise RankwiseError(f"{method.title} has no ranks to choose; use rankwise.fit")
        method.check(model, setting)
        setting = replace(
            setting, configuration={**setting.configuration, "weights": weights_of(model)}
        )
        kept = method.choose(model, setting, resume_from_checkpoint)
    assert kept.plan is not None
    return with_provenance(kept.plan, setting)


def train(
    model: PreTrainedModel,
    plan: RankPlan,
    train_dataset: Any,
    *,
    args: TrainingArguments,
    method: str | Method = "lora",
    task_type: str | None = None,
    lora_dropout: float = 0.0,
    resume_from_checkpoint: str | bool | None = None,
    **options: Any,
) -> FiniteTrainer:
    """Trains a fresh adapter at a plan's ranks with a stock Trainer.

    Args:
        model: base model; it carries the trained adapter afterwards, as `trainer.model`.
        plan: made for this model.
        train_dataset: training and validation rows together, where the plan comes from a search.
        args: TrainingArguments. `args.seed` also draws the factors, and ranks where a method does.
        method: how the pieces are trained; "lora" is all of them together. With one whose training
            gives several sizes, evaluations during the training are of the largest.
        task_type, lora_dropout: of the LoraConfig; None infers the type from the model's class.
        resume_from_checkpoint: a checkpoint folder, or True for the last complete one in
            `args.output_dir`.
        **options: flags of the method; all others are passed on to transformers.Trainer.

    Returns:
        The Trainer, trained; its `model` is a PeftModel. Where the method trains with gates they
        are still on: save with the trainer's `save_model`, for `model.save_pretrained` would write
        names that PEFT does not read.

    Raises:
        PlanError: the plan is for another model, or not one that the method can train at.
        RankwiseError: a method that trains no adapter at a plan. CheckpointError: nothing to
            resume from. DivergedError: the loss became NaN or infinite.

    Example:
        >>> trainer = rankwise.train(base, plan, train_dataset, args=args)
        >>> trainer.model.save_pretrained("adapter")
    """
    method, options = with_options(method, {"lora_dropout": lora_dropout, **options})
    if method.anew:
        raise RankwiseError(
            f"{method.title} chooses ranks, which are then trained as plain LoRA; use "
            "rankwise.search, and method='lora' here"
        )
    check_model(model)
    check_type("plan", plan, RankPlan, "a RankPlan, of search or of RankPlan.load(path)", PlanError)
    check_arguments(args)
    _check_task_type(task_type)
    _check_rows(model, train_dataset, options.get("trainer_class"))
    args = method.arguments(labelled(args))
    task_type = task_type or task_type_of(model)
    rows = fingerprint(train_dataset)
    configuration = {
        "method": method.trained_by(),
        "weights": weights_of(model),
        "ranks": plan.ranks,
        "scaling": plan.scaling,
        "task_type": task_type,
        "train_sha256": rows,
        "world_size": args.world_size,
        **decisive(args),
    }
    setting = Setting(
        train_dataset,
        None,
        args,
        task_type,
        options=options,
        provenance={"seed": args.seed, "train_sha256": rows},
        configuration=configuration,
    )
    set_seed(args.seed)
    trainer = method.trainer(method.attach(model, plan, setting), plan, setting)
    run_training(trainer, resume_from_checkpoint)
    assert isinstance(trainer, FiniteTrainer)
    return trainer


def with_options(method: str | Method, options: Mapping[str, Any]) -> tuple[Method, dict[str, Any]]:
    """The method with those options that are its flags, and the options that are not."""
    found = by_name(method)
    names = {f.name for f in fields(found)}
    flags = {name: value for name, value in options.items() if name in names}
    return found.with_flags(**flags), {k: v for k, v in options.items() if k not in flags}


def setting_of(
    method: Method,
    model: nn.Module,
    data: TwoSets,
    args: TrainingArguments,
    options: Mapping[str, Any],
    task_type: str | None,
    metric: str | None = None,
    greater_is_better: bool | None = None,
    score_rows: ScoreRows | None = None,
) -> Setting:
    """What a method is given: the rows in two, and where its plan will come from.

    The metric is `args.metric_for_best_model` where None is given, or else the loss.
    """
    refuse_sharded(method.title, args, able=method.shards)
    if is_4bit(model) and sharding(args):
        raise RankwiseError("a base in 4 bits is not sharded; take torchrun, or leave 4 bits out")
    if method.stock != "peft":
        refuse_training(model, method.title)
    metric, greater_is_better = what_counts(args, metric, greater_is_better)
    setting = Setting(
        data.train,
        data.validation,
        args,
        task_type,
        metric,
        greater_is_better,
        score_rows,
        options,
    )
    plan = method.start(model, setting)
    about = _provenance(method, model, plan, data, args, task_type)
    targets = {} if plan is None else {"targets": dict(sorted(plan.ranks.items()))}
    trained = {"method": method.trained_by(), **targets}
    return replace(setting, provenance=about, configuration=about | decisive(args) | trained)


def with_provenance(plan: RankPlan, setting: Setting) -> RankPlan:
    """The plan, saying where it comes from; what it says of itself already stays."""
    return replace(plan, provenance={**setting.provenance, **plan.provenance})


def weights_of(model: nn.Module) -> str:
    """A fingerprint of a model's weights, exact and cheap: one pass over their bits, as integers.

    Each tensor counts by its name, shape, type, the sum of its words, and some of its values in
    their places. Sums of integers are the same in every order, on every processor.
    """
    digest = sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().contiguous().view(-1)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if flat.numel() == 0 or flat.is_meta:
            continue
        step = max(1, flat.numel() // 64)
        words = flat.view(torch.uint8)
        if len(words) % 4 == 0 and words.storage_offset() % 4 == 0:
            words = words.view(torch.int32)
        digest.update(str(int(words.sum(dtype=torch.int64))).encode())
        digest.update(flat[::step].contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def _check_task_type(task_type: str | None) -> None:
    from peft import TaskType

    known = [kind.value for kind in TaskType]
    if task_type is not None and task_type not in known:
        raise RankwiseError(f"task_type is {shown(task_type)}; PEFT has {', '.join(known)}")


def _check_weights(model: nn.Module) -> None:
    if any(p.dtype == torch.float16 for p in model.parameters()):
        raise RankwiseError("the weights are float16; load the model in bfloat16 or float32")


def _check_rows(model: nn.Module, rows: Any, trainer_class: type[Trainer] | None) -> None:
    """Raises DataError at rows that the stock Trainer cannot take, or would train wrongly."""
    if rows is None or isinstance(rows, str | bytes):
        raise DataError(
            f"train_dataset is {shown(rows)}; give rows ready for the model (a datasets.Dataset, "
            "say), or the file itself to rankwise.fit"
        )
    columns = getattr(rows, "column_names", None)
    if isinstance(rows, list) and rows and isinstance(rows[0], Mapping):
        columns = list(map(str, rows[0]))
    if trainer_class is not None or not isinstance(columns, list) or not len(rows):
        return
    if not set(columns) & set(inspect.signature(model.forward).parameters):
        raise DataError(
            f"train_dataset has the columns {', '.join(columns)}, none of which the model takes; "
            "give the rows as they are to rankwise.fit, or trainer_class=SFTTrainer, or tokenize "
            "them (input_ids, attention_mask, labels)"
        )
    if "seq_lengths" in columns:  # the stock Trainer throws them away
        raise DataError(
            "train_dataset has packed rows (seq_lengths), whose documents would see each other in "
            "the stock Trainer; give trainer_class=SFTTrainer, or rows of one document each"
        )


def _provenance(
    method: Method,
    model: nn.Module,
    plan: RankPlan | None,
    data: TwoSets,
    args: TrainingArguments,
    task_type: str | None,
) -> dict[str, Any]:
    """What a plan says of where it comes from, as JSON."""
    config = getattr(model, "config", None)
    ranks = {} if plan is None else {"scaling": plan.scaling, "modules": len(plan.modules)}
    return {
        "method": method.describe(),
        **ranks,
        "task_type": task_type,
        "model": model_name(getattr(config, "_name_or_path", "")) or type(model).__name__,
        "model_class": type(model).__name__,
        "train_rows": len(data.train),
        "validation_rows": len(data.validation),
        "train_sha256": fingerprint(data.train),
        "validation_sha256": fingerprint(data.validation),
        "seed": args.seed,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": SchedulerType(args.lr_scheduler_type).value,
        "num_train_epochs": args.num_train_epochs,
        "max_steps": args.max_steps,
        "batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "world_size": args.world_size,
        "versions": {p: version(p) for p in ("rankwise", "torch", "transformers", "peft")},
    }


def model_name(name_or_path: str) -> str:
    """A hub id as it is; of a folder the last part, for the rest says more of the machine."""
    path = Path(name_or_path)
    return path.name if path.is_dir() else name_or_path
