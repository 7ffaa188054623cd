"""The cut as a method: what it hands over and says, which rows see what, stops and goes on."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import default_data_collator, set_seed

import rankwise
from conftest import make_rows, write_jsonl
from families import arguments, family, rows
from rankwise import choose, orders, surgeon
from rankwise.errors import DataError, DivergedError, RankwiseError
from rankwise.job import Source
from rankwise.methods.base import Kept, Setting
from rankwise.methods.cut import CutByData
from rankwise.trainer import FiniteTrainer

OF = family("bert-classification")


def accuracy(output: Any) -> dict[str, float]:
    return {"accuracy": float((output.predictions.argmax(-1) == output.label_ids).mean())}


def setting_for(folder: Path, held_out: int = 100, **changes: Any) -> Setting:
    args = arguments(folder, max_steps=30, learning_rate=2e-2, label_names=["labels"])
    return Setting(
        rows(OF, 96),
        rows(OF, held_out, seed=2),
        args,
        "SEQ_CLS",
        **{
            "metric": "accuracy",
            "greater_is_better": True,
            "options": {"data_collator": default_data_collator, "compute_metrics": accuracy},
        }
        | changes,
    )


def untrained(folder: Path) -> tuple[Any, Any, Setting]:
    """(trainer, plan, setting) of LoRA of rank 3 on all linear layers."""
    setting, method = setting_for(folder), CutByData(r=3)
    model = OF.model()
    plan = method.start(model, setting)
    set_seed(0)
    return method.trainer(method.attach(model, plan, setting), plan, setting), plan, setting


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, torch.Tensor]:
    """Those of the model after its training."""
    trainer, *_ = untrained(tmp_path_factory.mktemp("trained"))
    trainer.train()
    return {name: t.clone() for name, t in trainer.model.state_dict().items()}


@pytest.fixture
def trained(weights, tmp_path):
    """(trainer after training, plan, setting), anew: other TrainingArguments spoil a trainer."""
    trainer, plan, setting = untrained(tmp_path)
    trainer.model.load_state_dict(weights)
    return trainer, plan, setting


def kept_by(trained, **flags: Any) -> Kept:
    trainer, plan, setting = trained
    return CutByData(r=3, **flags).keep(trainer, plan, setting)


@pytest.fixture(scope="module")
def kept(weights, tmp_path_factory) -> Kept:
    trainer, plan, setting = untrained(tmp_path_factory.mktemp("kept"))
    trainer.model.load_state_dict(weights)
    return kept_by((trainer, plan, setting))


def refused(kind: type[Exception], call: Any, *words: str) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


# The choice.


def by_hand(curve: choose.Curve, margin: float | None) -> int:
    """The rule of docs/cut.md: from the largest down, as long as the lower end is in the margin."""
    sign = 1 if curve.greater_is_better else -1
    values = [sign * row[curve.metric] for row in curve.metrics]
    point = 0.01 if curve.metric == "accuracy" else 0.01 * abs(values[-1])
    allowed = max(point, curve.standard_errors[-1]) if margin is None else margin
    low = np.array(values) - values[-1] - 1.96 * np.array(curve.difference_errors)
    failing = [i for i in range(len(values)) if low[i] < -allowed]
    return curve.sizes[max(failing) + 1 if failing else 0]


@pytest.mark.parametrize("margin", [None, 0.0, 0.2, 1.0])
def test_the_smallest_size_that_is_as_good_is_handed_over(trained, margin):
    found = kept_by(trained, margin=margin)
    expected = by_hand(found.curve, margin)
    _, small = found.found
    assert small.parameters == found.plan.parameters == expected
    assert {n: f.rank for n, f in small.factors().items()} == found.plan.ranks
    assert found.figures["picked_by"] == "as good"
    if margin == 1.0:  # of an accuracy anything is
        assert expected == found.curve.sizes[0]


def test_the_choices_above_are_not_all_the_same(kept):
    assert len({by_hand(kept.curve, m) for m in (0.0, 0.2, 1.0)}) > 1


def test_by_the_loss_the_same_rule(trained):
    trainer, plan, setting = trained
    by_loss = replace(setting, metric="loss", greater_is_better=False)
    bare = CutByData(r=3).trainer(trainer.model, plan, replace(by_loss, options={}))
    for margin in (None, 100.0):
        found = CutByData(r=3, margin=margin).keep(bare, plan, by_loss)
        assert not found.curve.greater_is_better
        assert found.plan.parameters == by_hand(found.curve, margin)
        # one batch would have no spread, and everything within the margin would be as good
        assert all(e > 0 for e in found.curve.difference_errors[:-1])
    assert bare.args.per_device_eval_batch_size == trainer.args.per_device_eval_batch_size


def test_the_curve_is_that_of_the_cuts_measured_one_by_one(trained, kept):
    """On the judging rows, by stock PEFT's forward of factors padded with zeros."""
    trainer, _, setting = trained
    ordered, _ = kept.found
    judge = CutByData(r=3).halves(setting).validation.with_format("torch")[:]
    labels = judge.pop("labels")
    for size, metrics in zip(kept.curve.sizes, kept.curve.metrics, strict=True):
        small = ordered.cut(size)
        assert small.parameters == size
        assert metrics["accuracy"] == pytest.approx(measured(trainer, small, judge, labels))
    assert kept.curve.rows == len(labels) == 50
    halves = [ordered.order.parameters >> n for n in range(8)]
    least = ordered.order.pieces[ordered.order.sequence[0][0]].cost
    assert len(kept.curve.sizes) == len(
        {len(ordered.order.kept(half)) for half in halves if half >= least}
    )


