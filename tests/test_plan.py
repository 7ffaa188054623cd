"""RankPlan: budgets, JSON and hand edits, what PEFT makes of a plan, and the control plans."""

import json
from collections import Counter
from itertools import product

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import rankwise
from rankwise import Entry, ModelError, PlanError, RankPlan
from rankwise.lora import check, uniform

QUERY_0 = "bert.encoder.layer.0.attention.self.query"
VALUE_0 = "bert.encoder.layer.0.attention.self.value"
QUERY_1 = "bert.encoder.layer.1.attention.self.query"
UP_1 = "bert.encoder.layer.1.intermediate.dense"
SIZES = {QUERY_0: (32, 32), VALUE_0: (32, 32), QUERY_1: (32, 32), UP_1: (32, 48)}


def make_plan(ranks: dict[str, int], sizes: dict | None = None, **kwargs) -> RankPlan:
    sizes = sizes or SIZES
    modules = {name: Entry(r, *sizes[name], module=name) for name, r in ranks.items()}
    return RankPlan(modules, **{"r": 8, **kwargs})


@pytest.fixture
def plan() -> RankPlan:
    return make_plan({QUERY_0: 1, VALUE_0: 3, QUERY_1: 3, UP_1: 8})


def lora_parameters(model: nn.Module) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)


def edited(plan: RankPlan, edit) -> str:
    """The plan's JSON after an edit of the parsed object."""
    raw = json.loads(plan.to_json())
    edit(raw)
    return json.dumps(raw)


# Budget


def test_budget_by_hand(plan):
    # (in + out) r: 64 x 1 + 64 x 3 + 64 x 3 + 80 x 8
    assert plan.parameters == 64 + 192 + 192 + 640
    assert plan.modules[UP_1].cost == 80
    assert plan.ranks == {QUERY_0: 1, VALUE_0: 3, QUERY_1: 3, UP_1: 8}


def test_budget_is_what_peft_creates(plan, bert):
    assert lora_parameters(get_peft_model(bert, plan.lora_config(task_type="SEQ_CLS"))) == 1088


def test_rank_zero_costs_nothing_and_gets_no_adapter(plan, bert):
    plan = plan.with_ranks({**plan.ranks, QUERY_0: 0})
    model = get_peft_model(bert, plan.lora_config(task_type="SEQ_CLS"))
    check(model, plan)
    assert plan.parameters == lora_parameters(model) == 1088 - 64
    assert not any("lora_" in name and QUERY_0 in name for name, _ in model.named_parameters())


def test_with_ranks_wants_one_rank_per_entry(plan):
    with pytest.raises(PlanError, match=f"entry '{UP_1}'"):
        plan.with_ranks({name: r for name, r in plan.ranks.items() if name != UP_1})
    with pytest.raises(PlanError, match="entry 'extra'"):
        plan.with_ranks({**plan.ranks, "extra": 1})


def test_with_ranks_drops_gates_that_explain_other_ranks():
    plan = RankPlan({"a": Entry(1, 4, 4, module="a", gate=(0.7, 0.3))}, r=2)
    assert plan.with_ranks({"a": 2}).modules["a"].gate is None


# LoraConfig


def test_lora_config_is_realised_by_peft(plan, bert):
    config = plan.lora_config(task_type="SEQ_CLS", lora_dropout=0.25)
    assert (config.r, config.lora_alpha) == (3, 6)  # the commonest rank, at scaling 2
    assert config.lora_dropout == 0.25
    model = get_peft_model(bert, config)
    check(model, plan)
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    for name, r in plan.ranks.items():
        layer = layers[f"base_model.model.{name}"]
        assert layer.lora_A["default"].weight.shape == (r, 32)
        assert layer.scaling["default"] == 2.0


