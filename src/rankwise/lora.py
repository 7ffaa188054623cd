"""What PEFT's LoRA layers are made of: the only file that knows PEFT's insides.

Ranks live at *entries* of a plan. Most entries are a whole module. A fused projection (GPT-2's
`c_attn` computes query, key and value at once) has an entry per part: the parts' rank-1 pieces lie
side by side on the rank axis, and a constant mask keeps a piece's B to the rows of its own part.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import Trainer
from transformers.pytorch_utils import Conv1D

from rankwise.adapter import Adapter, Factors
from rankwise.errors import ModelError, PlanError
from rankwise.given import check_model
from rankwise.plan import Entry, RankPlan, patterns, tidy
from rankwise.sharded import is_sharded, put

ADAPTER = "default"

# Fused projections: leaf name -> names of its equal parts along the output, in order.
FUSED = {"c_attn": ("q", "k", "v")}

# The heads that PEFT trains whole, and therefore never adapts, for these kinds of model.
HEADS = ("classifier", "score", "qa_outputs")
HEADED = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")

# PEFT's default for GPT-2 is the whole of c_attn; the paper adapts query and value.
DEFAULT_PARTS = {"gpt2": ["c_attn.q", "c_attn.v"]}


def find_entries(
    model: nn.Module, target_modules: Sequence[str] | str | None, r: int
) -> dict[str, Entry]:
    """The plan entries of a base model, all at rank r, in the model's own order.

    Args:
        model: a transformers model without adapters.
        target_modules: names or suffixes of module names, a regular expression, `"all-linear"`, or
            None for PEFT's default of the model's type. A part of a fused module is named
            `c_attn.q`; `c_attn` is the whole of it.
        r: rank of every entry.

    Raises:
        ModelError: r < 1, a target that matches nothing, a model that has adapters already.
    """
    check_model(model)
    if not isinstance(r, int) or r < 1:
        raise ModelError(f"r is {r!r}; a rank has to be an integer of at least 1")
    if any(isinstance(module, LoraLayer) for module in model.modules()):
        raise ModelError("the model already has LoRA layers; pass the base model (model.unload())")
    targets = _targets(model, target_modules)
    entries: dict[str, Entry] = {}
    used: set[str] = set()
    for name, module in model.named_modules():
        if (shape := matrix_shape(module)) is None or _in_head(model, name):
            continue
        parts = _parts(name, module)
        for part, rows in [(None, None), *([] if isinstance(targets, str) else parts)]:
            full = name if part is None else f"{name}.{part}"
            if hits := _matches(full, targets):
                used.update(hits)
                out = shape[1] if rows is None else rows[1] - rows[0]
                entries[full] = Entry(r, shape[0], out, module=name, rows=rows)
    missed = [targets] if isinstance(targets, str) else [t for t in targets if t not in used]
    if not entries or (missed and not isinstance(targets, str)):
        raise ModelError(
            f"target_modules {missed[0]!r} matches no module of {type(model).__name__}; "
            f"modules that would: {_candidates(model)}"
        )
    for name, entry in entries.items():
        if r > (limit := min(entry.in_features, entry.out_features)):
            raise ModelError(
                f"r is {r}, but {name!r} can have no rank above {limit}; take a smaller r"
            )
        if entry.rows is not None and entry.module in entries:
            raise ModelError(
                f"{entry.module!r} is targeted whole and in parts; choose one of the two"
            )
    return entries


def uniform(
    model: nn.Module,
    r: int,
    *,
    target_modules: Sequence[str] | str | None = None,
    lora_alpha: float | None = None,
) -> RankPlan:
    """The plan that gives every adapted module of a base model the rank r.

    Args:
        model: a transformers model without adapters.
        r: the rank, >= 1.
        target_modules: what to adapt, see `find_entries`.
        lora_alpha: LoRA's alpha at this rank; None is 2 r, a scaling of 2.

    Raises:
        ModelError: r < 1, or a target that matches nothing.

    Example:
        >>> uniform(model, 8, target_modules="all-linear").parameters
        331776
    """
    entries = find_entries(model, target_modules, r)
    scaling = 2.0 if lora_alpha is None else lora_alpha / r
    return RankPlan(entries, r=r, scaling=scaling, provenance={"method": "uniform", "r": r})


def build(model: nn.Module, plan: RankPlan, **lora: Any) -> PeftModel:
    """`get_peft_model` with the plan's LoraConfig, checked, and fused modules kept to their parts.

    For plans without fused modules it is the same as
    `get_peft_model(model, plan.lora_config(...))` followed by `check(...)`. For a fused module
    it moreover lets each rank-1 piece reach the rows of its own part only: B starts at zero there,
    and a hook on its gradient keeps it there, in any trainer that calls `backward()` on this very
    model (a deep copy loses its hooks).

    Args:
        model: base model.
        plan: made for this model.
        **lora: passed on to LoraConfig (`task_type`, `lora_dropout`, ...).

    Raises:
        PlanError: the plan is for another model; the message names the first entry that differs.
    """
    check_fits(model, plan)
    peft_model = get_peft_model(model, plan.lora_config(**lora))
    try:
        check(peft_model, plan)
    except PlanError:
        peft_model.unload()
        raise
    for name, entries in by_module(plan).items():
        weight = b_weight(layers_of(peft_model)[name])
        if (mask := part_mask(entries, weight)) is not None:
            weight.register_hook(_masking(mask))
    return peft_model


def _masking(mask: Tensor) -> Callable[[Tensor], Tensor]:
    """A gradient hook that multiplies by the mask, brought to the gradient's device once."""
    there = {mask.device: mask}

    def masked(grad: Tensor) -> Tensor:
        if grad.device not in there:
            there[grad.device] = mask.to(grad.device)
        return grad * there[grad.device].to(grad.dtype)

    return masked


