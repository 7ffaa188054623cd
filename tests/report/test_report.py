"""What a run shows: the grid of ranks, the heat map, the verdict, the table and the card."""

import builtins
import io
import json
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from rich.console import Console

from rankwise import AutoLoRA, Curve, Entry, FullFineTuning, RankPlan, Result
from rankwise.report import (
    choice,
    print_curve,
    print_table,
    save_curves,
    save_heatmap,
    verdict,
    write_card,
)
from rankwise.report.heatmap import grid
from rankwise.tasks import Classification


def plan_of(ranks: dict[str, int], r: int = 8, **kwargs) -> RankPlan:
    modules = {name: Entry(r, 32, 32, module=name) for name, r in ranks.items()}
    return RankPlan(modules, r=r, **kwargs)


def bert_plan(layers: int = 2, **kwargs) -> RankPlan:
    names = [
        f"bert.encoder.layer.{i}.attention.self.{part}"
        for i in range(layers)
        for part in ("query", "value")
    ]
    return plan_of({name: n % 8 + 1 for n, name in enumerate(names)}, **kwargs)


# The grid


def test_grid_of_bert():
    assert grid(bert_plan().ranks) == (["0", "1"], ["query", "value"], [[1, 3], [2, 4]])


def test_grid_of_gpt2():
    ranks = {f"transformer.h.{i}.attn.c_attn.{p}": r for i, p, r in ((0, "q", 5), (0, "v", 6))}
    ranks |= {"transformer.h.1.attn.c_attn.q": 7, "transformer.h.1.attn.c_attn.v": 0}
    assert grid(plan_of(ranks).ranks) == (["0", "1"], ["q", "v"], [[5, 7], [6, 0]])


def test_grid_of_llama():
    parts = ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj")
    ranks = {f"model.layers.{i}.{part}": 1 + i for i in range(12) for part in parts}
    layers, matrices, table = grid(plan_of(ranks, r=12).ranks)
    assert layers == [str(i) for i in range(12)]  # in the model's order, not as text
    assert matrices == ["q_proj", "v_proj", "gate_proj"]
    assert table == [list(range(1, 13))] * 3


def test_grid_tells_matrices_of_one_last_part_apart():
    ranks = {
        "encoder.layer.0.attention.output.dense": 1,
        "encoder.layer.0.intermediate.dense": 2,
        "encoder.layer.0.output.dense": 3,
    }
    layers, matrices, table = grid(plan_of(ranks).ranks)
    assert layers == ["0"]
    assert matrices[:2] == ["attention.output.dense", "intermediate.dense"]
    assert len(set(matrices)) == 3
    assert table == [[1], [2], [3]]


def test_grid_of_a_module_outside_the_layers():
    ranks = {"model.layers.0.q_proj": 1, "model.layers.1.q_proj": 2, "lm_head": 3}
    layers, matrices, table = grid(plan_of(ranks).ranks)
    assert layers == ["0", "1", "-"]
    assert matrices == ["q_proj", "lm_head"]
    assert table == [[1, 2, None], [None, None, 3]]


def test_grid_of_names_that_are_only_numbers_or_one_word():
    assert grid(plan_of({"0": 1, "2": 2}).ranks)[2] == [[1], [2]]
    assert grid(plan_of({"linear": 3}).ranks) == (["-"], ["linear"], [[3]])


@pytest.mark.parametrize(
    "names",
    [
        ("encoder.block.{}.layer.0.SelfAttention.q", "decoder.block.{}.layer.0.SelfAttention.q"),
        ("model.encoder.layers.{}.self_attn.q_proj", "model.decoder.layers.{}.self_attn.q_proj"),
        ("text_model.layers.{}.q_proj", "vision_model.layers.{}.q_proj"),
    ],
)
def test_grid_keeps_every_entry_of_an_encoder_and_a_decoder(names):
    ranks = {name.format(i): 1 + 4 * n + i for n, name in enumerate(names) for i in range(3)}
    table = grid(plan_of(ranks).ranks)[2]
    assert sorted(r for row in table for r in row if r is not None) == sorted(ranks.values())


def test_grid_of_experts():
    ranks = {f"model.layers.{i}.moe.experts.{e}.w1": 1 + 2 * i + e for i in (0, 1) for e in (0, 1)}
    layers, matrices, table = grid(plan_of(ranks).ranks)
    assert layers == ["0", "1"]
    assert len(set(matrices)) == 2
    assert table == [[1, 3], [2, 4]]


