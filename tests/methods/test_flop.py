"""FLOP: its gates against their own distribution, its Lagrangian against numerical derivatives, its
sizes against the target, and the adapter that it hands over against stock PEFT."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import default_data_collator

from families import FAMILIES, StopAfter, arguments, batch, family, rows
from rankwise.errors import RankwiseError
from rankwise.gate import gate_values
from rankwise.lora import check, drop, layers_of, uniform
from rankwise.methods.base import Setting
from rankwise.methods.flop import FLOP
from rankwise.methods.hard_concrete import (
    HardConcrete,
    draws,
    lagrangian,
    open_pieces,
    open_probability,
    stretched,
)
from rankwise.trainer import find_checkpoint, task_type_of

R = 3
QUICK = {"r": R, "gate_learning_rate": 1.0, "multiplier_learning_rate": 1.0}


def ready(of, folder, method, **changes):
    """A trainer that has not started, with its plan and setting."""
    model = of.model()
    setting = Setting(
        train=rows(of),
        held_out=None,
        args=arguments(folder, **({"max_steps": 12} | changes)),
        task_type=task_type_of(model),
        options={"data_collator": default_data_collator},
        configuration={"method": "flop"},
    )
    method.check(model, setting)
    plan = method.start(model, setting)
    torch.manual_seed(3)
    trainer = method.trainer(method.attach(model, plan, setting), plan, setting)
    return trainer, plan, setting


def gates_apart(trainer, seed: int = 0) -> None:
    """log α at random from -4 to 4, so that some gates are shut, some open, some between."""
    generator = torch.Generator().manual_seed(seed)
    for gate in trainer.gates.values():
        gate.log_alpha.data.uniform_(-4, 4, generator=generator)


@pytest.mark.parametrize("log_alpha", [-3.0, -1.0, 0.0, 0.7, 2.5])
def test_the_chance_of_an_open_gate_is_that_of_its_draws(log_alpha):
    count = 200_000
    gate = HardConcrete(["m"], [count], None, torch.device("cpu"))
    gate.log_alpha.data.fill_(log_alpha)
    gate.noise = draws(seed=0, step=0, count=count)
    share = float((gate.values() > 0).double().mean())
    p = 1 / (1 + math.exp(-(log_alpha - 2 / 3 * math.log(0.1 / 1.1))))
    assert float(open_probability(torch.tensor(log_alpha))) == pytest.approx(p, abs=1e-6)
    assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / count)  # five standard errors


def test_drawn_gates_are_stretched_to_0_and_1_and_are_deterministic_without_noise():
    gate = HardConcrete(["m"], [1000], None, torch.device("cpu"))
    gate.log_alpha.data.zero_()
    gate.noise = draws(seed=0, step=0, count=1000)
    drawn = gate.values()
    assert drawn.min() == 0 and drawn.max() == 1 and ((drawn > 0) & (drawn < 1)).any()
    gate.noise = None
    assert torch.allclose(gate.values(), torch.full((1000,), 0.5))  # 0.5 * 1.2 - 0.1
    assert stretched(torch.tensor([-2.5, 2.5])).tolist() == [0, 1]


def test_noise_depends_on_seed_and_step_alone():
    assert torch.equal(draws(1, 5, 7), draws(1, 5, 7))
    assert not torch.equal(draws(1, 5, 7), draws(1, 6, 7))
    assert not torch.equal(draws(1, 5, 7), draws(2, 5, 7))


def test_the_lagrangians_gradient_is_its_numerical_derivative(tmp_path):
    """In float64: descent for the gates, ascent for the multipliers."""
    method = FLOP(**QUICK, keep_share=0.3, warmup_share=0.0)
    trainer, plan, _ = ready(family("llama-lm"), tmp_path, method)
    gates_apart(trainer)
    for module in [*trainer.gates.values(), trainer.multipliers]:
        module.double()
    trainer.multipliers.first.data.fill_(0.4)
    trainer.multipliers.second.data.fill_(0.9)
    costs = [e.cost for e in plan.modules.values() for _ in range(e.rank)]

    def value() -> float:
        alphas = torch.cat([g.log_alpha.detach() for g in trainer.gates.values()]).tolist()
        chances = [1 / (1 + (0.1 / 1.1) ** (2 / 3) * math.exp(-a)) for a in alphas]
        t = sum(c * p for c, p in zip(costs, chances, strict=True)) / sum(costs)
        s = int(0.3 * sum(costs)) / sum(costs)
        first, second = (p.item() for p in trainer.multipliers.parameters())
        return first * (t - s) + second * (t - s) ** 2

    trainer.add_lagrangian()
    checked = [(g.log_alpha, 1) for g in trainer.gates.values()]
    checked += [(p, -1) for p in trainer.multipliers.parameters()]
    for parameter, sign in checked:
        flat = parameter.data.view(-1)
        for j in range(flat.numel()):
            flat[j] += 1e-6
            up = value()
            flat[j] -= 2e-6
            numerical = (up - value()) / 2e-6
            flat[j] += 1e-6
            assert float(parameter.grad.view(-1)[j]) == pytest.approx(
                sign * numerical, rel=1e-6, abs=1e-9
            )


def test_the_lagrangian_itself():
    one, two = torch.tensor(0.5), torch.tensor(3.0)
    assert float(lagrangian(torch.tensor(0.6), 0.4, one, two)) == pytest.approx(0.1 + 0.12)


def test_multipliers_rise_and_the_expected_size_falls_while_it_is_above_the_target(tmp_path):
    method = FLOP(r=R, keep_share=0.2, warmup_share=0.0, hard_share=0.0, gate_learning_rate=0.3)
    trainer, _, _ = ready(family("bert-classification"), tmp_path, method, max_steps=15)
    before = float(trainer.size())
    trainer.train()
    assert float(trainer.multipliers.first) > 0.5  # Adam: about 0.1 a step
    assert float(trainer.multipliers.second) > 0.5
    assert float(trainer.size()) < before - 0.02


def test_gates_and_multipliers_have_rates_of_their_own_and_no_decay(tmp_path):
    method = FLOP(r=R, gate_learning_rate=0.25, multiplier_learning_rate=0.5)
    trainer, _, _ = ready(family("bert-tagging"), tmp_path, method, weight_decay=0.1)
    groups = trainer.create_optimizer().param_groups
    assert trainer.create_optimizer().param_groups is groups
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(found) == sum(len(g["params"]) for g in groups)  # each in one group
    assert all(found[id(g.log_alpha)] == (0.25, 0.0) for g in trainer.gates.values())
    assert all(found[id(p)] == (0.5, 0.0) for p in trainer.multipliers.parameters())
    trained = {id(p) for p in trainer.model.parameters() if p.requires_grad}
    assert set(found) == trained


def test_the_target_falls_linearly_from_everything(tmp_path):
    method = FLOP(r=R, keep_share=0.5, warmup_share=0.4)
    trainer, _, _ = ready(family("llama-lm"), tmp_path, method)
    trainer.state.max_steps, shares = 100, []
    for trainer.state.global_step in (0, 10, 20, 40, 70):
        shares.append(trainer.target_share())
    assert shares == pytest.approx([1, 0.875, 0.75, 0.5, 0.5], abs=1e-3)


def test_a_step_of_micro_batches_adds_the_lagrangian_once_and_draws_once(tmp_path):
    method = FLOP(r=R, keep_share=0.3, warmup_share=0.0)
    changes = {"gradient_accumulation_steps": 3, "max_steps": 2, "per_device_train_batch_size": 2}
    trainer, _, _ = ready(family("bert-classification"), tmp_path, method, **changes)
    seen, added = [], []
    trainer.model.register_forward_pre_hook(
        lambda *_: seen.append(torch.cat([g.noise for g in trainer.gates.values()]))
    )
    add = trainer.add_lagrangian
    trainer.add_lagrangian = lambda: (added.append(trainer.state.global_step), add())
    trainer.train()
    assert added == [0, 1]
    assert all(torch.equal(seen[i], seen[0]) for i in (1, 2))
    assert all(torch.equal(seen[i], seen[3]) for i in (4, 5)) and not torch.equal(seen[3], seen[0])


def test_pieces_open_by_expected_size_per_parameter_within_the_target():
    assert open_pieces([2.0, -5.0, 1.0, 3.0], [10] * 4, target=25) == [0, 3]
    assert open_pieces([2.0, -5.0, 1.0, 3.0], [10] * 4, target=40) == [0, 2, 3]  # -5: shut
    assert open_pieces([2.0, 3.0], [10, 30], target=35) == [0]  # the dearer has less a parameter
    assert open_pieces([3.0, 2.0, 1.0], [10, 12, 5], target=15) == [0, 2]
    assert open_pieces([-5.0], [1], target=10) == []


@pytest.mark.parametrize("of", FAMILIES, ids=lambda of: of.name)
def test_the_adapter_handed_over_is_the_hard_gated_model_in_stock_peft(of, tmp_path, plain_peft):
    method = FLOP(**QUICK, keep_share=0.3)
    of.model().save_pretrained(tmp_path / "base")
    trainer, plan, setting = ready(of, tmp_path / "run", method)
    gates_apart(trainer)
    first = next(iter(trainer.gates.values()))
    first.log_alpha.data.fill_(-9.0)  # a module that falls to rank 0
    trainer.train()
    kept = method.keep(trainer, plan, setting)
    assert 0 < kept.plan.parameters <= method.target(plan) == kept.figures["target"]
    assert kept.plan.ranks[first.names[0]] == 0
    assert {n: [g for g in v if g > 0] for n, v in gate_values(trainer.gates).items()} == {
        n: [g for g in e.gate if g > 0] for n, e in kept.plan.modules.items()
    }
    inputs = batch(of)
    with torch.no_grad():
        gated = trainer.model.eval()(**inputs).logits
        method.hand_over(trainer, kept, tmp_path)
        handed = trainer.model.eval()(**inputs).logits
    torch.testing.assert_close(handed, gated, rtol=0, atol=1e-5)
    check(trainer.model, kept.plan)
    found = plain_peft(of.auto.__name__, tmp_path / "base", tmp_path / "adapter", inputs, tmp_path)
    torch.testing.assert_close(found["logits"], gated, rtol=0, atol=1e-5)
    torch.testing.assert_close(found["merged"], gated, rtol=0, atol=1e-4)
    again = method.load(of.model(), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(**inputs).logits, gated, rtol=0, atol=1e-5)
    saved = sum(p.numel() for n, p in again.named_parameters() if ".lora_" in n)
    modules = {e.module for e in kept.plan.modules.values() if e.rank}
    if not any(e.rows for e in kept.plan.modules.values()):
        assert saved == kept.plan.parameters
    assert set(layers_of(again)) == modules


def test_a_part_of_a_fused_projection_falls_to_rank_0_alone(tmp_path, plain_peft):
    of, method = (
        family("gpt2-lm"),
        FLOP(**QUICK, keep_share=0.5, target_modules=("c_attn.q", "c_attn.v")),
    )
    of.model().save_pretrained(tmp_path / "base")
    trainer, plan, setting = ready(of, tmp_path / "run", method)
    gates_apart(trainer)
    gate = next(iter(trainer.gates.values()))
    gate.log_alpha.data[:R] = -9.0  # its query
    gate.log_alpha.data[R:] = 9.0
    trainer.train()
    kept = method.keep(trainer, plan, setting)
    assert [kept.plan.ranks[name] for name in gate.names] == [0, R]
    with torch.no_grad():
        gated = trainer.model.eval()(**batch(of)).logits
    method.hand_over(trainer, kept, tmp_path)
    found = plain_peft(
        of.auto.__name__, tmp_path / "base", tmp_path / "adapter", batch(of), tmp_path
    )
    torch.testing.assert_close(found["logits"], gated, rtol=0, atol=1e-5)


def test_the_hard_part_moves_the_factors_and_nothing_else(tmp_path):
    method = FLOP(**QUICK, keep_share=0.4)
    trainer, _, _ = ready(family("llama-classification"), tmp_path, method, weight_decay=0.1)
    gates_apart(trainer)
    at = {}

    def watched() -> list[torch.Tensor]:
        alphas = [g.log_alpha for g in trainer.gates.values()]
        return [p.detach().clone() for p in [*alphas, *trainer.multipliers.parameters()]]

    fix = trainer.fix

    def fixing() -> None:
        if not at:
            at["gates"], at["step"] = watched(), trainer.state.global_step
            at["b"] = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        fix()

    trainer.fix = fixing
    trainer.train()
    assert at["step"] == 9  # of 12 steps, three tenths are 3
    for before, after in zip(at["gates"], watched(), strict=True):
        assert torch.equal(before, after)
    moved = [n for n, p in trainer.model.named_parameters() if not torch.equal(at["b"][n], p)]
    assert any("lora_A" in n for n in moved) and any("lora_B" in n for n in moved)


@pytest.mark.parametrize("stop, save_steps", [(5, 4), (11, 5)], ids=["soft", "hard"])
def test_a_resumed_run_equals_one_that_never_stopped(stop, save_steps, tmp_path):
    of, method = family("bert-classification"), FLOP(**QUICK, keep_share=0.4)
    straight, plan, setting = ready(of, tmp_path / "whole", method)
    straight.train()
    saving = {"save_strategy": "steps", "save_steps": save_steps}
    stopped, _, _ = ready(of, tmp_path / "parts", method, **saving)
    stopped.add_callback(StopAfter(stop))
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    checkpoint = find_checkpoint(tmp_path / "parts", True, dict(setting.configuration))
    resumed, _, _ = ready(of, tmp_path / "parts", method, **saving)
    resumed.train(resume_from_checkpoint=checkpoint)
    pairs = zip(straight.model.named_parameters(), resumed.model.named_parameters(), strict=True)
    for (name, a), (_, b) in pairs:
        assert torch.equal(a, b), name
    kept = [method.keep(trainer, plan, setting) for trainer in (straight, resumed)]
    assert kept[0] == kept[1]


def test_evaluation_in_between_uses_the_deterministic_gates(tmp_path):
    method = FLOP(**QUICK)
    trainer, _, _ = ready(family("bert-classification"), tmp_path, method)
    trainer.train()
    losses = {trainer.evaluate(trainer.train_dataset)["eval_loss"] for _ in range(2)}
    assert len(losses) == 1
    assert all(gate.noise is None for gate in trainer.gates.values())


def test_a_budget_in_parameters_is_kept(tmp_path):
    method = FLOP(**QUICK, budget=500)
    trainer, plan, setting = ready(family("bert-tagging"), tmp_path, method)
    trainer.train()
    assert 0 < method.keep(trainer, plan, setting).plan.parameters <= 500


def test_dropped_modules_are_base_modules_again_and_leave_the_config():
    of = family("llama-lm")
    base = of.model()
    plan = uniform(base, 2, target_modules=["q_proj", "o_proj"])
    method = FLOP(r=2, target_modules=("q_proj", "o_proj"))
    model = method.attach(base, plan, Setting(None, None, None, task_type="CAUSAL_LM"))
    ranks = {name: 0 if name.endswith("q_proj") else 2 for name in plan.ranks}
    drop(model, plan.with_ranks(ranks))
    assert set(layers_of(model)) == {name for name, rank in ranks.items() if rank}
    assert type(model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")) is (
        torch.nn.Linear
    )
    assert set(model.peft_config["default"].target_modules) == set(layers_of(model))


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"budget": 0}, "budget is 0; it has to be at least 1"),
        ({"keep_share": 0.0}, "keep_share is 0.0"),
        ({"gate_learning_rate": 0.0}, "gate_learning_rate is 0.0"),
        ({"hard_share": 1.0}, "hard_share is 1.0"),
        ({"warmup_share": 0.6, "hard_share": 0.4}, r"warmup_share \+ hard_share is 1"),
    ],
)
def test_a_flag_out_of_range_is_refused(flags, message):
    with pytest.raises(RankwiseError, match=message):
        FLOP(**flags)


def test_a_budget_that_nothing_or_everything_fits_is_refused(tmp_path):
    model, args = family("bert-tagging").model(), arguments(tmp_path)
    with pytest.raises(RankwiseError, match="no room for a piece: the smallest takes 32"):
        FLOP(r=R, budget=31).check(model, Setting(None, None, args))
    with pytest.raises(RankwiseError, match="lower the budget, or raise r"):
        FLOP(r=R, budget=10**6).check(model, Setting(None, None, args))
    with pytest.raises(RankwiseError, match="fp16"):
        half = replace(args, fp16=False)
        half.fp16 = True
        FLOP().arguments(half)


def test_gates_that_all_shut_say_so(tmp_path):
    trainer, _, _ = ready(family("llama-lm"), tmp_path, FLOP(r=R))
    for gate in trainer.gates.values():
        gate.log_alpha.data.fill_(-9.0)
    with pytest.raises(RankwiseError, match="shut every gate; lower gate_learning_rate"):
        trainer.fix()