@pytest.mark.parametrize("scaling", [0.5, 1 / 3, 2.0, 16.0])
def test_scaling_is_the_same_at_every_rank(scaling, bert):
    plan = make_plan({QUERY_0: 1, VALUE_0: 3, QUERY_1: 3, UP_1: 7}, scaling=scaling)
    model = get_peft_model(bert, plan.lora_config(task_type="SEQ_CLS"))
    check(model, plan)
    found = [m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")]
    assert found == pytest.approx([scaling] * 4)


@pytest.mark.parametrize(
    "decided", ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_rslora"]
)
def test_lora_config_refuses_what_the_plan_decides(plan, decided):
    with pytest.raises(PlanError, match=decided):
        plan.lora_config(**{decided: 4})


def test_lora_config_of_nothing(plan):
    with pytest.raises(PlanError, match="every rank of the plan is 0"):
        plan.with_ranks(dict.fromkeys(plan.ranks, 0)).lora_config()


# check


def wrong_model(bert, plan: RankPlan, **changes):
    """A PEFT model of the plan's LoraConfig with some fields replaced."""
    config = plan.lora_config(task_type="SEQ_CLS").to_dict() | changes
    return get_peft_model(bert, LoraConfig(**{k: v for k, v in config.items() if v is not None}))


def test_check_refuses_another_rank(plan, bert):
    model = wrong_model(bert, plan, rank_pattern={QUERY_0: 2, UP_1: 8})
    with pytest.raises(PlanError, match=rf"'{QUERY_0}' has rank 2 .* the plan says 1 and 2"):
        check(model, plan)


def test_check_refuses_another_scaling(plan, bert):
    # what one gets who forgets alpha_pattern: the scaling follows the rank
    model = wrong_model(bert, plan, alpha_pattern={})
    with pytest.raises(PlanError, match=rf"'{QUERY_0}' has rank 1 and scaling 6 .* says 1 and 2"):
        check(model, plan)


def test_check_refuses_a_pattern_that_matched_nothing(plan, bert):
    model = wrong_model(bert, plan, rank_pattern={"layer.7": 1}, alpha_pattern={"layer.7": 2})
    with pytest.raises(PlanError, match=f"'{QUERY_0}' has rank 3"):
        check(model, plan)


def test_check_refuses_a_missing_and_an_extra_adapter(plan, bert):
    model = wrong_model(bert, plan, target_modules=[VALUE_0, QUERY_1, UP_1])
    with pytest.raises(PlanError, match=f"'{QUERY_0}' rank 1, but the model has no adapter there"):
        check(model, plan)
    with pytest.raises(PlanError, match=f"has an adapter at '{UP_1}', which the plan lacks"):
        check(model, make_plan({VALUE_0: 3, QUERY_1: 3}))


# Names


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(6, 6, bias=False)


class Nested(nn.Module):
    """Modules whose names are endings of other names: a.q, b.a.q and c.b.a.q."""

    def __init__(self):
        super().__init__()
        self.a = Attention()
        self.b = nn.ModuleDict({"a": Attention()})
        self.c = nn.ModuleDict({"b": nn.ModuleDict({"a": Attention()})})

    def forward(self, x):
        return self.a.q(x)


NESTED = dict.fromkeys(("a.q", "b.a.q", "c.b.a.q"), (6, 6))


@pytest.mark.parametrize("ranks", [(1, 2, 3), (3, 1, 1), (2, 2, 5), (1, 1, 4)])
def test_names_that_end_other_names_keep_their_ranks(ranks):
    plan = make_plan(dict(zip(NESTED, ranks, strict=True)), NESTED)
    model = get_peft_model(Nested(), plan.lora_config())
    check(model, plan)
    found = [m.r["default"] for m in model.modules() if hasattr(m, "lora_A")]
    assert found == list(ranks)


@pytest.mark.parametrize("left_out", ["b.a.q", "c.b.a.q"])
def test_a_name_that_ends_with_a_target_can_be_left_out(left_out):
    plan = make_plan({name: 0 if name == left_out else 2 for name in NESTED}, NESTED)
    check(rankwise.build(Nested(), plan), plan)


def test_names_with_regex_characters():
    names = ["q+v", "q(v)", "qv", "q[v]", "layer-1", "layer*1"]
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in names})
    plan = make_plan({n: r for r, n in enumerate(names, 1)}, dict.fromkeys(names, (8, 8)))
    built = get_peft_model(model, plan.lora_config())
    check(built, plan)
    found = {n: m.r["default"] for n, m in built.named_modules() if hasattr(m, "lora_A")}
    assert found == {f"base_model.model.{n}": r for r, n in enumerate(names, 1)}


