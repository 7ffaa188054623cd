"""What one pass over held-out rows says about a trained LoRA: statistics in the bottleneck of r.

Every adapted layer computes h = A x, of width r. With d = ∂z/∂h, the gradient of a scalar z of the
outputs, all that a quadratic model of the loss needs is r x r for each row and layer, whatever the
size of the model. The scalars are the columns of a square root of the Gauss-Newton matrix (Martens
2020, "New insights and perspectives on the natural gradient method"), so that the squares of
their derivatives sum to the curvature of the loss; no label takes part in that.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from peft.tuners.lora import Embedding
from peft.tuners.lora.layer import _ConvNd
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rankwise.adapter import Factors
from rankwise.errors import DataError, DivergedError, ModelError
from rankwise.fourbit import keep_gradients
from rankwise.lora import ADAPTER, b_slot, factors, layers_of
from rankwise.sharded import agreed, put, whole

Kind = Literal["regression", "classification", "multi-label", "tokens", "causal"]
Batch = Mapping[str, Any]

IGNORED = -100
"""The label of a token that has none, as in transformers."""

EXACT = 4
"""Up to so many outputs each gets a backward pass of its own; above that signs are drawn."""


KEPT = 2**20
"""Logits of a batch that are kept for later looks; a language model's are too many."""


@dataclass(frozen=True)
class Statistics:
    """Sums over rows; those of two halves, or of two processes, add up to those of the whole.

    Attributes:
        products: by module, C = Σ_t d_t h_tᵀ of each scalar of each row, (scalars, r, r).
        gradients: by module, P = Σ d dᵀ over scalars, rows and tokens, (r, r), float64.
        inputs: by module, Q = Σ h hᵀ over rows and tokens that are not padding, (r, r), float64.
        residuals: each scalar here minus in the reference model, (scalars,); 0 without one. The
            sum of their squares is about twice the divergence of the two models.
        distance: that sum of squares, by the signs that `collect` was told to measure it by.
        rows: how many were seen.
        count: what the mean loss is a mean over: rows, or tokens with a label.
        loss: sum of the loss from the labels.
        outputs: the logits of each batch, on the CPU, where they are few enough to keep, else None.
    """

    products: dict[str, Tensor]
    gradients: dict[str, Tensor]
    inputs: dict[str, Tensor]
    residuals: Tensor
    distance: float
    rows: int
    count: int
    loss: float
    outputs: tuple[Tensor | None, ...] = ()

    def __add__(self, other: "Statistics") -> "Statistics":
        def both(mine: dict[str, Tensor], its: dict[str, Tensor], how: Any) -> dict[str, Tensor]:
            return {name: how(tensor, its[name]) for name, tensor in mine.items()}

        return Statistics(
            both(self.products, other.products, lambda x, y: torch.cat([x, y])),
            both(self.gradients, other.gradients, torch.add),
            both(self.inputs, other.inputs, torch.add),
            torch.cat([self.residuals, other.residuals]),
            self.distance + other.distance,
            self.rows + other.rows,
            self.count + other.count,
            self.loss + other.loss,
            self.outputs + other.outputs,
        )


def collect(
    model: PeftModel,
    batches: Iterable[Batch],
    *,
    kind: Kind | None = None,
    reference: Mapping[str, Factors] | None = None,
    outputs: Sequence[Tensor | None] = (),
    most: float = math.inf,
    draws: int = 2,
    seed: int = 0,
    measured_by: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Statistics:
    """One forward and a few backward passes over held-out rows, in eval mode, nothing trained.

    Backward passes: one for each output of a regression, one for two classes, one a class up to
    four; above that, and for tokens, `draws` of them with random signs, which is right on average.

    Args:
        model: PEFT LoRA model; weights, flags and mode are as before afterwards.
        batches: dicts of tensors with `labels`, for example a DataLoader.
        kind: of loss; None asks the model's config.
        reference: factors of the same modules; the scalars' distance from the model with these is
            then recorded.
        outputs: the reference's, by batch, where an earlier pass over the same batches kept them;
            saves a forward pass.
        most: stops as soon as the distance is more; the sums are then over the rows so far.
        draws: backward passes where signs are drawn.
        seed: of the signs.
        measured_by: seed of the signs that the distance is measured by; None is `seed`.
        progress: called with the number of rows after each batch.

    Raises:
        ModelError: not LoRA, or a layer whose pieces cannot be told apart.
        DataError: no rows, or rows without labels, or without any that counts.
        DivergedError: a loss that is not finite.

    Example:
        >>> collect(model, first_half) + collect(model, second_half)
    """
    kind = kind or kind_of(model)
    mine = read(model)
    keep_gradients(model)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    ruler = None if measured_by is None else torch.Generator().manual_seed(measured_by)
    total: Statistics | None = None
    training = model.training
    model.eval()
    try:
        for n, batch in enumerate(batches):
            if batch.get("labels") is None:
                raise DataError(
                    f"a batch has no labels, only {', '.join(sorted(batch))}; add the column "
                    "'labels', which says what the loss is of"
                )
            moved = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}
            there = outputs[n] if n < len(outputs) else None
            if there is not None:
                there = there.to(device)
            elif reference is not None:
                write(model, reference)
                with torch.no_grad():
                    there = model(**_without_labels(moved)).logits
                write(model, mine)
            found = _of_batch(model, moved, kind, there, draws, generator, ruler)
            total = found if total is None else total + found
            if progress is not None:
                progress(total.rows)
            if most < math.inf and agreed(model, total.distance > most):
                break
    finally:
        write(model, mine)
        model.train(training)
    if total is None:
        raise DataError("there are no rows; give held-out rows with labels")
    if total.count == 0:
        raise DataError(
            f"none of {total.rows} rows has a token with a label, all are {IGNORED}; give rows "
            "whose labels are not cut off"
        )
    return total


