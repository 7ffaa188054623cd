"""Gates x model families: gated, baked, pruned, merged and reloaded models compute one function."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file

from families import FAMILIES, Family, batch
from rankwise.gate import attach, attach_nested, bake, gate_values, keep_first
from rankwise.lora import build, check, find_entries, layers_of
from rankwise.plan import RankPlan
from rankwise.trainer import task_type_of

K = 3


@dataclass(frozen=True)
class Kind:
    name: str
    attach: Callable
    kept: Callable


def learned(activation):
    """Gates far apart, so that a wrong order of pieces would show."""

    def put(model, plan):
        gated = attach(model, plan, activation)
        with torch.no_grad():
            for i, gate in enumerate(gated.values()):
                gate.beta += torch.linspace(-1, 1, gate.beta.numel()).roll(i)
        return gated

    return put


def nested(model, plan):
    """Every entry at another rank."""
    gated = attach_nested(model, plan)
    keep_first(gated, {name: 1 + i % K for i, name in enumerate(plan.modules)})
    return gated


KINDS = [
    Kind("softmax", learned(lambda b: torch.softmax(b, 0)), lambda g: g >= 1 / K),
    Kind("sigmoid", learned(torch.sigmoid), lambda g: g >= 0.5),
    Kind("nested", nested, lambda g: g > 0),
]


def gated_model(of: Family, kind: Kind, folder):
    """A gated model with random factors; what its gates say stays, by entry."""
    model = of.model()
    model.save_pretrained(folder / "base")
    plan = RankPlan(find_entries(model, None, K), r=K, scaling=2.0)
    peft_model = build(model, plan, task_type=task_type_of(model))
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in layers_of(peft_model).values():
            b = layer.lora_B["default"].weight  # zeros where a fused part must not reach stay
            b.copy_(torch.randn_like(b) * 0.3)
        for name, layer in layers_of(peft_model).items():
            mask_parts(layer.lora_B["default"].weight, plan, name)
    gated = kind.attach(peft_model, plan)
    keep = {
        name: [j for j, stays in enumerate(kind.kept(torch.tensor(g))) if stays]
        for name, g in gate_values(gated).items()
    }
    return peft_model.eval(), plan, gated, keep


def mask_parts(b, plan, module):
    """Zeros outside the rows of each part of a fused module."""
    column = 0
    for entry in plan.modules.values():
        if entry.module == module:
            start, stop = entry.rows or (0, len(b))
            b[:start, column : column + entry.rank] = 0
            b[stop:, column : column + entry.rank] = 0
            column += entry.rank


@torch.no_grad()
def logits(model, of: Family) -> torch.Tensor:
    return model(**batch(of)).logits


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
def kind(request):
    return request.param


@pytest.fixture(params=FAMILIES, ids=lambda f: f.name)
def of(request):
    return request.param


def test_baked_adapter_computes_the_gated_function_in_plain_peft(of, kind, plain_peft, tmp_path):
    model, _, _, _ = gated_model(of, kind, tmp_path)
    expected = logits(model, of)
    base = model.get_base_model()
    bake(model)
    torch.testing.assert_close(logits(model, of), expected, rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert not [name for name in saved if "parametrizations" in name or "beta" in name]
    found = plain_peft(
        of.auto.__name__, tmp_path / "base", tmp_path / "adapter", batch(of), tmp_path
    )
    torch.testing.assert_close(found["logits"], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["merged"], expected, rtol=1e-4, atol=1e-5)
    assert base is model.get_base_model()


def test_pruned_adapter_computes_the_function_without_the_pruned_pieces(
    of, kind, plain_peft, tmp_path
):
    model, plan, gated, keep = gated_model(of, kind, tmp_path)
    assert 0 < sum(map(len, keep.values())) < sum(plan.ranks.values())
    silenced = dict(model.named_modules())
    with torch.no_grad():  # the oracle: pruned pieces silenced by zeros in the gated model
        for name, gate in gated.items():
            b = silenced[f"base_model.model.{name}"].lora_B["default"].parametrizations.weight
            stays = torch.zeros(sum(gate.sizes), dtype=torch.bool)
            for i, entry in enumerate(gate.names):
                stays[[i * K + j for j in keep[entry]]] = True
            b.original[:, ~stays] = 0
    expected = logits(model, of)
    bake(model, keep)
    torch.testing.assert_close(logits(model, of), expected, rtol=1e-5, atol=1e-6)
    pruned = plan.with_ranks({name: len(pieces) for name, pieces in keep.items()})
    check(model, pruned)
    model.save_pretrained(tmp_path / "adapter")
    found = plain_peft(
        of.auto.__name__, tmp_path / "base", tmp_path / "adapter", batch(of), tmp_path
    )
    torch.testing.assert_close(found["logits"], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["merged"], expected, rtol=1e-4, atol=1e-5)


def test_every_entry_of_the_family_gets_a_rank(of):
    entries = find_entries(of.model(), None, K)
    assert len(entries) == 2 * len(of.entries)
    assert all(any(name.endswith(end) for end in of.entries) for name in entries)


def test_merging_a_gated_model_keeps_its_function(of, kind, tmp_path):
    """The gate is part of what merge reads, so even an unbaked merge is right."""
    model, _, _, _ = gated_model(of, kind, tmp_path)
    expected = logits(model, of)
    torch.testing.assert_close(logits(model.merge_and_unload(), of), expected, rtol=1e-4, atol=1e-5)
