"""EVA: PEFT's ranks and starting values, on every family, trained on and reloaded as plain LoRA."""

import pytest
import torch
from slots import handed_over, logits, setting_of
from transformers import DataCollatorWithPadding

from families import FAMILIES, arguments, batch, family, rows
from rankwise.errors import DataError, ModelError, RankwiseError
from rankwise.lora import check, factors, layers_of
from rankwise.methods import eva
from rankwise.methods.base import Setting
from rankwise.methods.eva import EVA

BERT = family("bert-classification")


@pytest.mark.parametrize("of", FAMILIES, ids=lambda f: f.name)
def test_adapter_loads_in_plain_peft(of, plain_peft, tmp_path):
    expected, kept, trainer = handed_over(EVA(r=2), of, tmp_path)
    assert (expected - logits(of.model(), of)).abs().max() > 1e-3
    found = plain_peft(
        of.auto.__name__, tmp_path / "base", tmp_path / "adapter", batch(of), tmp_path
    )
    torch.testing.assert_close(found["logits"], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["merged"], expected, rtol=1e-4, atol=1e-5)
    check(trainer.model, kept.plan)
    ranks = kept.plan.ranks.values()
    assert sum(ranks) == 2 * len(ranks) and max(ranks) <= 4


def attached(of, tmp_path, method, **changes):
    setting = setting_of(of, tmp_path, **changes)
    model = of.model()
    return method.attach(model, method.start(model, setting), setting), setting


def test_rows_of_a_are_orthonormal_and_span_the_leading_directions_of_the_inputs(tmp_path):
    """The oracle: an SVD of all the inputs of a module at once, centred as PCA has them."""
    peft_model, setting = attached(BERT, tmp_path, EVA(r=2))
    name = "bert.encoder.layer.1.intermediate.dense"
    base, seen = BERT.model().eval(), []
    base.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    table = setting.train.with_format("torch")
    with torch.no_grad():
        base(input_ids=table["input_ids"][:], attention_mask=table["attention_mask"][:])
    inputs = seen[0].flatten(0, 1)
    _, _, v = torch.linalg.svd(inputs - inputs.mean(0), full_matrices=False)
    a = factors(peft_model)[name][0].detach()
    torch.testing.assert_close(a @ a.T, torch.eye(len(a)), rtol=0, atol=1e-4)
    inside = torch.linalg.norm(a @ v[: len(a)].T) ** 2 / len(a)  # 1 if the same subspace
    assert inside > 0.9


def test_padding_is_left_out(tmp_path):
    """The same rows with padding behind them give the same ranks."""
    ranks = []
    for padding in (0, 4):
        table = rows(BERT).map(
            lambda row, padding=padding: {
                "input_ids": row["input_ids"] + [0] * padding,
                "attention_mask": row["attention_mask"] + [0] * padding,
            }
        )
        setting = Setting(table, None, arguments(tmp_path), task_type="SEQ_CLS")
        model = BERT.model()
        method = EVA(r=2)
        peft_model = method.attach(model, method.start(model, setting), setting)
        ranks.append({name: layer.r["default"] for name, layer in layers_of(peft_model).items()})
    assert ranks[0] == ranks[1]


def test_batches_of_a_padding_collator_are_read(tiny_bert, bert, tmp_path):
    """transformers' collators return a BatchEncoding, which PEFT's EVA refuses."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    texts = [" ".join(["film"] * (1 + n % 4) + ["great", "dull"][: 1 + n % 2]) for n in range(24)]
    table = Dataset.from_dict({"text": texts, **tokenizer(texts), "labels": [0, 1] * 12})
    options = {"data_collator": DataCollatorWithPadding(tokenizer)}
    setting = Setting(table, None, arguments(tmp_path), task_type="SEQ_CLS", options=options)
    method = EVA(r=1, target_modules=("query", "value"))
    assert method.attach(bert, method.start(bert, setting), setting)


def test_scaling_is_that_of_the_flags_at_every_rank(tmp_path):
    peft_model, _ = attached(BERT, tmp_path, EVA(r=2, lora_alpha=6.0))
    layers = layers_of(peft_model).values()
    assert len({layer.r["default"] for layer in layers}) > 1
    assert {layer.scaling["default"] for layer in layers} == {3.0}


def test_without_redistribution_every_rank_is_r(tmp_path):
    peft_model, _ = attached(BERT, tmp_path, EVA(r=2, rho=1.0))
    assert {layer.r["default"] for layer in layers_of(peft_model).values()} == {2}


def test_ranks_are_the_same_again(tmp_path):
    """So that a run that was stopped, and is attached anew, can be gone on with."""
    first, _ = attached(BERT, tmp_path, EVA(r=2))
    second, _ = attached(BERT, tmp_path, EVA(r=2))
    for name, (a, _) in factors(first).items():
        torch.testing.assert_close(factors(second)[name][0], a)


def test_search_that_does_not_end_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(eva, "LIMIT", 1)
    with pytest.raises(ModelError, match="still move after 1 batches of 4 rows"):
        attached(BERT, tmp_path, EVA(r=2))


def test_what_cannot_work_is_said_first(tmp_path):
    args, gpt2 = arguments(tmp_path), family("gpt2-lm")
    with pytest.raises(RankwiseError, match=r"rho is 0\.5; it has to be at least 1"):
        EVA(rho=0.5)
    with pytest.raises(ModelError, match=r"rho · r is 20, but '.*' can have no rank above 16"):
        EVA(r=10).check(BERT.model(), setting_of(BERT, tmp_path))
    with pytest.raises(ModelError, match=r"EVA cannot adapt '.*c_attn.q', a part of a module"):
        EVA(target_modules=("c_attn.q",)).check(gpt2.model(), setting_of(gpt2, tmp_path))
    setting = Setting(rows(BERT, 5), None, args, task_type="SEQ_CLS")
    model = BERT.model()
    with pytest.raises(DataError, match=r"8 directions \(rho · r\) in 5 training rows"):
        EVA(r=4).attach(model, EVA(r=4).start(model, setting), setting)
