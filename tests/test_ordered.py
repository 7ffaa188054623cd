"""An adapter with its order: each cut in stock PEFT against the model with the other pieces off."""

import re
import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import rankwise
from families import Family, batch, family, rows
from rankwise import AdapterError, DataError, ModelError, Ordered
from rankwise.adapter import Factors
from rankwise.curvature import read, write
from rankwise.lora import layers_of

R = 3
SIZES = ({"keep": 1.0}, {"keep": 0.4}, {"keep": 0.2}, {"rank": 1})


@dataclass(frozen=True)
class Case:
    """A base model and a LoraConfig beside r."""

    name: str
    base: str
    lora: dict[str, Any] = field(default_factory=dict)

    @property
    def of(self) -> Family:
        of = family(self.base)
        of.config.initializer_range = 0.2  # logits that depend visibly on every layer
        return of


CASES = [
    Case("bert", "bert-classification"),
    Case("tagging", "bert-tagging"),
    Case("gpt2-lm", "gpt2-lm", {"target_modules": ["c_attn", "c_fc", "c_proj"]}),
    Case("llama-lm", "llama-lm"),
    Case("ranks", "bert-classification", {"rank_pattern": {"query": 5, r".*\.1\..*dense": 1}}),
    Case("rslora", "llama-lm", {"use_rslora": True, "rank_pattern": {"q_proj": 5}}),
    Case("alphas", "bert-tagging", {"alpha_pattern": {"query": 7, r"layer\.1\..*value": 20}}),
    Case("embedding", "bert-classification", {"target_modules": ["word_embeddings", "value"]}),
    Case("tied", "gpt2-lm", {"target_modules": ["wte", "c_attn"]}),
]


