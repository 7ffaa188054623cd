"""Houlsby's adapters: where they go, how they start, what they cost; to disk and back."""

import json
from collections import Counter

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, default_data_collator

from families import FAMILIES, StopAfter, arguments, batch, family, rows, without_dropout
from rankwise.errors import AdapterError, CheckpointError, ModelError, RankwiseError
from rankwise.methods.base import Setting
from rankwise.methods.bottleneck import CONFIG, WEIGHTS, Adapted, Layout, attach, trainable
from rankwise.methods.houlsby import Houlsby
from rankwise.trainer import find_checkpoint

M, HIDDEN, LAYERS = 8, 16, 2


def setting(of, folder, **changes) -> Setting:
    return Setting(
        train=rows(of),
        held_out=None,
        args=arguments(folder, **changes),
        options={"data_collator": default_data_collator},
        configuration={"seed": 1},
    )


@torch.no_grad()
def logits(model, of) -> torch.Tensor:
    return model.eval()(**batch(of)).logits


def adapter_parameters(model) -> int:
    return sum(p.numel() for name, p in trainable(model) if ".adapter." in name)


@pytest.mark.parametrize("of", FAMILIES, ids=lambda of: of.name)
def test_trained_saved_and_loaded_on_a_fresh_base_it_gives_equal_logits(of, tmp_path):
    method, base = Houlsby(bottleneck=M), logits(of.model(), of)
    given = setting(of, tmp_path)
    method.check(of.model(), given)
    model = method.attach(of.model(), None, given)
    assert (logits(model, of) - base).abs().max() < 1e-3  # starts near the identity
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    trainer = method.trainer(model, None, given)
    trainer.train()
    for name, parameter in frozen.items():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=0, atol=0)
    method.hand_over(trainer, method.keep(trainer, None, given), tmp_path)
    trained = logits(trainer.model, of)
    assert (trained - base).abs().max() > 1e-2
    loaded = Houlsby().load(of.model(), tmp_path / "adapter")  # flags come from the file
    torch.testing.assert_close(logits(loaded, of), trained, rtol=0, atol=1e-6)
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == sorted([CONFIG, WEIGHTS])


@pytest.mark.parametrize("of", FAMILIES, ids=lambda of: of.name)
def test_it_has_the_papers_parameters_and_trains_norms_and_head(of):
    model = attach(of.model(), Layout(M, "gelu", True))
    assert adapter_parameters(model) == LAYERS * 2 * (2 * HIDDEN * M + HIDDEN + M)
    kinds = Counter(
        "norm" if "norm" in n.lower() or ".ln_" in n else "head"
        for n, _ in trainable(model)
        if ".adapter." not in n
    )
    affine = 1 if "llama" in of.name else 2  # an RMSNorm has no bias
    norms = 1 + 2 * LAYERS  # one each for the embeddings or the end, two a block
    assert kinds["norm"] == affine * norms
    assert (kinds["head"] > 0) == ("lm" not in of.name)
    without = {n for n, _ in trainable(attach(of.model(), Layout(M, "gelu", False)))}
    assert not any("norm" in name.lower() or ".ln_" in name for name in without)


@pytest.mark.parametrize("name", ["bert-tagging", "gpt2-lm", "llama-lm"])
def test_an_adapter_sits_on_each_sublayer_before_the_residual_sum(name):
    """With W_up = 0 and a bias c it adds c to the sub-layer's output: seen at the next module."""
    of = family(name)
    model = without_dropout(of)
    inputs, seen = batch(of), {}
    after = {
        "bert-tagging": "bert.encoder.layer.0.attention.output.LayerNorm",
        "gpt2-lm": "transformer.h.0.ln_2",
        "llama-lm": "model.layers.0.post_attention_layernorm",
    }[name]
    handle = model.get_submodule(after).register_forward_pre_hook(
        lambda _, args: seen.__setitem__("sum", args[0].detach())
    )
    with torch.no_grad():
        model.eval()(**inputs)
        before = seen["sum"]
        attach(model, Layout(M, "relu", True))
        first = next(m for m in model.modules() if isinstance(m, Adapted))
        c = torch.arange(HIDDEN) / HIDDEN
        first.adapter.up.weight.zero_()
        first.adapter.up.bias.copy_(c)
        model.eval()(**inputs)
    handle.remove()
    torch.testing.assert_close(seen["sum"], before + c)


