"""Flags out of dataclasses: their fields are the flags, and a YAML file can hold them too.

Kept to argparse, because the help of a command has to be there at once.
"""

import difflib
import math
import os
import types
import typing
from argparse import SUPPRESS, Action, ArgumentParser, ArgumentTypeError, HelpFormatter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NoReturn

from rankwise.errors import RankwiseError
from rankwise.reading import Unreadable, parse_json, read_yaml

# What no file may switch on, since files are passed on: only the command line says so.
TYPED = ("trust_remote_code",)

# A second spelling: torchrun takes --r for a beginning of its own flags, wherever it stands.
ALSO = {"r": ("--lora_r",)}


@dataclass(frozen=True)
class Group:
    """A dataclass on the command line.

    Attributes:
        title: over its flags in the help.
        like: an instance, whose values are the defaults.
        hidden: flags that the command takes but has no use for, so that commands can share a YAML
            file; the help leaves them out.
    """

    title: str
    like: Any
    hidden: frozenset[str] = frozenset()


class _HelpFormatter(HelpFormatter):
    """The default of every flag that has one, and one spelling of a flag's values."""

    def _get_help_string(self, action: Action) -> str | None:
        text, shown = action.help or "", action.default
        if isinstance(shown, list | tuple):
            shown = " ".join(map(str, shown))
        if shown is not None and shown is not False and shown != "" and action.dest != "help":
            text += f" (default: {shown})"
        return text.replace("%", "%%")

    def _format_action_invocation(self, action: Action) -> str:
        if action.nargs in (0, "?"):  # on and off
            return ", ".join(action.option_strings)
        if action.choices:
            shown = "{" + ",".join(map(str, action.choices)) + "}"
        else:
            kinds: dict[Any, str] = {_whole: "N", _finite: "X"}
            shown = kinds.get(action.type, "VALUE")
        return ", ".join(action.option_strings) + f" {shown}" + " ..." * (action.nargs == "+")


class _Parser(ArgumentParser):
    """Its errors are one line like all others."""

    hint: str | None = None

    def error(self, message: str) -> NoReturn:
        if self.hint is None:
            raise RankwiseError(f"{message}; see {self.prog} --help")
        raise RankwiseError(f"{self.prog}: {message.replace('argument --', '')}")


def parse(
    command: str,
    description: str,
    groups: Sequence[Group],
    argv: Sequence[str],
    elsewhere: Mapping[str, str] | None = None,
    **defaults: Any,
) -> list[Any]:
    """Flags, over the YAML file of `--config`, over a command's own defaults, over the classes'.

    Args:
        command: its name.
        description: for the help.
        groups: one dataclass each.
        argv: the command line after the command.
        elsewhere: flags that others have, and who ("method x"): a file of flags may name them, for
            it may be shared, and a message says where they belong.
        **defaults: of the command, by flag.

    Returns:
        One instance a group.

    Raises:
        RankwiseError: a flag or a key that is unknown, or a value that is none; a config file that
            cannot be read.
        SystemExit: by argparse, for `--help`.
    """
    parser = _Parser(
        prog=f"rankwise {command}",
        usage=f"rankwise {command} [--flag value ...]",
        description=description,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML file of flags; flags on the command line win")
    for group in groups:
        _add(parser, group)
    parser.set_defaults(**defaults)
    actions = {action.dest: action for action in parser._actions}
    path = parser.parse_known_args(list(argv))[0].config
    given = [] if path is None else _config_flags(path, actions, elsewhere or {})
    found, rest = parser.parse_known_args([*given, *argv])
    if rest:
        shown = [f.name for group in groups for f in fields(group.like)]
        parser.error(f"unknown flag {rest[0]}{_hint(rest[0], shown, elsewhere or {})}")
    return [
        type(group.like)(
            **{f.name: _value(getattr(found, f.name), f.metadata) for f in fields(group.like)}
        )
        for group in groups
    ]


# What other tools call them.
_OTHERS = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "model": "model_name_or_path",
    "rank": "r",
    "lora_r": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "resume": "resume_from_checkpoint",
    "output": "output_dir",
}


