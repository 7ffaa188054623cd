"""Prefix, prompt and P-tuning and LLaMA-Adapter: trained, and reloaded by plain PEFT, on every
family where the method exists; where it does not, one line says why."""

import pytest
import torch
from slots import handed_over, logits, setting_of, trained

from families import FAMILIES, batch, family
from rankwise.errors import DataError, ModelError, RankwiseError
from rankwise.methods.prompts import LlamaAdapter, PrefixTuning, PromptTuning, PTuning

PREFIX = {f.name for f in FAMILIES}
EMBEDDED = {"bert-classification", "roberta-classification", "gpt2-lm", "llama-lm"}
METHODS = [
    (PrefixTuning(num_virtual_tokens=3), PREFIX),
    (PrefixTuning(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8), PREFIX),
    (PromptTuning(num_virtual_tokens=3), EMBEDDED),
    (PromptTuning(num_virtual_tokens=3, prompt_tuning_init="RANDOM"), EMBEDDED),
    (PTuning(num_virtual_tokens=3, encoder_hidden_size=8), EMBEDDED),
    (LlamaAdapter(adapter_len=3), {"gpt2-lm", "llama-lm"}),
]
IDS = "prefix prefix-projection prompt prompt-random p-tuning llama-adapter".split()
WORKS = [
    pytest.param(method, name, id=f"{label}-{name}")
    for label, (method, names) in zip(IDS, METHODS, strict=True)
    for name in sorted(names)
]
REFUSED = [
    pytest.param(method, name, id=f"{label}-{name}")
    for label, (method, names) in zip(IDS, METHODS, strict=True)
    for name in sorted(PREFIX - names)
]


@pytest.mark.parametrize(("method", "name"), WORKS)
def test_adapter_loads_in_plain_peft(method, name, plain_peft, tmp_path):
    of = family(name)
    expected, kept, trainer = handed_over(method, of, tmp_path)
    assert kept.plan is None
    own = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
    assert [n for n in own if "prompt" in n]
    heads = {"classifier", "score"} if "-lm" not in name else {"prompt", "adaption"}
    assert [n for n in own if any(part in n for part in heads)]
    found = plain_peft(
        of.auto.__name__, tmp_path / "base", tmp_path / "adapter", batch(of), tmp_path
    )["logits"]
    if found.dim() == 3:  # PEFT's have the virtual tokens in front
        found = found[:, -expected.shape[1] :]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    base = of.auto.from_pretrained(tmp_path / "base")
    loaded = method.load(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, of), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("method", "name"), WORKS)
def test_what_is_trained_reaches_the_loss(method, name, tmp_path):
    """Every trained tensor has moved: nothing of the method is beside the graph."""
    of = family(name)
    setting = setting_of(of, tmp_path)
    adapted = method.attach(of.model(), None, setting)
    before = {n: p.detach().clone() for n, p in adapted.named_parameters() if p.requires_grad}
    method.trainer(adapted, None, setting).train()
    after = dict(adapted.named_parameters())
    assert before and all((after[n] - p).abs().max() > 0 for n, p in before.items())


@pytest.mark.parametrize(("method", "name"), REFUSED)
def test_no_such_model_or_task_is_one_line(method, name, tmp_path):
    with pytest.raises(ModelError) as caught:
        method.check(family(name).model(), setting_of(family(name), tmp_path))
    assert "\n" not in str(caught.value) and method.title in str(caught.value)


@pytest.mark.parametrize("name", ["gpt2-classification", "llama-classification"])
def test_refused_classifiers_do_read_the_padding(name, tmp_path):
    """Why they are refused. When this fails, transformers finds the end of a row by itself."""
    of = family(name)
    for method, same in ((PromptTuning(3), False), (PrefixTuning(3), True)):
        model = method.attach(of.model(), None, setting_of(of, tmp_path)).eval()
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
        one = batch(of, count=1)
        padded = {k: torch.nn.functional.pad(v, (0, 3)) for k, v in one.items()}
        with torch.no_grad():
            difference = (model(**one).logits - model(**padded).logits).abs().max()
        assert (difference < 1e-4) == same


@pytest.mark.parametrize("method", [PromptTuning(3), PTuning(3, encoder_hidden_size=8)])
def test_language_models_logits_are_those_of_the_rows_tokens(method, tmp_path):
    """So that a measure made for (batch, seq, vocabulary) reads the right positions."""
    of = family("gpt2-lm")
    trainer, _, setting = trained(method, of, tmp_path)
    table = setting.held_out.with_format("torch")
    inputs = {name: table[name][:] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        z = trainer.model.eval()(**inputs).logits
    assert z.shape[:2] == table["labels"][:].shape
    loss = torch.nn.functional.cross_entropy(
        z[:, :-1].flatten(0, 1), table["labels"][:][:, 1:].flatten()
    )
    seen = []
    trainer.compute_metrics = lambda output: seen.append(output.predictions.shape) or {}
    # PEFT's loss has one target more: the last virtual token predicts the row's first token.
    model_loss = trainer.evaluate(setting.held_out)["eval_loss"]
    assert seen == [(24, *z.shape[1:])]
    assert model_loss == pytest.approx(float(loss), rel=0.1)


@pytest.mark.parametrize(
    "method", [PromptTuning(3), LlamaAdapter(3)], ids=["prompt", "llama-adapter"]
)
def test_resumed_training_ends_where_the_other_did(method, tmp_path):
    assert method.resumable
    of = family("gpt2-lm")
    of.config.attn_pdrop = of.config.resid_pdrop = of.config.embd_pdrop = 0.0
    whole, _, _ = trained(method, of, tmp_path, save_strategy="steps", save_steps=2)
    setting = setting_of(of, tmp_path)
    adapted = method.attach(of.model(), None, setting)
    again = method.trainer(adapted, None, setting)
    again.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    torch.testing.assert_close(
        logits(again.model, of), logits(whole.model, of), rtol=1e-5, atol=1e-6
    )


def test_what_cannot_work_is_said_first(tmp_path):
    bert, llama = family("bert-classification"), family("llama-lm")
    setting = setting_of(bert, tmp_path)
    with pytest.raises(DataError, match=r"24 virtual tokens to rows of up to 9, .* 32 positions"):
        PrefixTuning(24).check(bert.model(), setting)
    with pytest.raises(RankwiseError, match="gradient_checkpointing"):
        PrefixTuning(3).check(bert.model(), setting_of(bert, tmp_path, gradient_checkpointing=True))
    setting.args.load_best_model_at_end = True
    with pytest.raises(RankwiseError, match="leave load_best_model_at_end out"):
        PTuning().check(bert.model(), setting)
    with pytest.raises(RankwiseError, match="num_virtual_tokens is 0"):
        PromptTuning(num_virtual_tokens=0)
    with pytest.raises(RankwiseError, match="adapter_len is 0"):
        LlamaAdapter(adapter_len=0)
    with pytest.raises(ModelError, match="adapter_layers is 3; the model has 2"):
        LlamaAdapter(adapter_layers=3).check(llama.model(), setting_of(llama, tmp_path))
