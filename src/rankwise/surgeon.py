"""The order by data: a quadratic model of the loss over the gates of all pieces, and its surgery.

Optimal brain surgeon (Hassibi and Stork 1993) over the rank-1 pieces of a LoRA: the statistics are
those of `rankwise.curvature`, the pieces' basis a Kronecker-factored one (`rotate`), and what goes
is taken up by the gates of what stays (`removal`). docs/cut.md has the derivation.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rankwise.adapter import Adapter, Factors
from rankwise.errors import AdapterError, DataError, DivergedError
from rankwise.given import check_type, fits, shown
from rankwise.orders import Order, Ordered, Piece, all_pieces, gated, padded, shaped_like

# `curvature` needs PEFT and transformers: it is imported where a model is looked at.
if TYPE_CHECKING:
    from rankwise.curvature import Batch, Kind, Statistics

LEAST_ROWS = 32


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
    sequence = sorted(all_pieces(pieces), key=lambda piece: -keys[piece[0]][piece[1]])
    return Order(pieces, tuple(sequence), {"order": "activation", "rows": statistics.rows})


STEP = 4.0
"""The most by which one look may multiply a gate: so far a quadratic model may be trusted."""

LADDER = (1 / 4, 1 / 16, 1 / 32, 1 / 64)

TRUST = 2.0
"""How many times the divergence that was foreseen there may be, before a step is undone."""

SLIGHT = 0.05
"""A cut whose outputs are within this share of the loss of the whole adapter's is let be."""

UNDONE = 2
"""At most so many steps are undone on the way to each size of the ladder."""


