"""AdaLoRA as PEFT has it, in a Trainer: its allocator called at every step, plain LoRA afterwards.

PEFT's AdaLoRA adds lora_alpha / (init_r + 1e-5) · B diag(E) A to a module (the paper's P Λ Q), and
leaves to the training loop the call that scores the pieces and masks them.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from peft.tuners.adalora import AdaLoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from rankwise import lora
from rankwise.errors import CheckpointError, ModelError, PlanError, RankwiseError
from rankwise.lora import ADAPTER
from rankwise.plan import RankPlan
from rankwise.trainer import FiniteTrainer

EPSILON = 1e-5  # PEFT divides by the rank and this


def steps(args: TrainingArguments, rows: Any) -> int:
    """Optimizer steps of a training, as Trainer counts them.

    Args:
        args: of the training.
        rows: training rows; without a length where `max_steps` is set.

    Raises:
        RankwiseError: neither max_steps nor a number of rows.

    Example:
        >>> steps(TrainingArguments("runs", num_train_epochs=2), rows)  # 24 rows, batches of 8
        6
    """
    if args.max_steps > 0:
        return args.max_steps
    if not hasattr(rows, "__len__"):
        raise RankwiseError("the training rows have no length; set max_steps for AdaLoRA")
    batches = len(rows) / (args.train_batch_size * args.world_size)
    whole = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    updates = max(math.ceil(whole / args.gradient_accumulation_steps), 1)
    return math.ceil(args.num_train_epochs * updates)


def build(model: nn.Module, plan: RankPlan, **adalora: Any) -> PeftModel:
    """A PEFT AdaLoRA model at the plan's ranks and with its scaling, checked.

    Args:
        model: base model.
        plan: of whole linear modules, one rank (PEFT's init_r).
        **adalora: of AdaLoraConfig. The orthogonality term is AllocatingTrainer's.

    Raises:
        PlanError: the plan is for another model.
    """
    lora.check_fits(model, plan)
    config = AdaLoraConfig(
        init_r=plan.r,
        lora_alpha=cast(int, plan.scaling * (plan.r + EPSILON)),
        target_modules=plan.lora_config().target_modules,
        orth_reg_weight=0.0,
        **adalora,
    )
    peft_model = get_peft_model(model, config)
    layers = _layers(peft_model)
    if set(layers) != set(plan.module_ranks()):
        odd = sorted(set(layers) ^ set(plan.module_ranks()))[0]
        raise PlanError(f"plan and model differ in the module {odd!r}; the plan is for another one")
    for name, layer in layers.items():
        scaling = layer.scaling[ADAPTER] / (layer.ranknum[ADAPTER].item() + EPSILON)
        if layer.r[ADAPTER] != plan.r or not math.isclose(scaling, plan.scaling, rel_tol=1e-6):
            raise PlanError(
                f"{name!r} has rank {layer.r[ADAPTER]} and scaling {scaling:g} in the model; the "
                f"plan says {plan.r} and {plan.scaling:g}"
            )
    return peft_model


class Allocation(TrainerCallback):
    """Calls PEFT's allocator once an optimizer step.

    Attributes:
        step: the last step at which it ran, counted from 1; 0 before the first. Counted from 0, the
            step of the last mask would never come where tfinal is 0.
    """

    def __init__(self) -> None:
        self.step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        planned = _config(kwargs["model"]).total_step
        if state.max_steps != planned:
            raise RankwiseError(
                f"Trainer plans {state.max_steps} optimizer steps, AdaLoRA's schedule has "
                f"{planned}; attach and train with the same arguments and rows"
            )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Trainer comes here after optimizer.step() and before zero_grad() and global_step += 1.
        model, optimizer = kwargs["model"], kwargs.get("optimizer")
        config, step = _config(model), state.global_step + 1
        last = config.total_step - config.tfinal
        if self.step == 0:
            _refuse_idle(model)
        self.step = step
        # Under fp16 a step is skipped where gradients overflowed: scores would be NaN ever after.
        if step < last and getattr(optimizer, "step_was_skipped", False):
            return
        model.base_model.update_and_allocate(step)


class AllocatingTrainer(FiniteTrainer):
    """Trains PEFT's AdaLoRA: the allocator runs, and only the training loss has its extra term.

    Args:
        model: of `build`.
        args: of the training, the same that `build` had the steps of.
        orth_reg_weight: of ‖PᵀP - I‖ + ‖QQᵀ - I‖ in the training loss (eq. 4).
        **trainer: of transformers.Trainer.
    """

    def __init__(
        self, model: nn.Module, args: TrainingArguments, *, orth_reg_weight: float, **trainer: Any
    ):
        super().__init__(model, args, **trainer)
        self.orth_reg_weight = orth_reg_weight
        self.allocation = Allocation()
        self.add_callback(self.allocation)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        # PEFT adds the term to each micro-batch. Where Trainer sums their losses rather than
        # averaging them, the term would count once for each.
        summed = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        weight = self.orth_reg_weight
        if summed:
            weight /= self.current_gradient_accumulation_steps
        with _orthogonality(_config(self.model), weight):
            return super().training_step(model, inputs, num_items_in_batch)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        raise CheckpointError(
            f"{resume_from_checkpoint} is AdaLoRA's, which cannot be gone on with: its checkpoints "
            "lack the masked pieces and the scores; start afresh"
        )


def final_mask(trainer: Trainer) -> dict[str, list[bool]]:
    """The pieces that the allocator's last mask leaves, by module name.

    Raises:
        RankwiseError: the allocator did not run up to that mask.
    """
    config = _config(trainer.model)
    last = config.total_step - config.tfinal
    found = [c.step for c in trainer.callback_handler.callbacks if isinstance(c, Allocation)]
    ran = max(found, default=0)
    if ran < last or not config.rank_pattern:
        raise RankwiseError(
            f"AdaLoRA's allocator never came to its last mask: it ran up to step {ran}, the mask "
            f"comes at step {last}; train all steps, with AllocatingTrainer's callback left in"
        )
    return {
        key.removesuffix(f".{ADAPTER}").removesuffix(".lora_E"): mask
        for key, mask in config.rank_pattern.items()
    }


def convert(trainer: Trainer, plan: RankPlan) -> None:
    """Turns the trainer's AdaLoRA model into plain LoRA of the same function and the plan's ranks.

    E goes into A: scaling · B (diag(E) A). PEFT's own `convert_to_lora` approximates by an SVD and
    refuses rank 0; here nothing is approximated, and a module of rank 0 has no adapter.

    Args:
        trainer: of `AllocatingTrainer`, after training; `trainer.model` becomes the new model.
        plan: ranks of the final mask.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    mask = final_mask(trainer)
    task_type, dropout = _config(model).task_type, _config(model).lora_dropout
    layers, training = _layers(model), model.training
    factors = {name: _folded(layer, mask[name]) for name, layer in layers.items()}
    base, heads = _unwrapped(model)
    plain = lora.build(base, plan, task_type=task_type, lora_dropout=dropout)
    with torch.no_grad():
        for name, (a, b) in lora.factors(plain).items():
            a.copy_(factors[name][0])
            b.copy_(factors[name][1])
    for name, head in heads.items():
        wrapper = cast(ModulesToSaveWrapper, base.get_submodule(name))
        wrapper.modules_to_save[ADAPTER].load_state_dict(head.state_dict())
    plain.train(training)
    trainer.model = trainer.model_wrapped = plain


def _folded(layer: AdaLoraLayer, kept: list[bool]) -> tuple[Tensor, Tensor]:
    """A (rank, in) with E in it, and B (out, rank), of the pieces kept."""
    a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    there = torch.tensor(kept, device=a.device)
    return (a * layer.lora_E[ADAPTER])[there].detach(), b[:, there].detach()


def _unwrapped(model: PeftModel) -> tuple[nn.Module, Mapping[str, nn.Module]]:
    """The base model with its own layers and heads back, and the trained heads by name.

    PEFT's `unload` would leave the trained heads in the base model.
    """
    base, heads = model.get_base_model(), {}
    for name, module in list(base.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            heads[name] = module.modules_to_save[ADAPTER]
            base.set_submodule(name, module.original_module)
        elif isinstance(module, AdaLoraLayer):
            base.set_submodule(name, module.get_base_layer())
    if hasattr(base, "peft_config"):  # PEFT would warn of a second adapter
        del base.peft_config
    return base, heads


def _layers(model: nn.Module) -> dict[str, AdaLoraLayer]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, AdaLoraLayer)
    }


def _config(model: Any) -> AdaLoraConfig:
    return model.peft_config[ADAPTER]


@contextmanager
def _orthogonality(config: AdaLoraConfig, weight: float) -> Iterator[None]:
    """PEFT adds its term to every loss, evaluated ones too: it has a weight in this block alone."""
    config.orth_reg_weight = weight
    try:
        yield
    finally:
        config.orth_reg_weight = 0.0


def _refuse_idle(model: nn.Module) -> None:
    """PEFT's scores need a gradient of every factor."""
    for name, layer in _layers(model).items():
        if layer.lora_E[ADAPTER].grad is None:
            raise ModelError(
                f"{name!r} had no part in the loss, so AdaLoRA cannot score it; leave it out of "
                "target_modules"
            )
