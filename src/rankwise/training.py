"""The search as a transformers.Trainer, training at a plan's ranks, and what resumes.

One optimizer step of a search (arXiv 2403.09113, Algorithm 1):

1. forward and backward of the training batch at (θ, β): Trainer's own pass, which leaves
   ∇_θ L_train for the parameters' step and ∇_β L_train for the finite difference;
2. the hypergradient of the validation loss through θ' = θ - η ∇_θ L_train (`rankwise.hypergrad`);
3. one AdamW step of θ with ∇_θ L_train and of β with the hypergradient, at two learning rates.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Subset
from transformers import PreTrainedModel, SchedulerType, Trainer, TrainingArguments, set_seed
from transformers.training_args import OptimizerNames
from transformers.utils import logging

from rankwise import gates
from rankwise.errors import CheckpointError, DataError, DivergedError, RankwiseError
from rankwise.files import write_json
from rankwise.hypergrad import RADIUS, RADIUS_BF16, TrainGradient, hypergradient
from rankwise.methods import METHODS, AutoLoRA
from rankwise.plan import RankPlan

logger = logging.get_logger(__name__)

TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def search(
    model: PreTrainedModel,
    train_dataset: Any,
    *,
    method: str | AutoLoRA = "autolora",
    validation_dataset: Any = None,
    validation_fraction: float = 0.5,
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
        method: a name from `rankwise.METHODS` or an `AutoLoRA(...)`.
        validation_dataset: D_val, on which β is learned. None takes it from `train_dataset`.
        validation_fraction: share of `train_dataset` that becomes D_val where
            `validation_dataset` is None; 0.5 in the paper. Drawn with `args.seed`.
        r: k, the rank-1 pieces of every layer; the largest rank that can come out.
        lora_alpha: LoRA's alpha at rank r. None is 2 r, a scaling of 2, which the plan keeps for
            every module.
        lora_dropout: of the adapters during the search.
        target_modules: what to adapt; None is PEFT's default for the model's type (query and value
            for most, as in the paper). See `rankwise.gates.find_entries`.
        task_type: PEFT's; None infers it from the model's class. It decides which head is trained
            along with the factors.
        args: the search's own TrainingArguments: learning rate of the parameters, epochs, batch
            size, precision, checkpoints, logging. None is 3 epochs of AdamW at 1e-4, batch 32.
        resume_from_checkpoint: a checkpoint folder of an earlier, interrupted search, or True for
            the last complete one in `args.output_dir`.
        **trainer: passed on to transformers.Trainer (`data_collator`, `processing_class`,
            `callbacks`, ...).

    Returns:
        RankPlan with the learned gate values and its provenance.

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
        args = args or _default_args(scratch)
        args = search_args(args, method)
        data = two_sets(train_dataset, validation_dataset, validation_fraction, args.seed)
        modules = gates.find_entries(model, target_modules, r)
        plan = RankPlan(modules, r_max=r, scaling=2.0 if lora_alpha is None else lora_alpha / r)
        lora = {"task_type": task_type or _task_type(model), "lora_dropout": lora_dropout}
        provenance = _provenance(model, method, plan, data, args, lora)
        configuration = provenance | _decisive(args) | {"targets": sorted(modules)}
        checkpoint = find_checkpoint(args.output_dir, resume_from_checkpoint, configuration)
        set_seed(args.seed)
        with gates.adapted(model, plan, **lora) as peft_model:
            gated = gates.attach(peft_model, plan, method.activation, method.initial(r))
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
            alphas = gates.values(gated)
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


class FiniteTrainer(Trainer):
    """A Trainer that stops at the first NaN or infinite loss, before it reaches the parameters."""

    def __init__(self, model: PeftModel, *args: Any, **kwargs: Any):
        super().__init__(model, *args, **kwargs)
        self._good: str | None = None  # the last checkpoint of this run
        # Trainer takes `**kwargs` in a model's forward as a promise to divide the loss by
        # num_items_in_batch. Language models do; the other heads ignore it, and the loss of a step
        # would be the sum over its micro-batches instead of their mean.
        if _task_type(model.get_base_model()) not in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
            self.model_accepts_loss_kwargs = False

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._stop_unless_finite(loss)
        return loss

    def _stop_unless_finite(self, loss: Tensor) -> None:
        if torch.isfinite(loss).all():
            return
        last = self._good
        kept = f"the last good checkpoint is {last}" if last else "no checkpoint had been saved yet"
        raise DivergedError(
            f"the loss is {float(loss)} at step {self.state.global_step + 1}; {kept}. "
            f"Lower the learning rate (now {self.args.learning_rate:g}) or look at the data"
        )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.stop_unless_finite_parameters()  # never save what a bad gradient left behind
        super()._save_checkpoint(model, trial)
        self._good = f"{self.args.output_dir}/checkpoint-{self.state.global_step}"

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        self._good = resume_from_checkpoint
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def stop_unless_finite_parameters(self) -> None:
        """Raises DivergedError where a finite loss had a gradient that was not."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not torch.isfinite(parameter).all():
                raise DivergedError(
                    f"{name} is not finite after step {self.state.global_step}; the last good "
                    f"checkpoint: {self._good}. Lower the learning rate"
                )