@torch.no_grad()
def measured(trainer, small, inputs, labels) -> float:
    from rankwise.curvature import read, write

    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    whole, cut = read(model), small.factors()
    write(model, {n: orders.padded(cut.get(n), f) for n, f in whole.items()})
    found = float((model(**inputs).logits.argmax(-1) == labels).float().mean())
    write(model, whole)
    return found


@pytest.mark.parametrize("share", [0.07, 0.9, 1.0])
def test_a_budget_is_used_up_to_the_piece_that_does_not_fit(trained, kept, share):
    ordered, _ = kept.found
    budget = int(share * ordered.order.parameters)
    found = kept_by(trained, budget=budget)
    _, small = found.found
    count = sum(found.plan.ranks.values())
    sequence = ordered.order.sequence
    costs = [ordered.order.pieces[name].cost for name, _ in sequence]
    assert sum(costs[:count]) == small.parameters == found.plan.parameters <= budget
    assert count == len(costs) or sum(costs[: count + 1]) > budget
    assert found.figures["picked_by"] == "budget"
    assert found.curve == kept.curve


# What is said of it.


def numbers(text: str) -> list[float]:
    return [float(word.replace(",", "")) for word in re.findall(r"[-+]?\d[\d,]*\.?\d*", text)]


@pytest.mark.parametrize("margin", [0.0, 1.0])
def test_the_sentence_says_what_the_curve_says(trained, margin):
    found = kept_by(trained, margin=margin)
    text, curve, plan = found.figures["choice"], found.curve, found.plan
    ordered, _ = found.found
    i = curve.sizes.index(plan.parameters)
    ranks = [plan.ranks.get(name, 0) for name in ordered.order.pieces]
    size = [plan.parameters, curve.sizes[-1], min(ranks), max(ranks)]
    modules = [sum(b > 0 for b in ranks), len(ranks)]
    if i == len(curve.sizes) - 1:
        assert "no smaller size could be shown to lose at most" in text
        assert numbers(text) == [*size, *modules, margin, curve.rows]
        return
    gap = curve.values[i] - curve.values[-1]
    width = 1.96 * curve.difference_errors[i]
    values = [curve.values[i], curve.values[-1], 95, gap - width, gap + width, curve.rows]
    assert "are as good as all, to a margin of" in text
    assert numbers(text) == pytest.approx([*size, *modules, margin, *values], abs=5.1e-5)


def test_of_a_loss_the_interval_has_the_sign_of_the_two_values(trained):
    trainer, plan, setting = trained
    by_loss = replace(setting, metric="loss", greater_is_better=False)
    found = CutByData(r=3, margin=100.0).keep(trainer, plan, by_loss)
    *_, small, whole, _, low, high, _ = numbers(found.figures["choice"])
    assert small > whole  # a cut to one piece has the larger loss
    assert low < small - whole < high


