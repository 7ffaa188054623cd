"""Orders: the rotation, the gate gradients, the quadratic model and its greedy, each against an
oracle in float64; the orders from factors; cuts, nesting, files, errors."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification

from families import FAMILIES, LENGTH, family, rows, without_dropout
from rankwise import curvature, orders, surgeon
from rankwise.adapter import Factors
from rankwise.curvature import collect, halfway, kind_of, loss_of, read, roots, write
from rankwise.errors import AdapterError, DataError, DivergedError, ModelError
from rankwise.orders import Order, at_random, by_energy, by_index, by_rank, by_sigma
from rankwise.surgeon import (
    by_activation,
    by_data,
    cut_in_rounds,
    gate_gradients,
    quadratic,
    refit,
    removal,
    rotate,
)

R = 3


def lora(name: str = "bert-classification", size: float = 0.2, **config):
    """A tiny float64 model with a LoRA that does something."""
    model = without_dropout(family(name)).double()
    settings = {"r": R, "lora_alpha": 2 * R, "target_modules": "all-linear"} | config
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(**settings))
    for _, p in model.named_parameters():
        if p.requires_grad:
            p.data = torch.randn_like(p) * size
    return model.eval()


def batches(name: str = "bert-classification", count: int = 40, size: int = 8, padded: bool = True):
    """Batches with labels; every second row has two tokens of padding."""
    table = rows(family(name), count).with_format("torch")
    whole = {key: table[key][:] for key in ("input_ids", "attention_mask", "labels")}
    if padded:
        whole["input_ids"][::2, -2:] = 0
        whole["attention_mask"][::2, -2:] = 0
        if whole["labels"].dim() == 2:
            whole["labels"][::2, -2:] = -100
    return [{k: v[i : i + size] for k, v in whole.items()} for i in range(0, count, size)]


def logits(model, batch):
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        return model(**inputs).logits


def scaled(pieces: dict[str, Factors], gates: torch.Tensor) -> dict[str, Factors]:
    """The factors with a gate in front of each piece, in the order of the modules."""
    parts = gates.split([f.rank for f in pieces.values()])
    return {
        name: Factors(f.a, f.b * g.to(f.b), f.scaling)
        for (name, f), g in zip(pieces.items(), parts, strict=True)
    }


def random_factors(seed: int = 0, dims=((5, 7), (6, 4), (9, 9)), r: int = R) -> dict[str, Factors]:
    torch.manual_seed(seed)
    return {
        f"layer.{n}": Factors(
            torch.randn(r, i, dtype=torch.float64), torch.randn(o, r, dtype=torch.float64), 2.0
        )
        for n, (i, o) in enumerate(dims)
    }


@pytest.mark.parametrize("name", [f.name for f in FAMILIES])
def test_the_rotation_leaves_the_model_as_it_is(name):
    model = lora(name)
    data = batches(name)
    before = [logits(model, batch) for batch in data]
    own = read(model)
    order = by_data(model, data, ladder=(1 / 4,))
    assert all(torch.equal(read(model)[n].b, f.b) for n, f in own.items())
    write(model, order.pieces)
    for old, batch in zip(before, data, strict=True):
        torch.testing.assert_close(logits(model, batch), old, rtol=0, atol=1e-10)
    moved = max(float((order.pieces[n].a - f.a).abs().max()) for n, f in own.items())
    assert moved > 1e-3


@pytest.mark.parametrize(
    ("name", "step", "tolerance"),
    [
        ("bert-tagging", 1e-5, 1e-6),
        ("gpt2-lm", 1e-5, 1e-6),
        ("gpt2-classification", 1e-5, 1e-6),
        ("llama-classification", 3e-2, 2e-2),  # its norms compute in float32 whatever comes in
    ],
)
def test_gate_gradients_are_numerical_derivatives(name, step, tolerance):
    model, data = lora(name), batches(name, count=6, size=6)
    kind = kind_of(model)
    statistics = collect(model, data, kind=kind, draws=1, seed=3)
    pieces, j = quadratic(read(model), statistics)
    (batch,) = data
    z = logits(model, batch)
    y = batch["labels"]
    z, y = (z[:, :-1], y[:, 1:]) if kind == "causal" else (z, y)
    columns = roots(kind, z, y, 1, torch.Generator().manual_seed(3))

    def scalars(gates):
        write(model, scaled(pieces, gates))
        out = logits(model, batch)
        out = out[:, :-1] if kind == "causal" else out
        return torch.cat([(c * out).flatten(1).sum(1) for c in columns])

    count = j.shape[1]
    for i in range(0, count, 5):
        up, down = torch.ones(count, dtype=torch.float64), torch.ones(count, dtype=torch.float64)
        up[i] += step
        down[i] -= step
        numerical = (scalars(up) - scalars(down)) / (2 * step * statistics.count**0.5)
        limit = tolerance * float(j.abs().max())
        torch.testing.assert_close(j[:, i], numerical, rtol=tolerance, atol=limit)


class Linear(nn.Module):
    """A linear model with the outputs that a transformers model has."""

    def __init__(self, outputs: int = 3):
        super().__init__()
        self.config = type("Config", (), {"model_type": "linear", "get": lambda *_: None})()
        self.one, self.two = nn.Linear(5, outputs), nn.Linear(4, outputs)

    def forward(self, x, y):
        return type("Output", (), {"logits": self.one(x) + self.two(y)})()


def linear_case():
    torch.manual_seed(0)
    config = LoraConfig(r=R, lora_alpha=4, target_modules=["one", "two"], use_rslora=True)
    model = get_peft_model(Linear().double(), config).double()
    for _, p in model.named_parameters():
        p.data = torch.randn_like(p)
    x, y = torch.randn(50, 5, dtype=torch.float64), torch.randn(50, 4, dtype=torch.float64)
    # Labels that the model fits exactly, so that its own gradient is zero.
    labels = model(x=x, y=y).logits.detach()
    data = [
        {"x": x[i : i + 10], "y": y[i : i + 10], "labels": labels[i : i + 10]}
        for i in range(0, 50, 10)
    ]
    return model, data


def linear_loss(model, data, pieces, gates):
    write(model, scaled(pieces, gates))
    total = sum(loss_of("regression", logits(model, b), b["labels"])[0] for b in data)
    return total / 50


def test_f_is_the_hessian_of_the_gates_and_predicts_any_removal():
    model, data = linear_case()
    statistics = collect(model, data, kind="regression")
    assert statistics.loss / statistics.count == pytest.approx(0, abs=1e-20)
    pieces, j = quadratic(read(model), statistics)
    f = j.T @ j
    count = len(f)
    ones = torch.ones(count, dtype=torch.float64)
    eye = torch.eye(count, dtype=torch.float64) * 1e-2
    for a, b in itertools.combinations_with_replacement(range(count), 2):
        parts = [
            sign * linear_loss(model, data, pieces, ones + s * eye[a] + t * eye[b])
            for s, t, sign in ((1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1))
        ]
        assert sum(parts) / 4e-4 == pytest.approx(float(f[a, b]), rel=1e-6, abs=1e-7)
    for size in range(1, count + 1, 2):
        for removed in itertools.combinations(range(count), size):
            gates = ones.clone()
            gates[list(removed)] = 0
            predicted = 0.5 * float(f[list(removed)][:, list(removed)].sum())
            assert linear_loss(model, data, pieces, gates) == pytest.approx(predicted, rel=1e-9)


def test_with_plain_curvatures_the_basis_is_the_svd():
    for name, f in random_factors().items():
        p, q = f.scaling**2 * f.b.T @ f.b, f.a @ f.a.T
        pieces, left, right, s = rotate(f, p, q)
        u, sigma, v = torch.linalg.svd(f.scaling * f.b @ f.a)
        torch.testing.assert_close(s, sigma[:R], rtol=1e-5, atol=1e-9)
        for i in range(R):
            piece = f.scaling * torch.outer(pieces.b[:, i], pieces.a[i])
            torch.testing.assert_close(
                piece, sigma[i] * torch.outer(u[:, i], v[i]), rtol=1e-4, atol=1e-4
            )
        torch.testing.assert_close(left @ right.T, torch.eye(R, dtype=torch.float64)), name


def test_each_piece_of_the_basis_costs_its_singular_value_squared():
    """In the model with curvature P ⊗ Q, and no two pieces interact."""
    torch.manual_seed(0)
    (f, *_) = random_factors().values()
    p, q = (x @ x.T for x in torch.randn(2, R, R, dtype=torch.float64))
    _, left, right, s = rotate(f, p, q)
    cores = torch.einsum("ki,li->ikl", left, right)
    costs = torch.einsum("ikl,km,jmn,nl->ij", cores, p, cores, q)
    torch.testing.assert_close(costs, torch.diag(s**2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dead", ["a", "b", "both"])
def test_factors_of_zero_have_pieces_too(dead):
    model = lora()
    for f in (read(model),):
        zero = {
            n: Factors(x.a * (dead == "b"), x.b * (dead == "a"), x.scaling) for n, x in f.items()
        }
    write(model, zero)
    before = logits(model, batches()[0])
    order = by_data(model, batches())
    write(model, order.pieces)
    assert all(f.a.isfinite().all() and f.b.isfinite().all() for f in order.pieces.values())
    torch.testing.assert_close(logits(model, batches()[0]), before, rtol=0, atol=1e-10)


def whole(j, moved, costs, ridge):
    """All of `removal`: pieces in their order, and the gates before and after each."""
    steps = list(removal(j, moved, costs, ridge))
    assert steps[0][0] is None
    return [i for i, _ in steps[1:]], [gates for _, gates in steps]


def least(j, moved, kept, lam) -> tuple[float, torch.Tensor]:
    """The least of ½‖moved + J x‖² + ½ λ‖x_K‖² and the gates there, by solving for it."""
    gone = [i for i in range(j.shape[1]) if i not in kept]
    t = moved - j[:, gone].sum(1)
    jk = j[:, kept]
    eye = torch.eye(len(kept), dtype=j.dtype)
    x = -torch.linalg.solve(jk.T @ jk + lam * eye, jk.T @ t)
    gates = torch.zeros(j.shape[1], dtype=j.dtype)
    gates[kept] = 1 + x
    return float(0.5 * ((t + jk @ x) ** 2).sum() + 0.5 * lam * (x**2).sum()), gates


@pytest.fixture
def spread():
    """Scalars and pieces whose effects differ in size and overlap; some scalars have moved."""
    generator = torch.Generator().manual_seed(0)
    j = torch.randn(30, 10, generator=generator, dtype=torch.float64)
    j += 0.5 * j[:, [3]]
    j *= torch.logspace(0, -1.5, 10, dtype=torch.float64)
    return j, 0.3 * torch.randn(30, generator=generator, dtype=torch.float64)


def test_the_gates_of_every_cut_are_the_least_squares_ones(spread):
    j, moved = spread
    gone, gates = whole(j, moved, [1] * 10, 0.1)
    lam = 0.1 * float((j**2).sum() / 10)
    for n in range(10):
        kept = sorted(gone[n:])
        torch.testing.assert_close(gates[n], least(j, moved, kept, lam)[1])


def test_each_step_takes_what_is_cheapest_per_parameter_by_solving_for_all(spread):
    j, moved = spread
    costs = [1, 2, 3, 4, 5] * 2
    lam = 0.1 * float((j**2).sum() / 10)
    gone, _ = whole(j, moved, costs, 0.1)
    for n in range(10):
        kept = gone[n:]
        now = least(j, moved, sorted(kept), lam)[0]
        price = {
            i: (least(j, moved, sorted(set(kept) - {i}), lam)[0] - now) / costs[i] for i in kept
        }
        assert gone[n] == min(price, key=price.__getitem__)


def test_the_greedy_is_near_brute_force():
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(10):
        j = torch.randn(30, 8, generator=generator, dtype=torch.float64)
        j *= torch.logspace(0, -1.5, 8, dtype=torch.float64)
        moved, lam = torch.zeros(30, dtype=torch.float64), 0.1 * float((j**2).sum() / 8)
        gone, _ = whole(j, moved, [1] * 8, 0.1)
        for keep in range(1, 8):
            best = min(
                least(j, moved, list(k), lam)[0] for k in itertools.combinations(range(8), keep)
            )
            ratios.append(least(j, moved, sorted(gone[8 - keep :]), lam)[0] / best)
    assert min(ratios) >= 1 - 1e-9  # brute force is the least there is
    assert sum(ratios) / len(ratios) < 1.05


def test_with_a_large_ridge_gates_stay_and_the_cost_is_that_of_f(spread):
    """½ Σ_{i,j∈S} F_ij: plain removal, with brute force over F beside it."""
    j, _ = spread
    gone, gates = whole(j, torch.zeros(30, dtype=torch.float64), [1] * 10, 1e7)
    assert all(float(g[g != 0].sub(1).abs().max()) < 1e-4 for g in gates[:-1])
    f = j.T @ j
    for n in range(10):
        price = {i: float(f[[*gone[:n], i]][:, [*gone[:n], i]].sum()) for i in gone[n:]}
        assert gone[n] == min(price, key=price.__getitem__)


def test_what_has_moved_already_is_made_good():
    """Where the model has moved by what piece 0 did, taking its opposite brings it back."""
    j = torch.tensor([[2.0, -2.0, 1.0]], dtype=torch.float64)
    assert whole(j[:, 1:], -j[:, 0], [1, 1], 1e7)[0][0] == 0
    # Of two equal pieces one goes for nothing, since the other doubles its gate.
    twins = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.9]], dtype=torch.float64)
    gone, gates = whole(twins, torch.zeros(2, dtype=torch.float64), [1] * 3, 1e-6)
    assert gone[0] in (0, 1)
    torch.testing.assert_close(
        gates[1][1 - gone[0]], torch.tensor(2.0, dtype=torch.float64), rtol=1e-4, atol=0
    )


def test_fitted_gates_bring_the_outputs_nearer_to_the_whole_adapters():
    model, data = lora(size=0.1), batches()
    own, target = read(model), torch.cat([logits(model, b) for b in data]).log_softmax(-1)

    def away(cut) -> float:
        write(model, {n: orders.padded(cut[n], f) for n, f in own.items()})
        found = torch.cat([logits(model, b) for b in data]).log_softmax(-1)
        write(model, own)
        return float((target.exp() * (target - found)).sum(-1).mean())

    for order in (by_data(model, data, ladder=(1 / 2, 1 / 4)), by_sigma(own)):
        budget = order.parameters // 4
        again = refit(model, data, order, [budget], passes=3)
        plain = away(again.factors(budget, fitted=False))
        assert away(again.factors(budget)) < 0.9 * plain
        assert again.kept(budget) == order.kept(budget)
        assert set(again.gates) >= {len(order.kept(budget))}


@pytest.mark.parametrize("name", ["bert-classification", "llama-lm"])
def test_outputs_that_were_kept_save_a_pass_and_change_nothing(name, monkeypatch):
    model, passes = lora(name), []
    model.register_forward_pre_hook(lambda *args: passes.append(1))
    data = batches(name)
    kept = by_data(model, data, ladder=(1 / 2, 1 / 4), trust=math.inf)
    few = len(passes)
    monkeypatch.setattr(curvature, "KEPT", 0)
    anew = by_data(model, data, ladder=(1 / 2, 1 / 4), trust=math.inf)
    assert (few, len(passes) - few) == (3 * len(data), 5 * len(data))
    assert kept.sequence == anew.sequence
    for count, gates in kept.gates.items():
        torch.testing.assert_close(gates, anew.gates[count], rtol=1e-4, atol=1e-6)


class Looks:
    """The looks of an order: the pieces that each saw, how far they were and how far they might
    be; the distance is times a factor of ours."""

    def __init__(self, monkeypatch, farther: Callable[[int], float]):
        self.counts: list[int] = []
        self.distances: list[float] = []
        self.bounds: list[float] = []
        real = surgeon._look

        def look(model, batches, now, whole, **how):
            found = real(model, batches, now, whole, **how | {"most": math.inf})
            found = replace(found, distance=found.distance * farther(len(self.counts)))
            self.counts.append(sum(f.rank if f else 0 for f in now.values()))
            self.distances.append(found.distance)
            self.bounds.append(how["most"])
            return found

        monkeypatch.setattr(surgeon, "_look", look)


def test_a_step_that_moved_the_outputs_too_far_goes_half_as_far(monkeypatch):
    """As if the size where it then ends had been a size of the ladder."""
    model, data = lora(size=0.1), batches()
    looks = Looks(monkeypatch, lambda n: math.inf if n == 1 else 0.0)
    undone = by_data(model, data, ladder=(1 / 2, 1 / 8))
    first, far, shorter, _ = looks.counts
    assert shorter == round((first * far) ** 0.5)
    assert undone.provenance["looks"] == 5

    kept = undone.sequence[:shorter]
    share = sum(undone.pieces[name].cost for name, _ in kept) / undone.parameters
    known = by_data(model, data, ladder=(1 / 2, share, 1 / 8), trust=math.inf)
    assert known.sequence == undone.sequence
    assert known.gates.keys() == undone.gates.keys()
    for count, gates in known.gates.items():
        torch.testing.assert_close(undone.gates[count], gates, rtol=1e-6, atol=1e-8)


def test_two_steps_are_undone_at_most_on_the_way_to_a_size_and_the_next_is_no_long_one(
    monkeypatch,
):
    looks = Looks(monkeypatch, lambda n: math.inf)  # however short the step, it was too long
    order = by_data(lora(size=0.1), batches(), ladder=(1 / 2,))
    far, half, quarter, next_one, *rest = looks.counts
    assert far < half < quarter  # the first two are undone
    ratio = len(order.sequence) / quarter
    assert quarter / next_one == pytest.approx(ratio**2, rel=0.05)  # at most twice as far
    assert rest == [far]  # none is undone any more, and here the size is reached
    assert sorted(order.sequence) == sorted(orders.all_pieces(order.pieces))


def test_a_cut_whose_loss_is_not_finite_is_undone_like_any_that_is_too_far(monkeypatch):
    looks, real = [], surgeon._look

    def look(*args, **how):
        looks.append(real(*args, **how))
        if len(looks) in whose:
            raise DivergedError("the loss is nan")
        return looks[-1]

    monkeypatch.setattr(surgeon, "_look", look)
    whose = {2}
    order = by_data(lora(size=1e-3), batches(), ladder=(1 / 2, 1 / 8))
    assert order.provenance["looks"] == 5  # one for the step that was undone, one for its half
    looks.clear()
    whose = {1, 2, 3}
    with pytest.raises(DivergedError, match="nan"):  # and two are undone at most
        by_data(lora(size=1e-3), batches(), ladder=(1 / 2, 1 / 8))


def test_no_step_is_undone_where_that_is_not_wanted(monkeypatch, tmp_path):
    looks = Looks(monkeypatch, lambda n: 1e300)
    order = by_data(lora(size=0.1), batches(), ladder=(1 / 2, 1 / 4), trust=math.inf)
    assert len(looks.counts) == 2
    order.save(tmp_path)
    assert Order.load(tmp_path).provenance["trust"] is None


def test_what_costs_hardly_anything_is_not_undone(monkeypatch):
    """An adapter that does next to nothing: no cut is 5 % of the loss away."""
    looks = Looks(monkeypatch, lambda n: 10.0)
    by_data(lora(size=1e-6), batches(), ladder=(1 / 2, 1 / 4), trust=1.0)
    assert len(looks.counts) == 2


def test_a_pass_ends_as_soon_as_the_outputs_are_known_to_be_too_far():
    model, data = lora(), batches()
    whole = read(model)
    write(model, {n: replace(f, b=f.b / 2) for n, f in whole.items()})
    every = collect(model, data, reference=whole)
    few = collect(model, data, reference=whole, most=every.distance / 2)
    assert few.rows < every.rows == 40
    assert every.distance / 2 < few.distance < every.distance
    assert few.distance == pytest.approx(float((every.residuals[: len(few.residuals)] ** 2).sum()))
    assert collect(model, data, reference=whole, most=every.distance).rows == 40


def test_a_linear_model_is_just_as_far_as_was_foreseen(monkeypatch):
    """There the quadratic model is exact, so that the bound at a trust of 1 is the distance."""
    model, data = linear_case()
    looks = Looks(monkeypatch, lambda n: 1.0)
    by_data(model, data, ladder=(1 / 2,), trust=1 + 1e-9, kind="regression")
    assert len(looks.counts) == 1
    assert looks.distances == pytest.approx(looks.bounds, rel=1e-6)
    assert looks.distances[0] > 0


@pytest.mark.parametrize("name", ["bert-tagging", "llama-lm"])
def test_drawn_signs_are_measured_by_those_that_foresaw_the_step(name, monkeypatch):
    """A step so short that the model is as good as linear: by other signs it seemed too far."""
    monkeypatch.setattr(surgeon, "SLIGHT", 0.0)
    looks = Looks(monkeypatch, lambda n: 1.0)
    by_data(lora(name, size=0.02), batches(name), ladder=(0.9,), trust=1.5)
    assert len(looks.counts) == 1
    assert 1.5 * looks.distances[0] == pytest.approx(looks.bounds[0], rel=0.05)


def test_refit_finds_the_gates_of_a_linear_model():
    """There the outputs are linear in the gates: one pass with hardly a ridge is least squares."""
    model, data = linear_case()
    order = by_sigma(read(model))
    budget = 30
    again = refit(model, data, order, [budget], passes=1, ridge=1e-9, kind="regression")
    kept = order.kept(budget)
    whole_output = torch.cat([logits(model, b) for b in data])
    write(model, {n: orders.padded(None, f) for n, f in read(model).items()})
    base = torch.cat([logits(model, b) for b in data])
    columns = []
    for name, j in kept:
        f = order.pieces[name]
        x = torch.cat([b["x" if name == "one" else "y"] for b in data])
        columns.append((f.scaling * x @ torch.outer(f.b[:, j], f.a[j]).T).flatten())
    solved = torch.linalg.lstsq(torch.stack(columns, 1), (whole_output - base).flatten()).solution
    torch.testing.assert_close(again.gates[len(kept)], solved, rtol=1e-5, atol=1e-6)


def test_statistics_of_two_halves_sum_to_the_whole():
    model, data = lora("gpt2-classification", target_modules=["c_attn", "c_proj"]), batches()
    whole = collect(model, data)
    halves = collect(model, data[:2]) + collect(model, data[2:])
    single = [
        {k: v[i : i + 1] for k, v in b.items()} for b in data for i in range(len(b["labels"]))
    ]
    apart = collect(model, single)
    assert (whole.rows, whole.count) == (halves.rows, halves.count) == (40, 40)
    for name in whole.inputs:
        for part in (halves, apart):
            for key in ("inputs", "gradients"):
                torch.testing.assert_close(getattr(part, key)[name], getattr(whole, key)[name])
        torch.testing.assert_close(
            halves.products[name].sum(0), whole.products[name].sum(0), rtol=1e-9, atol=1e-12
        )
    _, j = quadratic(read(model), whole)
    _, k = quadratic(read(model), halves)
    torch.testing.assert_close(k.T @ k, j.T @ j, rtol=1e-6, atol=1e-9)


def test_padding_counts_for_nothing():
    model = lora()
    data = batches(padded=True)
    longer = [
        {
            "input_ids": nn.functional.pad(b["input_ids"], (0, 5)),
            "attention_mask": nn.functional.pad(b["attention_mask"], (0, 5)),
            "labels": b["labels"],
        }
        for b in data
    ]
    short, long = collect(model, data), collect(model, longer)
    for name in short.inputs:
        torch.testing.assert_close(long.inputs[name], short.inputs[name])
        torch.testing.assert_close(long.products[name], short.products[name], rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize(
    ("kind", "outputs"),
    [("classification", 2), ("classification", 4), ("regression", 3), ("multi-label", 3)],
)
def test_the_roots_square_to_the_hessian_of_the_loss(kind, outputs):
    torch.manual_seed(0)
    z = torch.randn(1, outputs, dtype=torch.float64)
    y = {
        "classification": torch.tensor([1]),
        "regression": torch.randn(1, outputs),
        "multi-label": torch.ones(1, outputs),
    }[kind].to(torch.int64 if kind == "classification" else torch.float64)

    def loss(x):
        if kind == "classification":
            return nn.functional.cross_entropy(x, y)
        if kind == "regression":
            return nn.functional.mse_loss(x, y)
        return nn.functional.binary_cross_entropy_with_logits(x, y)

    hessian = torch.autograd.functional.hessian(loss, z).view(outputs, outputs)
    columns = torch.cat(roots(kind, z, y, 1, torch.Generator()))
    torch.testing.assert_close(columns.T @ columns, hessian)


def test_halfway_the_divergence_has_the_gradient_that_the_gap_gives():
    """For two classes, H(halfway) times the gap is near p_here - p_there, however far apart."""
    here = torch.tensor([[0.0, 2.0], [0.0, -6.0], [1.0, 1.5]], dtype=torch.float64)
    there = torch.tensor([[0.0, -1.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    (root,) = roots("classification", halfway("classification", here, there), None, 1, None)
    pull = root * (root * (here - there)).sum(1, keepdim=True)
    gap = here.softmax(1) - there.softmax(1)
    assert torch.equal(pull.sign(), gap.sign())
    ratio = pull[:, 1] / gap[:, 1]
    assert ((ratio > 0.99) & (ratio < 2.5)).all()
    (own,) = roots("classification", here, None, 1, None)
    alone = (own * (own * (here - there)).sum(1, keepdim=True))[:, 1] / gap[:, 1]
    assert alone[1] < 0.05  # sure and wrong: its own curvature sees next to nothing


def test_drawn_signs_square_to_the_hessian_on_average():
    torch.manual_seed(0)
    z = torch.randn(1, 2, 6, dtype=torch.float64) * 2
    labels = torch.tensor([[3, -100]])
    columns = roots("tokens", z, labels, 20_000, torch.Generator().manual_seed(0))
    square = torch.einsum("nti,nuj->tiuj", torch.cat(columns), torch.cat(columns))
    p = z[0, 0].softmax(-1)
    torch.testing.assert_close(
        square[0, :, 0], torch.diag(p) - torch.outer(p, p), rtol=0, atol=0.01
    )
    assert not square[1].any()


@pytest.mark.parametrize("rounds", [1, 3])
def test_an_order_by_data_beats_singular_values_where_they_mislead(rounds):
    """One input of the model never varies: what is large there is useless, and only data say so."""
    model, data = linear_case()
    for batch in data:
        batch["x"][:, :] = 0
    order = cut_in_rounds(model, data, 23, rounds, kind="regression")
    assert order.ranks(23) == {"one": 0, "two": R}
    assert by_sigma(read(model)).ranks(23)["one"] > 0


def test_embeddings_conv1d_ranks_and_alphas_by_layer():
    model = lora(
        "gpt2-classification",
        target_modules=["wte", "c_attn", "c_fc"],
        rank_pattern={"c_fc": 5},
        alpha_pattern={"c_attn": 3},
        use_rslora=True,
    )
    data = batches("gpt2-classification")
    before = logits(model, data[0])
    order = by_data(model, data)
    assert {f.rank for f in order.pieces.values()} == {R, 5}
    assert len({f.scaling for f in order.pieces.values()}) == 3
    assert order.pieces["transformer.wte"].a.shape == (R, 60)
    write(model, order.pieces)
    torch.testing.assert_close(logits(model, data[0]), before, rtol=0, atol=1e-10)


def test_gate_gradients_of_an_embedding():
    model = lora("gpt2-classification", target_modules=["wte", "c_fc"])
    (batch,) = batches("gpt2-classification", count=6, size=6)
    statistics = collect(model, [batch])
    pieces, j = quadratic(read(model), statistics)
    columns = roots("classification", logits(model, batch), batch["labels"], 1, torch.Generator())
    count, step = j.shape[1], 1e-5
    for i in range(R):
        values = []
        for sign in (1, -1):
            gates = torch.ones(count, dtype=torch.float64)
            gates[i] += sign * step
            write(model, scaled(pieces, gates))
            values.append(torch.cat([(c * logits(model, batch)).sum(1) for c in columns]))
        numerical = (values[0] - values[1]) / (2 * step * statistics.count**0.5)
        torch.testing.assert_close(j[:, i], numerical, rtol=1e-6, atol=1e-8)


def test_frozen_factors_and_bfloat16_are_read_as_well():
    model, data = lora(), batches()
    trainable = by_data(model, data)
    for p in model.parameters():
        p.requires_grad_(False)
    frozen = by_data(model, data)
    assert frozen.sequence == trainable.sequence
    assert not any(p.requires_grad for p in model.parameters())
    half = by_data(model.bfloat16(), data)
    assert {f.a.dtype for f in half.pieces.values()} == {torch.bfloat16}
    head = set(trainable.sequence[:10])
    assert len({name for name, _ in head} & {name for name, _ in half.sequence[:10]}) >= 3


def test_the_model_is_left_as_it_was():
    model = lora().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    by_data(model, batches())
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


# Orders from factors.


def test_by_sigma_is_one_threshold_on_the_singular_values_of_all_layers():
    factors = random_factors()
    order = by_sigma(factors)
    values = [
        float(torch.linalg.matrix_norm(torch.outer(f.b[:, j], f.a[j]) * f.scaling))
        for name, j in order.sequence
        for f in [order.pieces[name]]
    ]
    assert values == sorted(values, reverse=True)
    expected = sorted(
        itertools.chain(
            *(torch.linalg.svdvals(f.scaling * f.b @ f.a)[:R].tolist() for f in factors.values())
        ),
        reverse=True,
    )
    assert values == pytest.approx(expected)


def test_by_rank_and_by_energy_and_by_index_and_random():
    factors = random_factors()
    order = by_rank(factors)
    assert [j for _, j in order.sequence] == [0] * 3 + [1] * 3 + [2] * 3
    energy = by_energy(factors)
    for share in (0.5, 0.7, 0.9):
        ranks = {}
        for name, f in factors.items():
            s = torch.linalg.svdvals(f.b @ f.a)[:R] ** 2
            ranks[name] = next(k for k in range(1, R + 1) if s[:k].sum() >= share * s.sum())
        kept = energy.sequence[: sum(ranks.values())]
        assert {n: sum(m == n for m, _ in kept) for n in factors} == ranks
    index = by_index(factors)
    assert index.pieces == factors
    assert [j for _, j in index.sequence] == [0] * 3 + [1] * 3 + [2] * 3
    thin = by_sigma(random_factors(dims=((5, 2), (4, 6))))  # rank 2 at most, of 3 pieces
    assert {n: f.rank for n, f in thin.pieces.items()} == {"layer.0": 2, "layer.1": 3}
    assert at_random(factors, 1).sequence == at_random(factors, 1).sequence
    assert at_random(factors, 1).sequence != at_random(factors, 2).sequence


def test_by_activation_ignores_inputs_that_never_come():
    model, data = linear_case()
    for batch in data:
        batch["x"][:, :] = 0
    order = by_activation(model, data, kind="regression")
    assert order.ranks(rank=1) == {"one": 1, "two": 1}
    assert [name for name, _ in order.sequence] == ["two"] * R + ["one"] * R


# Cuts and files.


def test_cuts_are_nested_and_within_the_budget():
    order = by_sigma(random_factors())
    total = order.parameters
    assert total == R * (12 + 10 + 18)
    previous: tuple = ()
    for budget in range(18, total + 1):
        kept = order.kept(budget)
        assert kept[: len(previous)] == previous
        cut = order.factors(budget)
        spent = sum(f.a.numel() + f.b.numel() for f in cut.values() if f is not None)
        assert spent <= budget
        assert {n: f.rank if f else 0 for n, f in cut.items()} == order.ranks(budget)
        previous = kept
    assert len(previous) == 3 * R
    assert order.ranks(keep=1.0) == dict.fromkeys(order.pieces, R)
    assert order.ranks(keep=0.5) == order.ranks(total // 2)
    assert order.ranks(rank=2) == dict.fromkeys(order.pieces, 2)


def test_a_cut_between_two_sizes_takes_the_gates_of_the_larger():
    order = by_sigma(random_factors())
    gates = {4: torch.tensor([1.0, 2.0, 3.0, 4.0]), 6: torch.arange(6.0)}
    order = replace(order, gates=gates)
    name, j = order.sequence[2]
    for budget, gate in (
        (order.pieces[name].cost * 0 + cost_of(order, 3), 3),
        (cost_of(order, 5), 2),
    ):
        cut = order.factors(budget)[name]
        plain = order.factors(budget, fitted=False)[name]
        place = [p for p in order.kept(budget) if p[0] == name].index((name, j))
        torch.testing.assert_close(cut.b[:, place], gate * plain.b[:, place])
    all_of_it = order.factors(keep=1.0)
    assert all(
        torch.equal(all_of_it[n].b, f.b) for n, f in order.factors(keep=1.0, fitted=False).items()
    )


def cost_of(order: Order, count: int) -> int:
    return sum(order.pieces[name].cost for name, _ in order.sequence[:count])


def test_an_order_comes_back_from_disk(tmp_path):
    order = by_data(lora(), batches())
    order.save(tmp_path / "ordered")
    again = Order.load(tmp_path / "ordered")
    assert again.sequence == order.sequence and again.provenance == order.provenance
    assert set(again.gates) == set(order.gates) and len(order.gates) > 10
    assert all(torch.equal(again.gates[n], g) for n, g in order.gates.items())
    for name, f in order.pieces.items():
        assert torch.equal(again.pieces[name].a, f.a) and torch.equal(again.pieces[name].b, f.b)
        assert again.pieces[name].scaling == f.scaling


# Errors.


def message(kind, call) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_wrong_input_is_named(tmp_path):
    data = batches()
    plain = family("bert-classification").model()
    assert "no LoRA layers" in message(ModelError, lambda: by_data(plain, data))
    assert "DoRA" in message(ModelError, lambda: by_data(lora(use_dora=True), data))
    merged = lora()
    merged.merge_adapter()
    assert "unmerge" in message(ModelError, lambda: by_data(merged, data))
    unlabelled = [{k: v for k, v in b.items() if k != "labels"} for b in data]
    assert "labels" in message(DataError, lambda: by_data(lora(), unlabelled))
    assert "8 rows" in message(DataError, lambda: by_data(lora(), data[:1]))
    broken = lora()
    next(p for n, p in broken.named_parameters() if "lora_B" in n).data.fill_(math.nan)
    assert "nan" in message(DivergedError, lambda: by_data(broken, data))
    wrong = [b | {"labels": b["input_ids"]} for b in data]
    assert "do not fit" in message(DataError, lambda: by_data(lora(), wrong))
    order = by_sigma(random_factors())
    assert "one of" in message(AdapterError, lambda: order.ranks())
    assert "hold no piece" in message(AdapterError, lambda: order.ranks(3))
    assert "keep is 2" in message(AdapterError, lambda: order.ranks(keep=2))
    assert "rank is 0" in message(AdapterError, lambda: order.ranks(rank=0))
    assert "no order" in message(AdapterError, lambda: Order.load(tmp_path))
    assert "ridge" in message(AdapterError, lambda: by_data(lora(), data, ridge=0))
    assert "other modules" in message(AdapterError, lambda: refit(lora(), data, order, [40]))
    assert "budget is 0" in message(AdapterError, lambda: cut_in_rounds(lora(), data, 0))


def test_a_convolution_is_refused():
    class Convolution(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = type("Config", (), {"model_type": "conv", "get": lambda *_: None})()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(x)

    model = get_peft_model(Convolution(), LoraConfig(r=2, target_modules=["conv"]))
    assert "Conv2d" in message(ModelError, lambda: read(model))


def test_an_unknown_kind_of_model_is_asked_about():
    model, _ = linear_case()
    assert "pass kind=" in message(ModelError, lambda: kind_of(model))


def test_the_mask_is_of_this_length():
    """The batches above have the padding that the tests count on."""
    assert batches()[0]["attention_mask"].sum(1).tolist()[:2] == [LENGTH - 2, LENGTH]
    assert AutoModelForSequenceClassification is family("bert-classification").auto
    assert surgeon.LEAST_ROWS <= 40
    assert gate_gradients(torch.ones(2, 1, 1), torch.ones(1, 1), torch.ones(1, 1)).shape == (2, 1)
