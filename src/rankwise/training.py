"""Searching ranks, training at a plan's ranks, and what a stopped run resumes from."""

from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, SchedulerType, Trainer, TrainingArguments, set_seed
from transformers.training_args import OptimizerNames
from transformers.utils import logging

from rankwise.adapter import Adapter
from rankwise.bilevel import SearchTrainer
from rankwise.errors import AdapterError, PlanError, RankwiseError
from rankwise.gate import attach, gate_values
from rankwise.lora import adapted, build, check_fits, find_entries
from rankwise.methods import METHODS, AutoLoRA, DyLoRA, Method
from rankwise.nested import Curve, NestedTrainer, curve, pick
from rankwise.plan import RankPlan
from rankwise.rows import TwoSets as TwoSets  # the command line takes them from here still
from rankwise.rows import fingerprint as fingerprint
from rankwise.rows import two_sets as two_sets
from rankwise.trainer import (
    FiniteTrainer,
    decisive,
    default_arguments,
    find_checkpoint,
    labelled,
    replaced,
    task_type_of,
)

logger = logging.get_logger(__name__)


def search(
    model: PreTrainedModel,
    train_dataset: Any,
    *,
    method: str | Method = "autolora",
    validation_dataset: Any = None,
    validation_fraction: float | None = None,
    r: int = 8,
    lora_alpha: float | None = None,
    lora_dropout: float = 0.0,
    target_modules: list[str] | str | None = None,
    task_type: str | None = None,
    args: TrainingArguments | None = None,
    resume_from_checkpoint: str | bool | None = None,
    **trainer: Any,
) -> RankPlan:
    """Chooses the rank of every adapted layer from data, and returns the plan.

    The model is as it was afterwards, on the device that Trainer put it on: adapters, gates and the
    head trained by the search are gone.

    Args:
        model: base model, without adapters.
        train_dataset: rows ready for the model (`input_ids`, `attention_mask`, `labels`), a
            `datasets.Dataset` or any dataset with a length and an index.
        method: a name from `rankwise.METHODS`, an `AutoLoRA(...)` or a `DyLoRA(...)`.
        validation_dataset: D_val, on which AutoLoRA learns β and DyLoRA compares ranks. None takes
            it from `train_dataset`.
        validation_fraction: share of `train_dataset` that becomes D_val where
            `validation_dataset` is None, drawn with `args.seed`. None is 0.5 for AutoLoRA, as in
            its paper, and 0.1 for DyLoRA.
        r: k, the rank-1 pieces of every layer; the largest rank that can come out.
        lora_alpha: LoRA's alpha at rank r. None is 2 r, a scaling of 2, which the plan keeps for
            every module.
        lora_dropout: of the adapters during the search.
        target_modules: what to adapt; None is PEFT's default for the model's type (query and value
            for most, as in the paper). See `rankwise.find_entries`.
        task_type: PEFT's; None infers it from the model's class. It decides which head is trained
            along with the factors.
        args: the search's own TrainingArguments: learning rate of the parameters, epochs, batch
            size, precision, checkpoints, logging. None is 3 epochs of AdamW at 1e-4, batch 32.
        resume_from_checkpoint: a checkpoint folder of an earlier, interrupted search, or True for
            the last complete one in `args.output_dir`.
        **trainer: passed on to transformers.Trainer (`data_collator`, `processing_class`,
            `callbacks`, ...).

    Returns:
        RankPlan with its provenance: for AutoLoRA with the learned gate values; for DyLoRA one rank
        for all, the smallest within one standard error of the best on D_val by
        `args.metric_for_best_model` (the loss where that is None), with the whole curve in its
        provenance. To keep the adapter that DyLoRA trained, which needs no retraining, use
        `train(..., method="dylora")`, `curve` and `Adapter.truncate`.

    Raises:
        RankwiseError: arguments out of range, targets that match nothing, an empty split, a
            checkpoint of another configuration. Raised before any training.
        DivergedError: the loss became NaN or infinite; names the step and the last checkpoint.

    Source: AutoLoRA, Algorithm 1 and section 4.4.

    Example:
        >>> plan = rankwise.search(model, train_dataset, data_collator=collator)
        >>> model = get_peft_model(model, plan.lora_config(task_type="SEQ_CLS"))
    """
    method = _method(method)
    _check_lora(model, lora_alpha, lora_dropout)
    with TemporaryDirectory() as scratch:
        args = args or default_arguments(scratch)
        args = search_args(args, method)
        fraction = default_fraction(method) if validation_fraction is None else validation_fraction
        data = two_sets(train_dataset, validation_dataset, fraction, args.seed)
        if isinstance(method, DyLoRA):
            _check_metric(args, trainer.get("compute_metrics"))
        modules = find_entries(model, target_modules, r)
        plan = RankPlan(modules, r=r, scaling=2.0 if lora_alpha is None else lora_alpha / r)
        lora = {"task_type": task_type or task_type_of(model), "lora_dropout": lora_dropout}
        provenance = _provenance(model, method, plan, data, args, lora)
        configuration = provenance | decisive(args) | {"targets": sorted(modules)}
        checkpoint = find_checkpoint(args.output_dir, resume_from_checkpoint, configuration)
        set_seed(args.seed)
        with adapted(model, plan, **lora) as peft_model:
            if isinstance(method, DyLoRA):
                nested = NestedTrainer(
                    peft_model,
                    args,
                    plan=plan,
                    method=method,
                    configuration=configuration,
                    train_dataset=data.train,
                    **trainer,
                )
                nested.train(resume_from_checkpoint=checkpoint)
                return _picked(plan, curve(nested, data.validation), provenance)
            gated = attach(peft_model, plan, method.activation, method.initial(r))
            trainer_ = SearchTrainer(
                peft_model,
                args,
                gated=gated,
                method=method,
                train_dataset=data.train,
                validation_dataset=data.validation,
                configuration=configuration,
                **trainer,
            )
            trainer_.train(resume_from_checkpoint=checkpoint)
            trainer_.stop_unless_finite_parameters()
            alphas = gate_values(gated)
            _stop_unless_moved(alphas, method, trainer_.state.global_step)
    return _learned(plan, method, alphas, provenance)


