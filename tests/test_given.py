"""What a caller gives, by its type; the words of what is wrong."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from rankwise import METHODS, RankwiseError
from rankwise.cli.boundary import fail
from rankwise.given import check_count, check_path, fits, shown, words_for
from rankwise.methods import by_name

LIKE = tuple[str, ...] | str | None


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (3, int, True),
        (np.int64(3), int, True),
        (True, int, False),
        (3.0, int, False),
        (3, float, True),
        (np.float32(3), float, True),
        ("3", float, False),
        (True, bool, True),
        (1, bool, False),
        (Path("a"), str, True),
        (b"a", str, False),
        (["a", "b"], LIKE, True),
        (("a", 5), LIKE, False),
        (None, LIKE, True),
        (np.ones(3), tuple[float, ...], True),
        (np.ones((3, 3)), tuple[float, ...], False),
        ("x", Literal["x", "y"], True),
        ("z", Literal["x", "y"], False),
        (object(), Any, True),
        ({}, dict[str, Any], True),
    ],
)
def test_a_value_is_of_a_type(value, kind, expected):
    assert fits(value, kind) is expected


def test_words():
    assert words_for(int | None) == "a whole number or None"
    assert words_for(tuple[str, ...] | str) == "a list of texts or a text"
    assert shown([1]) == "a list" and shown("a\nb") == r"'a\nb'"
    assert len(shown("x" * 10**6)) < 100
    with pytest.raises(RankwiseError, match="rank is True; it has to be a whole number"):
        check_count("rank", True)
    with pytest.raises(RankwiseError, match="output_dir is None; it has to be the path"):
        check_path("output_dir", None)


@pytest.mark.parametrize("name", METHODS)
def test_every_flag_of_a_method_is_held_to_its_type(name):
    for flag in vars(by_name(name)):
        with pytest.raises(RankwiseError, match=rf"^{flag} is .*; it has to be "):
            by_name(name, **{flag: Exception("x")})


def test_a_line_shows_no_value_of_any_length(capsys):
    for text in ("x" * 5000, "a " + "y" * 400):
        with pytest.raises(SystemExit):
            fail(f"seed is {text}; give another", 2)
    long, short = capsys.readouterr().err.splitlines()
    assert "(5,001 characters)" in long and len(long) < 200
    assert "y" * 400 in short