def test_a_dot_in_a_pattern_is_only_a_dot():
    """`layer.1` as a regular expression also matches `layer11`; a plan must not."""
    names = ["layer.1", "layerX1"]
    inner = nn.ModuleDict({"1": nn.Linear(8, 8)})
    holder = nn.ModuleDict({"layer": inner, "layerX1": nn.Linear(8, 8)})
    for ranks in ((2, 5), (5, 2)):
        plan = make_plan(dict(zip(names, ranks, strict=True)), dict.fromkeys(names, (8, 8)))
        built = get_peft_model(nn.ModuleDict(dict(holder)), plan.lora_config())
        check(built, plan)
        built.unload()


# JSON


def test_json_round_trip():
    plan = RankPlan(
        {
            "h.0.c_attn.q": Entry(0, 4, 4, "h.0.c_attn", (0, 4), (0.25, 0.75)),
            "h.0.c_attn.v": Entry(2, 4, 4, "h.0.c_attn", (8, 12), (0.5, 0.5)),
            'odd "name" ü': Entry(3, 7, 5, 'odd "name" ü'),
        },
        r=3,
        scaling=0.3,
        provenance={"method": {"gate": "softmax"}, "seed": 1, "note": "two\nlines, ü"},
    )
    assert RankPlan.from_json(plan.to_json()) == plan


def test_saved_with_a_line_per_module_for_hand_edits(plan, tmp_path):
    plan.save(tmp_path / "new" / "plan.json")
    text = (tmp_path / "new" / "plan.json").read_text()
    assert f'    "{VALUE_0}": {{"rank": 3, "in": 32, "out": 32}},\n' in text
    assert RankPlan.load(tmp_path / "new" / "plan.json") == plan
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["plan.json"]


def test_an_edited_rank_counts(plan, bert, tmp_path):
    path = tmp_path / "plan.json"
    plan.save(path)
    line = f'"{VALUE_0}": {{"rank": 3,'
    assert line in path.read_text()
    path.write_text(path.read_text().replace(line, line.replace("3", "7")))
    found = RankPlan.load(path)
    assert found.ranks == {**plan.ranks, VALUE_0: 7}
    assert found.parameters == plan.parameters + 4 * 64
    rankwise.build(bert, found, task_type="SEQ_CLS")


def test_an_edit_to_rank_zero_leaves_the_module_out(plan, bert):
    text = edited(plan, lambda raw: raw["modules"][VALUE_0].update(rank=0))
    model = rankwise.build(bert, RankPlan.from_json(text), task_type="SEQ_CLS")
    assert not any("lora_" in name and VALUE_0 in name for name, _ in model.named_parameters())


def test_a_deleted_line_leaves_the_module_out(plan, bert):
    text = edited(plan, lambda raw: raw["modules"].pop(VALUE_0))
    model = rankwise.build(bert, RankPlan.from_json(text), task_type="SEQ_CLS")
    assert not any("lora_" in name and VALUE_0 in name for name, _ in model.named_parameters())


def entry(**changes):
    """An edit of one entry; None takes the key away."""

    def edit(raw):
        value = raw["modules"][VALUE_0]
        value.update(changes)
        for key, new in changes.items():
            if new is None:
                del value[key]

    return edit


