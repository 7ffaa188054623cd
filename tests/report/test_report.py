"""What a run shows: the grid of ranks, the heat map, the verdict, the table and the card."""

import builtins
import io
import json

import numpy as np
import pytest
import yaml
from rich.console import Console

from rankwise import Entry, RankPlan
from rankwise.report import print_table, save_heatmap, verdict, write_card
from rankwise.report.heatmap import grid
from rankwise.tasks import Classification, Task


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
    assert grid(bert_plan()) == (["0", "1"], ["query", "value"], [[1, 3], [2, 4]])


def test_grid_of_gpt2():
    ranks = {f"transformer.h.{i}.attn.c_attn.{p}": r for i, p, r in ((0, "q", 5), (0, "v", 6))}
    ranks |= {"transformer.h.1.attn.c_attn.q": 7, "transformer.h.1.attn.c_attn.v": 0}
    assert grid(plan_of(ranks)) == (["0", "1"], ["q", "v"], [[5, 7], [6, 0]])


def test_grid_of_llama():
    parts = ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj")
    ranks = {f"model.layers.{i}.{part}": 1 + i for i in range(12) for part in parts}
    layers, matrices, table = grid(plan_of(ranks, r=12))
    assert layers == [str(i) for i in range(12)]  # in the model's order, not as text
    assert matrices == ["q_proj", "v_proj", "gate_proj"]
    assert table == [list(range(1, 13))] * 3


def test_grid_tells_matrices_of_one_last_part_apart():
    ranks = {
        "encoder.layer.0.attention.output.dense": 1,
        "encoder.layer.0.intermediate.dense": 2,
        "encoder.layer.0.output.dense": 3,
    }
    layers, matrices, table = grid(plan_of(ranks))
    assert layers == ["0"]
    assert matrices[:2] == ["attention.output.dense", "intermediate.dense"]
    assert len(set(matrices)) == 3
    assert table == [[1], [2], [3]]


def test_grid_of_a_module_outside_the_layers():
    ranks = {"model.layers.0.q_proj": 1, "model.layers.1.q_proj": 2, "lm_head": 3}
    layers, matrices, table = grid(plan_of(ranks))
    assert layers == ["0", "1", "-"]
    assert matrices == ["q_proj", "lm_head"]
    assert table == [[1, 2, None], [None, None, 3]]


def test_grid_of_names_that_are_only_numbers_or_one_word():
    assert grid(plan_of({"0": 1, "2": 2}))[2] == [[1], [2]]
    assert grid(plan_of({"linear": 3})) == (["-"], ["linear"], [[3]])


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
    table = grid(plan_of(ranks))[2]
    assert sorted(r for row in table for r in row if r is not None) == sorted(ranks.values())


def test_grid_of_experts():
    ranks = {f"model.layers.{i}.moe.experts.{e}.w1": 1 + 2 * i + e for i in (0, 1) for e in (0, 1)}
    layers, matrices, table = grid(plan_of(ranks))
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


def task_of(*metrics: str) -> Task:
    return Classification("mine", ("text",), "label", ("a", "b"), metrics)


def arm(trainable: int = 578, **figures: float) -> dict:
    return {
        "eval": {"split": "test", "rows": 1200, "loss": 0.5, **figures},
        "trainable_parameters": trainable,
        "lora_parameters": trainable - 66,
        "train_seconds": 61.4,
        "search_seconds": 0.0,
        "peak_memory_bytes": 2**30,
    }


@pytest.mark.parametrize(
    ("metric", "ours", "control", "sentence"),
    [
        ("accuracy", 0.75, 0.5, "The searched ranks beat uniform r=4 by 0.2500 in accuracy."),
        ("accuracy", 0.5, 0.75, "uniform r=4 did better by 0.2500 in accuracy: choosing ranks did"),
        ("accuracy", 0.5, 0.5, "uniform r=4 did as well in accuracy: choosing ranks did not help"),
        ("perplexity", 8.0, 9.5, "The searched ranks beat uniform r=4 by 1.5000 in perplexity."),
        ("perplexity", 9.5, 8.0, "uniform r=4 did better by 1.5000 in perplexity: choosing"),
        ("loss", 1.0, 1.0, "uniform r=4 did as well in loss: choosing ranks did not help here."),
        ("matthews_correlation", -0.1, -0.2, "beat uniform r=4 by 0.1000 in matthews_correlation."),
    ],
)
def test_verdict(metric, ours, control, sentence):
    arms = {"autolora": arm(**{metric: ours}), "uniform r=4": arm(**{metric: control})}
    first, *rest = verdict(arms, task_of(metric)).splitlines()
    assert sentence in first
    assert len(rest) == 1
    assert "One seed" in rest[0]


