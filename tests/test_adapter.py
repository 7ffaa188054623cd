"""Adapters on disk: the two truncations against dense matrices, numpy's SVD and stock PEFT."""

import itertools
import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from families import Family, batch, family
from rankwise import Adapter, AdapterError, OutputError, PlanError, RankPlan, files
from rankwise import adapter as module
from rankwise.gate import attach_nested, bake, keep_first
from rankwise.lora import build, uniform
from rankwise.orders import Ordered, by_sigma

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Net(nn.Module):
    """Convolutions and linear layers whose names end each other, one of them no plain regex."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.point = nn.Conv2d(8, 4, 1)
        self.lin = nn.Linear(4, 24)  # takes fewer inputs than the adapter has ranks
        self.more = nn.ModuleDict({"lin": nn.Linear(24, 10), "c++": nn.Linear(10, 7)})

    def forward(self, x):
        hidden = self.point(torch.tanh(self.conv(x))).mean((2, 3))
        return self.more["c++"](torch.tanh(self.more["lin"](torch.tanh(self.lin(hidden)))))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def net_inputs() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))}


@dataclass(frozen=True)
class Kind:
    """A base model, inputs for it, and a LoraConfig."""

    name: str
    base: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, torch.Tensor]]
    lora: dict[str, Any]

    def logits(self, model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            out = model.eval()(**self.inputs())
        return out if isinstance(out, torch.Tensor) else out.logits


def lively(name: str) -> Family:
    """A family whose logits are large enough to depend visibly on every layer."""
    of = family(name)
    of.config.initializer_range = 0.2
    return of


BERT, GPT2 = lively("bert-classification"), lively("gpt2-classification")


def bert_kind(name: str, **lora: Any) -> Kind:
    settings = {"r": 6, "lora_alpha": 9, "target_modules": ["query", "value"]}
    return Kind(name, BERT.model, lambda: batch(BERT), settings | {"task_type": "SEQ_CLS"} | lora)


PATTERNS = {  # real regexes; for layer 1's query both match and the first counts; PEFT sorts them
    "rank_pattern": {r".*\.1\..*query": 3, r"encoder\.layer\.(0|1)\..*\.query": 5},
    "alpha_pattern": {r"0.attention.self.(query|key)": 7, "value": 20},
}
LINEAR = bert_kind("linear")
KINDS = [
    LINEAR,
    bert_kind("patterns", **PATTERNS),
    bert_kind("rslora", use_rslora=True),
    bert_kind("rslora-patterns", use_rslora=True, **PATTERNS),
    bert_kind("embedding", target_modules=["word_embeddings", "key", "output.dense"]),
    Kind(
        "conv1d",
        GPT2.model,
        lambda: batch(GPT2),
        {"r": 6, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    ),
    Kind("conv2d", net, net_inputs, {"r": 6, "target_modules": ["conv", "point", "lin", "c++"]}),
]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
def kind(request):
    return request.param


def adapted(base: nn.Module, **lora: Any) -> PeftModel:
    """A stock PEFT model whose factors are far from their start, with singular values that fall."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, LoraConfig(**lora))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.5)
                if "_A" in name:
                    falling = 0.6 ** torch.arange(len(parameter))
                    parameter.mul_(falling.view(-1, *[1] * (parameter.dim() - 1)))
    return model


def saved(kind: Kind, folder: Path, **changes: Any) -> PeftModel:
    model = adapted(kind.base(), **kind.lora | changes)
    model.save_pretrained(str(folder))
    return model