def _stop_unless_moved(alphas: dict[str, list[float]], method: AutoLoRA, steps: int) -> None:
    """A gate that stands where it started says nothing, but α_j >= 1/k would keep every piece."""
    still = [name for name, alpha in alphas.items() if len(alpha) > 1 and len(set(alpha)) == 1]
    if len(still) == sum(len(alpha) > 1 for alpha in alphas.values()) > 0:
        raise RankwiseError(
            f"no gate moved in {steps} steps, so nothing was learned; look at the number of steps, "
            f"the warmup and the learning rates (gates: {method.learning_rate:g})"
        )
    if still:
        logger.warning(f"the gates of {still} never moved; their ranks are the largest by default")


def _learned(
    plan: RankPlan, method: AutoLoRA, alphas: dict[str, list[float]], provenance: dict[str, Any]
) -> RankPlan:
    """The searched plan: ranks and gate values from the learned α."""
    learned = plan.with_ranks({n: len(method.kept(a)) for n, a in alphas.items()}, **provenance)
    modules = {n: replace(e, gate=tuple(alphas[n])) for n, e in learned.modules.items()}
    return replace(learned, modules=modules)


def _check_metric(args: TrainingArguments, compute_metrics: Any) -> None:
    metric = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if metric != "loss" and compute_metrics is None:
        raise RankwiseError(
            f"metric_for_best_model is {metric!r}, but there is no compute_metrics to compute it"
        )


def _picked(plan: RankPlan, curve: Curve, provenance: dict[str, Any]) -> RankPlan:
    """The plan of one rank for all that the curve speaks for."""
    ranks = dict.fromkeys(plan.modules, pick(curve))
    return plan.with_ranks(ranks, **provenance, curve=curve.to_dict())


