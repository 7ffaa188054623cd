"""IA3 on every family: trained, reloaded and merged by plain PEFT; its modules by type of model."""

import pytest
import torch
from slots import handed_over, logits, setting_of, trained
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from families import FAMILIES, batch, family
from rankwise.errors import ModelError, RankwiseError
from rankwise.methods.ia3 import IA3


@pytest.mark.parametrize("of", FAMILIES, ids=lambda f: f.name)
def test_adapter_loads_in_plain_peft(of, plain_peft, tmp_path):
    expected, kept, trainer = handed_over(IA3(), of, tmp_path)
    assert kept.plan is None
    assert (expected - logits(of.model(), of)).abs().max() > 1e-3
    found = plain_peft(
        of.auto.__name__, tmp_path / "base", tmp_path / "adapter", batch(of), tmp_path
    )
    torch.testing.assert_close(found["logits"], expected, rtol=1e-5, atol=1e-5)
    if of.name != "roberta-classification":  # PEFT's merge looks for its head's `weight`
        merged = trainer.model.merge_and_unload()
        torch.testing.assert_close(logits(merged, of), expected, rtol=1e-4, atol=1e-5)


def test_one_vector_a_module(tmp_path):
    """BERT's two layers: key and value (16), attention's output (16), the feed-forward's (24)."""
    of = family("bert-classification")
    model = IA3().attach(of.model(), None, setting_of(of, tmp_path))
    sizes = [p.numel() for n, p in model.named_parameters() if "ia3_l" in n]
    assert sizes == [16, 16, 16, 24] * 2


def test_resumed_training_ends_where_the_other_did(tmp_path):
    of = family("llama-lm")
    whole, _, _ = trained(IA3(), of, tmp_path, save_strategy="steps", save_steps=2)
    setting = setting_of(of, tmp_path)
    again = IA3().trainer(IA3().attach(of.model(), None, setting), None, setting)
    again.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    torch.testing.assert_close(
        logits(again.model, of), logits(whole.model, of), rtol=1e-5, atol=1e-6
    )


def test_common_names_stand_in_where_peft_has_no_default(tmp_path):
    config = DistilBertConfig(vocab_size=60, dim=16, hidden_dim=24, n_layers=1, n_heads=2)
    model = DistilBertForSequenceClassification(config)
    assert IA3().modules(model) == (["k_lin", "v_lin", "lin2"], ["lin2"])
    of = family("bert-classification")
    adapted = IA3().attach(model, None, setting_of(of, tmp_path))
    sizes = {n.split(".")[-3]: p.numel() for n, p in adapted.named_parameters() if "ia3_l" in n}
    assert sizes == {"k_lin": 16, "v_lin": 16, "lin2": 24}


def test_what_cannot_work_is_said_first(tmp_path):
    of = family("llama-lm")
    with pytest.raises(ModelError, match="no default modules of IA3 for a model of type 'None'"):
        IA3().check(torch.nn.Sequential(torch.nn.Linear(2, 2)), setting_of(of, tmp_path))
    with pytest.raises(RankwiseError, match="'fc2', which is not in target_modules"):
        IA3(target_modules=("k_proj",), feedforward_modules=("fc2",))
    with pytest.raises(ModelError, match="nowhere"):
        IA3(target_modules=("nowhere",)).attach(of.model(), None, setting_of(of, tmp_path))