def test_verdict_judges_by_the_main_metric_and_names_every_control():
    arms = {
        "autolora": arm(accuracy=0.7, f1=0.1),
        "uniform r=4": arm(accuracy=0.6, f1=0.9),
        "random plan": arm(accuracy=0.8, f1=0.0),
    }
    first, second, _ = verdict(arms, task_of("accuracy", "f1")).splitlines()
    assert first == "The searched ranks beat uniform r=4 by 0.1000 in accuracy."
    assert second.startswith("random plan did better by 0.1000 in accuracy: ")


def test_verdict_without_a_control_claims_nothing():
    text = verdict({"autolora": arm(accuracy=1.0)}, task_of("accuracy"))
    assert "No control" in text
    assert "beat" not in text


@pytest.mark.parametrize(("ours", "control"), [(float("nan"), 0.5), (0.5, float("nan"))])
def test_verdict_of_nan_claims_nothing(ours, control):
    arms = {"autolora": arm(accuracy=ours), "uniform r=4": arm(accuracy=control)}
    text = verdict(arms, task_of("accuracy"))
    assert "beat" not in text
    assert "better" not in text


# The table


def test_table_has_a_row_per_arm():
    arms = {"autolora": arm(accuracy=0.75), "uniform r=4": arm(trainable=1_234_567, accuracy=0.5)}
    arms["autolora"] |= {"search_seconds": 120.4, "search_peak_memory_bytes": 3 * 2**30}
    out = io.StringIO()
    print_table(arms, task_of("accuracy", "f1"), Console(file=out, width=120))
    lines = out.getvalue().splitlines()
    assert "mine: 1,200 test rows, one seed" in lines[0]
    ours = next(line for line in lines if "autolora" in line)
    control = next(line for line in lines if "uniform r=4" in line)
    assert [word in ours for word in ("0.7500", "578", "120", "61", "3.00")] == [True] * 5
    assert [word in control for word in ("0.5000", "1,234,567", "1.00")] == [True] * 3
    assert "f1" not in out.getvalue()  # no arm was measured by it


def test_table_fits_80_columns_without_breaking_words():
    arms = {
        "autolora": arm(accuracy=0.75, f1=0.5),
        "uniform r=4": arm(trainable=1_234_567, accuracy=0.5, f1=0.5),
        "random plan, same size": arm(accuracy=0.5, f1=0.5),
    }
    out = io.StringIO()
    print_table(arms, task_of("accuracy", "f1"), Console(file=out, width=80))
    for word in ("autolora", "uniform", "accuracy", "trainable", "1,234,567"):
        assert word in out.getvalue()


# The card


def write(folder, base: str, plan: RankPlan | None = None, name: str = "models/tiny-bert") -> str:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    (folder / "README.md").write_text("PEFT's own")
    metrics = {
        "model": name,
        "eval": {"split": "test", "rows": 1200, "accuracy": 0.75},
        "training": {
            "learning_rate": 1e-4,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 4,
            "seed": 42,
        },
        "steps": 77,
    }
    arms = {"autolora": arm(accuracy=0.75), "uniform r=4": arm(trainable=1_234_567, accuracy=0.5)}
    plan = plan or bert_plan(provenance={"method": {"gate": "softmax"}})
    write_card(folder, plan, metrics, task_of("accuracy"), arms)
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
        "tags": ["lora", "rankwise"],
    }
    lines = card.splitlines()
    assert "# LoRA adapter for roberta-base on mine" in lines
    table = lines.index("| layer | query | value |")
    assert lines[table + 2 : table + 4] == ["| 0 | 1 | 2 |", "| 1 | 3 | 4 |"]
    assert "| autolora | 0.7500 | 578 |" in lines
    assert "| uniform r=4 | 0.5000 | 1,234,567 |" in lines
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
