"""What holds for any input, by hypothesis: readers, plans, cuts, recipes, escapes, flags."""

import json
import math
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml as pyyaml

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise import Adapter, DataError, PlanError, RankPlan, RankwiseError, escape
from rankwise.cli.arguments import FitArguments, check_ranges
from rankwise.cli.flags import Group, parse
from rankwise.compare.cells import (
    Cell,
    Failure,
    cell_file,
    cells_of,
    digest,
    read_cell,
    write_failure,
)
from rankwise.compare.recipe import read_recipe
from rankwise.plan import Entry
from rankwise.reading import Unreadable, parse_json, parse_yaml
from rankwise.tasks.files import SUFFIXES, read_file
from rankwise.tasks.known import KNOWN

KNOWN_NAMES = {part for name in KNOWN for part in (name, name.rpartition("/")[2])}
QUICK = settings(max_examples=60, deadline=None, derandomize=True, database=None)

texts = st.text(max_size=20)
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), inner)
    ),
    max_leaves=12,
)
anything = st.recursive(
    plain | st.floats() | texts, lambda x: st.lists(x) | st.dictionaries(texts, x), max_leaves=8
)


# Readers


@QUICK
@given(plain)
def test_json_reads_what_json_writes(value):
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value, ensure_ascii=False)) == value


@QUICK
@given(texts | st.text('[]{}",:0123456789.eE-+\\u ntf', max_size=60))
def test_any_text_is_a_value_or_one_error(text):
    for read in (parse_json, parse_yaml):
        try:
            value = read(text)
        except Unreadable as error:
            assert str(error)
        else:
            json.dumps(value, allow_nan=False).encode()  # whatever is read can be written


@QUICK
@given(st.sampled_from(SUFFIXES), st.binary(max_size=200) | texts.map(str.encode))
def test_any_bytes_are_rows_or_one_error(suffix, content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows{suffix}"
        path.write_bytes(content)
        try:
            rows = read_file(path)
        except DataError as error:
            assert path.name in str(error)
        else:
            assert len({len(values) for values in rows.values()}) == 1
            assert all(name == name.strip() for name in rows)


@QUICK
@given(st.lists(st.dictionaries(st.sampled_from("abc"), plain, min_size=1), min_size=1))
def test_rows_are_what_json_lines_say(rows):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        found = read_file(path)
    for name, values in found.items():
        assert values == [row.get(name) for row in rows]


# Plans


@st.composite
def plans(draw) -> RankPlan:
    modules = {}
    for name in draw(st.lists(st.text("abc.01", min_size=1, max_size=8), min_size=1, unique=True)):
        wide, tall = draw(st.integers(1, 64)), draw(st.integers(1, 64))
        rank = draw(st.integers(0, min(wide, tall)))
        gate = draw(st.none() | st.lists(st.floats(0, 1).map(lambda g: round(g, 6)), max_size=3))
        modules[name] = Entry(rank, wide, tall, name, gate=None if gate is None else tuple(gate))
    scaling = draw(st.floats(0.01, 64))
    return RankPlan(modules, draw(st.integers(1, 64)), scaling, draw(st.just({}) | _provenance))


_provenance = st.dictionaries(st.text("abc", max_size=3), st.integers() | st.text("ab"), max_size=2)


@QUICK
@given(plans())
def test_a_plan_comes_back_as_it_was(plan):
    assert RankPlan.from_json(plan.to_json()) == plan


@QUICK
@given(plans(), st.data())
def test_an_edited_plan_is_a_plan_or_one_error(plan, data):
    raw = json.loads(plan.to_json())
    entry = raw["modules"][data.draw(st.sampled_from(sorted(raw["modules"])))]
    where = data.draw(st.sampled_from([raw, entry]))
    where[data.draw(st.sampled_from([*where, "odd"]))] = data.draw(anything)
    text = json.dumps(raw)
    try:
        found = RankPlan.from_json(text)
    except PlanError as error:
        assert str(error)
    else:
        assert RankPlan.from_json(found.to_json()).ranks == found.ranks
        assert 0 <= found.parameters < 2**100 and math.isfinite(found.scaling)


# Cuts


@st.composite
def adapters(draw) -> Adapter:
    """LoRA of several modules, each of its own rank and alpha, as patterns say them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weights, ranks, alphas = {}, {}, {}
    for n in range(draw(st.integers(1, 3))):
        name = f"layer.{n}.{draw(st.sampled_from(['q', 'v.w']))}"
        rank, wide, tall = (draw(st.integers(1, 4)), *(draw(st.integers(4, 7)) for _ in "ab"))
        for half, shape in (("A", (rank, wide)), ("B", (tall, rank))):
            made = torch.from_numpy(rng.standard_normal(shape)).float()
            weights[f"base_model.model.{name}.lora_{half}.weight"] = made
        ranks[f"^{name.replace('.', '[.]')}"] = rank
        alphas[f"^{name.replace('.', '[.]')}"] = draw(st.integers(1, 32))
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    config |= {"rank_pattern": ranks, "alpha_pattern": alphas, "target_modules": ["q", "w"]}
    return Adapter(config | {"use_rslora": draw(st.booleans())}, weights)


def update(factors) -> np.ndarray:
    return factors.scaling * (factors.b.double() @ factors.a.double()).numpy()


@QUICK
@given(adapters(), st.data())
def test_a_cut_is_the_best_of_its_rank_whatever_the_patterns(adapter, data):
    """numpy's singular values of the whole update are the reference."""
    before = adapter.factors()
    most = max(f.rank for f in before.values())
    rank = data.draw(st.integers(1, most))
    after = adapter.truncate_svd(rank).factors()
    for name, old in before.items():
        u, s, v = np.linalg.svd(update(old))
        kept = min(rank, old.rank)
        best = (u[:, :kept] * s[:kept]) @ v[:kept]
        assert after[name].rank == kept
        assert np.linalg.norm(update(after[name]) - best) <= 1e-4 * max(1, np.linalg.norm(best))


@QUICK
@given(adapters())
def test_an_adapter_on_disk_comes_back_as_it_was(adapter):
    with tempfile.TemporaryDirectory() as folder:
        adapter.save(Path(folder) / "a")
        found = Adapter.load(Path(folder) / "a")
        assert sorted(p.name for p in Path(folder).iterdir()) == ["a"]
    assert found.config == adapter.config
    assert all(found.weights[n].equal(t) for n, t in adapter.weights.items())


# Recipes


def cells_in(folder: Path, value: object) -> list[Cell]:
    """Of a recipe of one file of rows, which lies beside it."""
    (folder / "rows.jsonl").write_text('{"text": "a", "label": "b"}\n')
    (folder / "r.yaml").write_text(pyyaml.safe_dump(value, allow_unicode=True), encoding="utf-8")
    return cells_of(read_recipe(folder / "r.yaml", str(folder)))


def check_cells(cells: list[Cell]) -> None:
    """Names are unique and safe for files; each cell comes after those that it waits for."""
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names)
    for n, cell in enumerate(cells):
        assert re.fullmatch(r"\w[\w.-]{1,220}", cell.name, re.ASCII)
        assert cell_file(Path("f"), cell.name).parent == Path("f/cells")
        assert len(f".{cell.name}.generations.jsonl.1234567.tmp".encode()) <= 255
        assert set(cell.needs) <= set(names[:n])
        assert json.loads(json.dumps(cell.spec, allow_nan=False)) == cell.spec
        assert cell.name.endswith(digest(cell.spec))