def adapted(case: Case) -> nn.Module:
    """A stock PEFT model in float32 whose LoRA does something, more in some layers than others."""
    settings = {"r": R, "lora_alpha": 2 * R, "target_modules": "all-linear"} | case.lora
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(case.of.model(), LoraConfig(**settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for n, layer in enumerate(layers_of(model).values()):
            for key, parameter in layer.named_parameters():
                if "lora_" in key:
                    parameter.normal_(std=0.2 / (1 + n % 3))
    return model.eval()


def batches(of: Family, count: int = 32) -> list[dict[str, torch.Tensor]]:
    table = rows(of, count).with_format("torch")
    whole = {key: table[key][:] for key in ("input_ids", "attention_mask", "labels")}
    return [{k: v[i : i + 8] for k, v in whole.items()} for i in range(0, count, 8)]


@torch.no_grad()
def logits(model: nn.Module, of: Family) -> torch.Tensor:
    return model(**batch(of)).logits


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def made(request, tmp_path_factory):
    """(case, PEFT model, its Ordered, a folder with the base model)."""
    case = request.param
    folder = tmp_path_factory.mktemp(case.name)
    case.of.model().save_pretrained(folder / "base")
    model = adapted(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ordered = rankwise.order(model, batches(case.of), ladder=(1 / 2, 1 / 4))
    return case, model, ordered, folder


def test_an_order_shows_the_rows_of_each_look_and_can_be_silent(capfd):
    case = CASES[0]
    ordered = rankwise.order(adapted(case), batches(case.of), ladder=(1 / 2,))
    shown = capfd.readouterr().err
    for look in range(1, ordered.order.provenance["looks"] + 1):
        assert f"order, look {look}: " in shown
    assert "32/32" in shown
    rankwise.order(adapted(case), batches(case.of), ladder=(1 / 2,), bar=False)
    assert capfd.readouterr().err == ""


def test_who_wants_to_be_told_the_rows_gets_no_bar(capfd):
    case, told = CASES[0], []
    rankwise.order(adapted(case), batches(case.of), ladder=(), progress=told.append)
    assert told == [8, 16, 24, 32]
    assert capfd.readouterr().err == ""


def silenced(ordered: Ordered, **size: Any) -> dict[str, Factors]:
    """All pieces at their places; those outside the cut times 0, the others times their gate."""
    order = ordered.order
    kept = order.kept(**size)
    gates = torch.ones(len(kept))
    if "rank" not in size or len(kept) == len(order.sequence):
        gates = order.gates[min(n for n in order.gates if n >= len(kept))][: len(kept)]
    of_piece = dict(zip(kept, gates.tolist(), strict=True))
    return {
        name: Factors(
            f.a,
            f.b * torch.tensor([of_piece.get((name, j), 0.0) for j in range(f.rank)]),
            f.scaling,
        )
        for name, f in order.pieces.items()
    }


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_cut_in_stock_peft_is_the_model_with_the_other_pieces_off(
    made, size, plain_peft, tmp_path
):
    case, model, ordered, folder = made
    own, before = read(model), logits(model, case.of)
    write(model, silenced(ordered, **size))
    expected = logits(model, case.of)
    write(model, own)
    small = ordered.cut(**size)
    small.save(tmp_path / "cut")
    found = plain_peft(
        case.of.auto.__name__, folder / "base", tmp_path / "cut", batch(case.of), tmp_path
    )
    scale = float(expected.abs().max())
    torch.testing.assert_close(found["logits"], expected, rtol=1e-4, atol=1e-5 * scale)
    if case.name != "tied":  # merged into wte, a piece would reach the output layer as well
        torch.testing.assert_close(found["merged"], expected, rtol=1e-3, atol=1e-4 * scale)
    if size == {"keep": 1.0}:
        torch.testing.assert_close(expected, before, rtol=1e-3, atol=1e-4 * scale)
    else:
        assert (expected - before).abs().max() > 1e-2  # the cut is seen


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_saved_and_loaded_it_cuts_the_same_bit_for_bit(made, size, tmp_path):
    _, _, ordered, _ = made
    ordered.save(tmp_path / "ordered")
    ours, theirs = ordered.cut(**size), Ordered.load(tmp_path / "ordered").cut(**size)
    assert ours.config == theirs.config and ours.cuts == theirs.cuts
    assert ours.weights.keys() == theirs.weights.keys()
    assert all(torch.equal(t, theirs.weights[name]) for name, t in ours.weights.items())


def test_of_two_sizes_the_smaller_lies_in_the_larger(made):
    """The pieces, each at its place; their gates are each size's own."""
    _, _, ordered, _ = made
    total = ordered.order.parameters
    larger = ordered.cut(total).factors()
    for budget in (total // 2, total // 3, total // 5):
        smaller = ordered.cut(budget)
        assert smaller.parameters <= budget
        for name, f in smaller.factors().items():
            whole = larger[name]
            assert f.scaling == pytest.approx(whole.scaling, rel=1e-12)
            assert torch.equal(f.a, whole.a[: f.rank])
            b, like = f.b.flatten(1).double(), whole.b[:, : f.rank].flatten(1).double()
            gate = (b * like).sum(0) / (like**2).sum(0)
            torch.testing.assert_close(
                b, gate * like, rtol=1e-5, atol=1e-6 * float(like.abs().max())
            )
        larger = smaller.factors()


def test_modules_of_rank_0_are_absent_and_what_each_lost_is_said(made):
    _, _, ordered, _ = made
    order = ordered.order
    small = ordered.cut(keep=0.2)
    ranks = order.ranks(keep=0.2)
    assert 0 in ranks.values()
    assert {n: f.rank for n, f in small.factors().items()} == {n: r for n, r in ranks.items() if r}
    assert {name: cut.rank for name, cut in small.cuts.items()} == ranks
    for name, f in ordered.adapter.factors().items():
        dense = f.scaling * f.b.double() @ f.a.double()
        new, left = small.factors().get(name), dense
        if new is not None:
            left = dense - new.scaling * new.b.double() @ new.a.double()
        share = float(left.norm() / dense.norm())
        assert small.cuts[name].lost == pytest.approx(share, rel=1e-6, abs=1e-7)
        assert small.cuts[name].rank_before == f.rank


def test_the_card_of_a_cut_says_that_an_order_made_it(tmp_path):
    of = family("bert-classification")
    rankwise.order(adapted(CASES[0]), batches(of)).cut(keep=0.3).save(tmp_path / "cut")
    card = (tmp_path / "cut" / "README.md").read_text()
    assert "an order" in card and "SVD" not in card


# Errors.


def refused(kind: type[Exception], call: Any, *words: str) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def test_what_has_no_order_is_refused_in_one_line():
    of = family("bert-classification")
    data = batches(of)
    refused(ModelError, lambda: rankwise.order(of.model(), data), "no LoRA layers")
    refused(ModelError, lambda: rankwise.order(nn.Linear(2, 2), data), "no LoRA layers")
    dora = adapted(Case("dora", "bert-classification", {"use_dora": True}))
    refused(ModelError, lambda: rankwise.order(dora, data), "DoRA")
    bias = adapted(Case("bias", "bert-classification", {"lora_bias": True}))
    refused(ModelError, lambda: rankwise.order(bias, data), "lora_bias=False")


def test_rows_that_cannot_order_are_refused_in_one_line():
    model, data = adapted(CASES[0]), batches(CASES[0].of)
    bare = [{k: v for k, v in b.items() if k != "labels"} for b in data]
    refused(DataError, lambda: rankwise.order(model, bare), "labels")
    refused(DataError, lambda: rankwise.order(model, data[:3]), "24 rows are too few", "32")
    refused(DataError, lambda: rankwise.order(model, []), "0 rows are too few")
    lm = Case("lm", "llama-lm")
    ignored = [{**b, "labels": torch.full_like(b["labels"], -100)} for b in batches(lm.of)]
    refused(DataError, lambda: rankwise.order(adapted(lm), ignored), "label", "-100")


def test_single_rows_and_odd_sizes_are_refused_in_one_line():
    of = family("bert-classification")
    model = get_peft_model(of.model(), LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(DataError, match="takes batches of tensors"):
        rankwise.order(model, rows(of))
    ordered = rankwise.order(model, [rows(of, 40).with_format("torch")[:]])
    for size in ({"budget": "900"}, {"rank": 1.5}, {"keep": "all"}, {"rank": True}):
        with pytest.raises(AdapterError, match=r"it has to be an integer|it is a share"):
            ordered.cut(**size)
    assert len(repr(ordered)) < 200


def test_a_model_that_has_diverged_is_refused_and_left_as_it_was():
    model = adapted(CASES[0])
    with torch.no_grad():
        model.get_base_model().classifier.weight.fill_(float("nan"))
    before = read(model)
    with pytest.raises(rankwise.DivergedError, match="held-out rows is nan"):
        rankwise.order(model, batches(CASES[0].of))
    assert all(torch.equal(f.b, before[n].b) for n, f in read(model).items())


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": "rankwise-order/1", "modules": [], "sequence": []}']
)
def test_a_damaged_order_is_refused_in_one_line(text, tmp_path):
    ordered = rankwise.order(adapted(CASES[0]), batches(CASES[0].of), ladder=())
    ordered.save(tmp_path / "ordered")
    (tmp_path / "ordered" / "order.json").write_text(text)
    refused(AdapterError, lambda: Ordered.load(tmp_path / "ordered"), "no order can be read")


def test_a_notebook_shows_sizes_and_ranks_and_a_text_is_short(made):
    _, _, ordered, _ = made
    text = re.sub(r"<[^>]+>", " ", ordered._repr_html_()).replace(",", "")
    for halvings in range(3):
        small = ordered.cut(ordered.order.parameters >> halvings)
        ranks = [f.rank for f in small.factors().values()]
        shown = f"{small.parameters}  {max(ranks)}  {len(ranks)} of {len(ordered.order.pieces)}"
        assert shown in text
    assert len(repr(ordered)) < 120
