"""Compacter: its matrices against torch.kron, what it shares and costs, to disk and back."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import default_data_collator

from families import FAMILIES, arguments, batch, family, rows
from rankwise.errors import ModelError, RankwiseError
from rankwise.methods.base import Setting
from rankwise.methods.bottleneck import WEIGHTS, KroneckerLinear, trainable
from rankwise.methods.compacter import Compacter

M, N, HIDDEN, LAYERS = 8, 4, 16, 2


def setting(of, folder, **changes) -> Setting:
    options = {"data_collator": default_data_collator}
    return Setting(rows(of), None, arguments(folder, **changes), options=options)


@torch.no_grad()
def logits(model, of) -> torch.Tensor:
    return model.eval()(**batch(of)).logits


def test_the_matrix_is_the_sum_of_kronecker_products():
    torch.manual_seed(0)
    layer = KroneckerLinear(nn.Parameter(torch.randn(3, 3, 3)), 12, 6).double()
    summed = sum(torch.kron(layer.rule[i], torch.outer(layer.s[i], layer.t[i])) for i in range(3))
    torch.testing.assert_close(layer.weight(), summed)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ summed.T + layer.bias)


@pytest.mark.parametrize("of", FAMILIES, ids=lambda of: of.name)
def test_trained_saved_and_loaded_on_a_fresh_base_it_gives_equal_logits(of, tmp_path):
    method, base = Compacter(bottleneck=M, n=N), logits(of.model(), of)
    given = setting(of, tmp_path)
    model = method.attach(of.model(), None, given)
    assert (logits(model, of) - base).abs().max() < 1e-2  # starts near the identity
    trainer = method.trainer(model, None, given)
    trainer.train()
    method.hand_over(trainer, method.keep(trainer, None, given), tmp_path)
    trained = logits(trainer.model, of)
    assert (trained - base).abs().max() > 1e-2
    loaded = Compacter().load(of.model(), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, of), trained, rtol=0, atol=1e-6)


def test_all_layers_share_one_rule_in_training_and_on_disk(tmp_path):
    of, method = family("gpt2-classification"), Compacter(bottleneck=M, n=N)
    given = setting(of, tmp_path)
    trainer = method.trainer(method.attach(of.model(), None, given), None, given)
    start = next(p for name, p in trainable(trainer.model) if name.endswith("rule")).clone()
    trainer.train()
    for model in (trainer.model, None):
        if model is None:
            method.hand_over(trainer, method.keep(trainer, None, given), tmp_path)
            model = method.load(of.model(), tmp_path / "adapter")
        layers = [m for m in model.modules() if isinstance(m, KroneckerLinear)]
        assert len(layers) == LAYERS * 2 * 2
        assert all(layer.rule is layers[0].rule for layer in layers)
        assert not torch.equal(layers[0].rule, start)
    saved = load_file(tmp_path / "adapter" / WEIGHTS)
    assert sum(name.endswith("rule") for name in saved) == 1


def test_it_has_the_papers_parameters():
    model = Compacter(bottleneck=M, n=N).attach(family("bert-tagging").model(), None, None)
    found = sum(p.numel() for name, p in trainable(model) if ".adapter." in name)
    assert found == N**3 + LAYERS * 6 * (HIDDEN + M)


def test_sizes_that_n_does_not_divide_are_refused_before_anything_changes():
    with pytest.raises(RankwiseError, match="bottleneck is 10, which n = 4 does not divide"):
        Compacter(bottleneck=10)
    model = family("bert-tagging").model()
    with pytest.raises(ModelError, match="hidden size is 16, which n = 3 does not divide"):
        Compacter(bottleneck=9, n=3).check(model, Setting(None, None, arguments("unused")))
    with pytest.raises(ModelError, match="hidden size is 16"):
        Compacter(bottleneck=9, n=3).attach(model, None, None)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(RankwiseError, match="n is 0"):
        Compacter(n=0)
