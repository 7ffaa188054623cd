"""Orders: all rank-1 pieces of a trained LoRA, the most useful first; every size is a cut of one.

ΔW = s Σ_j b_j a_jᵀ in each layer. Any invertible M may stand between B and A as long as M M⁻¹ does,
so the pieces can be chosen, not only counted: the SVD's, or those that held-out data tell apart
best. An order lists the pieces of all layers, and a cut is its beginning: of two cuts by one order
the smaller lies in the larger. An order by data knows moreover what gate each piece should have
once others are gone, so that those that stay take over what they can.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rankwise.adapter import ORDER, Adapter, Factors, svd
from rankwise.errors import AdapterError, DataError
from rankwise.files import temporary_name, write_json
from rankwise.reading import parse_json

# `curvature` needs PEFT and transformers, which a cut out of a folder does not wait for: it is
# imported where a model is looked at.
if TYPE_CHECKING:
    from rankwise.curvature import Batch, Kind, Statistics

FORMAT = "rankwise-order/1"
PIECES, SEQUENCE = "pieces.safetensors", ORDER

Piece = tuple[str, int]

LEAST_ROWS = 32


@dataclass(frozen=True)
class Order:
    """All pieces of an adapter, and which goes last.

    Attributes:
        pieces: by module, the factors; ΔW is that of the adapter that was ordered.
        sequence: (module, index on its rank axis) of every piece, the most useful first.
        provenance: how it was made.
        gates: by number of pieces kept, a gate for each of them in the order's sequence. A cut of
            another number takes those of the next larger; without any, all gates are 1.

    Example:
        >>> order = by_data(peft_model, held_out_loader)
        >>> order.ranks(budget=50_000)["bert.encoder.layer.0.attention.self.query"]
        3
    """

    pieces: dict[str, Factors]
    sequence: tuple[Piece, ...]
    provenance: dict[str, Any] = field(default_factory=dict)
    gates: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        there = {(name, j) for name, f in self.pieces.items() for j in range(f.rank)}
        if set(self.sequence) != there or len(self.sequence) != len(there):
            raise AdapterError(
                f"the order lists {len(self.sequence)} pieces, the factors have {len(there)}, or "
                "not the same ones; make the order anew"
            )

    def __repr__(self) -> str:
        how = self.provenance.get("order", "given")
        return (
            f"Order({len(self.sequence)} pieces of {len(self.pieces)} modules, "
            f"{self.parameters:,} parameters, by {how})"
        )

    @property
    def parameters(self) -> int:
        """Parameters of all pieces."""
        return sum(f.rank * f.cost for f in self.pieces.values())

    def kept(
        self, budget: int | None = None, *, keep: float | None = None, rank: int | None = None
    ) -> tuple[Piece, ...]:
        """The pieces of a cut, the most useful first. Give exactly one of the three.

        Args:
            budget: parameters in all. The cut ends before the first piece that does not fit, so
                that it stays a beginning of the order.
            keep: share of the parameters, in (0, 1].
            rank: the first so many pieces of every layer.

        Raises:
            AdapterError: not one of the three, out of range, or too small for the first piece.
        """
        if sum(x is not None for x in (budget, keep, rank)) != 1:
            raise AdapterError("give one of budget, keep and rank")
        for name, value in (("budget", budget), ("rank", rank)):
            if value is not None and (not isinstance(value, Integral) or isinstance(value, bool)):
                raise AdapterError(f"{name} is {value!r}; it has to be an integer")
        if rank is not None:
            most = max(f.rank for f in self.pieces.values())
            if not 1 <= rank <= most:
                raise AdapterError(
                    f"rank is {rank}; the adapter has ranks up to {most}, give 1 to that"
                )
            return tuple(_first_of_each(self.sequence, rank))
        if keep is not None and (not isinstance(keep, Real) or not 0 < keep <= 1):
            raise AdapterError(f"keep is {keep!r}; it is a share, above 0 and at most 1")
        limit = budget if budget is not None else math.floor(self.parameters * (keep or 0) + 1e-6)
        kept, spent = [], 0
        for name, j in self.sequence:
            spent += self.pieces[name].cost
            if spent > limit:
                break
            kept.append((name, j))
        if not kept:
            raise AdapterError(
                f"{limit} parameters hold no piece; the first of this order takes {spent}"
            )
        return tuple(kept)

    def ranks(self, budget: int | None = None, **size: Any) -> dict[str, int]:
        """Rank by module of the cut, 0 where nothing is left; the arguments of `kept`."""
        kept = self.kept(budget, **size)
        return {name: sum(module == name for module, _ in kept) for name in self.pieces}

    def factors(
        self, budget: int | None = None, *, fitted: bool = True, **size: Any
    ) -> dict[str, Factors | None]:
        """Factors by module of the cut, None where nothing is left; the arguments of `kept`.

        Within a layer the pieces come in the order's sequence, so that those of a smaller cut are
        the first ones of a larger.

        Args:
            fitted: each piece times its gate, folded into B. False leaves the pieces as they are.
        """
        kept = self.kept(budget, **size)
        gates = torch.ones(len(kept), dtype=torch.float64)
        # A cut of one rank everywhere is no beginning of the sequence, so the gates are not its.
        if fitted and kept == self.sequence[: len(kept)]:
            gates = self._gates_of(len(kept))
        return _gated(self.pieces, kept, gates)

    def _gates_of(self, count: int) -> Tensor:
        if not (known := [n for n in self.gates if n >= count]):
            return torch.ones(count, dtype=torch.float64)
        return self.gates[min(known)][:count].double()

    def save(self, folder: str | Path) -> None:
        """Writes pieces.safetensors and, last, order.json; a later cut needs nothing else."""
        target = Path(folder)
        tensors = {
            f"{name}.{side}": getattr(f, side).contiguous()
            for name, f in self.pieces.items()
            for side in ("a", "b")
        }
        tensors |= {f"gates.{count}": gates.contiguous() for count, gates in self.gates.items()}
        with temporary_name(target / PIECES) as temporary:
            save_file(tensors, temporary)
        names = list(self.pieces)
        number = {name: n for n, name in enumerate(names)}
        write_json(
            target / SEQUENCE,
            {
                "format": FORMAT,
                "modules": {name: self.pieces[name].scaling for name in names},
                "sequence": [[number[name], j] for name, j in self.sequence],
                "provenance": self.provenance,
            },
        )

    @classmethod
    def load(cls, folder: str | Path) -> Order:
        """Reads what `save` wrote; no model, data or GPU.

        Raises:
            AdapterError: no order there, or a damaged one.
        """
        folder = Path(folder)
        try:
            raw = parse_json((folder / SEQUENCE).read_text(encoding="utf-8"))
            if raw["format"] != FORMAT:
                raise ValueError(f'"format" is {raw["format"]!r}, not {FORMAT!r}')
            tensors = load_file(folder / PIECES)
            pieces = {
                name: Factors(tensors[f"{name}.a"], tensors[f"{name}.b"], float(scaling))
                for name, scaling in raw["modules"].items()
            }
            names = list(pieces)
            sequence = tuple((names[n], j) for n, j in raw["sequence"])
            gates = {
                int(key.removeprefix("gates.")): tensor
                for key, tensor in tensors.items()
                if re.fullmatch(r"gates\.[0-9]+", key)
            }
            if odd := [n for n, along in gates.items() if len(along) != n]:
                raise ValueError(f"the gates of {odd[0]} pieces are {len(gates[odd[0]])}")
            if odd := [n for n, f in pieces.items() if f.a.shape[0] != f.b.shape[1]]:
                raise ValueError(f"the halves of {odd[0]!r} are of two ranks")
            return cls(pieces, sequence, raw["provenance"], gates)
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            IndexError,
            AttributeError,
            SafetensorError,
        ) as error:
            raise AdapterError(
                f"no order can be read from {folder}: {error!r}; give a folder that a run ordered"
            ) from error


def _first_of_each(sequence: Iterable[Piece], rank: int) -> Iterator[Piece]:
    seen: dict[str, int] = {}
    for name, j in sequence:
        seen[name] = seen.get(name, 0) + 1
        if seen[name] <= rank:
            yield name, j


def _gated(
    pieces: Mapping[str, Factors], kept: Sequence[Piece], gates: Tensor
) -> dict[str, Factors | None]:
    """By module the pieces that are kept, in their sequence, each B times its gate; None for none.

    A vector of B belongs to one piece, whatever its shape, so the gate goes along its second axis.
    """
    index: dict[str, list[int]] = {name: [] for name in pieces}
    along: dict[str, list[float]] = {name: [] for name in pieces}
    for (name, j), gate in zip(kept, gates.tolist(), strict=True):
        index[name].append(j)
        along[name].append(gate)
    found: dict[str, Factors | None] = {}
    for name, f in pieces.items():
        g = torch.tensor(along[name], dtype=torch.float64).view(1, -1, *[1] * (f.b.dim() - 2))
        b = (f.b[:, index[name]].double() * g.to(f.b.device)).to(f.b.dtype)
        found[name] = Factors(f.a[index[name]].clone(), b, f.scaling) if index[name] else None
    return found


# Orders from the factors alone.


def by_sigma(factors: Mapping[str, Factors]) -> Order:
    """One threshold on the singular values s σ of all layers (PARA, arXiv 2604.27796)."""
    return _by_key(factors, lambda s: -s, how="sigma")


def by_rank(factors: Mapping[str, Factors]) -> Order:
    """The SVD of each layer, all layers alike: first pieces first; s σ breaks the ties."""
    return _by_key(factors, lambda s: torch.arange(len(s)) - s / (1 + s), how="rank")


def by_energy(factors: Mapping[str, Factors]) -> Order:
    """A share of Σσ² of each layer, the same for all (`energy` in PEFT's `convert_to_lora`).

    A piece stays as long as those before it in its layer hold less than the share.
    """

    def before(s: Tensor) -> Tensor:
        energy = s**2 / (s**2).sum().clamp_min(1e-300)
        return energy.cumsum(0) - energy

    return _by_key(factors, before, how="energy")


def at_random(factors: Mapping[str, Factors], seed: int = 0) -> Order:
    """The SVD's pieces in random order: the control of all orders."""
    pieces = _all(svd_pieces(factors)[0])
    random.Random(seed).shuffle(pieces)
    return Order(svd_pieces(factors)[0], tuple(pieces), {"order": "random", "seed": seed})


def by_index(factors: Mapping[str, Factors]) -> Order:
    """The pieces as they are, first ones first, layer by layer: that of a nested training."""
    pieces = sorted(_all(factors), key=lambda piece: piece[1])
    return Order(dict(factors), tuple(pieces), {"order": "index"})


def svd_pieces(factors: Mapping[str, Factors]) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """The SVD's pieces of each B A, √σ in both halves, and s σ by module, in descending order."""
    pieces, values = {}, {}
    for name, f in factors.items():
        u, s, v = svd(f)
        root = s.sqrt()
        pieces[name] = _like(f, root[:, None] * v[: len(s)], u[:, : len(s)] * root)
        values[name] = f.scaling * s
    return pieces, values


def _by_key(
    factors: Mapping[str, Factors], key: Callable[[Tensor], Tensor], **provenance: Any
) -> Order:
    pieces, values = svd_pieces(factors)
    keys = {name: key(s).tolist() for name, s in values.items()}
    size = {name: s.tolist() for name, s in values.items()}
    sequence = sorted(_all(pieces), key=lambda p: (keys[p[0]][p[1]], -size[p[0]][p[1]]))
    return Order(pieces, tuple(sequence), {"order": provenance["how"]})


def _all(factors: Mapping[str, Factors]) -> list[Piece]:
    return [(name, j) for name, f in factors.items() for j in range(f.rank)]


def _like(f: Factors, a: Tensor, b: Tensor) -> Factors:
    """New halves in the shapes and types of the old."""
    return Factors(
        a.view(len(a), *f.a.shape[1:]).to(f.a.dtype).contiguous(),
        b.view(len(b), a.shape[0], *f.b.shape[2:]).to(f.b.dtype).contiguous(),
        f.scaling,
    )


# Orders by data.


def by_activation(model: Any, batches: Iterable[Batch], **how: Any) -> Order:
    """By how much of each layer's output a piece carries, ‖s b aᵀx‖² per parameter; no gradients.

    Arguments and errors of `by_data`.
    """
    from rankwise.curvature import collect, read

    statistics = collect(model, _enough(batches), **how)
    old = read(model)
    pieces, keys = {}, {}
    for name, f in old.items():
        p = f.scaling**2 * _double(f.b).T @ _double(f.b)
        pieces[name], _, _, values = rotate(f, p, statistics.inputs[name])
        keys[name] = (values**2 / f.cost).tolist()
    sequence = sorted(_all(pieces), key=lambda piece: -keys[piece[0]][piece[1]])
    return Order(pieces, tuple(sequence), {"order": "activation", "rows": statistics.rows})


STEP = 4.0
"""The most by which one look may multiply a gate: so far a quadratic model may be trusted."""

LADDER = (1 / 4, 1 / 16, 1 / 64)


def by_data(
    model: Any,
    batches: Iterable[Batch],
    *,
    ladder: Sequence[float] = LADDER,
    ridge: float = 0.1,
    kind: Kind | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Order:
    """The order by a quadratic model of the loss over the gates of all pieces, on held-out rows.

    One pass gives C_n, P and Q of `curvature`; P and Q choose the pieces of each layer (`rotate`),
    C_n their gate gradients J (`gate_gradients`). The pieces whose going moves the outputs least
    per parameter go first, while the gates of those that stay move so as to make up for them
    (`removal`; Hassibi and Stork 1993, "Second order derivatives for network pruning").

    Removing most pieces is no small step, so the model is looked at again at each size of the
    ladder, with the gates that it has by then: the gates are set right for what has really become
    of the outputs, and what goes next is chosen by what is seen there. The aim is the outputs of
    the whole adapter; labels only say which tokens count.

    The whole is one order, and the pieces of all its cuts are nested; their gates are not, each
    size has its own.

    Args:
        model: PEFT LoRA model; as before afterwards.
        batches: dicts of tensors with `labels`; rows that the adapter was not trained on.
        ladder: sizes, as shares of all parameters, at which to look again: a forward pass of the
            whole adapter and a forward and backward pass of the cut, each.
        ridge: how far the gates are held to where they are, > 0, in units of a piece's mean
            curvature. Large values leave them at 1: brain damage, not surgery.
        kind, seed, progress: see `curvature.collect`.

    Raises:
        ModelError, DataError, DivergedError: see `curvature.collect`; DataError too for fewer than
            32 rows.

    Example:
        >>> order = by_data(peft_model, loader)
        >>> order.save("run/ordered")
    """
    from rankwise.curvature import collect, read

    if not ridge > 0:
        raise AdapterError(f"ridge is {ridge}; it has to be above 0")
    batches, first = _enough(batches), read(model)
    seen = collect(model, batches, kind=kind, seed=seed, progress=progress)
    outputs = seen.outputs
    pieces, j = quadratic(first, seen)
    listed = _all(pieces)
    costs = [pieces[name].cost for name, _ in listed]
    alive, gone = list(range(len(listed))), []
    gates = torch.ones(len(listed), dtype=torch.float64)
    fitted: dict[int, Tensor] = {}
    wanted, left = _stored(len(listed)), sum(costs)
    sizes = sorted((share for share in ladder if 0 < share < 1), reverse=True)
    for n, limit in enumerate([share * sum(costs) + 1e-6 for share in sizes] + [0.0]):
        if not alive:  # of a small adapter the last sizes of the ladder hold no piece
            break
        if n:
            kept = [listed[i] for i in alive]
            now = _gated(pieces, kept, gates[alive])
            how = {"kind": kind, "seed": seed + n, "progress": progress, "outputs": outputs}
            seen = _look(model, batches, now, first, **how)
            j = gate_columns([name for name, _ in kept], seen)
        here, before = list(alive), gates[alive]
        for out, factor in removal(j, _moved(seen), [costs[i] for i in here], ridge):
            if out is not None:
                gone.append(here[out])
                alive.remove(here[out])
                left -= costs[here[out]]
            gates = torch.zeros_like(gates)
            gates[here] = before * factor.clamp(0, STEP)
            if alive and (out is None or len(alive) in wanted):
                fitted[len(alive)] = gates
            if left <= limit:
                break
    order = gone[::-1]
    return Order(
        pieces,
        tuple(listed[i] for i in order),
        {"order": "data", "rows": seen.rows, "ladder": sizes, "ridge": ridge, "seed": seed},
        {count: g[order[:count]] for count, g in fitted.items()},
    )


def _stored(count: int) -> set[int]:
    """Numbers of pieces whose gates an order holds: each one up to 64, then steps of 9 %."""
    return {*range(1, 65), *(round(64 * 2 ** (n / 8)) for n in range(1, 200)), count}


def _look(
    model: Any,
    batches: Iterable[Batch],
    now: Mapping[str, Factors | None],
    whole: Mapping[str, Factors],
    **how: Any,
) -> Statistics:
    """Statistics of the model with these factors, against the whole adapter, which stays in it."""
    from rankwise.curvature import collect, write

    try:
        write(model, {name: padded(now[name], f) for name, f in whole.items()})
        return collect(model, batches, reference=whole, **how)
    finally:
        write(model, whole)


def _moved(seen: Statistics) -> Tensor:
    return seen.residuals.double() / seen.count**0.5


def cut_in_rounds(
    model: Any, batches: Iterable[Batch], budget: int, rounds: int = 3, **how: Any
) -> Order:
    """`by_data` with the ladder that leads to one budget in equal factors.

    Cuts by the rounds' root of the factor and looks again, so often, and once more at the budget
    itself, to set the gates there. Larger and smaller cuts of the same order nest with it; another
    budget has another ladder and so another order, whose cuts need not nest with these.

    Args:
        budget: parameters in all.
        rounds: cuts, >= 1; there is one look more.

    Raises:
        AdapterError: a budget that is no cut. Else as `by_data`.
    """
    from rankwise.curvature import read

    total = sum(f.rank * f.cost for f in read(model).values())
    if not 0 < budget <= total or rounds < 1:
        raise AdapterError(
            f"budget is {budget} and rounds {rounds}; the adapter has {total} parameters, and "
            "there has to be a round"
        )
    steps = [(budget / total) ** (n / rounds) for n in range(1, rounds + 1)]
    return by_data(model, batches, ladder=steps, **how)


def refit(
    model: Any,
    batches: Iterable[Batch],
    order: Order,
    budgets: Iterable[int],
    *,
    passes: int = 2,
    ridge: float = 0.1,
    kind: Kind | None = None,
    seed: int = 0,
) -> Order:
    """The same order, by data or not, with gates set for cuts at these budgets.

    The gates are those that bring the outputs of the cut nearest to those of the whole adapter, by
    a Gauss-Newton step in each pass: closed form, no learning rate, no labels. A step that brings
    them no nearer is not taken.

    Args:
        model: the PEFT model that was ordered, uncut.
        budgets: parameters in all, each.

    Raises:
        As `by_data`; AdapterError for a budget that holds no piece, or an order of another model.
    """
    from rankwise.curvature import read

    batches, first = _enough(batches), read(model)
    if {n: f.scaling for n, f in first.items()} != {n: f.scaling for n, f in order.pieces.items()}:
        raise AdapterError("the order has other modules or scalings than the model; order it anew")
    fitted = dict(order.gates)
    for kept in [order.kept(budget) for budget in budgets]:
        names, gates = [name for name, _ in kept], order._gates_of(len(kept))
        costs = [order.pieces[name].cost for name in names]
        least = math.inf
        for n in range(passes + 1):
            now = _gated(order.pieces, kept, gates)
            seen = _look(model, batches, now, first, kind=kind, seed=seed)
            if (away := float((seen.residuals**2).sum())) >= least:
                break
            least, fitted[len(kept)] = away, gates
            if n < passes:
                j = gate_columns(names, seen)
                _, factor = next(removal(j, _moved(seen), costs, ridge))
                gates = gates * factor.clamp(0, STEP)
    return replace(order, gates=fitted)


def quadratic(
    factors: Mapping[str, Factors], statistics: Statistics
) -> tuple[dict[str, Factors], Tensor]:
    """The pieces that the data tell apart best, and J / √count (scalars, pieces), so F = JᵀJ."""
    pieces, columns = {}, []
    for name, f in factors.items():
        pieces[name], left, right, _ = rotate(
            f, statistics.gradients[name], statistics.inputs[name]
        )
        columns.append(gate_gradients(statistics.products[name].double(), left, right))
    return pieces, torch.cat(columns, 1) / statistics.count**0.5


def gate_columns(names: Sequence[str], statistics: Statistics) -> Tensor:
    """J / √count of pieces that lie in the model as they are, each the next one of its module."""
    seen: Counter[str] = Counter()
    columns = []
    for name in names:
        i = seen[name]
        columns.append(statistics.products[name][:, i, i].double())
        seen[name] += 1
    return torch.stack(columns, 1) / statistics.count**0.5


def gate_gradients(c: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """∂/∂g_i = p_iᵀ C_n q_i, (rows, k), of the gates at 1 of the pieces (B p_i)(q_iᵀ A)."""
    return torch.einsum("ki,nkl,li->ni", left, c, right)


def rotate(f: Factors, p: Tensor, q: Tensor) -> tuple[Factors, Tensor, Tensor, Tensor]:
    """The pieces that a Kronecker-factored quadratic model would keep or drop, one by one.

    With P = L_P L_Pᵀ, Q = L_Q L_Qᵀ and L_Pᵀ L_Q = U Σ Vᵀ, the identity between B and A is
    Σ_i (L_P⁻ᵀ u_i σ_i)(v_iᵀ L_Q⁻¹): ΔW is as before, and removing piece i costs σ_i² in the model
    whose curvature is P ⊗ Q. P = s²BᵀB and Q = A Aᵀ give the SVD; a little of them is mixed in, so
    that directions which no row has touched (all of them, where B is zero) have pieces too.

    Args:
        f: factors of rank r. p, q: (r, r), symmetric and not negative.

    Returns:
        The new factors, p_i as columns (r, r), q_i as columns (r, r), σ (r,) in descending order.
    """
    lp, lp_inverse = _root(p, f.scaling**2 * _double(f.b).T @ _double(f.b))
    lq, lq_inverse = _root(q, _double(f.a) @ _double(f.a).T)
    u, s, vt = torch.linalg.svd(lp.T @ lq)
    left = lp_inverse @ (u * s)
    right = lq_inverse @ vt.T
    a, b = right.T @ _double(f.a), _double(f.b) @ left
    # Halves of equal norm: neither is then so small that its type cannot hold it.
    ratio = (b.norm(dim=0) / a.norm(dim=1).clamp_min(1e-150)).clamp(1e-12, 1e12).sqrt()
    return _like(f, a * ratio[:, None], b / ratio), left, right, s


MIXED = 1e-6


def _root(wanted: Tensor, plain: Tensor) -> tuple[Tensor, Tensor]:
    """L and L⁻ᵀ with L Lᵀ = `wanted`, up to its scale, where it has full rank; never singular.

    By eigenvectors and not by Cholesky: a layer that feeds one token alone (BERT's pooler) has a
    `wanted` of so low a rank that rounding makes it indefinite.
    """
    r = len(wanted)
    scale = wanted.diagonal().sum() / r
    mixed = wanted.clone() if scale > 0 else torch.zeros_like(wanted)
    scale = scale if scale > 0 else torch.ones_like(scale)
    if (size := plain.diagonal().sum() / r) > 0:
        mixed += MIXED * scale * plain / size
    values, vectors = torch.linalg.eigh(mixed)
    root = values.clamp_min(MIXED**2 * scale).sqrt()
    return vectors * root, vectors / root


def removal(
    j: Tensor, moved: Tensor, costs: Sequence[int], ridge: float
) -> Iterator[tuple[int | None, Tensor]]:
    """Pieces in the order in which they go, the least useful first, and the gates of the others.

    With x = g - 1, and -1 for what is gone, the gates of what stays, K, are those that minimise
    ½ ‖moved + J x‖² + ½ λ ‖x_K‖². With t = moved - Σ_gone J_i and M = (λ + J_K J_Kᵀ)⁻¹ the least is
    ½ λ tᵀM t, at g_i = 1 - b_i with b_i = J_iᵀ M t; letting i go as well adds
    ½ λ ((1 - b_i)² / (1 - a_i) - 1) with a_i = J_iᵀ M J_i, and changes M by one of rank 1. Each
    step takes the piece for which that is least per parameter.

    Args:
        j: (scalars, pieces), over √count.
        moved: how far the scalars have moved from where they should be, (scalars,), over √count.
        costs: parameters of each piece.
        ridge: λ over the mean of ‖J_i‖².

    Yields:
        (None, gates before any goes), then (piece, gates), a gate of 0 for what is gone.
    """
    scalars, pieces = j.shape
    mean = float((j**2).sum() / max(pieces, 1))
    lam = ridge * mean if mean > 0 else 1.0
    cost = torch.tensor(costs, dtype=j.dtype)
    m = torch.linalg.inv(lam * torch.eye(scalars, dtype=j.dtype) + j @ j.T)
    a, b = ((m @ j) * j).sum(0), j.T @ (m @ moved)
    present = torch.ones(pieces, dtype=torch.bool)
    yield None, 1 - b
    for _ in range(pieces):
        price = ((1 - b) ** 2 / (1 - a) - 1) / cost
        i = int(torch.where(present, price, torch.inf).argmin())
        present[i] = False
        v = m @ j[:, i]
        w, rest, gate = j.T @ v, 1 - a[i], 1 - b[i]
        m += torch.outer(v, v) / rest
        a, b = a + w**2 / rest, b - w * gate / rest
        a[~present] = 0  # what is gone counts no more, and its a is no longer below 1
        yield i, torch.where(present, 1 - b, 0.0)


def padded(f: Factors | None, like: Factors) -> Factors:
    """The factors at the rank of `like`, zeros behind them."""
    a, b = torch.zeros_like(like.a), torch.zeros_like(like.b)
    if f is not None:
        a[: f.rank], b[:, : f.rank] = f.a, f.b
    return Factors(a, b, like.scaling)


def _enough(batches: Iterable[Batch]) -> list[Batch]:
    """The batches as a list, since several passes see them; refused if there are too few rows."""
    found = list(batches)
    for batch in found[:1]:
        if not isinstance(batch, Mapping) or not any(
            isinstance(value, Tensor) for value in batch.values()
        ):
            raise DataError(
                "order takes batches of tensors, as the model takes them, and these are single "
                "rows; give DataLoader(rows, batch_size=16, collate_fn=...)"
            )
    tensors = [next(v for v in batch.values() if isinstance(v, Tensor)) for batch in found]
    rows = sum(map(len, tensors))
    if rows < LEAST_ROWS:
        raise DataError(
            f"{rows} rows are too few to order by: at least {LEAST_ROWS} are needed, and a few "
            "hundred are better, since pieces whose effects overlap are told apart row by row"
        )
    return found


def _double(x: Tensor) -> Tensor:
    return x.flatten(1).double().cpu()


# An adapter with its order.


@dataclass(frozen=True)
class Ordered:
    """A LoRA adapter and an order of its pieces: every size of it, cut in milliseconds.

    Attributes:
        adapter: all of it, as trained.
        order: of its pieces.

    Example:
        >>> ordered = rankwise.order(peft_model, held_out_loader)
        >>> ordered.cut(budget=50_000).save("small")  # stock PEFT
    """

    adapter: Adapter
    order: Order

    def cut(
        self, budget: int | None = None, *, keep: float | None = None, rank: int | None = None
    ) -> Adapter:
        """A stock PEFT adapter of a size: the beginning of the order. Give one of the three.

        Args:
            budget: parameters in all.
            keep: share of the parameters, in (0, 1].
            rank: the first so many pieces of every module.

        Raises:
            AdapterError: not one of the three, out of range, or too small for the first piece.
        """
        most = self.adapter.parameters
        if isinstance(budget, Integral) and budget > most:
            raise AdapterError(
                f"budget is {budget}; the adapter has {most} parameters, give no more"
            )
        found = self.order.factors(budget, keep=keep, rank=rank)
        return self.adapter.with_factors({n: f for n, f in found.items() if f is not None})

    def save(self, folder: str | Path) -> None:
        """Writes the adapter, which stock PEFT loads, with the order beside it.

        Raises:
            AdapterError: the folder exists.
        """
        self.adapter.save(folder)
        self.order.save(folder)

    @classmethod
    def load(cls, folder: str | Path) -> Ordered:
        """Reads what `save` wrote; no model, data or GPU.

        Raises:
            AdapterError: no adapter or no order there, or a damaged one.
        """
        return cls(Adapter.load(folder), Order.load(folder))


def order(model: Any, batches: Iterable[Batch] | None = None, **how: Any) -> Ordered:
    """Orders the pieces of a trained PEFT LoRA adapter by what held-out rows say.

    For an adapter of any trainer: the model is as before afterwards.

    Args:
        model: PEFT model with a LoRA adapter, or the Trainer that trained one (TRL's too).
        batches: held-out rows with labels as the model takes them, for example a DataLoader; some
            hundred rows, none that the adapter was trained on. None takes the trainer's own.
        **how: see `by_data`.

    Raises:
        ModelError, AdapterError: not LoRA, or DoRA and others that a change of rank would break.
        DataError: too few rows, or rows without labels. DivergedError: a loss that is not finite.

    Example:
        >>> ordered = rankwise.order(peft_model, held_out_loader)
        >>> ordered.cut(keep=1 / 16).save("small")
    """
    from rankwise.curvature import read

    if hasattr(model, "get_eval_dataloader"):
        from rankwise.batches import batches_of

        batches = batches_of(model) if batches is None else batches
        model = model.accelerator.unwrap_model(model.model)
    if batches is None:
        raise DataError("there are no rows to order by; give batches, or the Trainer")
    read(model)  # refuses what has no pieces to order, before anything is written
    return Ordered(Adapter.of(model), by_data(model, batches, **how))
