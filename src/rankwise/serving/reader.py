"""An adapter as an engine's rules read it: the update that each module would get, or the refusal.

An engine that does not run on this machine is held to its own rules here; `engines.py` says where
each was read.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from rankwise.adapter import Adapter, Factors
from rankwise.errors import ExportError
from rankwise.serving.engines import Engine

_LAYER = re.compile(r"^(?P<before>(?:.*?\.)?)(?P<number>\d+)\.(?P<rest>.+)$")


def kind_of(module: str) -> tuple[str, str]:
    """What modules of all layers share: the name before the layer's number, and the one after."""
    match = _LAYER.match(module)
    return (match["before"], match["rest"]) if match else ("", module)


def leaf(module: str) -> str:
    """`q_proj` of `model.layers.0.self_attn.q_proj`."""
    return module.rpartition(".")[2]


def whole_modules(adapter: Adapter) -> list[str]:
    """Modules that an adapter brings whole: heads of `modules_to_save`, saved embeddings."""
    names = {
        key.removeprefix("base_model.model.").rpartition(".")[0]
        for key in adapter.weights
        if ".lora_" not in key
    }
    return sorted(names)


def refuse(adapter: Adapter, engine: Engine) -> None:
    """Raises ExportError where an adapter has what the engine lacks, and no export can mend it."""
    if engine.form == "merged":
        return
    config = adapter.config
    if any(key.endswith(".lora_B.bias") for key in adapter.weights):
        raise ExportError(
            f"the adapter has biases beside its factors (lora_bias), which {engine.name} does not "
            "load; take --to merged"
        )
    if config.get("alora_invocation_tokens"):
        raise ExportError(
            f"the adapter is an activated LoRA (alora_invocation_tokens), which the export to "
            f"{engine.name} does not carry; train it without"
        )
    if engine.heads is not None:
        odd = [name for name in whole_modules(adapter) if leaf(name) not in engine.heads]
        if odd:
            raise ExportError(
                f"the adapter brings the whole module {odd[0]!r} (modules_to_save), which "
                f"{engine.name} does not load; take --to merged"
            )
    odd = [name for name in adapter.factors() if not _adapts(engine, name)]
    if odd:
        raise ExportError(
            f"the adapter has {odd[0]!r}, and {engine.name} adapts only "
            f"{', '.join(engine.targets or ())}; take --to merged, or train without that module"
        )


def _adapts(engine: Engine, module: str) -> bool:
    return engine.targets is None or leaf(module) in engine.targets


def read_as(engine: Engine, adapter: Adapter) -> dict[str, Factors]:
    """The factors and scalings that the engine would compute with.

    Args:
        engine: whose rules.
        adapter: a stock PEFT adapter; of a file in another form, the one that it stands for.

    Raises:
        ExportError: the engine would refuse the adapter, fail on it, or drop a part of it.
    """
    refuse(adapter, engine)
    found = adapter.factors()
    _check_ranks(engine, found, adapter.config["r"])
    if engine.every_layer:
        _check_gaps(found)
    have = {leaf(name) for name in found}
    for kind, other in engine.needs:
        if kind in have and other not in have:
            raise ExportError(f"{engine.name} takes no {kind} without {other}; export the adapter")
    first = next(iter(found.values())).rank
    first_type = next((t for t in engine.targets or () if t in have), None)
    return {
        name: replace(f, scaling=_scale(engine, adapter, f, leaf(name) == first_type, first))
        for name, f in found.items()
    }


def _scale(engine: Engine, adapter: Adapter, f: Factors, first_type: bool, first: int) -> float:
    if engine.scale == "patterns":
        return f.scaling
    config = adapter.config
    alpha, r = float(config["lora_alpha"]), config["r"]
    if engine.scale == "alpha/shape":
        return alpha / f.rank
    if engine.pads and not first_type:
        r = engine.rank_for(first)
    return alpha / (r**0.5 if engine.rslora and config.get("use_rslora") else r)


def _check_ranks(engine: Engine, found: Mapping[str, Factors], r: int) -> None:
    for name, f in found.items():
        engine.rank_for(f.rank)
        if engine.ranks_by_layer == "one" and f.rank != r:
            raise ExportError(
                f"{engine.name} takes one rank, r = {r}, and {name!r} has {f.rank}; export the "
                "adapter"
            )
    if engine.ranks_by_layer == "type":
        ranks: dict[tuple[str, str], int] = {}
        for name, f in found.items():
            padded = engine.rank_for(f.rank)
            if ranks.setdefault(kind_of(name), padded) != padded:
                raise ExportError(
                    f"{engine.name} takes one rank for {leaf(name)} in all layers, and the "
                    f"adapter has several, {f.rank} in {name!r} among them; export the adapter"
                )


def _check_gaps(found: Mapping[str, Factors]) -> None:
    """All layers that the adapter reaches have the same types of modules."""
    kinds = {kind_of(name) for name in found}
    layers = {(m["before"], m["number"]) for m in map(_LAYER.match, found) if m}
    for before, rest in sorted(kinds):
        for place, number in sorted(layers):
            name = f"{before}{number}.{rest}"
            if place == before and name not in found:
                raise ExportError(
                    f"{name!r} has no adapter, and a type of module that is not in all layers is "
                    "dropped in all of them; export the adapter"
                )


def distance(one: Mapping[str, Factors], other: Mapping[str, Factors]) -> tuple[float, str]:
    """‖ΔW - ΔW'‖ / ‖ΔW‖ over all modules, and the module that is furthest off.

    From products of the small factors in float64; the modules of either count.
    """
    whole, gap, worst = 0.0, 0.0, (-1.0, "")
    for name in {**one, **other}:
        mine, its = one.get(name), other.get(name)
        if mine is not None and its is not None and _shape(mine) != _shape(its):
            raise ExportError(
                f"{name!r} is {_shape(mine)} in one and {_shape(its)} in the other; they are of "
                "other base models"
            )
        same = 0.0 if mine is None else _product(mine, mine)
        there = 0.0 if its is None else _product(its, its)
        both = 0.0 if mine is None or its is None else _product(mine, its)
        off = max(same - 2 * both + there, 0.0)
        whole, gap, worst = whole + same, gap + off, max(worst, (off, name))
    return (gap / whole) ** 0.5 if whole > 0 else float(gap > 0), worst[1]


def _shape(f: Factors) -> tuple[int, ...]:
    """(out, in, ...) of ΔW."""
    return (f.b.shape[0], *f.a.shape[1:])


def _product(one: Factors, other: Factors) -> float:
    """⟨ΔW, ΔW'⟩ in the Frobenius inner product."""
    b = one.b.flatten(1).double().T @ other.b.flatten(1).double()
    a = one.a.flatten(1).double() @ other.a.flatten(1).double().T
    return one.scaling * other.scaling * float((a * b).sum())