def test_a_size_that_was_asked_for_is_not_called_as_good(trained, kept):
    """A budget on the curve, where all pieces may be far better."""
    for size in (kept.curve.sizes[0], kept.curve.sizes[-1]):
        text = kept_by(trained, budget=size).figures["choice"]
        i = kept.curve.sizes.index(size)
        assert "as asked for: accuracy" in text
        assert "good" not in text and "no smaller" not in text
        assert kept.curve.values[i] == pytest.approx(numbers(text)[6], abs=5.1e-5)
    between = kept.curve.sizes[-1] - 1
    text = kept_by(trained, budget=between).figures["choice"]
    assert "as asked for; its size is not on the curve" in text


# Healing.


def scored(trainer: Any, adapter: rankwise.Adapter, dataset: Any, folder: Path) -> float:
    """The loss in stock PEFT of an adapter on disk."""
    adapter.save(folder)
    base = trainer.model.unload()
    trainer.model = trainer.model_wrapped = PeftModel.from_pretrained(base, str(folder))
    return trainer.evaluate(dataset)["eval_loss"]


@pytest.mark.parametrize(("rate", "better"), [(1e-2, True), (1e3, False)])
def test_a_cut_is_trained_on_and_kept_where_it_is_better(trained, tmp_path, rate, better):
    trainer, plan, setting = trained
    trainer.state.max_steps = 40
    method = CutByData(r=3, heal=0.5, budget=1200)
    setting = replace(setting, metric="loss", greater_is_better=False)
    if better:  # one class, which any training finds
        one = setting.held_out.map(lambda row: {"labels": 1})
        setting = replace(setting, train=one, held_out=one)
    judged = method.halves(setting).validation
    setting.args.learning_rate = rate
    found = method.keep(trainer, plan, setting)
    ordered, small = found.found
    cut, about = ordered.cut(1200), found.figures["heal"]
    assert about["steps"] == 20
    assert about["kept"] is better, about
    assert {n: f.rank for n, f in small.factors().items()} == found.plan.ranks
    assert scored(trainer, cut, judged, tmp_path / "a") == pytest.approx(about["before"], rel=1e-5)
    after = about["after"] if better else about["before"]
    assert scored(trainer, small, judged, tmp_path / "b") == pytest.approx(after, rel=1e-5)
    assert ("which is kept" in found.figures["choice"]) is better


# The model, and what stands beside it.


def test_the_trained_model_is_as_before_bit_for_bit(trained):
    trainer, _, _ = trained
    model = trainer.accelerator.unwrap_model(trainer.model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    kept_by(trained)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert not any(m._forward_hooks for m in model.modules())


def test_rivals_have_at_most_the_size_of_the_cut(trained, kept):
    for found in (kept, kept_by(trained, budget=200)):
        ordered, small = found.found
        rivals = CutByData(r=3).rivals(found)
        assert rivals.pop("all pieces").parameters == ordered.order.parameters
        assert set(rivals) == {"one threshold on σ", "random order"}
        largest = max(f.cost for f in ordered.order.pieces.values())
        for rival in rivals.values():
            assert small.parameters - largest < rival.parameters <= small.parameters


def test_a_rival_without_a_cut_so_small_is_left_out(kept):
    """A piece of the feed-forward layers costs 40, one of the attention 32."""
    ordered, _ = kept.found
    small = ordered.adapter.with_factors(
        {
            name: replace(f, a=f.a[:1], b=f.b[:, :1])
            for name, f in list(ordered.adapter.factors().items())[:1]
        }
    )
    assert small.parameters == 32
    dear = {n: f for n, f in ordered.adapter.factors().items() if f.cost == 40}
    whole = replace(ordered, adapter=ordered.adapter.with_factors(dear))
    found = CutByData(r=3).rivals(Kept(found=(whole, small)))
    assert list(found) == ["all pieces"]


# Bad input.


def check(folder: Path, setting: Setting | None = None, **flags: Any) -> None:
    CutByData(**{"r": 3} | flags).check(OF.model(), setting or setting_for(folder))


def test_too_few_held_out_rows(tmp_path):
    check(tmp_path, setting_for(tmp_path, 64))
    refused(
        DataError,
        lambda: check(tmp_path, setting_for(tmp_path, 63)),
        "63 held-out rows are too few",
        "64",
        "validation_fraction",
    )


def test_a_budget_out_of_range(tmp_path):
    total = CutByData(r=3).start(OF.model(), setting_for(tmp_path)).parameters
    check(tmp_path, budget=40)  # one piece of the largest layer
    check(tmp_path, budget=total)
    for budget in (1, 39, total + 1):
        refused(
            RankwiseError,
            lambda b=budget: check(tmp_path, budget=b),
            f"budget is {budget};",
            "40 to",
            f"{total:,}",
        )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"budget": 0}, "budget is 0; it has to be at least 1"),
        ({"margin": -0.01}, "margin is -0.01; it has to be at least 0"),
        ({"margin": float("nan")}, "margin is nan"),
        ({"margin": float("inf")}, "margin is inf"),
        ({"sizes": 1}, "sizes is 1; it has to be >= 2"),
        ({"order_rows": 1}, "order_rows is 1"),
    ],
    ids=str,
)
def test_flags_out_of_range(flags, said):
    refused(RankwiseError, lambda: CutByData(**flags), said)