def test_a_resumed_run_equals_one_that_never_stopped(tmp_path):
    of, method = family("bert-classification"), Houlsby(bottleneck=M)
    whole = setting(of, tmp_path / "whole")
    straight = method.trainer(method.attach(of.model(), None, whole), None, whole)
    straight.train()
    parts = setting(of, tmp_path / "parts", save_strategy="steps", save_steps=3)
    stopped = method.trainer(method.attach(of.model(), None, parts), None, parts)
    stopped.add_callback(StopAfter(4))
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    checkpoint = find_checkpoint(tmp_path / "parts", True, dict(parts.configuration))
    resumed = method.trainer(method.attach(of.model(seed=0), None, parts), None, parts)
    resumed.train(resume_from_checkpoint=checkpoint)
    for (name, a), (_, b) in zip(trainable(straight.model), trainable(resumed.model), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(CheckpointError, match="seed was 1 and is now 2"):
        find_checkpoint(tmp_path / "parts", True, {"seed": 2})


def test_a_model_in_bfloat16_keeps_its_adapters_in_float32():
    of = family("llama-lm")
    model = attach(of.model().to(torch.bfloat16), Layout(M, "silu", False))
    assert {p.dtype for _, p in trainable(model)} == {torch.float32}
    assert logits(model, of).dtype == torch.bfloat16


def test_an_unknown_architecture_is_named_before_anything_changes():
    config = BartConfig(
        vocab_size=60, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16,
        decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2,
        max_position_embeddings=32,
    )  # fmt: skip
    model = BartForConditionalGeneration(config)
    with pytest.raises(ModelError, match=r"type 'bart'; they know bert, .*gpt2, llama"):
        Houlsby().check(model, Setting(None, None, arguments("unused")))
    with pytest.raises(ModelError, match="bart"):
        attach(model, Layout(M, "gelu", True))
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_with_adapters_is_refused():
    model = attach(family("gpt2-lm").model(), Layout(M, "gelu", True))
    with pytest.raises(ModelError, match="already has bottleneck adapters"):
        attach(model, Layout(M, "gelu", True))


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"bottleneck": 0}, "bottleneck is 0; it has to be an integer of at least 1"),
        ({"nonlinearity": "gleu"}, "nonlinearity is 'gleu'; it has to be 'gelu' or "),
    ],
)
def test_a_flag_out_of_range_is_refused(flags, message):
    with pytest.raises(RankwiseError, match=message):
        Houlsby(**flags)


def test_what_cannot_be_loaded_says_why(tmp_path):
    of, method = family("bert-classification"), Houlsby(bottleneck=M)
    given = setting(of, tmp_path, max_steps=1)
    trainer = method.trainer(method.attach(of.model(), None, given), None, given)
    method.hand_over(trainer, method.keep(trainer, None, given), tmp_path)
    folder = tmp_path / "adapter"
    with pytest.raises(AdapterError, match="cannot read the adapter in"):
        method.load(of.model(), tmp_path)
    with pytest.raises(AdapterError, match="of type 'bert', and this one is 'gpt2'"):
        method.load(family("gpt2-classification").model(), folder)
    of.config.num_labels = 4
    with pytest.raises(AdapterError, match=r"'classifier.weight' is \(3, 16\) .* \(4, 16\)"):
        method.load(of.model(), folder)
    of.config.num_labels, of.config.num_hidden_layers = 3, 3
    with pytest.raises(AdapterError, match=r"lacks 'bert\.encoder\.layer\.2"):
        method.load(of.model(), folder)
    about = json.loads((folder / CONFIG).read_text()) | {"format": "other/1"}
    (folder / CONFIG).write_text(json.dumps(about))
    with pytest.raises(AdapterError, match="not of the format rankwise-bottleneck/1"):
        method.load(family("bert-classification").model(), folder)