def top(**changes):
    return lambda raw: raw.update(changes)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (entry(r=3), [VALUE_0, "'r'"]),
        (entry(rank=-1), [VALUE_0, '"rank"', "-1", ">= 0"]),
        (entry(rank="4"), [VALUE_0, '"rank"', "'4'"]),
        (entry(rank=2.5), [VALUE_0, '"rank"', "2.5"]),
        (entry(rank=True), [VALUE_0, '"rank"', "True"]),
        (entry(rank=None), [VALUE_0, '"rank"']),
        (entry(**{"in": None}), [VALUE_0, '"in"']),
        (entry(out=0), [VALUE_0, '"out"', ">= 1"]),
        (entry(rank=33), [VALUE_0, "33", "32 x 32"]),
        (entry(rows=[0, 5]), [VALUE_0, '"rows"', "[0, 5]"]),
        (entry(rows=["a", "b"]), [VALUE_0, '"rows"']),
        (entry(rows=[0.0, 32.0]), [VALUE_0, '"rows"']),
        (entry(gate=3), [VALUE_0, '"gate"']),
        (entry(gate=["x"]), [VALUE_0, '"gate"']),
        (entry(module=7), [VALUE_0, '"module"']),
        (lambda raw: raw["modules"].update({VALUE_0: 4}), [VALUE_0, "4"]),
        (lambda raw: raw["modules"].update({VALUE_0: [1, 2]}), [VALUE_0]),
        (lambda raw: raw["modules"].clear(), ["no modules"]),
        (lambda raw: raw.pop("modules"), ['"modules"']),
        (top(modules=[]), ['"modules"']),
        (top(format="rankwise-plan/9"), ["rankwise-plan/9", "rankwise-plan/1"]),
        (lambda raw: raw.pop("format"), ['"format"', "None"]),
        (top(comment="mine"), ["'comment'"]),
        (top(r=0), ['"r"', "0"]),
        (top(r="8"), ['"r"', "'8'"]),
        (lambda raw: raw.pop("r"), ['"r"']),
        (top(scaling=0), ['"scaling"', "0"]),
        (top(scaling=-2), ['"scaling"', "-2"]),
        (top(scaling="2"), ['"scaling"', "'2'"]),
        (top(provenance="mine"), ['"provenance"']),
    ],
)
def test_bad_edits_name_what_is_wrong(plan, tmp_path, edit, words):
    path = tmp_path / "plan.json"
    path.write_text(edited(plan, edit))
    with pytest.raises(PlanError) as caught:
        RankPlan.load(path)
    message = str(caught.value)
    assert all(word in message for word in [str(path), *words]), message
    assert "\n" not in message


def test_a_module_named_twice_is_refused(plan):
    """JSON keeps the last of two equal keys; an edit that silently loses one is worse than none."""
    line = f'    "{VALUE_0}": {{"rank": 3, "in": 32, "out": 32}},\n'
    text = plan.to_json()
    assert line in text
    with pytest.raises(PlanError, match="twice"):
        RankPlan.from_json(text.replace(line, line + line.replace("3,", "5,", 1)))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"plan"', "not json", "\ufeff{}"])
def test_files_that_hold_no_plan(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PlanError) as caught:
        RankPlan.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_truncated_file(plan, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json()[:-40])
    with pytest.raises(PlanError, match="not JSON"):
        RankPlan.load(path)


def test_a_file_that_is_missing_or_binary(tmp_path):
    with pytest.raises(PlanError, match=r"cannot read the plan .*nowhere\.json"):
        RankPlan.load(tmp_path / "nowhere.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match=r"cannot read the plan .*binary\.json"):
        RankPlan.load(tmp_path / "binary.json")
    with pytest.raises(PlanError, match="cannot read the plan"):
        RankPlan.load(tmp_path)


# A plan for another model


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("bert.encoder.layer.9.attention.self.query", (32, 32), "names no module"),
        ("bert.encoder.layer.0.attention.self.dropout", (32, 32), "names no module"),
        (QUERY_0, (64, 32), "is 32 x 64, but the module is 32 x 32"),
        (QUERY_0, (32, 64), "has 64 outputs, but the module has 32"),
        (QUERY_0, (16, 16), "another model"),
    ],
)
def test_build_refuses_a_plan_for_another_model(bert, name, size, words):
    plan = make_plan({VALUE_0: 2, name: 2}, SIZES | {name: size})
    with pytest.raises(PlanError, match=words) as caught:
        rankwise.build(bert, plan)
    assert repr(name) in str(caught.value)
    assert lora_parameters(bert) == 0  # found before any change


def test_build_refuses_a_plan_for_another_model_even_where_its_rank_is_zero(bert):
    plan = make_plan({VALUE_0: 2, "gone": 0}, SIZES | {"gone": (4, 4)})
    with pytest.raises(PlanError, match="'gone'"):
        rankwise.build(bert, plan)


# uniform


