"""Recipes and their cells: what is refused, what a name hangs on, what waits for what."""

import shutil

import pytest
import yaml

from rankwise.compare.cells import cells_of, digest
from rankwise.compare.recipe import read_recipe
from rankwise.errors import RankwiseError
from rankwise.methods import by_name

PLAIN = {
    "model": "tiny",
    "tasks": {"mine": {"train_file": "train.jsonl"}},
    "methods": {"lora": {"r": 4}},
}


def recipe(tmp_path, **changes):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(PLAIN | changes))
    return read_recipe(path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metods": ["lora"]}, r"no key 'metods'; did you mean 'methods'\?"),
        ({"methods": ["autolroa"]}, r"no method 'autolroa'; did you mean 'autolora'\?"),
        ({"methods": {"a": {"method": "loar"}}}, r"methods.a: no method 'loar'.*'lora'"),
        ({"methods": {"lora": {"lora_alfa": 3}}}, r"no flag of lora 'lora_alfa'.*'lora_alpha'"),
        ({"methods": {"lora": {"r": "eight"}}}, r"methods.lora: r/--lora_r: 'eight' is no integer"),
        ({"methods": {"lora": {"r": 0}}}, r"methods.lora: r is 0"),
        ({"methods": {}}, r"methods is \{\}"),
        ({"tasks": ["mrcp"]}, r"no task 'mrcp'; did you mean 'mrpc'\?"),
        ({"tasks": {"mine": {"task": "glue/srt2"}}}, r"no task 'glue/srt2'.*'glue/sst2'"),
        ({"tasks": {"mrpc": {"max_lenght": 9}}}, r"no key 'max_lenght'.*'max_length'"),
        ({"tasks": {"mrpc": {"training": {"epochs": 9}}}}, r"tasks.mrpc: no key 'epochs'"),
        ({"tasks": {"mrpc": {"training": {"seed": 9}}}}, r"seed is the recipe's"),
        ({"training": {"learning_rte": 1}}, r"training: no key 'learning_rte'.*learning_rate"),
        ({"training": {"learning_rate": 1e-3}, "rates": [1e-3]}, "and rates are given too"),
        ({"training": {"num_train_epochs": 0}}, "num_train_epochs is 0"),
        ({"rates": ["fast"]}, r"rates has 'fast'; give a list of numbers"),
        ({"rates": [-1.0]}, "out of range"),
        ({"rates": [1e-3, 1e-2], "methods": {"lora": {"rates": [1e-3]}}}, "is given as many"),
        ({"seeds": [1, 1]}, "without repetitions"),
        ({"budget": "small"}, "budget is 'small'"),
        ({"tune": {"held_out": 3}}, "held_out is 3"),
        ({"methods": {"ia3": {"same_size_as": "lora"}, "lora": None}}, "takes no budget"),
        ({"methods": {"lora": {"same_size_as": "svd"}}}, "no method to be the size of 'svd'"),
        ({"model": None}, "names no model"),
        ({"model": {"model_nam_or_path": "x"}}, "did you mean 'model_name_or_path'"),
        ({"model": True}, "model_name_or_path is true; it takes a text, so put"),
        ({"model": "x" * 5000}, "model is 'xxx.*File name too long"),
        ({"data_dir": [1]}, "data_dir is"),
        ({"seeds": [1.5]}, "seeds has 1.5; give whole numbers"),
        ({"seeds": True}, "seeds has True"),
        ({"seeds": 2**40}, "seeds has"),
        ({"rates": [True]}, "rates has True"),
        ({"training": {"learning_rate": -1.0}}, "rates has -1.0, which is out of range"),
        ({"training": 0}, "training is 0; it has to map"),
        ({"tune": {"num_train_epochs": -1.0}}, "tune: num_train_epochs is -1.0"),
        ({"generation": {"num_beams": 0}}, "r.yaml: generation: num_beams is 0"),
        ({"budget": True}, "budget is True"),
        ({"methods": ["lora", "lora"]}, "methods has 'lora' twice"),
        ({"methods": {"lora": {"target_modules": [None]}}}, "target_modules is or has None"),
        ({"tasks": {"": {}}}, "tasks has the name ''"),
    ],
)
def test_what_is_wrong_is_named_with_the_nearest(changes, said, tmp_path):
    with pytest.raises(RankwiseError, match=said) as caught:
        recipe(tmp_path, **changes)
    assert "\n" not in str(caught.value)


TWICE = "model: a\nmodel: b\n"
NAN = "rates: .nan\n"


@pytest.mark.parametrize("text", ["", "- a\n", "a: [\n", "\x00", TWICE, NAN, "a: &a [*a]"])
def test_a_file_that_is_no_recipe(text, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RankwiseError, match="recipe"):
        read_recipe(tmp_path / "r.yaml")