@QUICK
@given(anything)
def test_any_value_is_a_grid_or_one_error(value):
    try:
        text = pyyaml.safe_dump(value, allow_unicode=True)
        text.encode()
    except (pyyaml.YAMLError, UnicodeEncodeError):
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            cells = cells_in(Path(folder), value)
        except RankwiseError as error:
            assert str(error) and "\n" not in str(error)
        else:
            check_cells(cells)


labels = st.sampled_from(
    ["../x", "..", ".x", "/etc/passwd", "a/b", "\u6f22" * 90, "\u202ex", "-x", "a b", "x" * 300]
) | st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=90)


@st.composite
def recipes(draw) -> dict:
    """What is a recipe, its labels of any letters."""
    task = {"train_file": "rows.jsonl", "kind": "classification"}
    tasks = draw(st.lists(labels.filter(str.strip), min_size=1, max_size=3, unique=True))
    rates = draw(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=3, unique=True))
    methods = {}
    for label in draw(st.lists(labels.filter(str.strip), min_size=1, max_size=3, unique=True)):
        methods[label] = {"method": "lora", "r": draw(st.integers(1, 8))}
    if draw(st.booleans()):
        first = next(iter(methods))
        methods["its size"] = {"method": "random", "same_size_as": first}
    return {
        "model": draw(st.text("abc/", min_size=1, max_size=9).filter(lambda t: t.strip("/"))),
        "tasks": {label: task for label in tasks if label not in KNOWN_NAMES},
        "methods": methods,
        "seeds": draw(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=2, unique=True)),
        "rates": rates,
    }


@QUICK
@given(recipes(), st.data())
def test_a_recipe_s_cells_have_stable_names_and_hold_what_they_say(recipe, data):
    if not recipe["tasks"]:
        return
    with tempfile.TemporaryDirectory() as folder:
        cells = cells_in(Path(folder), recipe)
        check_cells(cells)
        # neither the order of a recipe's keys nor where it lies is in a name
        keys = data.draw(st.permutations(list(recipe)))
        with tempfile.TemporaryDirectory() as elsewhere:
            again = cells_in(Path(elsewhere), {key: recipe[key] for key in keys})
        assert [cell.name for cell in again] == [cell.name for cell in cells]
        # what a cell leaves is read back as it was, whatever its labels are
        cell = data.draw(st.sampled_from(cells))
        path = cell_file(Path(folder), cell.name)
        write_failure(path, Failure(cell.spec, "it diverged", True))
        assert read_cell(path) == Failure(cell.spec, "it diverged", True)
        changed = dict(recipe, seeds=[(recipe["seeds"][0] + 1) % 2**32])
        other = {cell.name for cell in cells_in(Path(folder), changed)}
        assert not other & {cell.name for cell in cells}


# What is shown, and flags


@QUICK
@given(st.text())
def test_what_is_shown_is_text(text):
    shown = escape.terminal(text)
    shown.encode()
    assert not any((ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 for c in shown)
    assert "\n" not in escape.markdown(text)
    if shown == text:
        assert pyyaml.safe_load(f"a: {escape.yaml(text)}") == {"a": text}


@QUICK
@given(st.sampled_from(["learning_rate", "max_steps", "seed", "use_cpu", "report_to"]), texts)
def test_any_value_of_a_flag_is_taken_or_one_error(name, value):
    try:
        (found,) = parse("train", "", [Group("training", FitArguments())], [f"--{name}={value}"])
        check_ranges([found])
    except RankwiseError as error:
        assert str(error)
    else:
        taken = getattr(found, name)
        assert not isinstance(taken, float) or math.isfinite(taken)
        json.dumps(taken).encode()