# The heat map


def test_heatmap_is_a_picture_of_the_ranks(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    path = tmp_path / "new folder" / "ranks.png"
    assert save_heatmap(bert_plan(), path) is True
    with Image.open(path) as image:
        assert image.format == "PNG"
        width, height = image.size
        pixels = np.asarray(image.convert("RGB"))
    assert 200 < width < 1000
    assert 150 < height < 1000
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10
    assert [p.name for p in path.parent.iterdir()] == ["ranks.png"]


def test_heatmap_differs_with_the_ranks_and_grows_with_the_layers(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    plan = bert_plan()
    other = plan.with_ranks({name: 9 - r for name, r in plan.ranks.items()})
    for name, drawn in (("a", plan), ("b", other), ("c", bert_plan(layers=24))):
        assert save_heatmap(drawn, tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as a, Image.open(tmp_path / "c.png") as c:
        assert c.size[0] > 3 * a.size[0]
        assert c.size[0] < 4000


def test_heatmap_of_one_rank_and_of_ranks_with_gaps(tmp_path):
    assert save_heatmap(plan_of({"linear": 1}, r=1), tmp_path / "one.png")
    gaps = plan_of({"model.layers.0.q_proj": 0, "lm_head": 9})
    assert save_heatmap(gaps, tmp_path / "gaps.png")
    assert (tmp_path / "one.png").stat().st_size > 1000
    assert (tmp_path / "gaps.png").stat().st_size > 1000


def test_heatmap_without_matplotlib_draws_nothing(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError("No module named 'matplotlib'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert save_heatmap(bert_plan(), tmp_path / "ranks.png") is False
    assert list(tmp_path.iterdir()) == []


# The verdict


def result_of(
    name: str, metrics: tuple[str, ...] = ("accuracy",), trainable: int = 578, **figures: float
) -> Result:
    """A record of a run on 1,200 test rows, with these figures beside its loss."""
    return Result(
        name=name,
        method={"name": "AutoLoRA"},
        claim="choosing ranks",
        task=Classification("mine", ("text",), "label", ("a", "b"), metrics).describe(),
        model="roberta-base",
        rows={"train": 100, "held_out": 50, "evaluated": 1200},
        split="test",
        training={
            "learning_rate": 1e-4,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 4,
            "seed": 42,
        },
        metrics={"loss": 0.5, **figures},
        trainable_parameters=trainable,
        lora_parameters=trainable - 66,
        ranks=None,
        cost={
            "search_seconds": 0.0,
            "train_seconds": 61.4,
            "peak_memory_bytes": 2**30,
            "peak_memory_of": "resident set",
            "steps": 77,
        },
    )


@pytest.mark.parametrize(
    ("metric", "ours", "control", "sentence"),
    [
        ("accuracy", 0.75, 0.5, "AutoLoRA beat LoRA r=4 by 0.2500 in accuracy."),
        ("accuracy", 0.5, 0.75, "LoRA r=4 did better by 0.2500 in accuracy: choosing ranks did"),
        ("accuracy", 0.5, 0.5, "LoRA r=4 did as well in accuracy: choosing ranks did not help"),
        ("perplexity", 8.0, 9.5, "AutoLoRA beat LoRA r=4 by 1.5000 in perplexity."),
        ("perplexity", 9.5, 8.0, "LoRA r=4 did better by 1.5000 in perplexity: choosing"),
        ("loss", 1.0, 1.0, "LoRA r=4 did as well in loss: choosing ranks did not help here."),
        ("matthews_correlation", 0.4, 0.3, "beat LoRA r=4 by 0.1000 in matthews_correlation."),
    ],
)
def test_verdict(metric, ours, control, sentence):
    first, *rest = verdict(
        result_of("AutoLoRA", (metric,), **{metric: ours}),
        [result_of("LoRA r=4", (metric,), **{metric: control})],
    ).splitlines()
    assert sentence in first
    assert len(rest) == 1
    assert "one training each" in rest[0]


@pytest.mark.parametrize(
    ("shift", "noise", "said"),
    [
        (0.02, 0.005, "A beat B by 0.0200 in accuracy (paired 95 % interval of the gain +0.01"),
        (0.02, 0.05, "A and B cannot be told apart in accuracy (paired 95 % interval of the gain"),
        (-0.02, 0.005, "B did better by 0.0200 in accuracy (paired 95 % interval of the gain -0.0"),
        (-0.02, 0.05, "A and B cannot be told apart in accuracy"),
    ],
)
def test_a_difference_within_the_error_of_the_rows_is_called_none(shift, noise, said):
    rng = np.random.default_rng(0)
    theirs = 0.7 + rng.normal(0, 0.1, 100)  # of rows that are hard for both alike
    ours = theirs + shift + rng.normal(0, noise, 100)
    first = verdict(
        replace(result_of("A", accuracy=0.7 + shift), resampled=tuple(ours)),
        [replace(result_of("B", accuracy=0.7), resampled=tuple(theirs))],
    )
    assert first.startswith(said)


def test_verdict_judges_by_the_main_metric_and_names_every_control():
    metrics = ("accuracy", "f1")
    first, second, _ = verdict(
        result_of("AutoLoRA", metrics, accuracy=0.7, f1=0.1),
        [
            result_of("LoRA r=4", metrics, accuracy=0.6, f1=0.9),
            result_of("random plan", metrics, accuracy=0.8, f1=0.0),
        ],
    ).splitlines()
    assert first == "AutoLoRA beat LoRA r=4 by 0.1000 in accuracy."
    assert second.startswith("random plan did better by 0.1000 in accuracy: ")


def test_verdict_speaks_of_what_the_method_claims():
    ours = replace(result_of("DyLoRA", accuracy=0.5), claim="one training for all ranks")
    text = verdict(ours, [result_of("LoRA r=4", accuracy=0.6)])
    assert "one training for all ranks did not help here" in text


def test_verdict_without_a_control_claims_nothing():
    text = verdict(result_of("AutoLoRA", accuracy=1.0), [])
    assert text == "No control was trained: nothing here says whether AutoLoRA helped."
    at_chance = replace(result_of("A", accuracy=0.5), about={"floor": {"accuracy": 0.5}})
    assert verdict(at_chance, []).startswith("A learned nothing here: ")


@pytest.mark.parametrize(("ours", "control"), [(float("nan"), 0.5), (0.5, float("nan"))])
def test_verdict_of_nan_claims_nothing(ours, control):
    text = verdict(result_of("AutoLoRA", accuracy=ours), [result_of("LoRA r=4", accuracy=control)])
    assert "beat" not in text
    assert "better" not in text


# What was picked


def test_choice_says_what_was_picked_and_by_what():
    ours = result_of("DyLoRA", accuracy=0.5)
    assert choice(ours) == ""
    ours = replace(ours, ranks={"a": 3, "b": 3}, figures={"picked_by": "budget"})
    assert choice(ours) == "picked rank 3 (budget)"
    assert choice(replace(ours, ranks={"a": 1, "b": 4})) == "picked ranks 1 to 4 (budget)"


@pytest.mark.parametrize(("pays", "word"), [(True, "below 0.7000"), (False, "not below, so")])
def test_choice_says_whether_ranks_by_layer_pay(pays, word):
    found = {
        "pays": pays,
        "by_layer_loss": 0.6 if pays else 0.8,
        "uniform_loss": 0.7,
        "uniform_rank": 2,
        "parameters": 1000,
        "uniform_parameters": 900,
    }
    figures = {"picked_by": "layer", "by_layer": found}
    said = choice(replace(result_of("DyLoRA"), ranks={"a": 1, "b": 4}, figures=figures))
    assert word in said
    assert "1,000 parameters" in said and "rank 2 everywhere (900)" in said


# The tables


def test_table_has_a_row_per_result():
    metrics = ("accuracy", "f1")
    ours = result_of("AutoLoRA", metrics, accuracy=0.75)
    more = {"search_seconds": 120.4, "search_peak_memory_bytes": 3 * 2**30}
    ours = replace(ours, cost=ours.cost | more)
    control = result_of("LoRA r=4", metrics, trainable=1_234_567, accuracy=0.5)
    out = io.StringIO()
    print_table([ours, control], Console(file=out, width=120))
    lines = out.getvalue().splitlines()
    assert "mine: 1,200 test rows, one seed" in lines[0]
    first = next(line for line in lines if "AutoLoRA" in line)
    second = next(line for line in lines if "LoRA r=4" in line)
    assert [word in first for word in ("0.7500", "578", "120", "61", "3.00")] == [True] * 5
    assert [word in second for word in ("0.5000", "1,234,567", "1.00")] == [True] * 3
    assert "f1" not in out.getvalue()  # neither was measured by it


def test_table_fits_80_columns_without_breaking_words():
    metrics = ("accuracy", "f1")
    results = [
        result_of("AutoLoRA", metrics, accuracy=0.75, f1=0.5),
        result_of("LoRA r=4", metrics, trainable=1_234_567, accuracy=0.5, f1=0.5),
        result_of("LoRA, cut by SVD, one threshold", metrics, accuracy=0.5, f1=0.5),
    ]
    out = io.StringIO()
    print_table(results, Console(file=out, width=80))
    for word in ("AutoLoRA", "LoRA r=4", "accuracy", "trainable", "1,234,567"):
        assert word in out.getvalue()


def test_a_name_in_brackets_is_no_markup():
    out = io.StringIO()
    print_table([result_of("LoRA [red]", accuracy=0.5)], Console(file=out, width=120))
    assert "LoRA [red]" in out.getvalue()


def test_curve_has_a_row_per_size():
    found = Curve(
        metric="accuracy",
        greater_is_better=True,
        unit="parameters",
        sizes=(512, 1_024),
        metrics=({"accuracy": 0.5, "loss": 0.9}, {"accuracy": 0.75, "loss": 0.25}),
        standard_errors=(0.0625, 0.03),
        difference_errors=(0.02, 0.0),
        rows=1_000,
    )
    out = io.StringIO()
    print_curve(found, Console(file=out, width=80))
    lines = out.getvalue().splitlines()
    assert "every size, on 1,000 held-out rows" in lines[0]
    row = next(line for line in lines if line.split()[:1] == ["1,024"])
    assert row.split() == ["1,024", "0.7500", "0.0300", "0.2500"]


# The card


def write(folder, base: str, plan: RankPlan | None = None, name: str = "models/tiny-bert") -> str:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    (folder / "README.md").write_text("PEFT's own")
    control = result_of("LoRA r=4", trainable=1_234_567, accuracy=0.5)
    result = replace(result_of("AutoLoRA", accuracy=0.75), model=name).with_controls([control], "")
    plan = plan or bert_plan(provenance={"method": AutoLoRA().describe()})
    write_card(folder, result, plan)
    return (folder / "README.md").read_text()


def header(card: str) -> dict:
    start, text, _ = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(text)


def test_card_says_what_the_adapter_is(tmp_path):
    card = write(tmp_path / "adapter", "roberta-base", name="roberta-base")
    assert header(card) == {
        "base_model": "roberta-base",
        "library_name": "peft",
        "pipeline_tag": "text-classification",
        "metrics": ["accuracy"],
        "tags": ["base_model:adapter:roberta-base", "lora", "rankwise"],
        "model-index": [
            {
                "name": "AutoLoRA",
                "results": [
                    {
                        "task": {"type": "text-classification"},
                        "dataset": {"name": "mine", "type": "mine", "split": "test"},
                        "metrics": [{"type": "accuracy", "name": "accuracy", "value": 0.75}],
                    }
                ],
            }
        ],
    }
    lines = card.splitlines()
    assert "# LoRA adapter for roberta-base on mine" in lines
    table = lines.index("| layer | query | value |")
    assert lines[table + 2 : table + 4] == ["| 0 | 1 | 2 |", "| 1 | 3 | 4 |"]
    assert "| AutoLoRA | 0.7500 | 578 |" in lines
    assert "| LoRA r=4 | 0.5000 | 1,234,567 |" in lines
    assert "## Figures on 1200 test rows, one seed" in lines
    assert "77 steps of 32 rows" in card
    assert "seed 42" in card
    assert "AutoLoRA (softmax gate)" in card
    assert f"{64 * 10:,} LoRA parameters" in card


def test_card_of_a_local_model_holds_no_path(tmp_path):
    base = tmp_path / "someone" / "tiny-bert"
    base.mkdir(parents=True)
    card = write(tmp_path / "adapter", str(base), name="tiny-bert")
    assert "base_model" not in header(card)
    assert str(tmp_path) not in card
    assert "someone" not in card


def test_card_of_one_rank_does_not_speak_of_a_choice(tmp_path):
    plan = RankPlan.uniform(bert_plan(), 4)
    card = write(tmp_path / "adapter", "roberta-base", plan)
    assert "differ" not in card
    assert "chosen by" not in card


def test_card_of_modules_without_a_layer_is_a_table(tmp_path):
    plan = plan_of({"model.layers.0.q_proj": 1, "lm_head": 3})
    lines = write(tmp_path / "adapter", "gpt2", plan).splitlines()
    table = lines.index("| layer | q_proj | lm_head |")
    rows = lines[table : table + 4]
    assert {row.count("|") for row in rows} == {4}
    assert rows[2:] == ["| 0 | 1 |  |", "| - |  | 3 |"]


def test_card_of_a_rank_out_of_many_says_so(tmp_path):
    plan = bert_plan(provenance={"trained_ranks": [1, 2, 4, 8]})
    plan = plan.with_ranks(dict.fromkeys(plan.modules, 4), **plan.provenance)
    card = write(tmp_path / "adapter", "roberta-base", plan)
    assert "has rank 4, cut out of a training of ranks up to 8" in card


def test_card_of_a_plan_that_was_edited_says_so(tmp_path):
    gate = (0.3, 0.1, 0.3, 0.3)
    plan = bert_plan(r=4, provenance={"method": AutoLoRA(r=4).describe()})
    modules = {name: replace(e, rank=3, gate=gate) for name, e in plan.modules.items()}
    first = next(iter(modules))
    for rank, edited in ((3, False), (2, True)):
        modules[first] = replace(modules[first], rank=rank)
        modules["x.1.y"] = replace(modules[first], rank=1, module="x.1.y", gate=None)
        card = write(tmp_path / str(rank), "roberta-base", replace(plan, modules=modules))
        assert "AutoLoRA (softmax gate)" in card
        assert ("edited by hand since" in card) == edited


def test_card_of_a_plan_by_hand_and_of_no_plan(tmp_path):
    assert "a plan made by hand" in write(tmp_path / "hand", "roberta-base", bert_plan())
    folder = tmp_path / "none"
    folder.mkdir()
    method = FullFineTuning()
    result = replace(result_of(method.title, accuracy=0.5), method=method.describe())
    write_card(folder, result, None)
    card = (folder / "README.md").read_text()
    assert "# full fine-tuning, model for roberta-base on mine" in card
    assert "578 trained parameters" in card
    assert "transformers' `from_pretrained(folder)`" in card
    assert "## Ranks" not in card and "PeftModel" not in card


# The curve


def test_curve_is_a_picture(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    series = {"DyLoRA": ((1, 2, 4), (0.5, 0.7, 0.75), (0.1, 0.05, 0.05))}
    path = tmp_path / "curve.png"
    assert save_curves(series, "accuracy", path, mark=2, spread="standard error") is True
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.size[0] > 300
    assert [p.name for p in tmp_path.iterdir()] == ["curve.png"]


def test_a_notebook_shows_a_plan_as_a_table_of_its_ranks():
    class Cells(HTMLParser):
        def __init__(self):
            super().__init__()
            self.rows, self.inside, self.tags = [], False, set()

        def handle_starttag(self, tag, attrs):
            self.tags.add(tag)
            self.rows += [[]] if tag == "tr" else []
            self.inside = tag in ("td", "th")
            if self.inside:
                self.rows[-1].append("")

        def handle_data(self, data):
            if self.inside:
                self.rows[-1][-1] += data

    ranks = {"layer.0.query": 3, "layer.1.query": 0, "layer.1.<img src=x>": 2}
    plan = plan_of(ranks, r=4)
    shown = Cells()
    shown.feed(plan._repr_html_())
    assert shown.rows == [["layer", "0", "1"], ["query", "3", "0"], ["<img src=x>", "", "2"]]
    assert shown.tags == {"table", "caption", "tr", "th", "td"}


def test_verdict_says_where_nothing_was_learned():
    chance = {"floor": {"accuracy": 0.5}}
    ours, control = (result_of(name, accuracy=value) for name, value in (("A", 0.52), ("B", 0.51)))
    text = verdict(replace(ours, about=chance), [control])
    # one standard error of 1,200 rows is 0.0144
    assert text.startswith("A learned nothing here: accuracy 0.5200 on 1,200 rows")
    better = replace(ours, metrics=ours.metrics | {"accuracy": 0.54}, about=chance)
    assert "learned nothing" not in verdict(better, [control])


def test_verdict_names_a_control_that_is_too_large():
    ours = result_of("A", accuracy=0.6, trainable=566)  # 500 LoRA parameters
    text = verdict(ours, [result_of("B", accuracy=0.7, trainable=1066)])
    assert text.startswith("B has 2.0 times as many parameters: it is no control of this size.")