def check_fits(model: nn.Module, plan: RankPlan) -> None:
    """Raises PlanError, naming the entry, where the plan is not one for this base model."""
    modules = dict(model.named_modules())
    if any(isinstance(module, LoraLayer) for module in modules.values()):
        raise ModelError("the model already has LoRA layers; pass the base model (model.unload())")
    for name, entry in plan.modules.items():
        if entry.module not in modules or (shape := matrix_shape(modules[entry.module])) is None:
            raise PlanError(
                f"plan entry {name!r} names no module of {type(model).__name__} that takes LoRA; "
                f"the plan is for another model, or was edited wrongly"
            )
        rows = entry.rows or (0, shape[1])
        if entry.in_features != shape[0] or not 0 <= rows[0] < rows[1] <= shape[1]:
            raise PlanError(
                f"plan entry {name!r} is {entry.out_features} x {entry.in_features}, but the "
                f"module is {shape[1]} x {shape[0]}; the plan is for another model"
            )
        if entry.rows is None and entry.out_features != shape[1]:
            raise PlanError(
                f"plan entry {name!r} has {entry.out_features} outputs, but the module has "
                f"{shape[1]}; the plan is for another model"
            )


def check(model: PeftModel, plan: RankPlan, adapter_name: str = ADAPTER) -> None:
    """Asserts that a PEFT model realises a plan: each module's rank and scaling.

    PEFT matches patterns as regular expressions and silently ignores one that matches nothing,
    so a built model is looked at rather than trusted.

    Raises:
        PlanError: a module that lacks an adapter, has one it should not have, or has another
            rank or scaling than the plan says.
    """
    found = realised(model, adapter_name)
    for name, rank in plan.module_ranks().items():
        if name not in found:
            raise PlanError(
                f"the plan gives {name!r} rank {rank}, but the model has no adapter there"
            )
        rank_found, scaling, shape = found[name]
        if rank_found != rank or abs(scaling - plan.scaling) > 1e-9 * plan.scaling:
            raise PlanError(
                f"{name!r} has rank {rank_found} and scaling {scaling:g} in the model; "
                f"the plan says {rank} and {plan.scaling:g}"
            )
        for entry in plan.modules.values():
            if entry.module == name and shape is not None and entry.in_features != shape[0]:
                raise PlanError(
                    f"{name!r} takes {shape[0]} inputs in the model; the plan says "
                    f"{entry.in_features}, so it is for another model"
                )
    if extra := sorted(set(found) - set(plan.module_ranks())):
        raise PlanError(f"the model has an adapter at {extra[0]!r}, which the plan lacks")


def factors(model: PeftModel) -> dict[str, tuple[Tensor, Tensor]]:
    """The trained (A, B) of every adapted layer by module name; under a gate, B without it.

    The rank axis is A's first and B's second.
    """
    found = {}
    for name, layer in layers_of(model).items():
        owner, slot = b_slot(layer)
        gated = parametrize.is_parametrized(owner, slot)
        b = cast(Any, owner.parametrizations)[slot].original if gated else b_weight(layer)
        embedding = ADAPTER in layer.lora_embedding_A
        a = layer.lora_embedding_A[ADAPTER] if embedding else layer.lora_A[ADAPTER].weight
        found[name] = (a, b)
    return found


def write_ranks(model: PeftModel) -> None:
    """Makes the model's LoraConfig say the layers' ranks."""
    layers = layers_of(model)
    said = {name: (layer.r[ADAPTER], layer.lora_alpha[ADAPTER]) for name, layer in layers.items()}
    for key, value in patterns(said).items():
        setattr(model.peft_config[ADAPTER], key, value)


