"""What a caller gives, by its type: one line instead of an exception from deep inside."""

import os
import types
import typing
from numbers import Integral, Real
from typing import Any, Literal

from rankwise.errors import RankwiseError


def check_type(
    name: str, value: Any, kinds: Any, what: str, error: type[RankwiseError] = RankwiseError
) -> None:
    """Raises where a value is of another type.

    Args:
        name: of the argument.
        value: what was given.
        kinds: a class or several, as isinstance takes them.
        what: has to be given, in words.
        error: what is raised.

    Example:
        >>> check_type("model", "roberta-base", nn.Module, "a transformers model")
        Traceback (most recent call last):
        rankwise.errors.RankwiseError: model is 'roberta-base'; it has to be a transformers model
    """
    if not isinstance(value, kinds):
        raise error(f"{name} is {shown(value)}; it has to be {what}")


def check_path(name: str, value: Any, error: type[RankwiseError] = RankwiseError) -> None:
    """Raises where a value can name no file or folder; one that is not there yet may be named."""
    check_type(name, value, (str, os.PathLike), "the path of a file or folder, a text", error)
    try:
        os.lstat(value)
    except (FileNotFoundError, NotADirectoryError):
        return  # who opens it says so, and what there is instead
    except (OSError, ValueError) as odd:  # too long, a NUL, a folder that may not be looked into
        reason = getattr(odd, "strerror", None) or str(odd)
        raise error(f"{name} is {shown(value)}: {reason}; give another") from odd


def check_model(value: Any, name: str = "model") -> None:
    """Raises where a value is no model in memory."""
    from torch import nn

    what = "a transformers model in memory (AutoModel....from_pretrained(...))"
    check_type(name, value, nn.Module, what)


def check_arguments(value: Any) -> None:
    """Raises where a value is no TrainingArguments."""
    from transformers import TrainingArguments

    check_type("args", value, TrainingArguments, "transformers' TrainingArguments(...)")


def check_count(name: str, value: Any, error: type[RankwiseError] = RankwiseError) -> None:
    """Raises where a value is no whole number of at least 1."""
    if not fits(value, int) or value < 1:
        raise error(f"{name} is {shown(value)}; it has to be a whole number of at least 1")


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotated type, as far as flags have some; a list is a tuple."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in inner)
    if origin is tuple:
        value = value.tolist() if hasattr(value, "tolist") else value  # of numpy or torch
        return isinstance(value, list | tuple) and all(fits(one, inner[0]) for one in value)
    if kind in (int, float):
        number = Integral if kind is int else Real
        return isinstance(value, number) and not isinstance(value, bool)
    if kind is str:
        return isinstance(value, str | os.PathLike)
    return kind is Any or isinstance(value, origin or kind)


def shown(value: Any) -> str:
    """A value in a message: itself where it is short and plain, else what kind of thing it is."""
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if isinstance(value, str | int | float | None):
        return repr(value) if len(repr(value)) <= 200 else f"{repr(value)[:60]}..."
    return f"a {type(value).__name__}"


def words_for(kind: Any) -> str:
    """An annotated type in words."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(words_for(one) for one in inner)
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin is tuple:
        return f"a list of {words_for(inner[0]).partition(' ')[2]}s"
    known = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}
    return known.get(kind, "None" if kind is type(None) else f"a {getattr(kind, '__name__', kind)}")
