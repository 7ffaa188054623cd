"""Full fine-tuning on every family: everything moves, and plain transformers loads the result."""

import pytest
import torch
from slots import handed_over, logits, trained

from families import FAMILIES, batch, family
from rankwise.errors import OutputError
from rankwise.methods.full import FullFineTuning


@pytest.mark.parametrize("of", FAMILIES, ids=lambda f: f.name)
def test_model_loads_in_plain_transformers(of, plain_peft, tmp_path):
    expected, kept, _ = handed_over(FullFineTuning(), of, tmp_path)
    assert kept.plan is None
    found = plain_peft(of.auto.__name__, tmp_path / "base", tmp_path / "model", batch(of), tmp_path)
    torch.testing.assert_close(found["logits"], expected, rtol=1e-5, atol=1e-5)
    loaded = FullFineTuning().load(of.model(seed=1), tmp_path / "model")
    torch.testing.assert_close(logits(loaded, of), expected, rtol=1e-5, atol=1e-5)


def test_every_parameter_moves(tmp_path):
    of = family("bert-classification")
    before = dict(of.model().named_parameters())
    model = of.model().requires_grad_(False)  # as a method before it may have left it
    of_frozen = FullFineTuning().attach(model, None, None)
    assert all(p.requires_grad for p in of_frozen.parameters())
    trainer, _, _ = trained(FullFineTuning(), of, tmp_path)
    after = dict(trainer.model.named_parameters())
    # A key's bias shifts all scores of a query alike, which the softmax takes out again.
    moved = {name for name, p in after.items() if (p - before[name]).abs().max() > 1e-4}
    assert set(before) - moved <= {name for name in before if name.endswith("key.bias")}


def test_folder_without_a_model_is_an_error(tmp_path):
    with pytest.raises(OutputError, match="no model in"):
        FullFineTuning().load(family("gpt2-lm").model(), tmp_path)