def _without_labels(batch: Batch) -> dict[str, Tensor]:
    return {key: value for key, value in batch.items() if key != "labels"}


def _of_batch(
    model: PeftModel,
    batch: dict[str, Tensor],
    kind: Kind,
    there: Tensor | None,
    draws: int,
    generator: torch.Generator,
    ruler: torch.Generator | None,
) -> Statistics:
    labels, mask = batch["labels"], batch.get("attention_mask")
    rows = len(labels)
    with torch.enable_grad(), watched(model) as seen:
        logits = whole = model(**_without_labels(batch)).logits
        if kind == "causal":  # position t predicts token t + 1
            logits, labels = logits[:, :-1], labels[:, 1:]
        loss, count = loss_of(kind, logits.detach(), labels)
        calls = [(name, *call) for name, found in seen.items() for call in found]
        if there is not None and kind == "causal":
            there = there[:, :-1]
        at = logits.detach() if there is None else halfway(kind, logits.detach(), there)
        columns = roots(kind, at, labels, draws, generator)
        grads = [
            torch.autograd.grad(
                logits,
                [target for _, _, target, _ in calls],
                column.to(logits.dtype),
                retain_graph=n + 1 < len(columns),
                allow_unused=True,
            )
            for n, column in enumerate(columns)
        ]
    sizes = {name: len(a) for name, (a, _) in factors(model).items()}
    products = {n: torch.zeros(len(columns), rows, r, r) for n, r in sizes.items()}
    gradients = {n: torch.zeros(r, r, dtype=torch.float64) for n, r in sizes.items()}
    inputs = {n: torch.zeros(r, r, dtype=torch.float64) for n, r in sizes.items()}
    for n, (name, h, _, to_bottleneck) in enumerate(calls):
        h = _by_row(name, _precise(h.detach()), rows)
        real = h if mask is None else h * _mask_like(mask, h)
        inputs[name] += _gram(real)
        for column, grad in enumerate(grads):
            if (g := grad[n]) is None:  # the outputs do not depend on this layer
                continue
            d = _by_row(name, to_bottleneck(_precise(g)), rows)
            gradients[name] += _gram(d)
            c = torch.einsum("bti,btj->bij", d, h).cpu()
            products[name] = products[name].to(c.dtype)
            products[name][column] += c
    residuals, distance = torch.zeros(len(columns), rows), 0.0
    if there is not None:
        gap = _precise(logits.detach()) - _precise(there)

        def along(columns: list[Tensor]) -> Tensor:
            return torch.stack([(c * gap).flatten(1).sum(1) for c in columns]).cpu()

        residuals = along(columns)
        by = residuals if ruler is None else along(roots(kind, at, labels, draws, ruler))
        distance = float((by.double() ** 2).sum())
    flat = {name: c.flatten(0, 1) for name, c in products.items()}
    kept = whole.detach().cpu() if whole.numel() <= KEPT else None
    return Statistics(
        flat, gradients, inputs, residuals.flatten(), distance, rows, count, loss, (kept,)
    )


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _gram(x: Tensor) -> Tensor:
    flat = x.flatten(0, 1)
    return (flat.T @ flat).double().cpu()


def _by_row(name: str, x: Tensor, rows: int) -> Tensor:
    """(rows, tokens, r); a layer may see (rows, r), or all tokens on one axis."""
    if x.dim() == 2 and x.shape[0] % rows == 0:
        return x.view(rows, -1, x.shape[-1])
    if x.dim() < 2 or x.shape[0] != rows:
        raise ModelError(
            f"{name!r} sees {tuple(x.shape)} for {rows} rows, so its rows cannot be told apart; "
            "leave it out of target_modules"
        )
    return x.flatten(1, -2)


