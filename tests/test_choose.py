"""Ranks by layer within a budget, against every plan there is, on losses whose gains are known;
the smallest size that is as good, by hand and on simulated rows."""

import itertools
from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import TrainingArguments, default_data_collator

from families import family, rows
from rankwise import Adapter, DivergedError, DyLoRA, PlanError, RankPlan, RankwiseError
from rankwise.choose import (
    Curve,
    measure_sizes,
    ranks_by_layer,
    smallest_as_good,
    uniform_within,
)
from rankwise.lora import build, uniform
from rankwise.nested import NestedTrainer, size_loss
from rankwise.plan import Entry

R = 4
SQUARE = [(8, 8)] * 3


def plan_of(sizes: list[tuple[int, int]], r: int = R) -> RankPlan:
    """A nested adapter's plan: modules of these sizes, all at rank r."""
    modules = {f"m{n}": Entry(r, *size, module=f"m{n}") for n, size in enumerate(sizes)}
    return RankPlan(modules, r=r)


class Additive:
    """A loss from which each piece takes its own gain, whatever the other modules have."""

    def __init__(self, gains: list[list[float]]):
        self.gains = {f"m{n}": pieces for n, pieces in enumerate(gains)}
        self.calls: list[dict[str, int]] = []

    def __call__(self, ranks: Mapping[str, int]) -> float:
        self.calls.append(dict(ranks))
        return self.of(ranks)

    def of(self, ranks: Mapping[str, int]) -> float:
        return 100 - sum(sum(pieces[: ranks[name]]) for name, pieces in self.gains.items())


def best(loss: Additive, plan: RankPlan, budget: int, r_min: int = 1) -> float:
    """The lowest loss of all plans within the budget."""
    every = itertools.product(range(r_min, R + 1), repeat=len(plan.modules))
    plans = (dict(zip(plan.modules, ranks, strict=True)) for ranks in every)
    return min(loss.of(ranks) for ranks in plans if plan.with_ranks(ranks).parameters <= budget)


def budgets(plan: RankPlan, step: int, r_min: int = 1) -> range:
    one = RankPlan.uniform(plan, 1).parameters
    return range(r_min * one, plan.parameters + 1, step)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("r_min", [1, 2])
def test_diminishing_gains_at_equal_costs_give_the_best_plan_of_all(seed, r_min):
    rng = np.random.default_rng(seed)
    plan = plan_of(SQUARE)
    scales = rng.exponential(5, size=len(SQUARE))
    gains = [sorted(rng.exponential(scale, size=R), reverse=True) for scale in scales]
    for budget in budgets(plan, 8, r_min):  # half the cost of a piece: some of it is left over
        loss = Additive(gains)
        found = ranks_by_layer(loss, plan, budget, range(r_min, R + 1))
        assert loss.of(found.plan.ranks) == pytest.approx(best(loss, plan, budget, r_min))
        assert found.plan.parameters <= budget
        assert min(found.plan.ranks.values()) >= r_min


def test_pieces_that_hurt_are_left_out():
    loss = Additive([[5, 3, -1, -2], [4, -1, -1, -1], [6, 5, 4, 3]])
    found = ranks_by_layer(loss, plan_of(SQUARE), budget=plan_of(SQUARE).parameters)
    assert found.plan.ranks == {"m0": 2, "m1": 1, "m2": 4}


@pytest.mark.parametrize("useless", [0.0, -0.5])
def test_a_useless_piece_does_not_hide_a_useful_one(useless):
    """One rank at a time, the third piece of m0 would never be seen behind the second."""
    loss = Additive([[1, useless, 9, 0], [1, 0.5, 0.4, 0.3], [1, 0.6, 0.2, 0.1]])
    plan = plan_of(SQUARE)
    budget = (3 + 1 + 1) * 16
    found = ranks_by_layer(loss, plan, budget)
    assert found.plan.ranks == {"m0": 3, "m1": 1, "m2": 1}
    assert loss.of(found.plan.ranks) == best(loss, plan, budget)
    assert found.pays


