"""Every method x model family: gated, baked, pruned and reloaded models compute the same function.

attach -> a few steps of the method's own search -> bake or prune -> save -> reload by plain PEFT in
a process where rankwise cannot be imported -> equal logits; merge -> equal logits.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments, default_data_collator

from families import FAMILIES, Family, batch, family, rows
from rankwise import METHODS, DyLoRA
from rankwise.bilevel import SearchTrainer
from rankwise.gate import attach, bake, gate_values, keep_first
from rankwise.lora import build, check, find_entries, layers_of
from rankwise.nested import NestedTrainer
from rankwise.plan import RankPlan
from rankwise.trainer import task_type_of

K = 3


def searched(of: Family, method_name: str, folder: Path):
    """A gated model after a few steps of the method's own, with everything off its start.

    Under DyLoRA every entry then stands at another rank.
    """
    method = METHODS[method_name]
    model = of.model()
    model.save_pretrained(folder / "base")
    entries = find_entries(model, None, K)
    plan = RankPlan(entries, r=K, scaling=2.0)
    peft_model = build(model, plan, task_type=task_type_of(model))
    args = TrainingArguments(
        output_dir=str(folder / "search"),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=5e-2,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    common = {
        "train_dataset": rows(of),
        "configuration": {},
        "data_collator": default_data_collator,
    }
    if isinstance(method, DyLoRA):
        trainer = NestedTrainer(peft_model, args, plan=plan, method=method, **common)
        trainer.train()
        keep_first(trainer.gated, {name: 1 + i % K for i, name in enumerate(plan.modules)})
        return peft_model.eval(), plan, trainer.gated, method
    gated = attach(peft_model, plan, method.activation, method.initial(K))
    val = rows(of, seed=2)
    SearchTrainer(
        peft_model, args, gated=gated, method=method, validation_dataset=val, **common
    ).train()
    with torch.no_grad():  # far apart, so that a wrong order of pieces would show
        for i, gate in enumerate(gated.values()):
            gate.beta += torch.linspace(-1, 1, gate.beta.numel()).roll(i)
    return peft_model.eval(), plan, gated, method


def kept(method, alpha: list[float]) -> list[int]:
    """The pieces that the method's gate says stay."""
    if isinstance(method, DyLoRA):
        return [j for j, g in enumerate(alpha) if g > 0]
    return method.kept(alpha)


@torch.no_grad()
def logits(model, of: Family) -> torch.Tensor:
    return model(**batch(of)).logits


@pytest.fixture(params=list(METHODS))
def method_name(request):
    return request.param


@pytest.fixture(params=FAMILIES, ids=lambda f: f.name)
def of(request):
    return request.param


def test_baked_adapter_computes_the_gated_function_in_plain_peft(
    of, method_name, plain_peft, tmp_path
):
    model, _, _, _ = searched(of, method_name, tmp_path)
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
    of, method_name, plain_peft, tmp_path
):
    model, plan, gated, method = searched(of, method_name, tmp_path)
    keep = {name: kept(method, alpha) for name, alpha in gate_values(gated).items()}
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


def test_merging_a_gated_model_keeps_its_function(of, method_name, tmp_path):
    """The gate is part of what merge reads, so even an unbaked merge is right."""
    model, _, _, _ = searched(of, method_name, tmp_path)
    expected = logits(model, of)
    torch.testing.assert_close(logits(model.merge_and_unload(), of), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2-classification", "gpt2-lm"])
def test_parts_of_a_fused_projection_stay_apart(name, tmp_path):
    """Query's pieces never reach value's rows, through training and in the saved adapter."""
    of = family(name)
    model, _, _, _ = searched(of, "autolora", tmp_path)
    bake(model)
    for layer in layers_of(model).values():
        b = layer.lora_B["default"].weight
        width = b.shape[0] // 3
        assert b[:width, :K].abs().sum() > 0 and b[2 * width :, K:].abs().sum() > 0
        assert b[width:, :K].abs().max() == 0 and b[: 2 * width, K:].abs().max() == 0