def train(
    model: PreTrainedModel,
    plan: RankPlan,
    train_dataset: Any,
    *,
    args: TrainingArguments,
    method: str | DyLoRA | None = None,
    task_type: str | None = None,
    lora_dropout: float = 0.0,
    resume_from_checkpoint: str | bool | None = None,
    **trainer: Any,
) -> Trainer:
    """Trains a fresh adapter at a plan's ranks with a stock Trainer (section 4.5 of AutoLoRA).

    Args:
        model: base model; it carries the trained adapter afterwards, as `trainer.model`.
        plan: made for this model.
        train_dataset: D_tr and D_val together, where the plan comes from a search.
        args: TrainingArguments. `args.seed` also draws the factors, and DyLoRA's ranks.
        method: None for plain LoRA; "dylora", "dylora-frozen" or `DyLoRA(...)` for an adapter that
            works at every rank up to the plan's, which has to be the same for all modules.
            Evaluations during the training are of the largest rank.
        task_type, lora_dropout: of the LoraConfig; None infers the type from the model's class.
        resume_from_checkpoint: a checkpoint folder, or True for the last complete one in
            `args.output_dir`.
        **trainer: passed on to transformers.Trainer.

    Returns:
        The Trainer, trained; its `model` is an ordinary PeftModel. With a method it is a
        `NestedTrainer` for `rankwise.curve`, whose model still has its gates: save it with
        `save_nested`, for `model.save_pretrained` would write gated names that PEFT does not read.

    Raises:
        PlanError: the plan is for another model, or has several ranks where DyLoRA needs one.
        RankwiseError: a range of ranks that the plan does not allow. CheckpointError: nothing to
            resume from. DivergedError: the loss became NaN or infinite.

    Example:
        >>> trainer = rankwise.train(base, plan, train_dataset, args=args)
        >>> trainer.model.save_pretrained("adapter")
    """
    lora = {"task_type": task_type or task_type_of(model), "lora_dropout": lora_dropout}
    args = labelled(args)
    kind: type[FiniteTrainer] = FiniteTrainer
    about: dict[str, Any] = {}
    if method is not None:
        nested = _dylora(method)
        plan = check_nested(nested, plan)
        args = search_args(args, nested)
        rows = fingerprint(train_dataset)
        configuration = {"method": asdict(nested), "ranks": plan.ranks, "scaling": plan.scaling}
        configuration |= {"lora": lora, "train_sha256": rows}
        configuration |= {"world_size": args.world_size} | decisive(args)
        plan = plan.with_ranks(plan.ranks, seed=args.seed, train_sha256=rows)
        kind = NestedTrainer
        about = {"plan": plan, "method": nested, "configuration": configuration}
    checkpoint = find_checkpoint(
        args.output_dir, resume_from_checkpoint, about.get("configuration")
    )
    set_seed(args.seed)
    peft_model = build(model, plan, **lora)
    trainer_ = kind(peft_model, args, train_dataset=train_dataset, **about, **trainer)
    trainer_.train(resume_from_checkpoint=checkpoint)
    return trainer_


def load_nested(
    model: PreTrainedModel, folder: str | Path, *, args: TrainingArguments, **trainer: Any
) -> NestedTrainer:
    """An adapter that DyLoRA trained, from disk on its base model: to measure, not to train anew.

    Args:
        model: the base model; it carries the adapter afterwards.
        folder: what `save_nested` wrote, `nested/` of a run.
        args: TrainingArguments, for the evaluation.
        **trainer: passed on to transformers.Trainer (`compute_metrics`, `data_collator`, ...).

    Returns:
        The trainer as `train(..., method="dylora")` left it, for `curve` and `elastic`.

    Raises:
        AdapterError: no nested adapter there. PlanError: it is for another model.

    Example:
        >>> trainer = rankwise.load_nested(base, "runs/d/nested", args=args)
        >>> rankwise.curve(trainer, other_rows).values
        (0.41, 0.38, 0.38, 0.37)
    """
    adapter = Adapter.load(folder)
    if adapter.plan is None or adapter.method is None:
        raise AdapterError(f"{folder} holds an adapter of one rank; give nested/ of a DyLoRA run")
    args = search_args(labelled(args), adapter.method)
    check_fits(model, adapter.plan)
    peft_model = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    return NestedTrainer(
        peft_model, args, plan=adapter.plan, method=adapter.method, configuration={}, **trainer
    )


def check_nested(method: DyLoRA, plan: RankPlan) -> RankPlan:
    """The plan with its one rank as the largest; raises PlanError or RankwiseError where DyLoRA
    cannot train at it.
    """
    if len(ranks := set(plan.ranks.values())) != 1:
        raise PlanError(
            f"DyLoRA draws one rank for all modules, but the plan has ranks {min(ranks)} to "
            f"{max(ranks)}; give rankwise.uniform(model, r)"
        )
    plan = replace(plan, r=ranks.pop())
    method.probabilities(plan.r)
    return plan


