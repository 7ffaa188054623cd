"""Flags out of dataclasses: what every kind of field takes, from the line, a file and the class."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from rankwise import RankwiseError
from rankwise.cli.flags import Group, parse, read_flag


def option(default: Any, text: str = "") -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Kinds:
    """A field of every kind."""

    count: int = option(3, "how many")
    share: float = option(0.0, "a share: 50% is 0.5")
    place: str | None = option(None, "where; 100% yours")
    fast: bool = option(False, "on or off")
    safe: bool = option(True, "off or on")
    shape: Literal["round", "square"] = option("round", "which form")
    edge: Literal["sharp", "soft"] | None = option(None, "of the form")
    names: tuple[str, ...] = option((), "several")
    numbers: tuple[int, ...] = option((1, 2), "several numbers")
    weights: tuple[float, ...] | None = option(None, "several weights")
    where: tuple[str, ...] | str | None = option("everywhere", "several, or one word")
    more: dict | None = option(None, "as JSON: '{\"a\": 1}'")  # noqa: RUF009


def parsed(*argv: str, like: Kinds | None = None, **defaults: Any) -> Kinds:
    (found,) = parse("try", "What it does.", [Group("kinds", like or Kinds())], argv, **defaults)
    return found


def help_of(capsys, like: Kinds | None = None, **defaults: Any) -> str:
    with pytest.raises(SystemExit) as stop:
        parsed("--help", like=like, **defaults)
    assert stop.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_nothing_given_is_what_the_instance_holds():
    assert parsed() == Kinds()
    like = Kinds(count=7, fast=True, names=("a",), weights=(0.5,), more={"a": 1}, shape="square")
    assert parsed(like=like) == like


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--count", "5"], "count", 5),
        (["--count=-5"], "count", -5),
        (["--share", "1e-4"], "share", 1e-4),
        (["--share", "-1"], "share", -1.0),
        (["--place", "here and there"], "place", "here and there"),
        (["--fast"], "fast", True),
        (["--fast", "true"], "fast", True),
        (["--fast", "Yes"], "fast", True),
        (["--fast=1"], "fast", True),
        (["--fast", "false"], "fast", False),
        (["--safe"], "safe", True),
        (["--safe", "false"], "safe", False),
        (["--safe=0"], "safe", False),
        (["--safe", "no"], "safe", False),
        (["--shape", "square"], "shape", "square"),
        (["--edge", "soft"], "edge", "soft"),
        (["--names", "a"], "names", ("a",)),
        (["--names", "a", "b c"], "names", ("a", "b c")),
        (["--numbers", "4", "5"], "numbers", (4, 5)),
        (["--weights", "0.25", "1"], "weights", (0.25, 1.0)),
        (["--where", "here"], "where", ("here",)),
        (["--where", "here", "there"], "where", ("here", "there")),
        (["--more", '{"a": [1, 2]}'], "more", {"a": [1, 2]}),
        (["--count", "5", "--count", "6"], "count", 6),
    ],
)
def test_a_flag_sets_its_field_and_no_other(argv, name, value):
    found = vars(parsed(*argv))
    assert found.pop(name) == value
    assert type(getattr(parsed(*argv), name)) is type(value)
    assert found == {key: v for key, v in vars(Kinds()).items() if key != name}


def test_a_flag_without_a_value_leaves_the_next_flag_alone():
    found = parsed("--fast", "--count", "5")
    assert (found.fast, found.count) == (True, 5)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--count", "four"], ["--count", "'four'"]),
        (["--count", "2.5"], ["--count", "'2.5'"]),
        (["--count"], ["--count", "expected one argument"]),
        (["--share", "much"], ["--share", "'much'"]),
        (["--fast", "perhaps"], ["--fast", "'perhaps' is neither true nor false"]),
        (["--shape", "oval"], ["--shape", "'oval'", "round", "square"]),
        (["--edge", "blunt"], ["--edge", "'blunt'", "sharp", "soft"]),
        (["--names"], ["--names", "at least one"]),
        (["--numbers", "1", "x"], ["--numbers", "'x'"]),
        (["--more", "[1]"], ["--more", "not a JSON object"]),
        (["--more", "{"], ["--more", "not JSON"]),
        (["--cou", "1"], ["unknown flag --cou"]),
        (["--fast-and-off"], ["unknown flag --fast-and-off"]),
        (["stray"], ["unknown flag stray"]),
    ],
)
def test_nonsense_is_named_with_its_flag(argv, words):
    with pytest.raises(RankwiseError) as error:
        parsed(*argv)
    assert all(word in str(error.value) for word in words), error.value
    assert "rankwise try --help" in str(error.value)


# The file


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("count: 5", "count", 5),
        ("share: 1e-4", "share", 1e-4),  # a text in YAML 1.1
        ("fast: true", "fast", True),
        ("fast: yes", "fast", True),
        ("safe: false", "safe", False),
        ("shape: square", "shape", "square"),
        ("names: a", "names", ("a",)),
        ("names: [a, b]", "names", ("a", "b")),
        ("names: []", "names", ()),
        ("weights: [0.5, 1]", "weights", (0.5, 1.0)),
        ("weights: null", "weights", None),
        ("where: [here, there]", "where", ("here", "there")),
        ("more: {a: 1}", "more", {"a": 1}),
        ("place: null", "place", None),
        ("place: --count", "place", "--count"),
    ],
)
def test_a_file_sets_what_flags_set(tmp_path, text, name, value):
    (tmp_path / "c.yaml").write_text(text)
    found = vars(parsed("--config", str(tmp_path / "c.yaml")))
    assert found.pop(name) == value
    assert found == {key: v for key, v in vars(Kinds()).items() if key != name}


def test_flags_go_over_the_file_and_that_over_the_command_and_that_over_the_class(tmp_path):
    (tmp_path / "c.yaml").write_text("count: 20\nshare: 0.2\n")
    config = ["--config", str(tmp_path / "c.yaml")]
    found = parsed(*config, "--count", "30", count=10, share=0.1, place="command")
    assert (found.count, found.share, found.place, found.shape) == (30, 0.2, "command", "round")


def test_one_flag_is_read_before_the_others_are_known(tmp_path):
    (tmp_path / "c.yaml").write_text("shape: of the file\nunknown: 1\n")
    config = ["--config", str(tmp_path / "c.yaml")]
    assert read_flag("try", ["--other", "1"], "shape", "default") == "default"
    assert read_flag("try", ["--other", "1", *config], "shape", "default") == "of the file"
    assert read_flag("try", [*config, "--shape", "given"], "shape", "default") == "given"
    assert read_flag("try", [*config, "--shape=given"], "shape", "default") == "given"
    assert read_flag("try", ["--help"], "shape", "default") == "default"
    with pytest.raises(RankwiseError, match=r"--shape.*expected one argument.*rankwise try --help"):
        read_flag("try", ["--shape"], "shape", "default")


# The help


def test_help_shows_every_flag_once_with_what_it_takes(capsys):
    out = help_of(capsys)
    assert "usage: rankwise try [--flag value ...]" in out
    assert "What it does." in out and "kinds:" in out
    for shown in (
        "--count N how many (default: 3)",
        "--share X a share: 50% is 0.5 (default: 0.0)",
        "--place VALUE where; 100% yours --fast",
        "--fast on or off --safe",
        "--safe off or on (default: True)",
        "--shape {round,square} which form (default: round)",
        "--edge {sharp,soft} of the form --names",
        "--names VALUE ... several --numbers",
        "--numbers N ... several numbers (default: 1 2)",
        "--weights X ... several weights --where",
        "--where VALUE ... several, or one word (default: everywhere)",
        """--more VALUE as JSON: '{"a": 1}'""",
    ):
        assert shown in out, shown
    assert out.count("--count ") == 1


def test_help_shows_a_command_s_own_default(capsys):
    out = help_of(capsys, count=10, place="50% of it")
    assert "how many (default: 10)" in out
    assert "where; 100% yours (default: 50% of it)" in out
