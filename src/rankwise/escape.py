"""Text of others made harmless where it is shown: one function for each kind of output."""

import html as _html
import re
from typing import Any

# Control characters but the newline and the tab, and marks that turn the direction of a line: in a
# terminal they move the cursor, set its title, or show another text than there is.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_MARKDOWN = re.compile(r"([\\`*\[\]<>|#~])|(?<!\w)_|_(?!\w)")


def terminal(text: Any) -> str:
    r"""For a terminal: control characters as `\x1b`, halves of surrogate pairs as `\udc80`.

    Example:
        >>> terminal("\x1b[2J")
        '\\x1b[2J'
    """
    shown = str(text).encode("utf-8", "backslashreplace").decode("utf-8")
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], shown)


def markup(text: Any) -> str:
    """For rich, which reads `[bold]` as markup: the text as it is, for a terminal."""
    from rich.markup import escape

    return escape(terminal(text))


def markdown(text: Any) -> str:
    """For one line of Markdown, a table's cell or a heading: no markup, tag or new line of its own.

    Example:
        >>> markdown("a|b <img>")
        'a\\\\|b \\\\<img\\\\>'
    """
    line = " ".join(terminal(text).split())
    return _MARKDOWN.sub(lambda found: "\\" + found[0], line)


def html(text: Any) -> str:
    """For the text or an attribute of HTML."""
    return _html.escape(terminal(text), quote=True)


def yaml(text: Any) -> str:
    """For a value of YAML, quoted where it would be read as something else.

    Example:
        >>> yaml("bert-base"), yaml("yes\\nlicense: mit")
        ('bert-base', '"yes\\\\nlicense: mit"')
    """
    import json

    plain = str(text)
    if re.fullmatch(r"[A-Za-z][\w.-]*(/[\w.-]+)*", plain, re.ASCII) and not re.fullmatch(
        r"(?i)y|yes|n|no|on|off|true|false|null", plain
    ):
        return plain
    quoted = json.dumps(plain, ensure_ascii=False)
    return re.sub(
        r"[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff\ud800-\udfff]",
        lambda found: f"\\u{ord(found[0]):04x}",
        quoted,
    )