def loaded(kind: Kind, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(kind.base(), str(folder))


def layers(model: PeftModel) -> dict[str, LoraLayer]:
    return {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def dense(model: PeftModel) -> dict[str, np.ndarray]:
    """ΔW of each layer as a matrix, as PEFT would merge it."""
    found = {}
    for name, layer in layers(model).items():
        delta = layer.get_delta_weight("default").detach()
        found[name] = delta.reshape(len(delta), -1).double().numpy()
    return found


def spectrum(matrix: np.ndarray) -> np.ndarray:
    return np.linalg.svd(matrix, compute_uv=False)


def lora_numbers(folder: Path) -> int:
    """Numbers that the file holds for A and B."""
    weights = load_file(folder / WEIGHTS)
    return sum(t.numel() for name, t in weights.items() if ".lora_" in name)


# --- truncation by SVD ----------------------------------------------------------------------------


@pytest.mark.parametrize("b", [1, 2, 4])
def test_svd_truncation_is_as_near_as_eckart_and_young_allow(kind, b, tmp_path):
    before = saved(kind, tmp_path / "whole")
    cut = Adapter.load(tmp_path / "whole").truncate_svd(b)
    cut.save(tmp_path / "cut")
    after = loaded(kind, tmp_path / "cut")
    old, new = dense(before), dense(after)
    assert set(cut.cuts) == set(old) == set(new)
    some_lost = False
    for name, layer in layers(after).items():
        norm = np.linalg.norm(old[name])
        error = np.linalg.norm(old[name] - new[name])
        tail = np.sqrt((spectrum(old[name])[b:] ** 2).sum())
        assert error == pytest.approx(tail, rel=1e-4, abs=2e-6 * norm)
        assert cut.cuts[name].lost == pytest.approx(error / norm, rel=1e-4, abs=2e-6)
        r_before = layers(before)[name].r["default"]
        assert cut.cuts[name].rank_before == r_before
        assert cut.cuts[name].rank == layer.r["default"] == min(b, r_before)
        assert layer.scaling["default"] == pytest.approx(
            layers(before)[name].scaling["default"], rel=1e-12
        )
        some_lost |= tail > 0.01 * norm
    assert some_lost
    assert cut.parameters == lora_numbers(tmp_path / "cut")


def test_at_the_full_rank_the_function_is_unchanged(kind, tmp_path):
    expected = kind.logits(saved(kind, tmp_path / "whole"))
    adapter = Adapter.load(tmp_path / "whole")
    assert adapter.parameters == lora_numbers(tmp_path / "whole")
    adapter.truncate_svd(6).save(tmp_path / "r")
    adapter.truncate_svd(energy=1).save(tmp_path / "energy")
    adapter.truncate_svd(budget=adapter.parameters).save(tmp_path / "budget")
    for folder in ("r", "energy", "budget"):
        found = kind.logits(loaded(kind, tmp_path / folder))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (expected - kind.logits(kind.base())).abs().max() > 1e-2  # the adapter does something


@pytest.mark.parametrize(
    ("base", "said"), [("org/model", "org/model"), ("folder", None), (None, None)]
)
def test_a_cut_adapter_has_a_card_that_the_hub_can_read(base, said, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()  # a base model on disk is no id of the hub
    saved(kind, tmp_path / "whole")
    config = json.loads((tmp_path / "whole" / CONFIG).read_text())
    config["base_model_name_or_path"] = base
    (tmp_path / "whole" / CONFIG).write_text(json.dumps(config))
    Adapter.load(tmp_path / "whole").truncate_svd(1).save(tmp_path / "cut")
    card = ModelCard.load(tmp_path / "cut" / "README.md")
    assert (card.data.base_model, card.data.library_name) == (said, "peft")
    assert "# LoRA adapter of rank 1\n" in card.text


def test_a_module_whose_rank_exceeds_its_inputs_keeps_what_it_can_have(tmp_path):
    kind = Kind("wide", net, net_inputs, {"r": 6, "target_modules": ["lin"]})
    before = saved(kind, tmp_path / "whole")
    cut = Adapter.load(tmp_path / "whole").truncate_svd(6)
    assert cut.cuts["lin"].rank == 4 and cut.cuts["lin"].rank_before == 6  # Linear(4, 24)
    assert cut.cuts["lin"].lost == 0
    cut.save(tmp_path / "cut")
    torch.testing.assert_close(
        kind.logits(loaded(kind, tmp_path / "cut")), kind.logits(before), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("energy", [0.3, 0.8, 0.97, 0.9999])
def test_energy_keeps_the_smallest_rank_that_holds_the_share(kind, energy, tmp_path):
    before = saved(kind, tmp_path / "whole")
    Adapter.load(tmp_path / "whole").truncate_svd(energy=energy).save(tmp_path / "cut")
    cut = layers(loaded(kind, tmp_path / "cut"))
    found = {name: layer.r["default"] for name, layer in cut.items()}
    for name, matrix in dense(before).items():
        squares = spectrum(matrix) ** 2
        held = [squares[:b].sum() / squares.sum() for b in range(len(squares) + 1)]
        assert found[name] == next(b for b, share in enumerate(held) if share >= energy)


def test_all_energy_is_the_numerical_rank(tmp_path):
    model = adapted(LINEAR.base(), **LINEAR.lora)
    with torch.no_grad():  # rank 1, 2, 3, 4 in factors of six pieces
        for n, layer in enumerate(layers(model).values(), 1):
            a = layer.lora_A["default"].weight
            a.copy_(torch.randn(6, n) @ torch.randn(n, a.shape[1]))
    model.save_pretrained(str(tmp_path / "whole"))
    cut = Adapter.load(tmp_path / "whole").truncate_svd(energy=1.0)
    expected = {
        name: int(np.linalg.matrix_rank(matrix.astype(np.float32)))
        for name, matrix in dense(model).items()
    }
    assert {name: found.rank for name, found in cut.cuts.items()} == expected
    assert sorted(expected.values()) == [1, 2, 3, 4]


def test_budget_is_the_best_of_all_plans_where_pieces_cost_the_same(tmp_path):
    """Query and value of two layers, at 4 ranks: 256 plans, all of them tried."""
    model = saved(LINEAR, tmp_path / "whole", r=4, alpha_pattern={"layer.0": 0, ".*1.*value": 40})
    adapter = Adapter.load(tmp_path / "whole")
    squares = {name: spectrum(matrix)[:4] ** 2 for name, matrix in dense(model).items()}
    cost = 32  # of one piece of a 16 x 16 matrix
    for budget in range(4 * cost, 16 * cost + 1, 24):  # not a multiple of the cost
        cut = adapter.truncate_svd(budget=budget)
        ranks = {name: found.rank for name, found in cut.cuts.items()}
        assert cut.parameters == sum(ranks.values()) * cost <= budget
        assert min(ranks.values()) >= 1
        best = max(
            sum(of[:b].sum() for of, b in zip(squares.values(), plan, strict=True))
            for plan in itertools.product(range(1, 5), repeat=4)
            if sum(plan) * cost <= budget
        )
        kept = sum(squares[name][:b].sum() for name, b in ranks.items())
        assert kept == pytest.approx(best, rel=1e-5)


def in_memory(spectra: dict[str, list[float]], sizes: dict[str, int]) -> Adapter:
    """An adapter of square modules with given singular values of B A, at lora_alpha = r."""
    rng = np.random.default_rng(0)
    weights = {}
    for name, values in spectra.items():
        u, v = (np.linalg.qr(rng.normal(size=(sizes[name], len(values))))[0] for _ in "uv")
        weights[f"base_model.model.{name}.lora_A.weight"] = torch.tensor(v.T * 0.5).contiguous()
        weights[f"base_model.model.{name}.lora_B.weight"] = torch.tensor(u * values / 0.5)
    ranks = {name: len(values) for name, values in spectra.items()}
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    return Adapter(config | {"rank_pattern": ranks, "alpha_pattern": ranks}, weights)


def test_many_cheap_pieces_do_not_keep_out_a_dear_one_worth_more():
    """Per parameter the small module's pieces gain more, but they leave no room for the big one."""
    adapter = in_memory(
        {"small": [10, 3.2, 3.2, 3.2], "big": [10, 8, 1, 1]}, {"small": 6, "big": 40}
    )
    cut = adapter.truncate_svd(budget=2 * 12 + 2 * 80)
    assert {name: found.rank for name, found in cut.cuts.items()} == {"small": 2, "big": 2}


def test_budget_is_kept_and_never_worse_than_the_best_single_rank():
    rng = np.random.default_rng(5)
    for _ in range(60):
        names = [f"m{n}" for n in range(rng.integers(2, 5))]
        sizes = {name: int(rng.integers(5, 60)) for name in names}
        spectra = {name: sorted(rng.exponential(size=rng.integers(1, 6)))[::-1] for name in names}
        adapter = in_memory(spectra, sizes)
        least = sum(2 * sizes[name] for name in names)
        budget = int(rng.integers(least, adapter.parameters + 1))
        cut = adapter.truncate_svd(budget=budget)
        ranks = {name: found.rank for name, found in cut.cuts.items()}

        def parameters(ranks, sizes=sizes):
            return sum(2 * sizes[name] * b for name, b in ranks.items())

        def kept(ranks, spectra=spectra):
            return sum((np.array(spectra[name])[:b] ** 2).sum() for name, b in ranks.items())

        singles = [{name: min(b, len(s)) for name, s in spectra.items()} for b in range(1, 6)]
        assert cut.parameters == parameters(ranks) <= budget and min(ranks.values()) >= 1
        assert kept(ranks) >= max(kept(s) for s in singles if parameters(s) <= budget) - 1e-9


def test_an_untrained_adapter_stays_the_zero_it_is(kind, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(kind.base(), LoraConfig(**kind.lora)).save_pretrained(str(tmp_path / "zero"))
    adapter = Adapter.load(tmp_path / "zero")
    budget = sum(f.cost for f in adapter.factors().values())
    ways = [{"r": 2}, {"energy": 0.9}, {"budget": budget}]
    for n, how in enumerate(ways):
        cut = adapter.truncate_svd(**how)
        assert all(found.lost == 0 for found in cut.cuts.values())
        cut.save(tmp_path / str(n))
        assert not any(np.abs(m).max() for m in dense(loaded(kind, tmp_path / str(n))).values())


def test_head_and_biases_survive(tmp_path):
    """The oracle is the plain BERT with numpy's nearest update added to its weights by hand."""
    kind = bert_kind("bias", lora_bias=True)
    model = adapted(kind.base(), **kind.lora)
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.normal_()
    model.save_pretrained(str(tmp_path / "whole"))
    Adapter.load(tmp_path / "whole").truncate_svd(2).save(tmp_path / "cut")
    plain = kind.base()
    with torch.no_grad():
        for name, layer in layers(model).items():
            u, s, v = np.linalg.svd(dense(model)[name])
            target = plain.get_submodule(name)
            target.weight += torch.tensor((u[:, :2] * s[:2]) @ v[:2]).float()
            target.bias += layer.scaling["default"] * layer.lora_B["default"].bias
            assert layer.lora_B["default"].bias.abs().max() > 0.1
        plain.classifier = model.base_model.model.classifier.modules_to_save["default"]
    found = kind.logits(loaded(kind, tmp_path / "cut"))
    torch.testing.assert_close(found, kind.logits(plain), rtol=1e-4, atol=1e-5)


def test_bf16_adapters_stay_bf16(tmp_path):
    model = adapted(LINEAR.base(), **LINEAR.lora)
    for layer in layers(model).values():
        layer.to(torch.bfloat16)
    model.save_pretrained(str(tmp_path / "whole"))
    cut = Adapter.load(tmp_path / "whole").truncate_svd(3)
    cut.save(tmp_path / "cut")
    weights = load_file(tmp_path / "cut" / WEIGHTS)
    assert {t.dtype for name, t in weights.items() if ".lora_" in name} == {torch.bfloat16}
    old = {name: (f.scaling * f.b.double() @ f.a.double()).numpy() for name, f in factors(tmp_path)}
    for name, found in cut.factors().items():
        new = (found.scaling * found.b.double() @ found.a.double()).numpy()
        tail = np.sqrt((spectrum(old[name])[3:] ** 2).sum())
        norm = np.linalg.norm(old[name])
        assert tail > 0.05 * norm
        assert np.linalg.norm(old[name] - new) == pytest.approx(tail, abs=2**-7 * norm)


def factors(folder: Path):
    return Adapter.load(folder / "whole").factors().items()


def test_an_init_that_wants_even_ranks_is_no_obstacle(tmp_path):
    kind = bert_kind("orthogonal", init_lora_weights="orthogonal")
    saved(kind, tmp_path / "whole")
    Adapter.load(tmp_path / "whole").truncate_svd(3).save(tmp_path / "cut")
    assert {layer.r["default"] for layer in layers(loaded(kind, tmp_path / "cut")).values()} == {3}


def test_layouts_in_memory_do_not_matter(tmp_path):
    """safetensors refuses tensors that are not contiguous, or that share memory."""
    adapter = in_memory({"x": [3.0, 2.0, 1.0]}, {"x": 5})
    turned = {name: t.T.contiguous().T for name, t in adapter.weights.items()}
    assert not any(t.is_contiguous() for t in turned.values())
    plan = RankPlan.from_json(
        '{"format": "rankwise-plan/1", "r": 3, "scaling": 1,'
        ' "modules": {"x": {"rank": 3, "in": 5, "out": 5}}}'
    )
    nested = Adapter(adapter.config, turned, plan)
    nested.truncate_svd(2).save(tmp_path / "svd")
    nested.truncate(2).save(tmp_path / "nested")
    a, b = adapter.weights.values()
    found = load_file(tmp_path / "nested" / WEIGHTS)
    np.testing.assert_array_equal(found["base_model.model.x.lora_A.weight"], a[:2])
    expected = b[:, :2].numpy() * 1.5  # float64 has to stay as exact as it was
    np.testing.assert_array_equal(found["base_model.model.x.lora_B.weight"], expected)
    u, s, v = np.linalg.svd(b.numpy() @ a.numpy())
    found = load_file(tmp_path / "svd" / WEIGHTS)
    a, b = found.values()
    np.testing.assert_allclose(b @ a, (u[:, :2] * s[:2]) @ v[:2], atol=1e-12)


def test_a_tiny_alpha_is_not_rounded_away():
    adapter = in_memory({"x": [3.0, 2.0, 1.0]}, {"x": 5})
    adapter.config["alpha_pattern"] = {"x": 3e-12}
    assert adapter.truncate_svd(2).factors()["x"].scaling == pytest.approx(1e-12, rel=1e-9, abs=0)


def test_truncation_leaves_the_adapter_itself_alone(tmp_path):
    saved(LINEAR, tmp_path / "whole")
    adapter = Adapter.load(tmp_path / "whole")
    adapter.truncate_svd(2)
    for name, tensor in load_file(tmp_path / "whole" / WEIGHTS).items():
        assert torch.equal(adapter.weights[name], tensor)
    assert adapter.config == json.loads((tmp_path / "whole" / CONFIG).read_text())


# --- one threshold over all layers, and other factors ---------------------------------------------


def by_threshold(adapter: Adapter, budget: int) -> Adapter:
    """One threshold on the singular values of all layers."""
    return Ordered(adapter, by_sigma(adapter.factors())).cut(budget)


def test_a_threshold_keeps_the_largest_singular_values_of_all_layers(kind, tmp_path):
    """Numpy's dense SVD says which; the model in stock PEFT has them and nothing else."""
    before = saved(kind, tmp_path / "whole")
    adapter = Adapter.load(tmp_path / "whole")
    old, costs = dense(before), {name: f.cost for name, f in adapter.factors().items()}
    ranks = {name: f.rank for name, f in adapter.factors().items()}
    listed = sorted(
        ((s, name) for name, m in old.items() for s in spectrum(m)[: ranks[name]]), reverse=True
    )
    for n, budget in enumerate((adapter.parameters, adapter.parameters // 3, max(costs.values()))):
        expected, left = dict.fromkeys(old, 0), budget
        for _, name in listed:
            if costs[name] > left:
                break
            expected[name] += 1
            left -= costs[name]
        cut = by_threshold(adapter, budget)
        found = {name: done.rank for name, done in cut.cuts.items()}
        if n:  # at the full budget pieces of zero are in both, but in any order
            assert found == expected
        assert cut.parameters <= budget
        cut.save(tmp_path / str(n))
        new = dense(loaded(kind, tmp_path / str(n)))
        assert set(new) == {name for name, b in found.items() if b}
        for name, matrix in old.items():
            u, s, v = np.linalg.svd(matrix, full_matrices=False)
            b, norm = found[name], np.linalg.norm(matrix)
            nearest = (u[:, :b] * s[:b]) @ v[:b]
            np.testing.assert_allclose(new.get(name, 0 * matrix), nearest, atol=1e-5 * norm)
            lost = np.linalg.norm(matrix - nearest) / norm
            assert cut.cuts[name].lost == pytest.approx(lost, abs=2e-6)


def test_a_threshold_out_of_range_names_what_there_is():
    adapter = in_memory({"small": [1, 0.5], "big": [10, 8]}, {"small": 6, "big": 40})
    with pytest.raises(AdapterError, match=r"budget is 500; the adapter has 184 parameters"):
        by_threshold(adapter, 500)
    for budget in (79, 12, 0, -5):  # 12 would hold a piece of the small module, not the first
        with pytest.raises(
            AdapterError, match=rf"{budget} parameters hold no piece; the first .* takes 80"
        ):
            by_threshold(adapter, budget)
    assert by_threshold(adapter, 80).cuts["small"].rank == 0


def test_a_module_with_a_bias_of_its_own_is_not_left_without_an_adapter(tmp_path):
    kind = bert_kind("bias", lora_bias=True)
    saved(kind, tmp_path / "whole")
    adapter = Adapter.load(tmp_path / "whole")
    ordered = Ordered(adapter, by_sigma(adapter.factors()))
    assert ordered.cut(rank=1).cuts.keys() == adapter.factors().keys()
    with pytest.raises(AdapterError, match=r"has a bias beside its factors .* truncate_svd"):
        ordered.cut(keep=1 / 8)


def test_factors_of_other_modules_and_none_at_all_are_refused():
    adapter = in_memory({"x": [3.0, 2.0], "y": [1.0, 0.5]}, {"x": 5, "y": 4})
    own = adapter.factors()
    for factors, match in (
        ({**own, "z": own["x"]}, "the adapter has no module 'z'; give factors of its own"),
        ({"xx": own["x"]}, "no module 'xx'"),
        ({}, "no module would be left; keep at least one piece"),
    ):
        with pytest.raises(AdapterError, match=match) as error:
            adapter.with_factors(factors)
        assert "\n" not in str(error.value)


def test_what_other_factors_lose_is_the_dense_share():
    """Any factors, also such that grow the update; 0 of an update that is zero."""
    adapter = in_memory({"x": [3.0, 2.0, 1.0], "y": [1.0], "z": [0.0]}, {"x": 5, "y": 4, "z": 4})
    generator = torch.Generator().manual_seed(0)
    for size in (0.1, 1.0, 10.0):
        a, b = (size * torch.randn(5, 2, generator=generator).double() for _ in "ab")
        cut = adapter.with_factors({"x": replace(adapter.factors()["x"], a=a.T, b=b)})
        old = adapter.factors()["x"]
        update = old.scaling * (old.b @ old.a)
        share = float((update - old.scaling * (b @ a.T)).norm() / update.norm())
        assert cut.cuts["x"].lost == pytest.approx(share, rel=1e-9)
        assert (cut.cuts["y"].lost, cut.cuts["z"].lost) == (1, 0)
        assert (cut.cuts["y"].rank, cut.cuts["x"].rank) == (0, 2)
        assert cut.factors()["x"].scaling == pytest.approx(old.scaling, rel=1e-12)


# --- without rankwise -----------------------------------------------------------------------------


def test_truncated_adapters_load_where_rankwise_is_not_installed(plain_peft, tmp_path):
    kind = bert_kind("mixed", target_modules=["word_embeddings", "query", "dense"], **PATTERNS)
    saved(kind, tmp_path / "whole")
    cut = Adapter.load(tmp_path / "whole").truncate_svd(energy=0.9)
    assert len({found.rank for found in cut.cuts.values()}) > 1  # so there are patterns to read
    cut.save(tmp_path / "cut")
    BERT.model().save_pretrained(tmp_path / "base")
    found = plain_peft(
        BERT.auto.__name__, tmp_path / "base", tmp_path / "cut", batch(BERT), tmp_path
    )
    plain = kind.base()
    with torch.no_grad():  # the oracle: numpy's nearest updates added by hand
        for name, matrix in dense(adapted(kind.base(), **kind.lora)).items():
            u, s, v = np.linalg.svd(matrix, full_matrices=False)
            b = cut.cuts[name].rank
            plain.get_submodule(name).weight += torch.tensor((u[:, :b] * s[:b]) @ v[:b]).float()
    expected = kind.logits(plain)
    torch.testing.assert_close(found["logits"], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["merged"], expected, rtol=1e-4, atol=1e-5)


# --- nested truncation ----------------------------------------------------------------------------

R = 3


def nested_kind(name: str, targets: list[str] | None = None) -> Kind:
    of = lively(name)
    task = "CAUSAL_LM" if name.endswith("lm") else "SEQ_CLS"
    return Kind(name, of.model, lambda: batch(of), {"targets": targets, "task_type": task})


NESTED = [
    nested_kind("bert-classification"),
    nested_kind("gpt2-classification"),
    nested_kind("gpt2-lm", ["c_attn.q", "c_attn.v", "c_proj"]),
    nested_kind("llama-lm"),
    nested_kind("bert-tagging", ["word_embeddings", "query", "output.dense"]),
    Kind("conv2d", net, net_inputs, {"targets": ["conv", "point", "lin"], "task_type": None}),
]


def nested(kind: Kind, folder: Path, r_min: int = 1):
    """A nested adapter on disk, and the logits in training at several ranks."""
    torch.manual_seed(4)
    base = kind.base()
    plan = uniform(base, R, target_modules=kind.lora["targets"], lora_alpha=4)
    model = build(base, plan, task_type=kind.lora["task_type"])
    gated = attach_nested(model, plan)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.4)
    wanted = [dict.fromkeys(plan.modules, b) for b in range(1, R + 1)]
    wanted += [{name: 1 + (i + n) % R for i, name in enumerate(plan.modules)} for n in range(R)]
    logits = []
    for ranks in wanted:
        keep_first(gated, ranks)
        logits.append(kind.logits(model))
    for one, other in itertools.combinations(logits, 2):
        assert (one - other).abs().max() > 1e-2  # ranks matter
    keep_first(gated, R)
    bake(model)
    model.save_pretrained(str(folder))
    plan = plan.with_ranks(plan.ranks, trained_ranks=list(range(r_min, R + 1)))
    plan.save(folder / "nested_plan.json")
    return plan, list(zip(wanted, logits, strict=True))


@pytest.mark.parametrize("kind", NESTED, ids=lambda kind: kind.name)
def test_nested_truncation_is_the_model_in_training_at_those_ranks(kind, tmp_path):
    plan, found = nested(kind, tmp_path / "nested")
    adapter = Adapter.load(tmp_path / "nested")
    for n, (ranks, expected) in enumerate(found):
        cut = adapter.truncate(plan.with_ranks(ranks))
        cut.save(tmp_path / str(n))
        model = loaded(kind, tmp_path / str(n))
        torch.testing.assert_close(kind.logits(model), expected, rtol=1e-4, atol=1e-5)
        realised = {name: layer.r["default"] for name, layer in layers(model).items()}
        assert realised == plan.with_ranks(ranks).module_ranks()
        assert {found.rank for found in cut.cuts.values()} == set(realised.values())
        assert {found.lost for found in cut.cuts.values()} == {None}
        if len(set(ranks.values())) == 1:  # an int says the same
            same = adapter.truncate(next(iter(ranks.values())))
            assert all(torch.equal(t, cut.weights[name]) for name, t in same.weights.items())


def test_nested_truncation_without_rankwise(plain_peft, tmp_path):
    kind = NESTED[1]  # GPT-2's fused projections
    plan, found = nested(kind, tmp_path / "nested")
    GPT2.model().save_pretrained(tmp_path / "base")
    ranks, expected = found[-1]
    Adapter.load(tmp_path / "nested").truncate(plan.with_ranks(ranks)).save(tmp_path / "cut")
    found = plain_peft(
        GPT2.auto.__name__, tmp_path / "base", tmp_path / "cut", batch(GPT2), tmp_path
    )
    torch.testing.assert_close(found["logits"], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["merged"], expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def nested_bert(tmp_path_factory):
    """A nested adapter whose ranks 2 and 3 were trained, and its plan."""
    folder = tmp_path_factory.mktemp("nested") / "nested"
    return folder, nested(NESTED[0], folder, r_min=2)[0]


def test_a_rank_that_was_never_drawn_is_not_cut_out(nested_bert):
    """DyLoRA(rank_weights=...) may leave ranks out within the range."""
    adapter = Adapter.load(nested_bert[0])
    plan = adapter.plan.with_ranks(adapter.plan.ranks, trained_ranks=[1, 3])
    adapter = replace(adapter, plan=plan)
    assert adapter.trained_ranks == [1, 3]
    with pytest.raises(AdapterError, match=r"rank 2 .* was not trained; .* ranks 1, 3"):
        adapter.truncate(2)


@pytest.mark.parametrize("b", [0, 1, R + 1, -1])
def test_only_trained_ranks_can_be_cut_out(nested_bert, b):
    folder, plan = nested_bert
    adapter = Adapter.load(folder)
    assert adapter.trained_ranks == [2, 3]
    with pytest.raises(AdapterError, match=rf"rank {b} .* was not trained; .* ranks 2, 3"):
        adapter.truncate(b)
    if b >= 0:
        one = {name: b if n == 1 else 2 for n, name in enumerate(plan.modules)}
        with pytest.raises(AdapterError, match=rf"rank {b} of '.*value' was not trained"):
            adapter.truncate(plan.with_ranks(one))


def test_a_plan_of_other_modules_is_refused(nested_bert):
    folder, _ = nested_bert
    for targets in (["query"], ["query", "value", "key"], ["key", "dense"]):
        other = uniform(BERT.model(), 2, target_modules=targets)
        with pytest.raises(PlanError, match=r"differ in the module '.*'; it is for another"):
            Adapter.load(folder).truncate(other)


def test_only_a_nested_adapter_can_be_cut_without_svd(nested_bert, tmp_path):
    saved(LINEAR, tmp_path / "whole")
    with pytest.raises(AdapterError, match="not nested; use truncate_svd"):
        Adapter.load(tmp_path / "whole").truncate(2)
    Adapter.load(nested_bert[0]).truncate(2).save(tmp_path / "cut")  # and what was cut is not
    with pytest.raises(AdapterError, match="use truncate_svd"):
        Adapter.load(tmp_path / "cut").truncate(2)


def test_a_nested_adapter_that_was_not_cut_stays_nested(nested_bert, tmp_path):
    folder, plan = nested_bert
    Adapter.load(folder).save(tmp_path / "copy")
    assert Adapter.load(tmp_path / "copy").plan == plan
    assert sorted(p.name for p in (tmp_path / "copy").iterdir()) == [
        CONFIG,
        WEIGHTS,
        "nested_plan.json",
    ]


def test_a_plan_that_contradicts_the_weights_is_refused(nested_bert, tmp_path):
    folder, plan = nested_bert
    path = tmp_path / "nested" / "nested_plan.json"
    shutil.copytree(folder, path.parent)
    plan.with_ranks(dict.fromkeys(plan.modules, 2)).save(path)
    with pytest.raises(PlanError, match=r"gives '.*' rank 2; the weights have 3"):
        Adapter.load(path.parent).truncate(2)
    more = uniform(BERT.model(), 3, target_modules=["query", "key", "value"])
    more.save(path)
    with pytest.raises(PlanError, match=r"has the module '.*key', which the weights lack"):
        Adapter.load(path.parent).truncate(2)
    for ranks in ("x", [], [0, 1], [4], 3, [1.5], None):
        plan.with_ranks(plan.ranks, trained_ranks=ranks).save(path)
        with pytest.raises(PlanError, match=r'"trained_ranks" in nested_plan\.json is'):
            Adapter.load(path.parent)
    path.write_text("{")
    with pytest.raises(PlanError, match=r"nested_plan\.json: not JSON"):
        Adapter.load(path.parent)


# --- saving ---------------------------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved(tmp_path):
    saved(LINEAR, tmp_path / "whole")
    cut = Adapter.load(f"{tmp_path}/whole/").truncate_svd(2)
    cut.save(f"{tmp_path}/deep/er/cut/")
    folder = tmp_path / "deep" / "er" / "cut"
    assert names(folder) == ["README.md", CONFIG, WEIGHTS, "truncation.json"]
    assert names(folder.parent) == ["cut"]
    with safe_open(folder / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(load_file(tmp_path / "whole" / WEIGHTS))
    said = json.loads((folder / "truncation.json").read_text())
    found = cut.cuts["bert.encoder.layer.0.attention.self.query"]
    assert said["bert.encoder.layer.0.attention.self.query"] == {
        "rank_before": 6,
        "rank": 2,
        "lost": found.lost,
    }
    config = json.loads((folder / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 3)  # 9 / 6 stays 3 / 2
    assert config["rank_pattern"] == config["alpha_pattern"] == {}  # not every server reads them
    before = json.loads((tmp_path / "whole" / CONFIG).read_text())
    assert {key for key in config if config[key] != before[key]} == {"r", "lora_alpha"}


@pytest.mark.parametrize("crash", [OSError("No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", ["save_file", "write_json", "replace_folder"])
def test_a_crash_while_saving_leaves_no_folder(at, crash, tmp_path, monkeypatch):
    saved(LINEAR, tmp_path / "whole")
    cut = Adapter.load(tmp_path / "whole").truncate_svd(2)

    def half(*args, **kwargs):
        if at != "replace_folder":
            Path(args[at == "save_file"]).write_bytes(b"{")
        raise crash

    with monkeypatch.context() as patched:
        patched.setattr(files if at == "replace_folder" else module, at, half)
        with pytest.raises(type(crash)):
            cut.save(tmp_path / "cut")
    assert names(tmp_path) == ["whole"]
    cut.save(tmp_path / "cut")
    assert names(tmp_path) == ["cut", "whole"]


def test_what_a_killed_process_left_does_not_get_in(tmp_path):
    saved(LINEAR, tmp_path / "whole")
    (tmp_path / ".copy.new").mkdir()
    (tmp_path / ".copy.new" / "truncation.json").write_text("{}")
    with pytest.raises(OutputError, match="files that rankwise did not write"):
        Adapter.load(tmp_path / "whole").save(tmp_path / "copy")
    (tmp_path / ".copy.new" / files.MARKER).write_text("")  # then a process of ours left it
    Adapter.load(tmp_path / "whole").save(tmp_path / "copy")
    assert names(tmp_path / "copy") == [CONFIG, WEIGHTS]
    assert names(tmp_path) == ["copy", "whole"]


def test_a_folder_that_exists_is_refused(tmp_path):
    saved(LINEAR, tmp_path / "whole")
    before = (tmp_path / "whole" / WEIGHTS).read_bytes()
    cut = Adapter.load(tmp_path / "whole").truncate_svd(2)
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "whole", f"{tmp_path}/whole/", tmp_path / "empty"):
        with pytest.raises(AdapterError, match="exists; give a new folder"):
            cut.save(target)
    assert (tmp_path / "whole" / WEIGHTS).read_bytes() == before
    assert names(tmp_path / "empty") == []


# --- errors ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "whole"
    saved(LINEAR, folder)
    return folder


def refused(folder: Path, match: str) -> None:
    with pytest.raises(AdapterError, match=match) as error:
        Adapter.load(folder)
    assert "\n" not in str(error.value)


def made(folder: Path, config: Any, base: nn.Module | None = None) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(base or BERT.model(), config).save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize(
    ("lora", "match"),
    [
        ({"use_dora": True}, r"has use_dora: .* every column; train it anew"),
        ({"init_lora_weights": "pissa"}, r"initialised by pissa, .* convert it to plain LoRA"),
        ({"init_lora_weights": "pissa_niter_2"}, "initialised by pissa_niter_2"),
        ({"init_lora_weights": "olora"}, "initialised by olora"),
        ({"kasa_config": KasaConfig()}, r"has kasa_config: .* train it anew"),
        ({"monteclora_config": MontecloraConfig()}, r"has monteclora_config: .* train it anew"),
        (
            {"use_bdlora": BdLoraConfig(target_modules_bd_a=["query"], nblocks=2)},
            r"has use_bdlora: .* train it anew",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_variants_that_a_change_of_rank_would_break(lora, match, tmp_path):
    refused(made(tmp_path / "x", LoraConfig(r=4, target_modules=["query"], **lora)), match)


def test_target_parameters_are_refused(tmp_path):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 8, 8))

        def forward(self, x):
            return x @ self.weight[0]

    config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.weight"])
    base = nn.ModuleDict({"experts": Experts()})
    refused(made(tmp_path / "x", config, base), "has target_parameters: .* train it anew")


def test_modules_that_cannot_have_a_rank_of_their_own_are_refused(tmp_path):
    base = nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2), "g": nn.Conv2d(4, 4, 3, groups=2)})
    lora = LoraConfig(r=4, target_modules=["mha"])
    refused(made(tmp_path / "mha", lora, base), r"MultiheadAttention .* train it anew")
    base = nn.ModuleDict({"g": nn.Conv2d(4, 4, 3, groups=2)})
    lora = LoraConfig(r=4, target_modules=["g"])
    refused(made(tmp_path / "g", lora, base), r"a convolution in groups cannot be cut")


def test_other_kinds_of_adapters_are_refused(tmp_path):
    config = IA3Config(target_modules=["key", "value"], feedforward_modules=[])
    refused(made(tmp_path / "x", config), "peft_type 'IA3'; only LORA can be cut, give one")


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def test_missing_files(copy, tmp_path):
    refused(tmp_path / "nowhere", r"cannot read .*nowhere/adapter_config\.json: .*No such file")
    weights = load_file(copy / WEIGHTS)
    (copy / WEIGHTS).unlink()
    refused(copy, r"no adapter_model\.safetensors in .*; give an adapter folder")
    torch.save(weights, copy / "adapter_model.bin")
    refused(copy, r"adapter_model\.bin is a pickle; load it in PEFT and save_pretrained\(\) again")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1], ids=lambda n: f"{n} bytes")
def test_a_file_that_was_cut_off(copy, keep):
    path = copy / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    refused(copy, r"adapter_model\.safetensors is damaged: .*; save or copy it again")


@pytest.mark.parametrize("junk", [b"\xff" * 400, b"PK\x03\x04 this is a pickle in a zip" * 9])
def test_a_file_that_is_something_else(copy, junk):
    (copy / WEIGHTS).write_bytes(junk)
    refused(copy, "is damaged")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[1, 2]", r"adapter_config\.json holds a list, not a JSON object; save"),
        ("null", "holds a NoneType, not a JSON object"),
        ("{", r"cannot read .*adapter_config\.json: not JSON: Expecting"),
        ("{}", "peft_type None; only LORA"),
    ],
)
def test_a_config_that_is_none(copy, text, match):
    (copy / CONFIG).write_text(text)
    refused(copy, match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"r": None}, r"gives '.*' r None; it has to be an integer >= 1"),
        ({"r": "six"}, "r 'six'; it has to be an integer"),
        ({"r": 0}, "r 0; it has to be an integer >= 1"),
        ({"lora_alpha": None}, "lora_alpha None; it has to be a number"),
        ({"lora_alpha": float("inf")}, "cannot read .*Infinity is no finite number"),
        ({"r": 5}, r"gives '.*' rank 5, but A is \(6, 16\) and B \(16, 6\); .* saved again"),
        ({"rank_pattern": {"value": 4}}, r"gives '.*value' rank 4, but A is \(6, 16\)"),
        ({"rank_pattern": ["value"]}, "rank_pattern in adapter_config.json is malformed"),
        ({"alpha_pattern": {"value(": 4}}, "alpha_pattern in adapter_config.json is malformed"),
    ],
    ids=str,
)
def test_a_config_that_contradicts_the_weights_or_itself(copy, changes, match):
    config = json.loads((copy / CONFIG).read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (copy / CONFIG).write_text(json.dumps(config))
    refused(copy, match)


QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda w: w.pop(f"{QUERY}.lora_A.weight"), r"query' has no lora_A; .* save .* again"),
        (lambda w: w.pop(f"{QUERY}.lora_B.weight"), "query' has no lora_B"),
        (lambda w: [w.pop(name) for name in list(w) if "lora_" in name], "no LoRA factors"),
        (lambda w: w.update({f"{QUERY}.lora_A.weight": torch.ones(0)}), r"A is \(0,\)"),
        (lambda w: w.update({f"{QUERY}.lora_B.weight": torch.ones(16, 5)}), r"B \(16, 5\)"),
        (lambda w: w[f"{QUERY}.lora_B.weight"].fill_(float("nan")), r"NaN .* train it anew"),
        (lambda w: w.update({f"{QUERY}.lora_E": torch.ones(6)}), r"lora_E', of a variant .* anew"),
    ],
    ids=["no A", "no B", "none", "empty", "short B", "NaN", "variant"],
)
def test_weights_that_are_no_lora_adapter(copy, change, match):
    weights = load_file(copy / WEIGHTS)
    change(weights)
    save_file(weights, copy / WEIGHTS)
    refused(copy, match)


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ({}, "give one of r, energy and budget"),
        ({"r": 2, "energy": 0.5}, "give one of r, energy and budget"),
        ({"r": 2, "energy": 0.5, "budget": 900}, "give one of r, energy and budget"),
        ({"r": 0}, "r is 0; the adapter has ranks up to 6, give 1 to that"),
        ({"r": 7}, "r is 7; the adapter has ranks up to 6"),
        ({"r": 2.5}, "r is 2.5; the adapter has ranks up to 6"),
        ({"energy": 0}, "energy is 0; it has to be above 0 and at most 1"),
        ({"energy": 1.01}, "energy is 1.01; it has to be above 0"),
        ({"energy": float("nan")}, "energy is nan"),
        ({"budget": 127}, "budget is 127; rank 1 in every module takes 128 parameters"),
        ({"budget": 0}, "budget is 0; rank 1"),
        ({"budget": 10**9}, "budget is 1000000000; the adapter has"),
    ],
    ids=str,
)
def test_truncation_out_of_range(whole, how, match):
    with pytest.raises(AdapterError, match=match) as error:
        Adapter.load(whole).truncate_svd(**how)
    assert "\n" not in str(error.value)
