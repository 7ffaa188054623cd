"""Gates on the rank axis: g in ΔW = s B diag(g) A.

A gate is attached as a parametrization of B, so that every reader of `lora_B.weight` (forward,
merge, DoRA's norm) sees the same gated matrix, and baked by folding g into B, which leaves an
ordinary PEFT adapter.
"""

from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any, TypeVar, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rankwise.errors import PlanError
from rankwise.lora import b_slot, b_weight, by_module, layers_of, part_mask, shrink, write_ranks
from rankwise.plan import RankPlan, first_pieces

AnyGate = TypeVar("AnyGate", bound="Gate")


class Gate(nn.Module):
    """g on the rank axis of one layer's B, one slice of it per plan entry.

    Args:
        names: names of the plan entries that share this layer, in rank order.
        sizes: rank-1 pieces of each entry; they sum to the layer's r.
        mask: (out, r) of 0 and 1 for a fused layer, else None.

    Where g comes from is the subclass's: `values()` gives it, length r, float32.
    """

    def __init__(self, names: list[str], sizes: list[int], mask: Tensor | None):
        super().__init__()
        self.mask: Tensor | None
        self.names, self.sizes = names, sizes
        self.register_buffer("mask", mask, persistent=False)

    def values(self) -> Tensor:
        raise NotImplementedError

    def forward(self, b: Tensor) -> Tensor:
        """B (out, r, ...) -> B diag(g)."""
        g = self.values().to(b.dtype)
        if self.mask is not None:
            g = g * self.mask
        elif b.dim() > 2:  # Conv2d: (out, r, 1, 1)
            g = g.view(1, -1, *[1] * (b.dim() - 2))
        return b * g


class LearnedGate(Gate):
    """g = activation(β), β learned; the activation is applied to each entry apart.

    β is kept in float32 whatever the type of B: its learning rate is below bf16's resolution.
    """

    def __init__(
        self,
        names: list[str],
        sizes: list[int],
        mask: Tensor | None,
        beta: Tensor,
        activation: Callable[[Tensor], Tensor],
    ):
        super().__init__(names, sizes, mask)
        self.beta, self.activation = nn.Parameter(beta), activation

    def values(self) -> Tensor:
        if len(self.sizes) == 1:
            return self.activation(self.beta)
        return torch.cat([self.activation(part) for part in self.beta.split(self.sizes)])


class NestedGate(Gate):
    """The first b pieces of each entry, scaled by r / b: α/r, PEFT's scale, becomes α/b.

    g is a buffer that `keep` writes in place, so that one compiled graph serves every b and
    no state dict holds it. It starts with all pieces.
    """

    def __init__(
        self, names: list[str], sizes: list[int], mask: Tensor | None, device: torch.device
    ):
        super().__init__(names, sizes, mask)
        self.g: Tensor
        self.register_buffer("g", torch.ones(sum(sizes), device=device), persistent=False)

    def values(self) -> Tensor:
        return self.g

    def keep(self, ranks: Mapping[str, int]) -> None:
        """Keeps the first `ranks[name]` pieces of each entry of this layer."""
        self.g.copy_(torch.tensor(first_pieces(self.sizes, [ranks[name] for name in self.names])))


def attach(
    model: PeftModel,
    plan: RankPlan,
    activation: Callable[[Tensor], Tensor],
    initial: float = 0.0,
) -> dict[str, LearnedGate]:
    """Puts a learned gate on every adapted layer; forward, merge and every reader of B see it.

    While gates are attached, state-dict keys read `...parametrizations.weight.original`: bake
    before any public save.

    Args:
        model: PEFT model at the plan's ranks (see `build`).
        plan: says which entries share a layer, and their sizes.
        activation: β (k,) -> g (k,).
        initial: starting value of β.

    Returns:
        The gates by module name, in the plan's order.
    """

    def gate(
        names: list[str], sizes: list[int], mask: Tensor | None, device: torch.device
    ) -> LearnedGate:
        beta = torch.full((sum(sizes),), initial, device=device)
        return LearnedGate(names, sizes, mask, beta, activation)

    return attach_gates(model, plan, gate)


def attach_nested(model: PeftModel, plan: RankPlan) -> dict[str, NestedGate]:
    """The same with a gate that keeps the first b pieces of every layer, at first all of them.

    Args:
        model: PEFT model at the plan's ranks.
        plan: says which entries share a layer, and their sizes.

    Returns:
        The gates by module name, in the plan's order, for `keep_first`.
    """
    return attach_gates(model, plan, NestedGate)