def _mask_like(mask: Tensor, h: Tensor) -> Tensor:
    """The attention mask (rows, tokens, 1) where h has the tokens that it masks, else ones."""
    fits = mask.dim() == 2 and mask.shape == h.shape[:2]
    return mask[..., None].to(h.dtype) if fits else torch.ones((), dtype=h.dtype, device=h.device)


# The loss and its Gauss-Newton square roots.


def kind_of(model: PeftModel) -> Kind:
    """The kind of loss that transformers would take for this model.

    Raises:
        ModelError: none of those known here.
    """
    base = model.get_base_model()
    config, name = base.config, type(base).__name__
    if name.endswith("ForSequenceClassification"):
        problem = getattr(config, "problem_type", None)
        if problem == "multi_label_classification":
            return "multi-label"
        if problem == "regression" or (problem is None and config.num_labels == 1):
            return "regression"
        return "classification"
    if name.endswith("ForTokenClassification"):
        return "tokens"
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal"
    raise ModelError(
        f"the loss of {name} is not known here; pass kind='classification', 'regression', "
        "'multi-label', 'tokens' or 'causal'"
    )


def loss_of(kind: Kind, logits: Tensor, labels: Tensor) -> tuple[float, int]:
    """The loss from the labels summed over rows or tokens, and how many of them there are.

    Raises:
        DataError: labels that do not fit. DivergedError: a loss that is not finite.
    """
    z = _precise(logits)
    try:
        if kind in ("regression", "multi-label"):
            y = labels.view_as(z).to(z.dtype)
            each = (
                (z - y) ** 2
                if kind == "regression"
                else nn.functional.binary_cross_entropy_with_logits(z, y, reduction="none")
            )
            count, loss = len(z), float(each.flatten(1).mean(1).sum())
        else:
            y, flat = labels.flatten(), z.flatten(0, -2)
            count = int((y != IGNORED).sum())
            loss = float(
                nn.functional.cross_entropy(flat, y, ignore_index=IGNORED, reduction="sum")
            )
    except (RuntimeError, ValueError, IndexError) as error:
        raise DataError(
            f"labels of shape {tuple(labels.shape)} and outputs of shape {tuple(z.shape)} do not "
            f"fit a loss of kind {kind!r} ({str(error).splitlines()[0]}); check both, or pass kind="
        ) from error
    if not torch.tensor(loss).isfinite():
        raise DivergedError(
            f"the loss on the held-out rows is {loss}; the adapter has diverged, or its type is "
            "too narrow: load the model in float32 or bfloat16"
        )
    return loss, count


def roots(
    kind: Kind, logits: Tensor, labels: Tensor, draws: int, generator: torch.Generator
) -> list[Tensor]:
    """Columns c with Σ c cᵀ = H, the Hessian of one row's loss in its outputs, each like logits.

    For a softmax H = diag(p) - p pᵀ, and √p∘ε - p (√p·ε) has H as its mean square for any ε of
    unit covariance: the unit vectors give it exactly; random signs, one set a token, on average,
    and with less spread than labels drawn from p, which are nearly always the same where p is sure.
    """
    z = _precise(logits)
    if kind == "regression":
        m = z[0].numel()
        return [(2 / m) ** 0.5 * e for e in _units(z)]
    if kind == "multi-label":
        p = z.sigmoid()
        scale = (p * (1 - p) / z.shape[-1]).sqrt()
        return [scale * e for e in _signs_or_units(z, draws, generator)]
    p = z.softmax(-1)
    if kind == "classification" and z.shape[-1] == 2:
        root = p.prod(-1, keepdim=True).sqrt()
        return [torch.cat([-root, root], -1)]
    if kind == "classification":
        noise = _signs_or_units(z, draws, generator)
    else:
        noise = _signs(z, draws, generator)
    columns = [p.sqrt() * e - p * (p.sqrt() * e).sum(-1, keepdim=True) for e in noise]
    if kind in ("tokens", "causal"):
        columns = [c * (labels != IGNORED)[..., None] for c in columns]
    return columns


def halfway(kind: Kind, here: Tensor, there: Tensor) -> Tensor:
    """Outputs whose probabilities are the mean of both, to take the curvature between two models.

    A model that is sure of something wrong has hardly a curvature of its own. For two classes the
    gradient of the divergence between the two is the gap of the outputs times a curvature in
    between, and this is close to it.
    """
    here, there = _precise(here), _precise(there)
    if kind == "regression":
        return here
    if kind == "multi-label":
        return torch.logit((here.sigmoid() + there.sigmoid()) / 2, eps=1e-6)
    return ((here.softmax(-1) + there.softmax(-1)) / 2).clamp_min(1e-30).log()