def test_what_is_reported_is_what_was_measured():
    loss = Additive([[9, 4, 2, 1], [3, 2, 1, 0.5], [1, 0.4, 0.2, 0.1]])
    plan, budget = plan_of(SQUARE), 7 * 16
    found = ranks_by_layer(loss, plan, budget)
    assert found.uniform.ranks == {"m0": 2, "m1": 2, "m2": 2}
    assert found.uniform_loss == loss.of(found.uniform.ranks)
    assert found.by_layer_loss == loss.of(found.by_layer.ranks) < found.uniform_loss
    assert found.pays and found.plan is found.by_layer
    assert found.by_layer.provenance == {"method": "by layer", "budget": budget}
    for name, by_rank in found.losses.items():
        assert by_rank == {b: loss.of({**found.uniform.ranks, name: b}) for b in range(1, R + 1)}


@pytest.mark.parametrize("r_min", [1, 2])
def test_each_plan_is_measured_once(r_min):
    plan = plan_of(SQUARE)
    for budget in budgets(plan, 16, r_min):
        loss = Additive([[9, 4, 2, 1], [3, 2, 1, 0.5], [1, 0.4, 0.2, 0.1]])
        found = ranks_by_layer(loss, plan, budget, range(r_min, R + 1))
        single = len(SQUARE) * (R - r_min)  # each entry at each of its other ranks
        same = found.by_layer.ranks == found.uniform.ranks
        assert len(loss.calls) == single + (1 if same else 2)
        trained = range(r_min, R + 1)
        assert all(b in trained for ranks in loss.calls for b in ranks.values())


def test_when_the_whole_is_worse_than_uniform_uniform_it_is():
    """Each module alone promises a gain; together they undo each other."""
    plan = plan_of(SQUARE)
    promise = Additive([[9, 8, 7, 6], [1, 0.1, 0.1, 0.1], [1, 0.1, 0.1, 0.1]])

    def loss(ranks):
        moved = sum(b != 2 for b in ranks.values())
        return promise.of(ranks) if moved <= 1 else 1000.0

    found = ranks_by_layer(loss, plan, budget=6 * 16)
    assert found.by_layer.ranks == {"m0": 4, "m1": 1, "m2": 1}
    assert found.by_layer_loss == 1000 and not found.pays
    assert found.plan is found.uniform and found.plan.ranks == {"m0": 2, "m1": 2, "m2": 2}


def test_other_rows_decide_where_they_are_given():
    """What looks like a gain on the rows of the choice need not be one on others."""
    plan, budget = plan_of(SQUARE), 6 * 16
    here = Additive([[9, 8, 7, 6], [1, 0.1, 0.1, 0.1], [1, 0.1, 0.1, 0.1]])
    there = Additive([[9, 1, 0, 0], [9, 1, 0, 0], [9, 1, 0, 0]])
    found = ranks_by_layer(here, plan, budget, check=there)
    assert found.by_layer.ranks == {"m0": 4, "m1": 1, "m2": 1}
    assert here.of(found.by_layer.ranks) < here.of(found.uniform.ranks)
    assert found.by_layer_loss == there.of(found.by_layer.ranks)
    assert found.uniform_loss == there.of(found.uniform.ranks) < found.by_layer_loss
    assert found.plan is found.uniform and not found.pays
    assert len(there.calls) == 2


def test_of_noise_alone_other_rows_keep_about_half():
    """Chosen and judged on the same rows, ranks by layer would win every time."""
    rng = np.random.default_rng(0)
    plan, budget = plan_of(SQUARE), 6 * 16
    noise = [[Additive(rng.normal(size=(3, R))) for _ in range(2)] for _ in range(200)]
    alone = sum(ranks_by_layer(here, plan, budget).pays for here, _ in noise)
    checked = sum(ranks_by_layer(here, plan, budget, check=there).pays for here, there in noise)
    assert alone > 180
    assert 70 < checked < 130  # 100 ± 7