def test_uniform_of_a_model(bert):
    plan = uniform(bert, 4)
    layers = [f"bert.encoder.layer.{i}.attention.self" for i in (0, 1)]
    assert list(plan.ranks) == [f"{at}.{part}" for at in layers for part in ("query", "value")]
    assert set(plan.ranks.values()) == {4}
    assert plan.parameters == 4 * 4 * (32 + 32)
    assert (plan.r, plan.scaling) == (4, 2.0)
    model = rankwise.build(bert, plan, task_type="SEQ_CLS")
    assert lora_parameters(model) == plan.parameters


def test_uniform_of_a_model_with_targets_and_alpha(bert):
    plan = uniform(bert, 2, target_modules=["intermediate.dense"], lora_alpha=1)
    assert plan.ranks == {UP_1.replace("1", "0"): 2, UP_1: 2}
    assert (plan.parameters, plan.scaling) == (2 * 2 * 80, 0.5)
    assert plan.lora_config().lora_alpha == 1


def test_uniform_of_a_plan_keeps_its_modules_and_scaling(plan):
    plan = make_plan(plan.ranks, scaling=0.5)
    uniform = RankPlan.uniform(plan, 2)
    assert uniform.ranks == dict.fromkeys(plan.ranks, 2)
    assert uniform.scaling == 0.5
    assert uniform.parameters == 2 * (3 * 64 + 80)


def test_uniform_refuses(plan, bert):
    with pytest.raises(PlanError, match="r is 0"):
        RankPlan.uniform(plan, 0)
    with pytest.raises(PlanError, match="33"):
        RankPlan.uniform(plan, 33)
    with pytest.raises(ModelError, match="33"):
        uniform(bert, 33)
    with pytest.raises(ModelError, match=r"'nope' .* query \(2\)"):
        uniform(bert, 2, target_modules=["query", "nope"])


# random

MIXED = {"a": (4, 4), "b": (4, 12), "c": (8, 4), "d": (4, 4)}  # costs 8, 16, 12 and 8


def test_random_keeps_the_budget_exactly_over_many_seeds():
    like = make_plan({"a": 1, "b": 2, "c": 4, "d": 3}, MIXED, r=4)
    plans = [RankPlan.random(like, seed) for seed in range(300)]
    assert {plan.parameters for plan in plans} == {like.parameters}
    assert all(1 <= r <= 4 for plan in plans for r in plan.ranks.values())
    assert len({tuple(plan.ranks.values()) for plan in plans}) > 10  # seeds differ
    assert RankPlan.random(like, 7) == plans[7]
    assert all(plan.scaling == like.scaling for plan in plans)


def all_plans(like: RankPlan) -> list[tuple[int, ...]]:
    """Every list of ranks in [1, r] with the plan's parameter count, by enumeration."""
    costs = [entry.cost for entry in like.modules.values()]
    ranks = product(range(1, like.r + 1), repeat=len(costs))
    return [
        r for r in ranks if sum(a * b for a, b in zip(r, costs, strict=True)) == like.parameters
    ]


@pytest.mark.parametrize("ranks", [(1, 2, 4, 3), (2, 2, 2, 2), (1, 1, 3, 4)])
def test_random_is_uniform_over_the_plans_of_the_budget(ranks):
    like = make_plan(dict(zip(MIXED, ranks, strict=True)), MIXED, r=4)
    possible = all_plans(like)
    assert len(possible) > 5
    draws = 60 * len(possible)
    drawn = Counter(tuple(RankPlan.random(like, seed).ranks.values()) for seed in range(draws))
    assert set(drawn) == set(possible)
    statistic = sum((drawn[plan] - 60) ** 2 / 60 for plan in possible)
    # chi-square with n - 1 degrees of freedom: mean n - 1, variance 2 (n - 1); 4 deviations
    freedom = len(possible) - 1
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5


def test_random_where_only_one_plan_fits():
    like = make_plan({"a": 1, "b": 1, "c": 1, "d": 1}, MIXED, r=4)
    assert RankPlan.random(like, 0).ranks == like.ranks
    like = make_plan({"a": 4, "b": 4, "c": 4, "d": 4}, MIXED, r=4)
    assert RankPlan.random(like, 0).ranks == like.ranks