def test_a_loss_that_is_not_finite_stops_it(trained):
    trainer, _, _ = trained
    head = trainer.accelerator.unwrap_model(trainer.model).get_base_model().classifier
    weight = next(p for p in head.parameters() if p.requires_grad)
    before = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
    try:
        refused(DivergedError, lambda: kept_by(trained), "nan")
    finally:
        with torch.no_grad():
            weight.copy_(before)


# Which rows see what, from the rows on disk.

FLAGS: dict[str, Any] = {"r": 4, "margin": 0.5, "sizes": 4}


def unlike(count: int, taken: set[str], seed: int) -> list[dict]:
    """Rows of texts that no other row has."""
    found = []
    for row in make_rows(20 * count, seed):
        if len(found) < count and row["text"] not in taken:
            taken.add(row["text"])
            found.append(row)
    assert len(found) == count
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Rows with a test split and without."""
    found, taken = {}, set()
    splits = {
        "tested": {"train": 40, "validation": 70, "test": 12},
        "untested": {"train": 340, "validation": 12},
    }
    for name, counts in splits.items():
        found[name] = tmp_path_factory.mktemp(name)
        for seed, (split, count) in enumerate(counts.items()):
            write_jsonl(found[name] / f"{split}.jsonl", unlike(count, taken, seed))
    return found


def run(tiny_bert: str, data: Path, out: Path, **more: Any) -> rankwise.Fitted:
    args = arguments(
        out.parent / "unused",
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        per_device_train_batch_size=8,
    )
    source = Source(tiny_bert, revision="main")
    return rankwise.fit("cut", data, model=source, output_dir=out, args=args, **FLAGS | more)


def ids(batch: Any) -> set[tuple[int, ...]]:
    """The rows of a batch or a dataset, without their padding."""
    listed = batch["input_ids"]
    listed = listed.tolist() if isinstance(listed, torch.Tensor) else listed
    return {tuple(t for t in row if t != 0) for row in listed}


@pytest.fixture
def watched(monkeypatch) -> dict[str, set]:
    """Rows by what they were used for."""
    seen: dict[str, set] = {"train": set(), "order": set(), "judge": set()}
    step, order, measure = FiniteTrainer.training_step, surgeon.order, choose.measure_sizes

    def trains(self, model, inputs, *args):
        seen["train"] |= ids(inputs)
        return step(self, model, inputs, *args)

    def orders_by(model, batches, **how):
        for batch in batches:
            seen["order"] |= ids(batch)
        return order(model, batches, **how)

    def judges(trainer, dataset, *args, **how):
        seen["judge"] |= ids(dataset)
        return measure(trainer, dataset, *args, **how)

    monkeypatch.setattr(FiniteTrainer, "training_step", trains)
    monkeypatch.setattr(surgeon, "order", orders_by)
    monkeypatch.setattr(choose, "measure_sizes", judges)
    return seen


def encoded(fitted: rankwise.Fitted, rows: Dataset) -> set:
    job = fitted.job
    return ids(job.task.encode(rows, job.tokenizer, job.max_length))


def test_where_there_are_test_rows_the_validation_rows_order_and_judge(
    folders, tiny_bert, watched, tmp_path
):
    fitted = run(tiny_bert, folders["tested"], tmp_path / "out")
    assert watched["order"] | watched["judge"] == encoded(fitted, fitted.job.task.validation)
    assert not watched["order"] & watched["judge"]
    assert (len(watched["order"]), len(watched["judge"])) == (35, 35)
    assert watched["train"] <= encoded(fitted, fitted.job.task.train)
    assert fitted.result.rows == {"train": 40, "held_out": 70, "evaluated": 12}
    assert fitted.result.split == "test"
    assert fitted.curve.rows == 35 and fitted.result.figures["order_rows"] == 35


def test_without_test_rows_a_share_of_the_training_rows_does(folders, tiny_bert, watched, tmp_path):
    fitted = run(tiny_bert, folders["untested"], tmp_path / "out", order_rows=32)
    assert (len(watched["order"]), len(watched["judge"])) == (32, 36)
    held_out = watched["order"] | watched["judge"]
    assert len(held_out) == 68  # a fifth
    assert held_out < encoded(fitted, fitted.job.task.train)
    assert watched["train"] and not watched["train"] & held_out
    assert not held_out & encoded(fitted, fitted.job.task.validation)  # those only evaluate
    assert fitted.result.rows == {"train": 272, "held_out": 68, "evaluated": 12}
    assert fitted.result.split == "validation"


# Stopping and going on; what a run leaves.


@pytest.fixture(scope="module")
def never_stopped(folders, tiny_bert, tmp_path_factory) -> rankwise.Fitted:
    return run(tiny_bert, folders["tested"], tmp_path_factory.mktemp("whole") / "out")


def same(a: Path, b: Path) -> bool:
    ours, theirs = (load_file(path) for path in (a, b))
    return ours.keys() == theirs.keys() and all(torch.equal(t, theirs[n]) for n, t in ours.items())


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (FiniteTrainer, "training_step", 4),  # after the checkpoint of step 2
        (CutByData, "rivals", 1),
    ],
)
def test_a_resumed_run_equals_one_never_stopped(
    never_stopped, folders, tiny_bert, tmp_path, monkeypatch, owner, name, call
):
    real, calls = getattr(owner, name), []

    def stop(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, stop)
        with pytest.raises(KeyboardInterrupt):
            run(tiny_bert, folders["tested"], tmp_path / "out")
    again = run(tiny_bert, folders["tested"], tmp_path / "out", resume_from_checkpoint=True)
    for file in (
        "adapter/adapter_model.safetensors",
        "ordered/adapter_model.safetensors",
        "ordered/pieces.safetensors",
    ):
        assert same(again.folder / file, never_stopped.folder / file), file
    for file in ("plan.json", "ordered/order.json", "adapter/adapter_config.json"):
        ours, theirs = (f.folder / file for f in (again, never_stopped))
        assert ours.read_text() == theirs.read_text(), file
    assert again.curve == never_stopped.curve
    assert again.result.metrics == never_stopped.result.metrics
    assert again.result.figures == never_stopped.result.figures


def test_where_no_row_tells_sizes_apart_all_pieces_are_kept(never_stopped):
    assert len(set(never_stopped.curve.values)) == 1
    assert never_stopped.plan.parameters == never_stopped.curve.sizes[-1]
    assert "no row tells any size from another" in never_stopped.result.figures["choice"]
    # all of what was trained is handed over, so that no order's cut of that size differs from it
    assert never_stopped.result.controls == ()
    assert str(never_stopped).splitlines()[-1].startswith("No control was trained")


def test_what_a_run_hands_over_is_the_cut_of_what_it_keeps(folders, tiny_bert, tmp_path):
    fitted = run(tiny_bert, folders["tested"], tmp_path / "out", budget=900)
    folder, size = fitted.folder, fitted.plan.parameters
    again = rankwise.Ordered.load(folder / "ordered").cut(size)
    kept = rankwise.Adapter.load(folder / "adapter")
    assert again.parameters == size == kept.parameters
    assert all(torch.equal(t, kept.weights[name]) for name, t in again.weights.items())
    assert 0 < size <= 900


def test_the_adapters_name_the_base_model_and_its_revision(never_stopped, tiny_bert):
    for name in ("adapter", "ordered"):
        config = rankwise.Adapter.load(never_stopped.folder / name).config
        assert (config["base_model_name_or_path"], config["revision"]) == (tiny_bert, "main")
