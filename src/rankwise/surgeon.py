"""The order by data: a quadratic model of the loss over the gates of all pieces, and its surgery.

Optimal brain surgeon (Hassibi and Stork 1993) over the rank-1 pieces of a LoRA: the statistics are
those of `rankwise.curvature`, the pieces' basis a Kronecker-factored one (`rotate`), and what goes
is taken up by the gates of what stays (`removal`). docs/cut.md has the derivation.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rankwise.adapter import Adapter, Factors
from rankwise.errors import AdapterError, DataError
from rankwise.given import check_type, fits, shown
from rankwise.orders import Order, Ordered, all_pieces, gated, padded, shaped_like

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

    if not fits(ridge, float) or not ridge > 0:
        raise AdapterError(f"ridge is {shown(ridge)}; it has to be a number above 0")
    if not fits(ladder, tuple[float, ...]):
        raise AdapterError(f"ladder is {shown(ladder)}; it has to be a list of shares below 1")
    batches, first = _enough(batches), read(model)
    seen = collect(model, batches, kind=kind, seed=seed, progress=progress)
    outputs = seen.outputs
    pieces, j = quadratic(first, seen)
    listed = all_pieces(pieces)
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
            now = gated(pieces, kept, gates[alive])
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
        names, gates = [name for name, _ in kept], order.gates_of(len(kept))
        costs = [order.pieces[name].cost for name in names]
        least = math.inf
        for n in range(passes + 1):
            now = gated(order.pieces, kept, gates)
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
    known = [name for name in signature(by_data).parameters if name not in ("model", "batches")]
    if odd := sorted(set(how) - set(known)):
        raise DataError(f"order has no option {odd[0]!r}; it has {', '.join(known)}")
    read(model)  # refuses what has no pieces to order, before anything is written
    if batches is None:
        raise DataError("there are no rows to order by; give batches, or the Trainer")
    return Ordered(Adapter.of(model), by_data(model, batches, **how))