def drop(model: PeftModel, plan: RankPlan) -> None:
    """Takes away the adapters of the modules that a plan leaves at rank 0, gates and all.

    The model's LoraConfig no longer targets them, so that the saved adapter loads as it is.

    Args:
        model: PEFT model built at ranks above 0.
        plan: of the same modules; one of them at least keeps a rank.

    Raises:
        PlanError: no module keeps a rank.
    """
    config = model.peft_config[ADAPTER]
    config.target_modules = plan.lora_config().target_modules
    for name, layer in layers_of(model).items():
        if name not in plan.module_ranks():
            _put(model.get_base_model(), name, layer.get_base_layer())


def realised(
    model: PeftModel, adapter_name: str = ADAPTER
) -> dict[str, tuple[int, float, tuple[int, int] | None]]:
    """(r, scaling, (in, out)) of every adapted layer of a built PEFT model, by base module name."""
    return {
        name: (
            layer.r[adapter_name],
            layer.scaling[adapter_name],
            matrix_shape(layer.get_base_layer()),
        )
        for name, layer in layers_of(model, adapter_name).items()
    }


@contextmanager
def adapted(model: nn.Module, plan: RankPlan, **lora: Any) -> Iterator[PeftModel]:
    """`build` for the duration of a block; the base model is as before afterwards."""
    with restored(model):
        yield build(model, plan, **lora)


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Whatever is put on a base model within a block is gone after it.

    PEFT's own `unload` leaves the trained task head in place and everything frozen: here every
    module that was replaced is put back, the head among them, and the `requires_grad` flags;
    checkpointing that a Trainer switched on for the block is switched off. Parameters that the
    block trains in place are not restored.
    """
    checkpointing = _checkpointing(model)
    modules = dict(model.named_modules())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    training = model.training
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    marked = hasattr(model, "peft_config")
    try:
        yield
    finally:
        if not marked and hasattr(model, "peft_config"):
            del model.peft_config
        for name, module in modules.items():  # a parent before its children
            if name and model.get_submodule(name) is not module:
                _put(model, name, module)
        for name, p in model.named_parameters():
            p.requires_grad_(flags[name])
        if not checkpointing and _checkpointing(model):
            cast(Any, model).gradient_checkpointing_disable()
            cast(Any, model).disable_input_require_grads()
        if use_cache is not None:  # Trainer switches the key-value cache off
            cast(Any, config).use_cache = use_cache
        model.train(training)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Sets the submodule of this dotted name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def swap_adapter(trainer: Trainer, folder: str | Path, trainable: bool = False) -> None:
    """Puts the adapter in a folder in place of the one that a trainer's model carries.

    In a sharded model the ranks stay, and zeros fill the factors up.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if is_sharded(model):
        fill(model, Adapter.load(folder).factors())
        return
    base = model.unload()
    new = PeftModel.from_pretrained(base, str(folder), is_trainable=trainable)
    trainer.model = trainer.model_wrapped = new.to(trainer.args.device)


@torch.no_grad()
def fill(model: PeftModel, new: Mapping[str, Factors]) -> None:
    """Writes factors of no higher ranks into the model's own, zeros beside them."""
    for name, (a, b) in factors(model).items():
        whole_a, whole_b = torch.zeros(a.shape), torch.zeros(b.shape)
        if (f := new.get(name)) is not None:
            whole_a[: f.rank] = f.a
            whole_b[:, : f.rank] = f.b * (f.scaling / layers_of(model)[name].scaling[ADAPTER])
        put(a, whole_a)
        put(b, whole_b)


def _checkpointing(model: nn.Module) -> bool:
    """Whether activations are recomputed; transformers is renaming the property."""
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")
    return next((getattr(model, name) for name in names if hasattr(type(model), name)), False)


def layers_of(model: PeftModel, adapter_name: str = ADAPTER) -> dict[str, LoraLayer]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.r
    }


def b_slot(layer: LoraLayer) -> tuple[nn.Module, str]:
    """The module that owns B and the name under which it does."""
    if ADAPTER in layer.lora_embedding_B:
        return layer.lora_embedding_B, ADAPTER
    return layer.lora_B[ADAPTER], "weight"


def b_weight(layer: LoraLayer) -> Tensor:
    owner, name = b_slot(layer)
    return owner[name] if isinstance(owner, nn.ParameterDict) else getattr(owner, name)