def _units(z: Tensor) -> list[Tensor]:
    return [e.expand_as(z) for e in torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)]


def _signs(z: Tensor, draws: int, generator: torch.Generator) -> list[Tensor]:
    return [
        (torch.randint(0, 2, z.shape, generator=generator) * 2 - 1).to(z) / draws**0.5
        for _ in range(draws)
    ]


def _signs_or_units(z: Tensor, draws: int, generator: torch.Generator) -> list[Tensor]:
    return _units(z) if z.shape[-1] <= EXACT else _signs(z, draws, generator)


# PEFT's insides.


def read(model: Any) -> dict[str, Factors]:
    """The factors of every adapted layer as they are now, copied.

    Raises:
        ModelError: no LoRA, or a kind of it whose pieces do not simply add up.
    """
    layers = layers_of(model) if isinstance(model, PeftModel) else {}
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no LoRA layers of the adapter {ADAPTER!r}; give the PEFT "
            "model that was trained with LoRA"
        )
    for name, layer in layers.items():
        if layer.use_dora.get(ADAPTER) or ADAPTER in layer.lora_variant:
            raise ModelError(
                f"{name!r} is DoRA or another variant of LoRA, whose pieces do not add up; train "
                "plain LoRA (use_dora=False)"
            )
        if isinstance(layer, _ConvNd) or not (
            ADAPTER in layer.lora_embedding_A or isinstance(layer.lora_A[ADAPTER], nn.Linear)
        ):
            raise ModelError(
                f"{name!r} is a {type(layer.get_base_layer()).__name__}, which has no order by "
                "data; leave it out of target_modules, or cut by singular values"
            )
        if cast(Any, layer).merged:
            raise ModelError(f"{name!r} is merged into the base model; call unmerge_adapter()")
        if layer.lora_bias.get(ADAPTER):
            raise ModelError(
                f"{name!r} has a bias beside its factors, which belongs to no piece and would go "
                "with the module; train with lora_bias=False, or cut by singular values"
            )
        if parametrize.is_parametrized(*b_slot(layer)):
            raise ModelError(f"{name!r} has a gate attached; bake it first (rankwise.bake)")
    found = factors(model)
    if odd := [name for name, (a, b) in found.items() if min(a.dim(), b.dim()) < 2]:
        raise ModelError(
            f"the factors of {odd[0]!r} are sharded by FSDP 1 or DeepSpeed, whose parts cannot be "
            "read; train with FSDP 2, or save the adapter and load it in a model of its own"
        )
    return {
        name: Factors(
            whole(a.detach()).clone(), whole(b.detach()).clone(), layers[name].scaling[ADAPTER]
        )
        for name, (a, b) in found.items()
    }


@torch.no_grad()
def write(model: PeftModel, new: Mapping[str, Factors]) -> None:
    """Puts factors of the layers' own ranks into the model, in place; the scaling stays."""
    for name, (a, b) in factors(model).items():
        put(a, new[name].a)
        put(b, new[name].b)


Call = tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]


@contextmanager
def watched(model: PeftModel) -> Iterator[dict[str, list[Call]]]:
    """Records each call of each layer: h, a tensor of the graph, and how its gradient becomes ∂/∂h.

    A layer that is called twice (shared, as in ALBERT) has two records. The tensor is h itself; an
    Embedding never computes h, so there it is the output, y = W x + s B h.
    """
    seen: dict[str, list[Call]] = {name: [] for name in layers_of(model)}
    handles = []
    for name, layer in layers_of(model).items():
        if isinstance(layer, Embedding):
            handles.append(layer.register_forward_hook(_embedding_hook(seen[name])))
        else:
            handles.append(layer.lora_A[ADAPTER].register_forward_hook(_hook(seen[name])))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _hook(calls: list[Call]) -> Callable[..., Tensor]:
    def record(module: nn.Module, args: tuple[Tensor, ...], h: Tensor) -> Tensor:
        if not h.requires_grad:  # frozen factors and nothing trainable below
            h = h.detach().requires_grad_()
        calls.append((h, h, lambda grad: grad))
        return h

    return record


def _embedding_hook(calls: list[Call]) -> Callable[..., Tensor]:
    def record(layer: Any, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        a, b = layer.lora_embedding_A[ADAPTER].detach(), layer.lora_embedding_B[ADAPTER].detach()
        scale = layer._get_embed_scale()  # Gemma multiplies what its embedding gives
        s = layer.scaling[ADAPTER] * (1 if scale is None else scale)
        y = y if y.requires_grad else y.detach().requires_grad_()
        calls.append((a.T[args[0]], y, lambda grad: s * (grad @ b.to(grad.dtype))))
        return y

    return record
