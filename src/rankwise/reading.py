"""Reading what others wrote: JSON and YAML with finite numbers and bounded depth, or one line."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from rankwise.errors import RankwiseError
from rankwise.given import check_path

DEPTH = 100  # lists and objects within each other
DIGITS = 300  # of an integer: what a float can hold
NODES = 1_000_000  # values of a YAML file, aliases counted as often as they are used

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')


class Unreadable(ValueError):
    """Text that is no JSON or YAML of ours; says what is wrong with it, and in `line` where."""

    line: int | None = None


def parse_json(text: str, finite: bool = True) -> Any:
    """The value that a JSON text holds.

    Stricter than `json.loads`: no NaN or infinity (JSON has none, Python reads and writes them), no
    name twice in one object, no half of a surrogate pair, no deeper than `DEPTH`.

    Args:
        text: JSON.
        finite: False lets NaN and infinity through: in rows they stand for a value that is missing,
            and perhaps in a column that nobody asks for.

    Raises:
        Unreadable: what is wrong, with line and column where they are known.

    Example:
        >>> parse_json('{"rank": 1e999}')
        Traceback (most recent call last):
        rankwise.reading.Unreadable: 1e999 is no finite number
    """
    if text.count("[") + text.count("{") > DEPTH and _depth(text) > DEPTH:
        raise Unreadable(f"lists or objects more than {DEPTH} deep")
    try:
        value = json.loads(
            text,
            parse_constant=_no_constant if finite else float,
            parse_float=_finite if finite else float,
            parse_int=_integer,
            object_pairs_hook=_once,
        )
    except json.JSONDecodeError as error:
        found = Unreadable(f"not JSON: {error.msg} at line {error.lineno} column {error.colno}")
        found.line = error.lineno
        raise found from error
    if _SURROGATE.search(text):
        _check_texts(value)
    return value


def as_json(value: Any) -> Any:
    """A value as a JSON file would give it back: lists for tuples, texts for keys."""
    return json.loads(json.dumps(value))


def read_json(path: str | Path, error: type[RankwiseError] = RankwiseError) -> Any:
    """The value in a JSON file.

    Args:
        path: of the file.
        error: raised where the file is missing, no UTF-8, or holds no JSON of ours.
    """
    return _read(path, parse_json, error)


def read_yaml(path: str | Path, error: type[RankwiseError] = RankwiseError) -> Any:
    """The value in a YAML file, of the types that JSON has too; a date stays the text it is.

    Args:
        path: of the file.
        error: raised where the file is missing, no UTF-8, or holds more than JSON could.
    """
    return _read(path, parse_yaml, error)


def parse_yaml(text: str) -> Any:
    """The value that a YAML text holds. Raises Unreadable."""
    import yaml

    try:
        value = yaml.load(text, Loader=_loader())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, RecursionError):
            raise Unreadable(f"lists or maps more than {DEPTH} deep") from error
        raise Unreadable(f"not YAML: {' '.join(str(error).split())}") from error
    _check_plain(value)
    return value


def _read(path: str | Path, parse: Callable[[str], Any], kind: type[RankwiseError]) -> Any:
    check_path("the file", path, kind)
    path = Path(path)
    try:
        return parse(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise kind(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise kind(f"cannot read {path}: it is no UTF-8 text ({error.reason})") from error
    except ValueError as error:  # Unreadable, or a path with a NUL in it
        raise kind(f"cannot read {path}: {error}") from error


def _depth(text: str) -> int:
    """How deep a text nests, strings left out: counted before a parser that recurses sees it."""
    deepest = depth = 0
    for mark in re.findall(r"[\[\]{}]", _QUOTED.sub('""', text)):
        depth += 1 if mark in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _no_constant(text: str) -> NoReturn:
    raise Unreadable(f"{text} is no finite number, which JSON does not have")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise Unreadable(f"{text} is no finite number")
    return number


def _integer(text: str) -> int:
    if len(text) > DIGITS:
        raise Unreadable(f"an integer of {len(text):,} digits ({text[:12]}...)")
    return int(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; a name that is there twice, of which JSON would let the last one win, refused."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise Unreadable(f"{twice!r} is there twice; leave one")
    return found


def _check_texts(value: Any) -> None:
    """Raises Unreadable where a text holds half of a surrogate pair, which UTF-8 cannot write."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise Unreadable(f"the text {value[:40]!r} is no Unicode text") from error
    elif isinstance(value, dict):
        for name, inner in value.items():
            _check_texts(name)
            _check_texts(inner)
    elif isinstance(value, list):
        for inner in value:
            _check_texts(inner)


def _check_plain(value: Any) -> None:
    """Raises Unreadable where a YAML value holds what JSON does not, or holds itself."""
    left = [(value, 0)]
    count = 0
    while left:
        item, depth = left.pop()
        count += 1
        if depth > DEPTH or count > NODES:  # an anchor within itself ends here too
            raise Unreadable(f"lists or maps more than {DEPTH} deep, or too many values")
        if isinstance(item, dict):
            left += [(part, depth + 1) for pair in item.items() for part in pair]
        elif isinstance(item, list):
            left += [(part, depth + 1) for part in item]
        elif isinstance(item, float) and not math.isfinite(item):
            raise Unreadable(f"{item} is no finite number")
        elif isinstance(item, int) and not isinstance(item, bool) and abs(item) >= 10**DIGITS:
            raise Unreadable("an integer of too many digits")
        elif not isinstance(item, str | int | float | type(None)):
            raise Unreadable(f"a value of the type {type(item).__name__}; write it as a text")


def _loader() -> Any:
    """yaml.SafeLoader that leaves dates as texts, and refuses a key that is there twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    date = "tag:yaml.org,2002:timestamp"
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in pairs if tag != date]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key, count in Counter(keys).items() if count > 1 and key != "<<"]:
            raise Unreadable(f"{twice[0]!r} is there twice; leave one")
        loader.flatten_mapping(node)
        return loader.construct_mapping(node, deep=True)

    Loader.add_constructor("tag:yaml.org,2002:map", mapping)
    return Loader
