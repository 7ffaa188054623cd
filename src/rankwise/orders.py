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
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rankwise.adapter import ORDER, Adapter, Factors, svd
from rankwise.errors import AdapterError
from rankwise.escape import html
from rankwise.files import temporary_name, write_json
from rankwise.reading import parse_json

FORMAT = "rankwise-order/1"
PIECES, SEQUENCE = "pieces.safetensors", ORDER

Piece = tuple[str, int]


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
            gates = self.gates_of(len(kept))
        return gated(self.pieces, kept, gates)

    def gates_of(self, count: int) -> Tensor:
        """The gates of a cut of so many pieces, in the order's sequence."""
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


def gated(
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
    pieces, _ = svd_pieces(factors)
    sequence = all_pieces(pieces)
    random.Random(seed).shuffle(sequence)
    return Order(pieces, tuple(sequence), {"order": "random", "seed": seed})


def by_index(factors: Mapping[str, Factors]) -> Order:
    """The pieces as they are, first ones first, layer by layer: that of a nested training."""
    pieces = sorted(all_pieces(factors), key=lambda piece: piece[1])
    return Order(dict(factors), tuple(pieces), {"order": "index"})


def svd_pieces(factors: Mapping[str, Factors]) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """The SVD's pieces of each B A, √σ in both halves, and s σ by module, in descending order."""
    pieces, values = {}, {}
    for name, f in factors.items():
        u, s, v = svd(f)
        root = s.sqrt()
        pieces[name] = shaped_like(f, root[:, None] * v[: len(s)], u[:, : len(s)] * root)
        values[name] = f.scaling * s
    return pieces, values


def _by_key(factors: Mapping[str, Factors], key: Callable[[Tensor], Tensor], how: str) -> Order:
    pieces, values = svd_pieces(factors)
    keys = {name: key(s).tolist() for name, s in values.items()}
    size = {name: s.tolist() for name, s in values.items()}
    sequence = sorted(all_pieces(pieces), key=lambda p: (keys[p[0]][p[1]], -size[p[0]][p[1]]))
    return Order(pieces, tuple(sequence), {"order": how})


def all_pieces(factors: Mapping[str, Factors]) -> list[Piece]:
    return [(name, j) for name, f in factors.items() for j in range(f.rank)]


def shaped_like(f: Factors, a: Tensor, b: Tensor) -> Factors:
    """New halves in the shapes and types of the old."""
    return Factors(
        a.view(len(a), *f.a.shape[1:]).to(f.a.dtype).contiguous(),
        b.view(len(b), a.shape[0], *f.b.shape[2:]).to(f.b.dtype).contiguous(),
        f.scaling,
    )


def padded(f: Factors | None, like: Factors) -> Factors:
    """The factors at the rank of `like`, zeros behind them."""
    a, b = torch.zeros_like(like.a), torch.zeros_like(like.b)
    if f is not None:
        a[: f.rank], b[:, : f.rank] = f.a, f.b
    return Factors(a, b, like.scaling)


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

    def __repr__(self) -> str:
        return f"Ordered({self.order!r})"

    def _repr_html_(self) -> str:
        """What a notebook shows: sizes, each half of the one before, and the ranks of a quarter."""
        from rankwise.report.heatmap import html_table

        order = self.order
        rows = ["<tr><th>parameters</th><th>largest rank</th><th>modules</th></tr>"]
        for halvings in range(8):
            try:
                ranks = Counter(name for name, _ in order.kept(order.parameters >> halvings))
            except AdapterError:  # no piece fits
                break
            size = sum(rank * order.pieces[name].cost for name, rank in ranks.items())
            modules = f"{len(ranks)} of {len(order.pieces)}"
            rows.append(
                f"<tr><td>{size:,}</td><td>{max(ranks.values())}</td><td>{modules}</td></tr>"
            )
        share = 0.25 if len(rows) > 3 else 1.0
        sizes = f"<table><caption>{html(repr(order))}</caption>{''.join(rows)}</table>"
        return sizes + html_table(f"ranks at keep={share:g}", order.ranks(keep=share))

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
