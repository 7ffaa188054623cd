"""The result record: what is written is what is read, and every damage is named by its field."""

import json
import math
from dataclasses import fields, replace

import pytest

from rankwise import Result
from rankwise.errors import ResultError

CONTROL = Result(
    name="LoRA r=4",
    method={"name": "LoRA", "r": 4, "target_modules": ["query", "value"]},
    claim="",
    task={"name": "mine", "metrics": ["accuracy"]},
    model="roberta-base",
    rows={"train": 100, "held_out": 0, "evaluated": 50},
    split="test",
    training={"learning_rate": 1e-4, "bf16": False, "max_steps": -1},
    metrics={"loss": 0.5, "accuracy": 1},
    trainable_parameters=1_234,
    lora_parameters=None,
    ranks=None,
    cost={"search_seconds": 0.0, "train_seconds": 1.5, "peak_memory_bytes": 2**33, "steps": 7},
)
RESULT = replace(
    CONTROL,
    name="Größe ±",
    claim="choosing ranks",
    lora_parameters=1_000,
    ranks={"layer.0.query": 1, "layer.0.value": 0},
    curve={"metric": "accuracy", "sizes": [1, 2], "values": [0.5, 0.75]},
    figures={"picked_by": "the user"},
    about={"command": "run", "resumed": False},
    controls=(CONTROL, replace(CONTROL, name="another")),
    verdict="nothing\nto say",
)


@pytest.mark.parametrize("result", [CONTROL, RESULT], ids=["control", "result"])
def test_round_trip(tmp_path, result):
    result.save(tmp_path / "new" / "metrics.json")
    assert Result.load(tmp_path / "new" / "metrics.json") == result
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["metrics.json"]
    assert Result.from_dict(result.to_dict()) == result
    raw = json.loads((tmp_path / "new" / "metrics.json").read_text(encoding="utf-8"))
    assert next(iter(raw)) == "schema"
    assert raw == result.to_dict()


def test_tuples_become_lists_as_json_has_them():
    given = replace(CONTROL, method={"name": "LoRA", "target_modules": ("query",)})
    assert given.to_dict()["method"]["target_modules"] == ["query"]
    assert Result.from_dict(given.to_dict()).to_dict() == given.to_dict()


def test_with_controls_keeps_all_else():
    found = CONTROL.with_controls([CONTROL], "as well")
    assert (found.controls, found.verdict) == ((CONTROL,), "as well")
    assert replace(found, controls=(), verdict="") == CONTROL


def test_nan_is_not_written(tmp_path):
    broken = replace(CONTROL, metrics={"loss": math.nan})
    with pytest.raises(ValueError):
        broken.save(tmp_path / "metrics.json")
    assert list(tmp_path.iterdir()) == []


def refused(path, *words: str) -> None:
    """Loading ends in one line that has the file's name and all the words."""
    with pytest.raises(ResultError) as error:
        Result.load(path)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in (str(path), *words)), message


@pytest.mark.parametrize("text", [None, "", "{", "nonsense", "[" * 100_000, "\x00", b"\xff\xfe{"])
def test_files_that_cannot_be_read(tmp_path, text):
    path = tmp_path / "metrics.json"
    if isinstance(text, bytes):
        path.write_bytes(text)
    elif text is not None:
        path.write_text(text)
    refused(path, "cannot read")
    refused(tmp_path, "cannot read")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("null", "NoneType"),
        ("[1]", "list"),
        ('"text"', "str"),
        ("{}", "None"),
        ('{"schema": "rankwise-result/99"}', "'rankwise-result/99'"),
        ('{"schema": 1}', "1"),
    ],
)
def test_files_of_another_schema(tmp_path, text, found):
    (tmp_path / "metrics.json").write_text(text)
    refused(tmp_path / "metrics.json", '"schema"', found, "rankwise-result/1")


@pytest.mark.parametrize("place", ["result", "control"])
@pytest.mark.parametrize("name", [f.name for f in fields(Result)])
def test_a_field_that_is_missing(tmp_path, name, place):
    raw = RESULT.to_dict()
    del (raw if place == "result" else raw["controls"][1])[name]
    (tmp_path / "metrics.json").write_text(json.dumps(raw))
    refused(tmp_path / "metrics.json", f"no field {name!r}")


@pytest.mark.parametrize("place", ["result", "control"])
def test_a_field_that_is_unknown(tmp_path, place):
    raw = RESULT.to_dict()
    (raw if place == "result" else raw["controls"][1])["accuracy"] = 1
    (tmp_path / "metrics.json").write_text(json.dumps(raw))
    refused(tmp_path / "metrics.json", "unknown field 'accuracy'")


NONE_TOO = ("lora_parameters", "ranks", "curve")


@pytest.mark.parametrize("place", ["result", "control"])
@pytest.mark.parametrize("name", [f.name for f in fields(Result)])
def test_a_field_of_another_type(tmp_path, name, place):
    good = RESULT.to_dict()[name]
    for value in (None, True, 1.5, 3, "text", [1], {"a": "b"}):
        same = type(value) is type(good) and name not in ("metrics", "rows", "ranks", "controls")
        if same or (value is None and name in NONE_TOO):
            continue
        raw = RESULT.to_dict()
        (raw if place == "result" else raw["controls"][1])[name] = value
        (tmp_path / "metrics.json").write_text(json.dumps(raw))
        refused(
            tmp_path / "metrics.json", "schema" if name == "controls" and value == [1] else name
        )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("metrics", "0.5"),
        ("metrics", None),
        ("metrics", True),
        ("metrics", math.nan),
        ("metrics", math.inf),
        ("metrics", [0.5]),
        ("rows", 1.5),
        ("rows", None),
        ("ranks", "4"),
        ("ranks", 2.5),
        ("ranks", -1),
        ("ranks", True),
    ],
)
def test_a_value_within_a_field(tmp_path, field, value):
    raw = RESULT.to_dict()
    raw[field]["inner"] = value
    (tmp_path / "metrics.json").write_text(json.dumps(raw))
    finite = not isinstance(value, float) or math.isfinite(value)
    refused(tmp_path / "metrics.json", "'inner'" if finite else "no finite number")