def test_equal_losses_do_not_pay():
    found = ranks_by_layer(lambda ranks: 1.0, plan_of(SQUARE), budget=6 * 16)
    assert not found.pays and found.plan.ranks == {"m0": 2, "m1": 2, "m2": 2}


def test_the_cheaper_of_two_equal_gains_is_taken():
    plan = plan_of([(40, 8), (8, 8), (8, 40)])
    loss = Additive([[5, 1, 1, 1]] * 3)
    least = 48 + 16 + 48
    assert ranks_by_layer(loss, plan, least + 47).plan.ranks == {"m0": 1, "m1": 3, "m2": 1}
    assert ranks_by_layer(loss, plan, least + 48).plan.ranks == {"m0": 1, "m1": 4, "m2": 1}
    assert ranks_by_layer(loss, plan, least + 96).plan.ranks == {"m0": 2, "m1": 4, "m2": 1}


def test_many_cheap_pieces_do_not_keep_out_a_dear_one_worth_more():
    """Per parameter m0 gains more, but it would leave no room for m1, which uniform ranks have."""
    plan = plan_of([(6, 6), (40, 40)])
    loss = Additive([[1, 1.2, 1.1, 1.06], [1, 7, 0.1, 0.1]])
    budget = 2 * 12 + 2 * 80 + 12
    found = ranks_by_layer(loss, plan, budget)
    assert found.by_layer.ranks == {"m0": 3, "m1": 2}
    assert loss.of(found.by_layer.ranks) == best(loss, plan, budget)


@pytest.mark.parametrize("seed", range(8))
def test_unequal_costs_never_exceed_the_budget_nor_lose_to_uniform(seed):
    """Any gains, diminishing or not."""
    rng = np.random.default_rng(seed)
    sizes = [tuple(int(n) for n in rng.integers(4, 60, size=2)) for _ in range(4)]
    plan = plan_of(sizes)
    for budget in budgets(plan, 29):
        loss = Additive(rng.normal(1, 1, size=(4, R)).tolist())
        found = ranks_by_layer(loss, plan, budget)
        assert max(found.plan.parameters, found.by_layer.parameters) <= budget
        assert loss.of(found.by_layer.ranks) <= loss.of(found.uniform.ranks) + 1e-9
        assert min(found.by_layer.ranks.values()) >= 1 and max(found.by_layer.ranks.values()) <= R


@pytest.mark.parametrize("r_min", [1, 2])
def test_budgets_out_of_range_are_refused(r_min):
    plan = plan_of(SQUARE)
    loss = Additive([[1] * R] * 3)
    for budget in (0, r_min * 48 - 1, 193):
        with pytest.raises(PlanError, match=rf"budget is {budget} .* ranks {r_min} to 4 .*192"):
            ranks_by_layer(loss, plan, budget, range(r_min, R + 1))
    assert not loss.calls  # refused before anything expensive
    assert set(ranks_by_layer(loss, plan, r_min * 48, range(r_min, R + 1)).plan.ranks.values()) == {
        r_min
    }
    assert set(ranks_by_layer(loss, plan, 192, range(r_min, R + 1)).plan.ranks.values()) == {R}


def test_uniform_within_is_the_largest_rank_that_fits():
    plan = plan_of([(8, 8), (30, 12)])
    for budget in budgets(plan, 7):
        found = uniform_within(plan, budget)
        b = found.ranks["m0"]
        assert set(found.ranks.values()) == {b}
        assert b * (16 + 42) <= budget < (b + 1) * (16 + 42)
    with pytest.raises(PlanError, match=r"the budget is 57 parameters; ranks 1 to 4"):
        uniform_within(plan, 57)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_choice(bad):
    def loss(ranks):
        return bad if ranks["m1"] == 3 else 1.0

    with pytest.raises(DivergedError, match=rf"loss is {bad} at the ranks .*'m1': 3"):
        ranks_by_layer(loss, plan_of(SQUARE), budget=6 * 16)