def _method(method: str | Method) -> Method:
    if isinstance(method, AutoLoRA | DyLoRA):
        return method
    if method not in METHODS:
        raise RankwiseError(
            f"method is {method!r}; give AutoLoRA(...), DyLoRA(...) or one of {', '.join(METHODS)}"
        )
    return METHODS[method]


def _dylora(method: str | DyLoRA) -> DyLoRA:
    found = _method(method)
    if not isinstance(found, DyLoRA):
        raise RankwiseError(f"method is {method!r}; what trains an adapter at once is dylora")
    return found


def default_fraction(method: Method) -> float:
    """Share of the training rows that a method's choice is made on."""
    return 0.5 if isinstance(method, AutoLoRA) else 0.1


def search_args(args: TrainingArguments, method: Method) -> TrainingArguments:
    """The user's arguments, with what a method needs; refused where it cannot work."""
    two_level = isinstance(method, AutoLoRA)
    if args.fp16 and two_level:
        raise RankwiseError(
            "fp16 scales losses, which a hypergradient cannot see; use bf16 or float32"
        )
    if args.n_gpu > 1:
        raise RankwiseError(
            f"{args.n_gpu} GPUs in one process; use `accelerate launch`, or CUDA_VISIBLE_DEVICES=0"
        )
    if args.fsdp or args.deepspeed:
        raise RankwiseError("a search shards no parameters; run it without fsdp and deepspeed")
    optim = OptimizerNames(args.optim).value
    if "adamw" not in optim and two_level:
        raise RankwiseError(f"optim is {optim}; a search takes an AdamW, for its gates too")
    if args.auto_find_batch_size:
        raise RankwiseError("auto_find_batch_size starts a search over half-way; give a batch size")
    if args.torch_compile and isinstance(method, AutoLoRA) and method.estimator == "exact":
        raise RankwiseError(
            "torch.compile has no double backward; use finite_difference or no compile"
        )
    if isinstance(method, DyLoRA):
        _check_nested_args(args, method)
    changes: dict[str, Any] = {}
    if two_level:
        changes = {"eval_strategy": "no", "load_best_model_at_end": False}
    if args.gradient_checkpointing:
        # reentrant checkpointing refuses autograd.grad
        kwargs = args.gradient_checkpointing_kwargs or {}
        changes["gradient_checkpointing_kwargs"] = kwargs | {"use_reentrant": False}
    return replaced(args, **changes)


def _check_nested_args(args: TrainingArguments, method: DyLoRA) -> None:
    if args.load_best_model_at_end:
        raise RankwiseError("load_best_model_at_end knows one rank; leave it out with dylora")
    if args.batch_eval_metrics or args.include_for_metrics:
        raise RankwiseError(
            "a standard error resamples predictions and labels; leave batch_eval_metrics and "
            "include_for_metrics out"
        )
    if args.bf16_full_eval or args.fp16_full_eval:
        raise RankwiseError(
            "bf16_full_eval and fp16_full_eval round the factors themselves, and with them every "
            "adapter cut afterwards; leave them out with dylora"
        )
    optim = OptimizerNames(args.optim).value
    if method.frozen and ("layerwise" in optim or "lomo" in optim):
        raise RankwiseError(
            f"optim is {optim}, which steps inside the backward pass, where nothing can be kept "
            "frozen; take another, or dylora without frozen"
        )


def _check_lora(model: nn.Module, lora_alpha: float | None, lora_dropout: float) -> None:
    if lora_alpha is not None and not 0 < lora_alpha < float("inf"):
        raise RankwiseError(f"lora_alpha is {lora_alpha}; it has to be > 0")
    if not 0 <= lora_dropout < 1:
        raise RankwiseError(f"lora_dropout is {lora_dropout}; it has to be at least 0 and below 1")
    if any(p.dtype == torch.float16 for p in model.parameters()):
        raise RankwiseError("the weights are float16; load the model in bfloat16 or float32")


def _provenance(
    model: nn.Module,
    method: Method,
    plan: RankPlan,
    data: TwoSets,
    args: TrainingArguments,
    lora: dict[str, Any],
) -> dict[str, Any]:
    """What the plan says of where it comes from, as JSON."""
    config = getattr(model, "config", None)
    return {
        "method": method.describe() if isinstance(method, DyLoRA) else asdict(method),
        "k": plan.r,
        "scaling": plan.scaling,
        "modules": len(plan.modules),
        "lora": lora,
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