def shrink(layer: LoraLayer, kept: list[int]) -> None:
    """Keeps these rank-1 pieces of a layer, at an unchanged scaling."""
    if ADAPTER in layer.lora_embedding_B:
        a, b = layer.lora_embedding_A, layer.lora_embedding_B
        a[ADAPTER] = nn.Parameter(a[ADAPTER][kept].clone(), a[ADAPTER].requires_grad)
        b[ADAPTER] = nn.Parameter(b[ADAPTER][:, kept].clone(), b[ADAPTER].requires_grad)
    else:
        a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        a.weight = nn.Parameter(a.weight[kept].clone(), a.weight.requires_grad)
        b.weight = nn.Parameter(b.weight[:, kept].clone(), b.weight.requires_grad)
        for module, side in ((a, "out"), (b, "in")):
            kind = "channels" if isinstance(module, nn.Conv2d) else "features"
            setattr(module, f"{side}_{kind}", len(kept))
    rooted = layer.use_rslora[ADAPTER]  # its scaling is alpha over the root of r
    alpha = layer.scaling[ADAPTER] * (len(kept) ** 0.5 if rooted else len(kept))
    layer.r[ADAPTER] = len(kept)
    layer.lora_alpha[ADAPTER] = tidy(alpha)


def by_module(plan: RankPlan) -> dict[str, dict[str, Entry]]:
    """Entries with rank > 0, grouped by the module they share."""
    grouped: dict[str, dict[str, Entry]] = {}
    for name, entry in plan.modules.items():
        if entry.rank > 0:
            grouped.setdefault(entry.module, {})[name] = entry
    return grouped


def part_mask(entries: Mapping[str, Entry], weight: Tensor) -> Tensor | None:
    """0 and 1 like B (out, r): each entry's pieces reach its rows only; None if all are whole."""
    if all(entry.rows is None for entry in entries.values()):
        return None
    mask = torch.zeros_like(weight, requires_grad=False)
    column = 0
    for entry in entries.values():
        start, stop = entry.rows or (0, weight.shape[0])
        mask[start:stop, column : column + entry.rank] = 1
        column += entry.rank
    return mask


def matrix_shape(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of the matrix that LoRA updates, counted as PEFT's A and B are; None if not one."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if isinstance(module, nn.Conv2d) and module.groups == 1:
        return module.in_channels * module.kernel_size[0] * module.kernel_size[
            1
        ], module.out_channels
    return None


def _parts(name: str, module: nn.Module) -> list[tuple[str, tuple[int, int]]]:
    """Names and rows of a fused projection's parts; empty for any other module."""
    parts = FUSED.get(name.rpartition(".")[2], ())
    if not parts or not isinstance(module, Conv1D) or module.nf != len(parts) * module.nx:
        return []
    size = module.nx
    return [(part, (i * size, (i + 1) * size)) for i, part in enumerate(parts)]


def _targets(model: nn.Module, target_modules: Sequence[str] | str | None) -> list[str] | str:
    if target_modules is None:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        defaults = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING | DEFAULT_PARTS
        found = defaults.get(str(kind))
        if found is None:
            raise ModelError(
                f"no default target_modules for a model of type {kind!r}; name them, for example "
                f"from: {_candidates(model)}"
            )
        return found
    if target_modules == "all-linear":
        config = LoraConfig(target_modules="all-linear")
        names = _maybe_include_all_linear_layers(config, model).target_modules
        return sorted(name for name in names if not _in_head(model, name))
    if not target_modules:
        raise ModelError(f"target_modules is empty; name some of: {_candidates(model)}")
    return target_modules if isinstance(target_modules, str) else list(target_modules)


def _matches(name: str, targets: list[str] | str) -> list[str]:
    """The targets that name this module, by PEFT's rules: a whole regex, or dotted suffixes.

    A regex names modules, not the parts that only rankwise knows of.
    """
    if isinstance(targets, str):
        return [targets] if re.fullmatch(targets, name) else []
    return [t for t in targets if name == t or name.endswith(f".{t}")]


def _in_head(model: nn.Module, name: str) -> bool:
    return type(model).__name__.endswith(HEADED) and any(p.endswith(HEADS) for p in name.split("."))


def _candidates(model: nn.Module) -> str:
    """`query (6), value (6), ...`: what target_modules could have named, commonest first."""
    leaves: Counter[str] = Counter()
    for name, module in model.named_modules():
        plain = matrix_shape(module) is not None and not isinstance(module, nn.Embedding)
        if plain and not _in_head(model, name):
            leaf = name.rpartition(".")[2]
            leaves[leaf] += 1
            leaves.update(f"{leaf}.{part}" for part, _ in _parts(name, module))
    return ", ".join(f"{leaf} ({count})" for leaf, count in leaves.most_common())