@pytest.fixture
def trainer(tmp_path):
    """A nested BERT that has seen no data, with factors large enough that ranks matter."""
    of = family("bert-classification")
    of.config.initializer_range = 0.2
    base = of.model()
    plan = uniform(base, 3)
    model = build(base, plan, task_type="SEQ_CLS")
    args = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        per_device_eval_batch_size=8,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = NestedTrainer(
        model,
        args,
        plan=plan,
        method=DyLoRA(),
        configuration={},
        train_dataset=rows(of),
        data_collator=default_data_collator,
    )
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.4)
    return trainer


def mean_loss(model, table) -> float:
    """Cross entropy over all rows at once, by hand."""
    columns = table.with_format("torch")[:]
    labels = columns.pop("labels")
    with torch.no_grad():
        logits = model.eval()(**columns).logits
    return float(torch.nn.functional.cross_entropy(logits, labels))


def test_the_choice_holds_for_the_adapter_that_is_cut_by_it(trainer, tmp_path):
    """The losses that it reports are those of stock PEFT adapters cut at its plans."""
    of = family("bert-classification")
    of.config.initializer_range = 0.2
    table = rows(of, count=20, seed=5)  # the last batch is smaller than the others
    loss = size_loss(trainer, table)
    full = mean_loss(trainer.model, table)
    one = RankPlan.uniform(trainer.plan, 1).parameters
    found = ranks_by_layer(loss, trainer.plan, budget=2 * one)
    assert mean_loss(trainer.model, table) == full  # the model is back at its largest rank
    trainer.save_nested(tmp_path / "nested")
    adapter = Adapter.load(tmp_path / "nested")
    measured = {}
    for name, plan in {"elastic": found.by_layer, "uniform": found.uniform}.items():
        cut = adapter.truncate(plan)
        assert cut.parameters == plan.parameters <= 2 * one
        cut.save(tmp_path / name)
        model = PeftModel.from_pretrained(of.model(), str(tmp_path / name))
        measured[name] = mean_loss(model, table)
    assert found.by_layer_loss == pytest.approx(measured["elastic"], rel=1e-5)
    assert found.uniform_loss == pytest.approx(measured["uniform"], rel=1e-5)
    assert len({full, *measured.values()}) == 3
    assert found.plan is (found.by_layer if found.pays else found.uniform)
    assert found.pays == (measured["elastic"] < measured["uniform"])


def test_ranks_that_were_not_trained_are_never_measured_or_chosen():
    loss, plan = Additive([[1.0, 1.0, 1.0, 5.0]] * 3), plan_of(SQUARE)
    one = RankPlan.uniform(plan, 1).parameters
    found = ranks_by_layer(loss, plan, 3 * one, [1, 4])
    assert set().union(*(ranks.values() for ranks in loss.calls)) <= {1, 4}
    assert set(found.uniform.ranks.values()) == {1}  # 3 was not trained, and 4 does not fit
    assert sorted(found.plan.ranks.values()) == [1, 4, 4]


# The smallest that is as good.


def curve_of(values, gaps, errors=None, metric="accuracy", greater=True) -> Curve:
    """Sizes 1, 2, 3, ... with these values, and standard errors of the difference to the last."""
    count = len(values)
    return Curve(
        metric,
        greater,
        "parameters",
        tuple(range(1, count + 1)),
        tuple({metric: value} for value in values),
        tuple(errors or [0.0] * count),
        tuple(gaps),
        500,
    )


def test_the_walk_ends_at_the_first_failure_though_a_smaller_size_would_pass():
    found = curve_of([0.90, 0.80, 0.90, 0.90], [0.001, 0.001, 0.001, 0])
    assert smallest_as_good(found, 0.01) == 3
    assert smallest_as_good(curve_of([0.90, 0.80], [0.001, 0]), 0.01) == 1
    assert smallest_as_good(curve_of([0.90, 0.9, 0.80, 0.9], [0, 0, 0.001, 0]), 0.01) == 4