def _hint(given: str, known: Sequence[str], elsewhere: Mapping[str, str]) -> str:
    """Which flag was meant, or whose it is."""
    name = given.lstrip("-").partition("=")[0].replace("-", "_")
    if not given.startswith("--"):
        return ""
    if name in elsewhere and name not in known:
        return f", which is a flag of {elsewhere[name]}"
    if (other := _OTHERS.get(name)) in known:
        return f"; did you mean --{other}?"
    near = difflib.get_close_matches(name, [*known, *elsewhere], n=1)
    if not near:
        return ""
    of = "" if near[0] in known else f" of {elsewhere[near[0]]}"
    return f"; did you mean --{near[0]}{of}?"


def read_values(where: str, like: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a dataclass of flags out of a file, read and checked as those of flags are.

    Args:
        where: names the place in the file, for errors.
        like: an instance.
        values: by flag; None is as good as left out.

    Raises:
        RankwiseError: an unknown key, or a value that is none.
    """
    parser = _Parser(where, add_help=False, allow_abbrev=False)
    parser.hint = ""
    _add(parser, Group("", like))
    actions = {action.dest: action for action in parser._actions}
    for key in values:
        if key not in actions:
            near = difflib.get_close_matches(str(key), actions, 1, 0.5) or [", ".join(actions)]
            raise RankwiseError(f"{where}: no key {key!r}; did you mean {near[0]!r}?")
    given = {key: value for key, value in values.items() if value is not None}
    found = parser.parse_args(_as_flags(where, given, actions))
    about = {f.name: f.metadata for f in fields(like)}
    return {key: _value(getattr(found, key), about[key]) for key in given}


def read_flag(command: str, argv: Sequence[str], name: str, default: str) -> str:
    """One flag's value before the others are known: which method's flags there are hangs on it."""
    parser = _Parser(prog=f"rankwise {command}", add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}")
    parser.add_argument("--config")
    found, _ = parser.parse_known_args(list(argv))
    value = getattr(found, name)
    if value is None and found.config is not None:
        value = _read_config(found.config).get(name)
    return default if value is None else str(value)


def _value(value: Any, about: Mapping[str, Any]) -> Any:
    """As the dataclass holds it; `~` of a path is the home folder, here and nowhere else."""
    if isinstance(value, str) and about.get("path"):
        return os.path.expanduser(value)
    return tuple(value) if isinstance(value, list) else value


def _add(parser: ArgumentParser, group: Group) -> None:
    there = parser.add_argument_group(group.title)
    hints = typing.get_type_hints(type(group.like))
    for f in fields(group.like):
        default = getattr(group.like, f.name)
        text = SUPPRESS if f.name in group.hidden else f.metadata.get("help", "")
        options: dict[str, Any] = {"help": text, "default": default}
        inner = _inner(hints[f.name])
        if inner is bool:
            options |= {"nargs": "?", "const": True, "type": _boolean}
        elif inner is dict:
            options["type"] = _json_object
        elif typing.get_origin(inner) is Literal:
            options |= {"choices": typing.get_args(inner), "type": str}
        elif typing.get_origin(inner) is tuple:
            options |= {"nargs": "+", "type": _reader(typing.get_args(inner)[0])}
        else:
            options["type"] = _reader(inner)
        names = [f"--{f.name}", *ALSO.get(f.name, ())]
        there.add_argument(*names, dest=f.name, **options)


def _inner(kind: Any) -> Any:
    """The type that one value has: of `X | None` X, of several the one that takes most values."""
    if not isinstance(kind, types.UnionType) and typing.get_origin(kind) is not typing.Union:
        return kind
    several = [k for k in typing.get_args(kind) if k is not type(None)]
    tuples = [k for k in several if typing.get_origin(k) is tuple]
    return (tuples or several)[0]


def _boolean(text: str) -> bool:
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in known:
        raise ArgumentTypeError(f"{text!r} is neither true nor false")
    return known[text.lower()]


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = parse_json(text)
    except Unreadable as error:
        raise ArgumentTypeError(f"{text[:200]!r} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ArgumentTypeError(f"{text[:200]!r} is not a JSON object")
    return value


def _finite(text: str) -> float:
    try:
        number = float(text)
    except ValueError as error:
        raise ArgumentTypeError(f"{text[:200]!r} is no number") from error
    if not math.isfinite(number):
        raise ArgumentTypeError(f"{text} is no finite number")
    return number


def _whole(text: str) -> int:
    try:
        number = int(text)
    except ValueError as error:
        raise ArgumentTypeError(f"{text[:200]!r} is no integer") from error
    if abs(number) >= 2**63:
        raise ArgumentTypeError(f"{text[:30]} is out of range")
    return number


def _plain(text: str) -> str:
    """A text that every file, record and system call can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ArgumentTypeError(f"{text!r} is no UTF-8 text; rename what it names") from error
    if "\0" in text:
        raise ArgumentTypeError(f"{text!r} has a NUL character in it")
    return text


def _reader(kind: Any) -> Any:
    readers: dict[Any, Any] = {float: _finite, int: _whole, str: _plain}
    return readers.get(kind, kind)


def _read_config(path: str) -> dict[str, Any]:
    config = read_yaml(os.path.expanduser(path), _ConfigError)
    if config is not None and not isinstance(config, dict):
        raise RankwiseError(
            f"--config {path} holds a {type(config).__name__}; it has to map flags to values"
        )
    return config or {}


class _ConfigError(RankwiseError):
    """Says that it was the file of `--config`."""

    def __init__(self, message: str):
        super().__init__(message.replace("cannot read ", "cannot read --config ", 1))


def _config_flags(path: str, actions: dict[str, Action], elsewhere: Mapping[str, str]) -> list[str]:
    """A YAML file as flags, so that its values are read and checked as those of flags are."""
    config = _read_config(path)
    for key in config:
        if key in elsewhere and key not in actions:
            continue  # for another command or method that shares the file
        if key in ("help", "config") or key not in actions:
            hint = _hint(f"--{key}", [*actions], elsewhere)
            raise RankwiseError(
                f"--config {path} has {str(key)!r}, which is no flag{hint}; see --help"
            )
    known = {key: value for key, value in config.items() if key in actions}
    return _as_flags(f"--config {path}", known, actions)


def _as_flags(where: str, values: Mapping[str, Any], actions: Mapping[str, Action]) -> list[str]:
    flags = []
    for key, value in values.items():
        if key in TYPED and value not in (None, False):
            raise RankwiseError(
                f"{where} has {key}, which no file may switch on; give --{key} on the command line"
            )
        several = actions[key].nargs == "+"
        if isinstance(value, list) and not several:
            raise RankwiseError(f"{where}: {key} is {value}; it takes one value")
        for one in value if isinstance(value, list) else [value]:
            _check_text(where, key, one, actions[key], isinstance(value, list))
        if several and value not in (None, []):
            flags += [f"--{key}", *map(_text, value if isinstance(value, list) else [value])]
        elif not several and value is not None:
            flags.append(f"--{key}={_text(value)}")
    return flags


def _check_text(where: str, key: str, one: Any, action: Action, listed: bool) -> None:
    """Raises RankwiseError where a flag that takes a text is given what is none: YAML reads an
    unquoted yes, no, on or off as true or false."""
    if action.type is not _plain and not action.choices:
        return
    if isinstance(one, bool):
        raise RankwiseError(
            f"{where}: {key} is {_text(one)}; it takes a text, so put what is meant in quotes"
        )
    if isinstance(one, dict | list) or (one is None and listed):
        raise RankwiseError(f"{where}: {key} is or has {one!r}; it takes a text")


def _text(value: Any) -> str:
    import json

    return json.dumps(value) if isinstance(value, bool | dict) else str(value)
