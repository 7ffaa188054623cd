"""Every method x model family, through the slots alone.

start -> attach -> a few steps -> keep -> hand over -> reload where rankwise cannot be imported ->
equal logits. A method that PEFT or transformers cannot read comes back through its own `load`.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import default_data_collator

from families import FAMILIES, Family, arguments, batch, family, rows
from rankwise.errors import ModelError
from rankwise.lora import layers_of
from rankwise.methods import METHODS, LoRA, Setting
from rankwise.trainer import run_training, task_type_of

K = 3


def small(name: str):
    """The method at a size that a model of hidden size 16 can have."""
    method = METHODS[name]
    sizes = {"r": K, "ranks": (1, K), "gate_learning_rate": 5e-2, "bottleneck": 4}
    known = method.__dataclass_fields__
    return method.with_flags(**{key: value for key, value in sizes.items() if key in known})


def setting_for(of: Family, model, method, folder: Path) -> Setting:
    args = arguments(folder, max_steps=8, learning_rate=2e-2)
    return Setting(
        rows(of),
        rows(of, 80, seed=2),
        method.arguments(args),
        task_type_of(model),
        options={"data_collator": default_data_collator},
    )


def handed_over(of: Family, name: str, folder: Path):
    """The trainer after all slots, with the adapter in `folder/adapter`."""
    method = small(name)
    model = of.model()
    model.save_pretrained(folder / "base")
    setting = setting_for(of, model, method, folder / "training")
    try:
        method.check(model, setting)
    except ModelError as error:
        assert "\n" not in str(error) and len(str(error)) > 20
        pytest.skip(str(error))
    plan = method.start(model, setting)
    if method.anew:
        plan, method = method.choose(model, setting).plan, LoRA()
    torch.manual_seed(0)
    trainer = method.trainer(method.attach(model, plan, setting), plan, setting)
    run_training(trainer, None)
    kept = method.keep(trainer, plan, setting)
    method.hand_over(trainer, kept, folder)
    trainer.model.eval()
    return trainer, kept, method


@torch.no_grad()
def logits(model, of: Family) -> torch.Tensor:
    return model(**batch(of)).logits


@pytest.mark.parametrize("of", FAMILIES, ids=lambda f: f.name)
@pytest.mark.parametrize("name", METHODS)
def test_what_is_handed_over_computes_what_was_trained(of, name, plain_peft, tmp_path):
    trainer, kept, method = handed_over(of, name, tmp_path)
    expected = logits(trainer.model, of)
    untrained = logits(of.model().eval(), of)
    assert (expected - untrained).abs().max() > 1e-3  # something was learned at all
    folder = tmp_path / method.product
    if method.stock:
        found = plain_peft(of.auto.__name__, tmp_path / "base", folder, batch(of), tmp_path)
        length = expected.shape[1]  # stock PEFT gives logits of virtual tokens too, before these
        torch.testing.assert_close(found["logits"][:, -length:], expected, rtol=1e-4, atol=1e-5)
    if method.stock == "peft" and "merged" in found:
        torch.testing.assert_close(found["merged"], expected, rtol=1e-4, atol=1e-4)
    again = method.load(of.model(), folder).eval()
    torch.testing.assert_close(logits(again, of), expected, rtol=1e-4, atol=1e-5)
    if kept.plan is not None:
        realised = {name: layer.r["default"] for name, layer in layers_of(again).items()}
        assert realised == kept.plan.module_ranks()


def test_a_run_stopped_after_its_last_step_takes_no_other(name_of_one_training, tmp_path):
    """Stopped while it chose: the training goes on from its last checkpoint with no step more."""
    of, method = family("bert-classification"), small(name_of_one_training)
    found = []
    for resume in (None, True):
        model = of.model()
        setting = setting_for(of, model, method, tmp_path / "training")
        saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 7}
        setting = replace(setting, args=method.arguments(arguments(tmp_path / "t", **saving)))
        plan = method.start(model, setting)
        torch.manual_seed(0)
        trainer = method.trainer(method.attach(model, plan, setting), plan, setting)
        run_training(trainer, resume)
        assert trainer.state.global_step == 7
        method.hand_over(trainer, method.keep(trainer, plan, setting), tmp_path / str(resume))
        found.append(logits(trainer.model.eval(), of))
    assert torch.equal(*found)


@pytest.fixture(
    params=[n for n, m in METHODS.items() if m.resumable and not m.anew and n != "llama-adapter"]
)
def name_of_one_training(request):
    return request.param


@pytest.mark.parametrize("of", ["gpt2-classification", "gpt2-lm"])
@pytest.mark.parametrize("name", ["autolora", "dylora"])
def test_parts_of_a_fused_projection_stay_apart(of, name, tmp_path):
    """Query's pieces never reach value's rows, through training and in what is handed over."""
    _, kept, method = handed_over(family(of), name, tmp_path)
    again = method.load(family(of).model(), tmp_path / "adapter")
    for module, layer in layers_of(again).items():
        b = layer.lora_B["default"].weight
        width, q = b.shape[0] // 3, kept.plan.ranks[f"{module}.q"]
        assert b[:width, :q].abs().sum() > 0 and b[2 * width :, q:].abs().sum() > 0
        assert b[width:, :q].abs().max() == 0 and b[: 2 * width, q:].abs().max() == 0