def by_data(
    model: Any,
    batches: Iterable[Batch],
    *,
    ladder: Sequence[float] = LADDER,
    trust: float = TRUST,
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
    of the outputs, and what goes next is chosen by what is seen there. Where their divergence from
    the whole adapter's is much larger than was foreseen, the step was too long for a quadratic
    model: it is undone, and goes half as far, by the logarithm of the number of pieces; the next
    one goes at most twice as far again. The aim is the outputs of the whole adapter; labels say
    which tokens count and how large the loss is.

    The whole is one order, and the pieces of all its cuts are nested; their gates are not, each
    size has its own.

    Args:
        model: PEFT LoRA model; as before afterwards.
        batches: dicts of tensors with `labels`; rows that the adapter was not trained on.
        ladder: sizes, as shares of all parameters, at which to look again: a forward pass of the
            whole adapter and a forward and backward pass of the cut, each.
        trust: how many times the divergence that was foreseen there may be, >= 1; `math.inf` undoes
            no step. A cut within 5 % of the loss of the whole adapter is let be, and on the way to
            each size of the ladder two steps are undone at most; below the last none is checked.
        ridge: how far the gates are held to where they are, > 0, in units of a piece's mean
            curvature. Large values leave them at 1: brain damage, not surgery.
        kind, seed: see `curvature.collect`.
        progress: called with the number of rows that a look has seen, after each batch; each look
            counts anew, and one that is undone may end early.

    Raises:
        ModelError, DataError, DivergedError: see `curvature.collect`; DataError too for fewer than
            32 rows.

    Example:
        >>> order = by_data(peft_model, loader)
        >>> order.save("run/ordered")
    """
    from rankwise.curvature import collect, read

    _check(ladder, trust, ridge)
    batches, first = _enough(batches), read(model)
    seen = collect(model, batches, kind=kind, seed=seed, progress=progress)
    rows, count, outputs = seen.rows, seen.count, seen.outputs
    slight = 2 * SLIGHT * seen.loss  # the squares of residuals are twice the divergence
    pieces, j = quadratic(first, seen)
    left = _Left(all_pieces(pieces), torch.ones(j.shape[1]).double(), j, _moved(seen), seed)
    cost = {piece: pieces[piece[0]].cost for piece in left.pieces}
    shares = sorted((float(share) for share in ladder if 0 < share < 1), reverse=True)
    limits = [share * sum(cost.values()) + 1e-6 for share in shares]
    seeds = itertools.count(seed + 1)

    def look(left: _Left, step: _Step, may_undo: bool) -> tuple[_Left, bool]:
        bound = max(trust * step.foreseen * count, slight) if may_undo else math.inf
        drawn, now = next(seeds), gated(pieces, step.kept, step.gates)
        ruler = {"measured_by": left.seed, "most": bound, "outputs": outputs}
        how = {"kind": kind, "seed": drawn, "progress": progress}
        try:
            seen = _look(model, batches, now, first, **how, **ruler)
        except DivergedError:  # farther than any bound
            if may_undo:
                return left, True
            raise
        j, moved = gate_columns(step.kept, seen), _moved(seen)
        return _Left(step.kept, step.gates, j, moved, drawn), seen.distance > bound

    order: list[Piece] = []
    fitted: dict[int, dict[Piece, float]] = {}
    for limit in [*limits, 0.0]:
        steps, left = _stretch(model, left, cost, ridge, limit, look)
        for step in steps:
            order = step.gone[::-1] + order
            fitted |= step.fitted
    about = {"rows": rows, "ladder": shares, "ridge": float(ridge), "seed": seed}
    about["trust"] = float(trust) if math.isfinite(trust) else None  # JSON has no infinity
    about["looks"] = next(seeds) - seed
    gates = {
        n: torch.tensor([by_piece[piece] for piece in order[:n]], dtype=torch.float64)
        for n, by_piece in fitted.items()
    }
    return Order(pieces, tuple(order), {"order": "data"} | about, gates)


def _stretch(
    model: Any,
    left: _Left,
    cost: Mapping[Piece, int],
    ridge: float,
    limit: float,
    look: Callable[[_Left, _Step, bool], tuple[_Left, bool]],
) -> tuple[list[_Step], _Left]:
    """The steps to at most `limit` parameters, and what is left then.

    Args:
        look: at what a step leaves, for what is left then and whether that is too far; with False,
            it never is.
    """
    from rankwise.sharded import agreed

    steps: list[_Step] = []
    undone, until = 0, 0
    while sum(cost[piece] for piece in left.pieces) > limit:
        step = agreed(model, _step(left, cost, ridge, limit=limit, until=until))
        after = replace(left, pieces=[])
        while step.kept:
            after, too_far = look(left, step, undone < UNDONE and len(step.gone) > 1)
            if not agreed(model, too_far):
                break
            undone += 1
            halfway = round((len(left.pieces) * len(step.kept)) ** 0.5)
            shorter = max(halfway, len(step.kept) + 1)
            step = agreed(model, _step(left, cost, ridge, until=shorter))
        if undone:  # the next step goes at most twice as far as the one that stood
            until = round(len(step.kept) ** 3 / len(left.pieces) ** 2)
        steps.append(step)
        left = after
    return steps, left


def _check(ladder: Any, trust: Any, ridge: Any) -> None:
    if not fits(ladder, tuple[float, ...]):
        raise AdapterError(f"ladder is {shown(ladder)}; it has to be a list of shares below 1")
    if not fits(trust, float) or not trust >= 1:
        raise AdapterError(f"trust is {shown(trust)}; it has to be a number, at least 1")
    if not fits(ridge, float) or not ridge > 0:
        raise AdapterError(f"ridge is {shown(ridge)}; it has to be a number above 0")


@dataclass(frozen=True)
class _Left:
    """The pieces that are left and what a look at them has said.

    Attributes:
        pieces, gates: what they are, and by how much each is multiplied.
        j: derivatives by factors on the gates, (scalars, pieces), over √count.
        moved: how far the scalars are from those of the whole adapter, (scalars,), over √count.
        seed: of the signs that the scalars were drawn with.
    """

    pieces: list[Piece]
    gates: Tensor
    j: Tensor
    moved: Tensor
    seed: int


@dataclass(frozen=True)
class _Step:
    """What one look takes away.

    Attributes:
        gone: the least useful first.
        kept, gates: what is left then, and its gates.
        fitted: gates of what was left on the way, by its number.
        foreseen: the squares of how far the scalars will be from those of the whole adapter,
            summed, over count.
    """

    gone: list[Piece]
    kept: list[Piece]
    gates: Tensor
    fitted: dict[int, dict[Piece, float]]
    foreseen: float


def _step(
    left: _Left, cost: Mapping[Piece, int], ridge: float, *, limit: float = 0.0, until: int = 0
) -> _Step:
    """Takes pieces away until they have at most `limit` parameters, or are no more than `until`.

    A shorter step is the beginning of a longer one.
    """
    costs = [cost[piece] for piece in left.pieces]
    size, gone, kept = sum(costs), [], dict.fromkeys(range(len(costs)))
    stored, fitted = _stored(len(costs)), {}
    for out, factor in removal(left.j, left.moved, costs, ridge):
        if out is not None:
            gone.append(out)
            del kept[out]
            size -= costs[out]
        factor = factor.clamp(0, STEP)
        gates = left.gates * factor
        if kept and len(kept) in stored:
            fitted[len(kept)] = {left.pieces[i]: float(gates[i]) for i in kept}
        if size <= limit or len(kept) <= until:
            break
    return _Step(
        [left.pieces[i] for i in gone],
        [left.pieces[i] for i in kept],
        gates[list(kept)],
        fitted,
        float(((left.moved + left.j @ (factor - 1)) ** 2).sum()),
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
        rounds: cuts, >= 1; there is at least one look more.

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
    from rankwise.sharded import agreed

    batches, first = _enough(batches), read(model)
    if {n: f.scaling for n, f in first.items()} != {n: f.scaling for n, f in order.pieces.items()}:
        raise AdapterError("the order has other modules or scalings than the model; order it anew")
    fitted = dict(order.gates)
    for kept in [order.kept(budget) for budget in budgets]:
        gates = order.gates_of(len(kept))
        costs = [order.pieces[name].cost for name, _ in kept]
        least = math.inf
        for n in range(passes + 1):
            now = gated(order.pieces, kept, gates)
            seen = _look(model, batches, now, first, kind=kind, seed=seed, most=least)
            if agreed(model, seen.distance >= least):
                break
            least, fitted[len(kept)] = seen.distance, gates
            if n < passes:
                j = gate_columns(kept, seen)
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


def gate_columns(pieces: Iterable[Piece], statistics: Statistics) -> Tensor:
    """J / √count of pieces that lie in the model as they are, each the next one of its module."""
    seen: Counter[str] = Counter()
    columns = []
    for name, _ in pieces:
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
    return shaped_like(f, a * ratio[:, None], b / ratio), left, right, s


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


def _enough(batches: Iterable[Batch]) -> list[Batch]:
    """The batches as a list, since several passes see them; refused if there are too few rows."""
    check_type("batches", batches, Iterable, "batches of rows, a DataLoader for example", DataError)
    found = list(batches)
    for batch in found[:1]:
        if not isinstance(batch, Mapping) or not any(
            isinstance(value, Tensor) for value in batch.values()
        ):
            raise DataError(
                "order takes batches of tensors, as the model takes them, and these are single "
                "rows; give DataLoader(rows, batch_size=16, collate_fn=...)"
            )
    rows = sum(map(_rows, found))
    if rows < LEAST_ROWS:
        raise DataError(
            f"{rows} rows are too few to order by: at least {LEAST_ROWS} are needed, and a few "
            "hundred are better, since pieces whose effects overlap are told apart row by row"
        )
    return found


def _rows(batch: Batch) -> int:
    return len(next(v for v in batch.values() if isinstance(v, Tensor)))


def _double(x: Tensor) -> Tensor:
    return x.flatten(1).double().cpu()


def order(
    model: Any, batches: Iterable[Batch] | None = None, *, bar: bool = True, **how: Any
) -> Ordered:
    """Orders the pieces of a trained PEFT LoRA adapter by what held-out rows say.

    For an adapter of any trainer: the model is as before afterwards.

    Args:
        model: PEFT model with a LoRA adapter, or the Trainer that trained one (TRL's too).
        batches: held-out rows with labels as the model takes them, for example a DataLoader; some
            hundred rows, none that the adapter was trained on. None takes the trainer's own.
        bar: shows the rows of each look.
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
    known = [name for name in signature(by_data).parameters if name not in ("model", "batches")]
    if odd := sorted(set(how) - set(known)):
        raise DataError(f"order has no option {odd[0]!r}; it has {', '.join(known)}")
    read(model)  # refuses what has no pieces to order, before anything is written
    if batches is None:
        raise DataError("there are no rows to order by; give batches, or the Trainer")
    batches = _enough(batches)
    with _bar(batches, show=bar and "progress" not in how) as tell:
        return Ordered(Adapter.of(model), by_data(model, batches, **{"progress": tell} | how))


@contextmanager
def _bar(batches: Sequence[Batch], show: bool) -> Iterator[Callable[[int], None] | None]:
    """A bar over the rows, started anew at each look; what `by_data` calls after each batch."""
    from tqdm.auto import tqdm

    if not show:
        yield None
        return
    looks, before = 1, 0
    with tqdm(total=sum(map(_rows, batches)), unit=" rows", desc="order, look 1") as bar:

        def tell(seen: int) -> None:
            nonlocal looks, before
            if seen <= before:
                looks, before = looks + 1, 0
                bar.reset()
                bar.set_description(f"order, look {looks}", refresh=False)
            bar.update(seen - before)
            before = seen

        yield tell
