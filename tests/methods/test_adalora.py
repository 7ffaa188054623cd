"""AdaLoRA: the allocator runs to its last mask, the orthogonality term stays out of evaluation, and
plain LoRA of the same function comes out."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft.tuners.lora import LoraLayer
from slots import handed_over, logits, setting_of, trained
from transformers import TrainerCallback

from families import FAMILIES, batch, family
from rankwise.errors import CheckpointError, ModelError, PlanError, RankwiseError
from rankwise.lora import check, realised
from rankwise.methods.adalora import AdaLoRA
from rankwise.methods.allocator import Allocation, build, final_mask, steps

BERT = family("bert-classification")


@pytest.mark.parametrize("of", FAMILIES, ids=lambda f: f.name)
def test_adapter_is_plain_lora_of_the_trained_function(of, plain_peft, tmp_path):
    expected, kept, trainer = handed_over(AdaLoRA(r=4, target_r=1), of, tmp_path, max_steps=8)
    untrained = logits(of.model(), of)
    assert (expected - untrained).abs().max() > 1e-3
    found = plain_peft(
        of.auto.__name__, tmp_path / "base", tmp_path / "adapter", batch(of), tmp_path
    )
    torch.testing.assert_close(found["logits"], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["merged"], expected, rtol=1e-4, atol=1e-5)
    check(trainer.model, kept.plan)  # every rank and scaling, and no module that has rank 0
    assert min(kept.plan.ranks.values()) == 0  # PEFT's own conversion refuses these


def test_last_mask_holds_the_target_budget_and_the_budget_shrinks_to_it(tmp_path):
    method, alive = AdaLoRA(r=4, target_r=1, tinit=0.2, tfinal=0.3), []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            nonzero = [(e != 0).sum() for n, e in model.named_parameters() if ".lora_E." in n]
            alive.append(int(sum(nonzero)))

    setting = setting_of(BERT, tmp_path, max_steps=10)
    model = BERT.model()
    plan = method.start(model, setting)
    trainer = method.trainer(method.attach(model, plan, setting), plan, setting)
    trainer.add_callback(Count())
    trainer.train()
    target, everything = len(plan.modules), 4 * len(plan.modules)
    assert alive[:2] == [everything] * 2  # tinit is 2 steps
    assert alive[2:7] == sorted(alive[2:7], reverse=True) and alive[2] < everything
    assert alive[6:] == [target] * 4  # step 7 = 10 - tfinal is the last mask, and it stays
    kept = method.keep(trainer, plan, setting)
    assert sum(kept.plan.ranks.values()) == target == kept.figures["pieces"]
    for name, layer in _adapted(trainer.model).items():
        alive_here = (layer.lora_E["default"] != 0).sum()
        assert alive_here == kept.plan.ranks[name]


def test_steps_count_from_one_so_that_a_mask_at_the_very_end_is_made(tmp_path):
    trainer, plan, setting = trained(AdaLoRA(r=4, tfinal=0.0), BERT, tmp_path)
    assert trainer.allocation.step == trainer.state.global_step == 4
    kept = AdaLoRA(r=4, tfinal=0.0).keep(trainer, plan, setting)
    assert sum(kept.plan.ranks.values()) == 2 * len(plan.modules)


def test_importance_is_scored_with_the_gradients_of_the_step(tmp_path):
    """PEFT's scores after one step are 0.15 |w · ∂L/∂w|, w after the optimizer's step."""
    seen = {}

    class Look(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 0:
                for name, p in model.named_parameters():
                    if ".lora_E." in name:
                        seen[name] = (p * p.grad).abs().detach().clone()

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                found = model.base_model.rankallocator.exp_avg_ipt
                for name, expected in seen.items():
                    key = name.removeprefix("base_model.model.")
                    torch.testing.assert_close(found[key], 0.15 * expected)
                seen["compared"] = True

    setting = setting_of(BERT, tmp_path)
    method, model = AdaLoRA(r=4, tinit=0.5, tfinal=0.0), BERT.model()
    plan = method.start(model, setting)
    trainer = method.trainer(method.attach(model, plan, setting), plan, setting)
    trainer.add_callback(Look())
    trainer.train()
    assert seen.pop("compared") and all(score.max() > 0 for score in seen.values())


def test_scale_is_that_of_lora(tmp_path):
    """B diag(E) A times PEFT's factor against s · B A with s = lora_alpha / r."""
    method = AdaLoRA(r=4, lora_alpha=12.0)
    setting, model = setting_of(BERT, tmp_path), BERT.model()
    plan = method.start(model, setting)
    peft_model = method.attach(model, plan, setting)
    for layer in _adapted(peft_model).values():
        torch.nn.init.normal_(layer.lora_E["default"])
        e, a, b = (getattr(layer, f"lora_{x}")["default"] for x in "EAB")
        delta = 3.0 * b @ torch.diag(e[:, 0]) @ a
        torch.testing.assert_close(layer.get_delta_weight("default"), delta, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_evaluated_loss_is_the_cross_entropy_alone(weight, tmp_path):
    method = AdaLoRA(r=4, orth_reg_weight=weight)
    trainer, plan, setting = trained(method, BERT, tmp_path)
    table = setting.held_out.with_format("torch")
    inputs = {name: table[name][:] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        z = trainer.model.eval()(**inputs).logits
    by_hand = torch.nn.functional.cross_entropy(z, table["labels"][:])
    evaluated = trainer.evaluate(setting.held_out)["eval_loss"]
    assert evaluated == pytest.approx(float(by_hand), abs=1e-6)
    method.hand_over(trainer, method.keep(trainer, plan, setting), tmp_path)
    assert trainer.evaluate(setting.held_out)["eval_loss"] == pytest.approx(evaluated, abs=1e-6)


@pytest.mark.parametrize("name", ["bert-classification", "gpt2-lm"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_loss_has_the_term_once_a_step(name, accumulation, tmp_path):
    """At the first step: the term by hand, whatever the number of micro-batches."""
    of, losses = family(name), {}
    of.config.attn_pdrop = of.config.resid_pdrop = of.config.embd_pdrop = 0.0
    of.config.hidden_dropout_prob = of.config.attention_probs_dropout_prob = 0.0
    for weight in (0.0, 0.5):
        method, model = AdaLoRA(r=4, orth_reg_weight=weight), of.model()
        setting = setting_of(
            of,
            tmp_path,
            logging_steps=1,
            logging_first_step=True,
            gradient_accumulation_steps=accumulation,
        )
        torch.manual_seed(0)
        peft_model = method.attach(model, plan := method.start(model, setting), setting)
        norms = [
            torch.linalg.norm(p @ p.T - torch.eye(4) if ".lora_A." in n else p.T @ p - torch.eye(4))
            for n, p in peft_model.state_dict().items()
            if ".lora_A." in n or ".lora_B." in n
        ]
        term = float(sum(norms) / len(norms))
        trainer = method.trainer(peft_model, plan, setting)
        trainer.train()
        losses[weight] = trainer.state.log_history[0]["loss"]
    assert losses[0.5] - losses[0.0] == pytest.approx(0.5 * term, abs=2e-4)


def test_error_when_the_allocator_never_ran(tmp_path):
    method, model, setting = AdaLoRA(r=4), BERT.model(), setting_of(BERT, tmp_path)
    plan = method.start(model, setting)
    trainer = method.trainer(method.attach(model, plan, setting), plan, setting)
    trainer.remove_callback(Allocation)
    trainer.train()
    with pytest.raises(RankwiseError, match="never came to its last mask: it ran up to step 0"):
        method.keep(trainer, plan, setting)


def test_error_when_training_stopped_before_the_last_mask(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    method, model = AdaLoRA(r=4), BERT.model()
    setting = setting_of(BERT, tmp_path, max_steps=8)
    plan = method.start(model, setting)
    trainer = method.trainer(method.attach(model, plan, setting), plan, setting)
    trainer.add_callback(Stop())
    trainer.train()
    with pytest.raises(RankwiseError, match="it ran up to step 3, the mask comes at step 4"):
        method.keep(trainer, plan, setting)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_steps": 5},
        {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 5},
        {"max_steps": -1, "num_train_epochs": 1.5, "gradient_accumulation_steps": 4},
        {"max_steps": -1, "num_train_epochs": 3, "per_device_train_batch_size": 7}
        | {"dataloader_drop_last": True},
    ],
)
def test_steps_are_those_of_trainer(changes, tmp_path):
    trainer, _, setting = trained(AdaLoRA(r=4), BERT, tmp_path, **changes)
    assert steps(setting.args, setting.train) == trainer.state.global_step


def test_schedule_of_other_arguments_is_refused_before_the_first_step(tmp_path):
    method, model, setting = AdaLoRA(r=4), BERT.model(), setting_of(BERT, tmp_path)
    plan = method.start(model, setting)
    trainer = method.trainer(method.attach(model, plan, setting), plan, setting)
    trainer.args.max_steps = 9
    with pytest.raises(RankwiseError, match="Trainer plans 9 optimizer steps"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_skipped_optimizer_step_leaves_the_scores_alone(tmp_path):
    """Gradients that overflowed under fp16 would make them NaN for good."""
    model = BERT.model()
    plan = AdaLoRA(r=4).start(model, setting_of(BERT, tmp_path))
    peft_model = build(model, plan, target_r=2, **AdaLoRA(r=4).phases(8))
    for p in peft_model.parameters():
        p.grad = torch.full_like(p, float("inf"))
    state, skipped = SimpleNamespace(global_step=0), SimpleNamespace(step_was_skipped=True)
    Allocation().on_optimizer_step(None, state, None, model=peft_model, optimizer=skipped)
    assert peft_model.base_model.rankallocator.exp_avg_ipt == {}


def test_too_few_steps_is_an_error_with_the_numbers():
    with pytest.raises(RankwiseError, match="2 optimizer steps, with its last mask at step 1"):
        AdaLoRA().phases(2)
    assert AdaLoRA().phases(3) == {"total_step": 3, "tinit": 0, "tfinal": 1, "deltaT": 1}


@pytest.mark.parametrize("tfinal", [0.0, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("total", [4, 7, 50])
def test_default_phases_pass_pefts_own_checks(total, tfinal):
    from peft import AdaLoraConfig

    AdaLoraConfig(init_r=8, target_r=4, **AdaLoRA(tfinal=tfinal).phases(total))


def test_checkpoints_can_be_saved_and_are_not_gone_on_with(tmp_path):
    assert AdaLoRA.resumable is False
    method = AdaLoRA(r=4, target_r=1)
    trainer, plan, setting = trained(
        method, BERT, tmp_path, max_steps=8, save_strategy="steps", save_steps=2
    )
    assert sum(method.keep(trainer, plan, setting).plan.ranks.values()) == len(plan.modules)
    with pytest.raises(CheckpointError, match="cannot be gone on with"):
        trainer.train(resume_from_checkpoint=f"{setting.args.output_dir}/checkpoint-4")


def test_base_model_gets_its_own_head_back_and_the_adapter_the_trained_one(tmp_path):
    before = BERT.model().classifier.weight
    _, _, trainer = handed_over(AdaLoRA(r=4), BERT, tmp_path)
    wrapper = trainer.model.get_base_model().classifier
    torch.testing.assert_close(wrapper.original_module.weight, before)
    assert (wrapper.modules_to_save["default"].weight - before).abs().max() > 1e-3


def test_mask_is_read_by_module(tmp_path):
    trainer, plan, _ = trained(AdaLoRA(r=4), BERT, tmp_path)
    assert set(final_mask(trainer)) == set(plan.modules)
    assert set(realised(trainer.model)) == set(plan.modules)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"r": 1}, "give at least 2"),
        ({"target_r": 8}, "from 1 to r - 1 = 7"),
        ({"target_r": 0}, "from 1 to r - 1"),
        ({"tinit": 0.5, "tfinal": 0.5}, "below 1, or no step"),
        ({"deltaT": 2.0}, "share of the steps"),
        ({"beta1": 1.0}, "between 0 and 1"),
        ({"orth_reg_weight": -1.0}, "has to be >= 0"),
    ],
)
def test_flag_out_of_range_is_an_error(flags, message):
    with pytest.raises(RankwiseError, match=message):
        AdaLoRA(**flags)


def test_what_it_cannot_adapt_is_said_in_check(tmp_path):
    gpt2, setting = family("gpt2-lm"), setting_of(BERT, tmp_path)
    with pytest.raises(ModelError, match=r"part of a module; name '.*c_attn'"):
        AdaLoRA(target_modules=("c_attn.q",)).check(gpt2.model(), setting_of(gpt2, tmp_path))
    with pytest.raises(ModelError, match="of type Embedding; name linear modules alone"):
        AdaLoRA(target_modules=("word_embeddings",)).check(BERT.model(), setting)
    with pytest.raises(RankwiseError, match="label_smoothing_factor"):
        AdaLoRA().check(BERT.model(), setting_of(BERT, tmp_path, label_smoothing_factor=0.1))
    with pytest.raises(RankwiseError, match="it needs a step of scores before that"):
        AdaLoRA().check(BERT.model(), setting_of(BERT, tmp_path, max_steps=2))
    with pytest.raises(RankwiseError, match="compute_loss_func"):
        own = replace(setting, options={"compute_loss_func": print})
        AdaLoRA().check(BERT.model(), own)
    with pytest.raises(PlanError, match="for another model"):
        build(family("llama-lm").model(), AdaLoRA(r=4).start(BERT.model(), None), target_r=2)


def test_module_without_gradient_is_named(tmp_path):
    method, setting = AdaLoRA(r=4), setting_of(BERT, tmp_path)
    model = BERT.model()
    model.unused = torch.nn.Linear(16, 16)
    plan = method.start(model, setting)
    trainer = method.trainer(method.attach(model, plan, setting), plan, setting)
    with pytest.raises(ModelError, match="'unused' had no part in the loss"):
        trainer.train()


def test_nothing_is_warned_about_a_second_adapter(tmp_path, recwarn, caplog):
    with caplog.at_level(logging.WARNING):
        handed_over(AdaLoRA(r=4), BERT, tmp_path)
    said = [str(w.message) for w in recwarn] + [r.getMessage() for r in caplog.records]
    assert not [line for line in said if "second time" in line or "multiple adapters" in line]


def _adapted(model):
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