def test_random_leaves_out_what_the_plan_leaves_out():
    like = make_plan({"a": 0, "b": 2, "c": 4, "d": 3}, MIXED, r=4)
    for seed in range(20):
        plan = RankPlan.random(like, seed)
        assert plan.ranks["a"] == 0
        assert min(plan.ranks[name] for name in "bcd") >= 1
        assert plan.parameters == like.parameters


def test_random_of_a_plan_edited_beyond_its_k():
    """One rank above k: no other may be given more than its matrix can have."""
    sizes = {"big": (32, 32), "small": (4, 4), "tiny": (4, 4)}
    like = make_plan({"big": 10, "small": 2, "tiny": 2}, sizes, r=4)
    for seed in range(30):
        plan = RankPlan.random(like, seed)
        assert plan.parameters == like.parameters
        assert max(plan.ranks["small"], plan.ranks["tiny"]) <= 4


def test_random_of_a_plan_with_every_rank_zero():
    with pytest.raises(PlanError, match="rank"):
        RankPlan.random(make_plan({"a": 0, "b": 0}, MIXED), 0)


@pytest.mark.parametrize("r", [1, 16, 31, 32])
def test_random_of_a_large_model(r):
    """224 modules of a 7-billion model at k = 32: more plans than a float can count."""
    names = [f"layers.{i}.{part}" for i in range(32) for part in "q k v o gate up down".split()]
    costs = {"q": 4096, "k": 1024, "v": 1024, "o": 4096, "gate": 14336, "up": 14336, "down": 14336}
    sizes = {name: (4096, costs[name.split(".")[2]]) for name in names}
    like = make_plan(dict.fromkeys(names, r), sizes, r=32)
    plan = RankPlan.random(like, 0)
    assert plan.parameters == like.parameters
    assert (plan.ranks == like.ranks) == (r in (1, 32))


def test_random_parts_of_a_fused_module_stay_within_it():
    modules = {
        f"h.{i}.c_attn.{part}": Entry(r, 8, 8, f"h.{i}.c_attn", (start, start + 8))
        for i, r in ((0, 1), (1, 4))
        for part, start in (("q", 0), ("v", 16))
    }
    like = RankPlan(modules, r=4)
    plan = RankPlan.random(like, 3)
    assert plan.parameters == like.parameters == 160
    assert [e.rows for e in plan.modules.values()] == [e.rows for e in modules.values()]
    assert sum(plan.module_ranks().values()) == 10


def test_plans_are_values():
    assert make_plan({QUERY_0: 1}) == make_plan({QUERY_0: 1})
    assert make_plan({QUERY_0: 1}) != make_plan({QUERY_0: 2})


def test_a_fused_plan_is_built_in_its_rows(bert):
    """Half of a matrix: B is zero, and stays zero, outside the entry's rows."""
    part = RankPlan({QUERY_0 + ".low": Entry(2, 32, 16, QUERY_0, (0, 16))}, r=2)
    model = rankwise.build(bert, part, task_type="SEQ_CLS")
    b = next(p for name, p in model.named_parameters() if "lora_B" in name)
    model(input_ids=torch.arange(5, 13)[None], labels=torch.tensor([1])).loss.backward()
    assert b.shape == (32, 2)
    assert b.grad[:16].abs().sum() > 0
    assert b.grad[16:].abs().sum() == 0


def test_a_module_edited_to_rank_0_is_left_out_though_its_name_ends_like_another():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = torch.nn.Linear(8, 8)

    class Two(Block):
        def __init__(self):
            super().__init__()
            self.block = Block()

    entries = {
        "lin": Entry(2, 8, 8, module="lin"),
        "block.lin": Entry(0, 8, 8, module="block.lin"),
    }
    plan = RankPlan(entries, r=4)
    check(get_peft_model(Two(), plan.lora_config()), plan)


def test_a_plan_with_a_gate_that_is_no_number_is_not_written(tmp_path):
    entries = {"q": Entry(1, 8, 8, module="q", gate=(float("nan"), 0.5))}
    with pytest.raises(ValueError):
        RankPlan(entries, r=2).save(tmp_path / "plan.json")
    assert not list(tmp_path.iterdir())