def test_the_budget_goes_to_those_that_say_no_size(tmp_path):
    methods = {"lora": {"r": 4}, "random": None, "svd-threshold": {"rank": 2}, "cut": None}
    found = {m.label: m.method for m in recipe(tmp_path, methods=methods, budget=999).methods}
    assert found["lora"].budget is None and found["svd-threshold"].budget is None
    assert found["random"].budget == found["cut"].budget == 999


def test_a_control_takes_the_shape_of_what_it_controls(tmp_path):
    methods = {
        "autolora": {"r": 6, "target_modules": ["query"]},
        "chance": {"method": "random", "same_size_as": "autolora"},
        "dropped": {"method": "lora", "same_size_as": "autolora", "lora_dropout": 0.1},
    }
    _, chance, dropped = recipe(tmp_path, methods=methods).methods
    assert chance.method == by_name("random", r=6, target_modules=("query",))
    assert dropped.method == by_name("lora", r=6, target_modules=("query",), lora_dropout=0.1)


def test_every_cell_comes_after_those_it_waits_for(tmp_path):
    methods = {"lora": {"same_size_as": "svd"}, "svd": None}
    cells = cells_of(recipe(tmp_path, methods=methods, rates=[1e-3, 1e-2], seeds=[0, 1]))
    place = {cell.name: n for n, cell in enumerate(cells)}
    assert all(place[need] < place[cell.name] for cell in cells for need in cell.needs)
    # two methods at two rates on the first seed, and two methods at two seeds at the best
    assert len(cells) == len(place) == 8
    finals = {(c.method.label, c.fit.seed): c for c in cells if c.held_out is None}
    assert len(finals) == 4
    for seed in (0, 1):
        lora, svd = finals["lora", seed], finals["svd", seed]
        assert lora.size_of == svd.name
        assert set(lora.rates) == set(svd.rates) == {1e-3, 1e-2}
        assert svd.rates == finals["svd", 0].rates  # every seed at the rates of one look


def test_cells_that_judge_rates_have_their_own_length(tmp_path):
    more = {"rates": [1e-3, 1e-2], "training": {"max_steps": 50, "num_train_epochs": 9}}
    found = {}
    for name, tune in {"epochs": {"num_train_epochs": 2}, "steps": {"max_steps": 4}}.items():
        cells = cells_of(recipe(tmp_path, **more, tune=tune))
        found[name] = {(c.fit.max_steps, c.fit.num_train_epochs) for c in cells if c.held_out}
        assert {c.fit.max_steps for c in cells if c.held_out is None} == {50}
    assert found == {"epochs": {(-1, 2.0)}, "steps": {(4, 9.0)}}


def test_without_rates_nothing_is_tuned(tmp_path):
    (cell,) = cells_of(recipe(tmp_path, training={"learning_rate": 0.002}))
    assert cell.needs == () and cell.fit.learning_rate == 0.002


def names(tmp_path, **changes):
    return [cell.name for cell in cells_of(recipe(tmp_path, **changes))]


def test_a_name_hangs_on_what_is_run_and_on_nothing_else(tmp_path):
    here, there = tmp_path / "a", tmp_path / "b"
    here.mkdir()
    (here / "train.jsonl").write_text('{"text": "x", "label": 1}\n')
    shutil.copytree(here, there)
    first = names(tmp_path, data_dir=str(here))
    assert first == names(tmp_path, data_dir=str(there))
    same = {"logging_steps": 7, "save_steps": 9, "report_to": "wandb", "use_cpu": True}
    assert first == names(tmp_path, data_dir=str(here), training=same)
    # default values that are spelled out, and another place in the file
    spelled = {"lora": {"lora_dropout": 0.0, "r": 4}}
    assert first == names(tmp_path, data_dir=str(here), methods=spelled)
    others = [
        {"methods": {"lora": {"r": 5}}},
        {"seeds": [1]},
        {"training": {"max_steps": 3}},
        {"training": {"learning_rate": 0.2}},
        {"max_length": 12},
        {"model": "other"},
        {"rates": [1e-3, 1e-2]},
    ]
    found = [names(tmp_path, data_dir=str(here), **other)[-1] for other in others]
    (there / "train.jsonl").write_text('{"text": "y", "label": 1}\n')
    found += names(tmp_path, data_dir=str(there))  # other rows
    assert len({*first, *found}) == 1 + len(others) + 1


def test_the_hash_can_be_had_from_what_the_file_says(tmp_path):
    import hashlib
    import json

    (cell,) = cells_of(recipe(tmp_path))
    text = json.dumps(dict(cell.spec), sort_keys=True)
    assert cell.name.endswith("-" + hashlib.sha256(text.encode()).hexdigest()[:8])
    assert cell.name == f"mine-lora-seed0-{digest(cell.spec)}"


def test_a_label_becomes_a_name_that_any_file_system_takes(tmp_path):
    (name,) = names(tmp_path, methods={"LoRA, r = 4 / <b>": {"method": "lora"}})
    assert name.startswith("mine-LoRA_r_4_b_-seed0-")