def test_an_interval_and_not_a_mean_decides():
    """The mean is within the margin both times; the lower end is once."""
    for error, expected in ((0.0045, 1), (0.0047, 2)):  # 0.001 + 1.96 x 0.0046 is the margin
        assert smallest_as_good(curve_of([0.899, 0.9], [error, 0]), 0.01) == expected


@pytest.mark.parametrize(
    ("values", "errors", "metric", "greater", "expected"),
    [
        ([0.891, 0.9], [0, 0], "accuracy", True, 1),  # a point
        ([0.889, 0.9], [0, 0], "accuracy", True, 2),
        ([0.881, 0.9], [0.5, 0.02], "accuracy", True, 1),  # the standard error of all pieces
        ([0.879, 0.9], [0.5, 0.02], "accuracy", True, 2),
        ([2.019, 2.0], [0, 0], "loss", False, 1),  # 1 % of it
        ([2.021, 2.0], [0, 0], "loss", False, 2),
        ([8.079, 8.0], [0, 0], "perplexity", False, 1),
        ([8.081, 8.0], [0, 0], "perplexity", False, 2),
        ([2.021, 2.0], [0.5, 0.5], "loss", False, 2),  # of which its own error says nothing
        ([1.0, 2.0], [0, 0], "loss", False, 1),  # better, not worse
        ([0.4, 0.3], [0, 0], "accuracy", True, 1),
    ],
)
def test_the_default_margin(values, errors, metric, greater, expected):
    found = curve_of(values, [0, 0], errors, metric, greater)
    assert smallest_as_good(found) == expected


def test_better_is_positive_in_both_directions():
    up = curve_of([0.88, 0.9], [0.005, 0])
    down = curve_of([0.32, 0.3], [0.005, 0], metric="loss", greater=False)
    for found in (up, down):
        assert found.difference(1) == pytest.approx((-0.02, -0.02 - 0.0098, -0.02 + 0.0098))
        assert found.difference(2) == (0, 0, 0)


@pytest.mark.parametrize("margin", [-0.01, float("nan")])
def test_a_negative_margin_is_refused(margin):
    with pytest.raises(RankwiseError, match=r"margin is .*; it has to be >= 0"):
        smallest_as_good(curve_of([0.9, 0.9], [0, 0]), margin)


class Recorded:
    """What `measure_sizes` needs of a trainer, over scores by row that are there already."""

    def __init__(self, scores: np.ndarray):
        self.scores, self.size = scores, 0
        self.args = SimpleNamespace(metric_for_best_model="score", greater_is_better=True)

    def compute_metrics(self, output):
        return {"score": float(output.predictions.mean())}

    def measure(self, dataset, loss_only):
        rows = self.scores[self.size]
        return SimpleNamespace(
            predictions=rows, label_ids=rows, metrics={"eval_score": float(rows.mean())}
        )


def test_a_size_that_is_worse_by_the_margin_is_called_as_good_one_time_in_forty():
    """Two correlated scores a row, the smaller size worse by exactly the margin on average.

    One end of a 95 % interval errs with probability 0.025, 10 of 400; less than 2 or more than 22
    come once in 1,000 each. Intervals that ignored the pairing would give next to none.
    """
    rng, margin, count = np.random.default_rng(0), 0.2, 120
    called = 0
    for _ in range(400):
        shared = rng.normal(size=count)
        own = 0.3 * rng.normal(size=(2, count))
        trainer = Recorded(np.stack([shared + own[0] - margin, shared + own[1]]))
        found = measure_sizes(
            trainer, shared, partial(setattr, trainer, "size"), [0, 1], unit="parameters"
        )
        assert found.standard_errors[0] > 1.5 * found.difference_errors[0]  # pairing is what helps
        called += smallest_as_good(found, margin) == 0
    assert 1 < called <= 22