def attach_gates(
    model: PeftModel, plan: RankPlan, gate: Callable[..., AnyGate]
) -> dict[str, AnyGate]:
    """Puts a gate of any kind on every adapted layer.

    Args:
        model: PEFT model at the plan's ranks.
        plan: says which entries share a layer, and their sizes.
        gate: makes one from (names, sizes, mask, device), see `Gate`.

    Returns:
        The gates by module name, in the plan's order.
    """
    layers = layers_of(model)
    gates = {}
    for name, entries in by_module(plan).items():
        sizes = [e.rank for e in entries.values()]
        weight = b_weight(layers[name])
        gates[name] = gate(list(entries), sizes, part_mask(entries, weight), weight.device)
        parametrize.register_parametrization(*b_slot(layers[name]), gates[name])
    return gates


def keep_first(gates: Mapping[str, NestedGate], ranks: int | Mapping[str, int]) -> None:
    """Makes nested gates keep the first b pieces: one b for all, or one per plan entry.

    Args:
        gates: what `attach_nested` returned.
        ranks: b, or b by entry name.

    Raises:
        PlanError: a rank below 1 or above what the entry has, or names that are not the entries'.
            No gate has changed then.

    Example:
        >>> keep_first(gates, 2)
    """
    sizes = {n: r for g in gates.values() for n, r in zip(g.names, g.sizes, strict=True)}
    wanted = ranks if isinstance(ranks, Mapping) else dict.fromkeys(sizes, ranks)
    if odd := sorted(set(wanted) ^ set(sizes)):
        raise PlanError(f"ranks and gates differ in the entry {odd[0]!r}; give one rank per entry")
    for name, size in sizes.items():
        b = wanted[name]
        if not (isinstance(b, Integral) and 1 <= b <= size):
            raise PlanError(f"{name!r} has ranks 1 to {size}; {b} is none of them")
    for gate in gates.values():
        gate.keep({name: int(wanted[name]) for name in gate.names})


def gate_values(gates: Mapping[str, Gate]) -> dict[str, list[float]]:
    """g by plan entry, as plain floats."""
    found: dict[str, list[float]] = {}
    for gate in gates.values():
        for name, part in zip(
            gate.names, gate.values().detach().cpu().split(gate.sizes), strict=True
        ):
            found[name] = part.tolist()
    return found


@torch.no_grad()
def bake(model: PeftModel, keep: Mapping[str, list[int]] | None = None) -> None:
    """Folds every gate into its B and removes it; with `keep`, prunes the rank axis as well.

    The model computes the same function as before where everything is kept, and is an ordinary
    PEFT model afterwards. The scaling of a pruned layer is unchanged: `r` and `lora_alpha` shrink
    together, in the layer and in the model's LoraConfig, so that the saved adapter says the same.

    Args:
        model: PEFT model with gates attached.
        keep: by plan entry, which rank-1 pieces stay, 0-based, in the order given; at least one for
            each layer. None keeps all.

    Raises:
        PlanError: a layer would be left without a piece, or a piece does not exist.
    """
    pieces = {}  # all checked before anything moves
    for name, layer in layers_of(model).items():
        if (gate := _gate(layer)) is not None and keep is not None:
            pieces[name] = _kept(name, gate, keep)
    for name, layer in layers_of(model).items():
        if _gate(layer) is None:
            continue
        parametrize.remove_parametrizations(*b_slot(layer), leave_parametrized=True)
        if name in pieces:
            shrink(layer, pieces[name])
    if pieces:
        write_ranks(model)


def _gate(layer: LoraLayer) -> Gate | None:
    owner, name = b_slot(layer)
    if not parametrize.is_parametrized(owner, name):
        return None
    return cast(Any, owner.parametrizations)[name][0]


def _kept(name: str, gate: Gate, keep: Mapping[str, list[int]]) -> list[int]:
    """Indices on the layer's rank axis of the pieces that stay, over all entries of the layer."""
    kept, offset = [], 0
    for entry, size in zip(gate.names, gate.sizes, strict=True):
        for j in keep.get(entry, []):
            if not 0 <= j < size:
                raise PlanError(f"{entry!r} has pieces 0 to {size - 1}; piece {j} cannot be kept")
            kept.append(offset + j)
        offset += size
    if not kept:
        raise PlanError(f"{name!r} would keep no piece; keep at least one, or leave the module out")
    return kept