@dataclass(frozen=True)
class MicroBatch:
    """What it takes to compute the loss of a training micro-batch again, dropout masks included."""

    inputs: dict[str, Any]
    num_items: Any
    rng: tuple[Tensor, Tensor | None]


class SearchTrainer(FiniteTrainer):
    """Trains LoRA factors and task head on D_tr while the gates learn on D_val.

    Args:
        model: PEFT model with gates attached.
        args: TrainingArguments.
        gated: what `gates.attach` returned.
        method: the gate's method.
        validation_dataset: D_val.
        configuration: what a checkpoint has to agree with to be resumed.
        **trainer: of transformers.Trainer.
    """

    def __init__(
        self,
        model: PeftModel,
        args: TrainingArguments,
        *,
        gated: dict[str, gates.Gate],
        method: AutoLoRA,
        validation_dataset: Any,
        configuration: dict[str, Any],
        **trainer: Any,
    ):
        super().__init__(model, args, **trainer)
        self.gated, self.method, self.configuration = gated, method, configuration
        self.betas = [gate.beta for gate in gated.values()]
        meta = {id(beta) for beta in self.betas}
        self.parameters = [p for p in model.parameters() if p.requires_grad and id(p) not in meta]
        # columns that the model does not take go the way that Trainer's own loaders send them
        self._collate = self.data_collator
        if isinstance(validation_dataset, Dataset):
            validation_dataset = self._remove_unused_columns(validation_dataset)
        else:
            self._collate = self._get_collator_with_removed_columns(self.data_collator)
        self.validation_dataset = validation_dataset
        coarse = args.bf16 or any(p.dtype == torch.bfloat16 for p in model.parameters())
        self._radius = method.radius or (RADIUS_BF16 if coarse else RADIUS)
        self._micro_batches: list[MicroBatch] = []
        self._order: dict[int, np.ndarray] = {}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's optimizer for θ, with a group of its own for β."""
        for beta in self.betas:
            beta.requires_grad_(False)
        optimizer = super().create_optimizer(model)
        for beta in self.betas:
            beta.requires_grad_(True)
        optimizer.add_param_group(
            {
                "params": self.betas,
                "lr": self.method.learning_rate,
                "weight_decay": self.method.weight_decay,
            }
        )
        return optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        model.train()
        if callable(getattr(self.optimizer, "train", None)):  # schedule-free optimizers
            self.optimizer.train()
        inputs = self._prepare_inputs(inputs)
        with self._attention():
            rng = _rng_state(self.args.device)
            loss = self._scaled_loss(model, inputs, num_items_in_batch)
            self.accelerator.backward(loss)
            loss = loss.detach()  # lets go of the graph before the passes that follow
            self._stop_unless_finite(loss)
            self._micro_batches.append(MicroBatch(inputs, num_items_in_batch, rng))
            if self.accelerator.sync_gradients:  # the last micro-batch of this optimizer step
                self._set_meta_gradients(self.accelerator.unwrap_model(model))
        return loss

    def _set_meta_gradients(self, model: nn.Module) -> None:
        """Replaces ∇_β L_train, which the backward pass left in β.grad, by the hypergradient."""
        batches = self._validation_batches(len(self._micro_batches))
        items = self._get_num_items_in_batch(batches, self.args.device)
        train = [self._replayed(model, batch) for batch in self._micro_batches]
        val = [lambda b=b: self._scaled_loss(model, b, items) for b in batches]
        lookahead = self.method.lookahead
        found = hypergradient(
            self.method.estimator,
            self.parameters,
            self.betas,
            train,
            val,
            self.optimizer.param_groups[0]["lr"] if lookahead is None else lookahead,
            train_gradient=TrainGradient(_grads(self.parameters), _grads(self.betas)),
            radius=self._radius,
            two_sided=self.method.two_sided,
            reduce=self._mean_over_processes,
        )
        for beta, gradient in zip(self.betas, found, strict=True):
            beta.grad = gradient
        self._micro_batches.clear()

    def _replayed(self, model: nn.Module, batch: MicroBatch) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            with _replaying(batch.rng, self.args.device):
                return self._scaled_loss(model, batch.inputs, batch.num_items)

        return loss

    def _scaled_loss(self, model: nn.Module, inputs: dict[str, Any], num_items: Any) -> Tensor:
        """Loss of a micro-batch, scaled so that the micro-batches of a step add up to its mean.

        The rule is Trainer.training_step's; it is needed apart from the backward pass here.
        """
        with self.compute_loss_context_manager():
            # a copy: label smoothing pops the labels, and this batch will be seen again
            loss = self.compute_loss(model, {**inputs}, num_items_in_batch=num_items)
        scaled = self.loss_is_scaled_for_ga
        if scaled is None:
            scaled = (self.model_accepts_loss_kwargs and num_items is not None) or (
                self.compute_loss_func is not None
            )
        return loss if scaled else loss / self.current_gradient_accumulation_steps

    def _validation_batches(self, count: int) -> list[dict[str, Any]]:
        """As many batches of D_val as the training step had, chosen by the step's number alone.

        Nothing about them has to be saved for a resumed search to see the same ones.
        """
        size = self.args.per_device_train_batch_size
        world, rank = self.args.world_size, self.args.process_index
        n = len(self.validation_dataset)
        batches = []
        for i in range(count):
            # the last step of an epoch may have fewer batches; the count before it must not change
            number = self.state.global_step * self.args.gradient_accumulation_steps + i
            first = (number * world + rank) * size
            rows = [self._order_of(p // n)[p % n] for p in range(first, first + min(size, n))]
            batches.append(self._collate([self.validation_dataset[int(row)] for row in rows]))
        return [self._prepare_inputs(batch) for batch in batches]

    def _order_of(self, sweep: int) -> np.ndarray:
        """The order of D_val's rows in its sweep-th pass."""
        if sweep not in self._order:
            rng = np.random.default_rng([self.args.seed, sweep])
            self._order = {
                **{s: o for s, o in self._order.items() if s >= sweep - 1},
                sweep: rng.permutation(len(self.validation_dataset)),
            }
        return self._order[sweep]

    def _mean_over_processes(self, tensors: list[Tensor]) -> list[Tensor]:
        if self.args.world_size == 1:
            return tensors
        flat = torch.cat([t.reshape(-1) for t in tensors])
        flat = self.accelerator.reduce(flat, reduction="mean")
        parts = flat.split([t.numel() for t in tensors])
        return [p.view_as(t) for p, t in zip(parts, tensors, strict=True)]

    def _attention(self) -> AbstractContextManager[Any]:
        """Fused attention has no second derivative; the plain kernel has."""
        exact = self.method.estimator == "exact"
        return sdpa_kernel(SDPBackend.MATH) if exact else nullcontext()

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        # β's gradient lives on another scale and must not shrink θ's.
        return self.accelerator.clip_grad_norm_(self.parameters, self.args.max_grad_norm)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean rank that the current α would give."""
        kept = [len(self.method.kept(a)) for a in gates.values(self.gated).values()]
        super().log(logs | {"mean_rank": round(sum(kept) / len(kept), 4)}, start_time)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """What a search needs to go on: trainable tensors, raw, and what they belong to."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        trainable = {n: p.detach().contiguous() for n, p in _trainable(self.model)}
        save_file(trainable, folder / "search.safetensors")
        write_json(folder / "search.json", self.configuration)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        self._good = resume_from_checkpoint
        try:
            saved = load_file(Path(resume_from_checkpoint) / "search.safetensors")
            with torch.no_grad():
                for name, parameter in _trainable(self.model):
                    parameter.copy_(saved[name])
        except (OSError, KeyError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(
                f"cannot read {resume_from_checkpoint}/search.safetensors: {error}; resume from an "
                "earlier checkpoint"
            ) from error


def train(
    model: PreTrainedModel,
    plan: RankPlan,
    train_dataset: Any,
    *,
    args: TrainingArguments,
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
        args: TrainingArguments. `args.seed` also draws the factors.
        task_type, lora_dropout: of the LoraConfig; None infers the type from the model's class.
        resume_from_checkpoint: a checkpoint folder, or True for the last complete one in
            `args.output_dir`.
        **trainer: passed on to transformers.Trainer.

    Returns:
        The Trainer, trained; its `model` is an ordinary PeftModel.

    Raises:
        PlanError: the plan is for another model. CheckpointError: nothing to resume from.
        DivergedError: the loss became NaN or infinite.

    Example:
        >>> trainer = rankwise.train(base, plan, train_dataset, args=args)
        >>> trainer.model.save_pretrained("adapter")
    """
    checkpoint = find_checkpoint(args.output_dir, resume_from_checkpoint)
    set_seed(args.seed)
    peft_model = gates.build(
        model, plan, task_type=task_type or _task_type(model), lora_dropout=lora_dropout
    )
    if args.label_names is None:  # Trainer cannot read them off a PEFT model
        args = _replaced(args, label_names=["labels"])
    trainer_ = FiniteTrainer(peft_model, args, train_dataset=train_dataset, **trainer)
    trainer_.train(resume_from_checkpoint=checkpoint)
    return trainer_


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest complete checkpoint in a folder. A run killed while saving leaves half of one."""
    found = []
    for path in Path(folder).glob("checkpoint-*"):
        try:  # Trainer writes trainer_state.json last
            found.append(
                (json.loads((path / "trainer_state.json").read_text())["global_step"], path)
            )
        except (OSError, ValueError, KeyError):
            continue
    return max(found)[1] if found else None


def find_checkpoint(
    output_dir: str | Path,
    resume_from_checkpoint: str | bool | None,
    configuration: dict[str, Any] | None = None,
) -> str | None:
    """The checkpoint to resume from, checked against the configuration that would resume it.

    Args:
        output_dir: where True looks for the last complete checkpoint.
        resume_from_checkpoint: a folder, True, or None or False for a fresh start.
        configuration: what the checkpoint's `search.json` has to agree with; None does not look.

    Raises:
        CheckpointError: nothing there, or a checkpoint of another configuration.
    """
    if not resume_from_checkpoint:
        return None
    if resume_from_checkpoint is True:
        path = last_checkpoint(output_dir)
        if path is None:
            raise CheckpointError(f"no complete checkpoint in {output_dir}; start without resuming")
    else:
        path = Path(resume_from_checkpoint)
        if not (path / "trainer_state.json").is_file():
            raise CheckpointError(
                f"{path} is not a complete checkpoint: no trainer_state.json in it"
            )
    if configuration is not None:
        try:
            saved = json.loads((path / "search.json").read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} is not a checkpoint of a search: {error}") from error
        _same_configuration(path, saved, json.loads(json.dumps(configuration)))
    return str(path)


def _same_configuration(path: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    for key in sorted(set(saved) | set(current)):
        if key != "versions" and saved.get(key) != current.get(key):
            raise CheckpointError(
                f"{path} belongs to another search: {key} was {saved.get(key)!r} and is now "
                f"{current.get(key)!r}; start afresh, or resume with the old settings"
            )


@dataclass(frozen=True)
class TwoSets:
    """D_tr and D_val."""

    train: Any
    validation: Any


def two_sets(train: Any, validation: Any, fraction: float, seed: int) -> TwoSets:
    """D_tr and D_val: as given, or `train` cut in two by a seeded permutation.

    Args:
        train: rows with a length and an index.
        validation: D_val where it is given, else None.
        fraction: share of `train` that becomes D_val.
        seed: of the permutation.

    Raises:
        DataError: an empty split, or rows that cannot be counted.
    """
    for name, rows in (("train_dataset", train), ("validation_dataset", validation)):
        if isinstance(rows, dict):
            raise DataError(f"{name} holds the splits {', '.join(rows)}; give one of them")
        if rows is not None and not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
            raise DataError(
                f"{name} is a {type(rows).__name__}, which has no length or index; load it whole "
                "(streaming=False)"
            )
    if len(train) == 0:
        raise DataError("train_dataset has no rows")
    if validation is not None:
        if len(validation) == 0:
            raise DataError("validation_dataset has no rows; leave it out to split train_dataset")
        return TwoSets(train, validation)
    if not 0 < fraction < 1:
        raise DataError(f"validation_fraction is {fraction}; it has to lie between 0 and 1")
    order = np.random.default_rng(seed).permutation(len(train)).tolist()
    cut = round(len(train) * (1 - fraction))
    if cut == 0 or cut == len(train):
        empty = "training" if cut == 0 else "validation"
        raise DataError(
            f"the {empty} split would be empty: {len(train)} rows at validation_fraction "
            f"{fraction}; give more rows or another fraction"
        )
    return TwoSets(_select(train, order[:cut]), _select(train, order[cut:]))


def _select(dataset: Any, rows: list[int]) -> Any:
    return dataset.select(rows) if isinstance(dataset, Dataset) else Subset(dataset, rows)


def _method(method: str | AutoLoRA) -> AutoLoRA:
    if isinstance(method, AutoLoRA):
        return method
    if method not in METHODS:
        raise RankwiseError(
            f"method is {method!r}; give AutoLoRA(...) or one of {', '.join(METHODS)}"
        )
    return METHODS[method]


def _default_args(scratch: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=scratch,
        learning_rate=1e-4,
        num_train_epochs=3,
        per_device_train_batch_size=32,
        save_strategy="no",
        report_to="none",
    )


def search_args(args: TrainingArguments, method: AutoLoRA) -> TrainingArguments:
    """The user's arguments, with what a two-level search needs; refused where it cannot work."""
    if args.fp16:
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
    if "adamw" not in optim:
        raise RankwiseError(f"optim is {optim}; a search takes an AdamW, for its gates too")
    if args.auto_find_batch_size:
        raise RankwiseError("auto_find_batch_size starts a search over half-way; give a batch size")
    if args.torch_compile and method.estimator == "exact":
        raise RankwiseError(
            "torch.compile has no double backward; use finite_difference or no compile"
        )
    changes: dict[str, Any] = {"eval_strategy": "no", "load_best_model_at_end": False}
    if args.gradient_checkpointing:
        # reentrant checkpointing refuses autograd.grad
        kwargs = args.gradient_checkpointing_kwargs or {}
        changes["gradient_checkpointing_kwargs"] = kwargs | {"use_reentrant": False}
    return _replaced(args, **changes)


def _replaced(args: TrainingArguments, **changes: Any) -> TrainingArguments:
    """`dataclasses.replace`, which counts the GPUs again where someone had set their number."""
    new = replace(args, **changes)
    new._n_gpu = args.n_gpu
    return new


def _check_lora(model: nn.Module, lora_alpha: float | None, lora_dropout: float) -> None:
    if lora_alpha is not None and not 0 < lora_alpha < float("inf"):
        raise RankwiseError(f"lora_alpha is {lora_alpha}; it has to be > 0")
    if not 0 <= lora_dropout < 1:
        raise RankwiseError(f"lora_dropout is {lora_dropout}; it has to be at least 0 and below 1")
    if any(p.dtype == torch.float16 for p in model.parameters()):
        raise RankwiseError("the weights are float16; load the model in bfloat16 or float32")


def _task_type(model: nn.Module) -> str | None:
    name = type(model).__name__
    return next((kind for suffix, kind in TASK_TYPES.items() if name.endswith(suffix)), None)


def _provenance(
    model: nn.Module,
    method: AutoLoRA,
    plan: RankPlan,
    data: TwoSets,
    args: TrainingArguments,
    lora: dict[str, Any],
) -> dict[str, Any]:
    """What the plan says of where it comes from, as JSON."""
    config = getattr(model, "config", None)
    return {
        "method": asdict(method),
        "k": plan.r_max,
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


def _decisive(args: TrainingArguments) -> dict[str, Any]:
    """The training arguments that a resumed search must share with the one that was stopped."""
    names = (
        "learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps "
        "num_train_epochs max_steps per_device_train_batch_size "
        "gradient_accumulation_steps optim optim_args train_sampling_strategy "
        "weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm bf16 seed "
        "data_seed label_smoothing_factor neftune_noise_alpha "
        "average_tokens_across_devices"
    ).split()
    given = args.to_dict()
    return {name: given.get(name) for name in names}


def model_name(name_or_path: str) -> str:
    """A hub id as it is; of a folder the last part, for the rest says more of the machine."""
    path = Path(name_or_path)
    return path.name if path.is_dir() else name_or_path


def fingerprint(dataset: Any) -> str | None:
    """sha256 over the rows of a `datasets.Dataset`, in order; None for any other dataset."""
    if not isinstance(dataset, Dataset):
        return None
    digest = sha256()
    for row in dataset.with_format(None):
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _grads(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors]


def _rng_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The state of the CPU's generator and of the accelerator's, which draws the dropout masks."""
    if device.type == "cpu":
        return torch.get_rng_state(), None
    return torch.get_rng_state(), torch.get_device_module(device).get_rng_state()


def _set_rng_state(rng: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(rng[0])
    if rng[1] is not None:
        torch.get_device_module(device).set_rng_state(rng[1])


@contextmanager
def _replaying(rng: tuple[Tensor, Tensor | None], device: torch.device) -> Iterator[None]:
    """Random numbers from a recorded state on; the running state is untouched."""
    running = _rng_state(device)
    _set_rng_state(rng, device)
    try:
        yield
    finally:
        _set_rng_state(running, device)
