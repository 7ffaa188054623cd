"""A report on disk: report.md with its PNGs, and report.html, which needs no other file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rankwise.errors import RankwiseError
from rankwise.files import write_text
from rankwise.report import figures
from rankwise.report.sections import HeatMap, Section, Table, sections, title_of
from rankwise.report.suite import Suite


def write_report(suite: Suite, folder: Path, command: str) -> list[Path]:
    """Writes report.md, its pictures and report.html.

    Args:
        suite: what was read.
        folder: made where it is missing.
        command: that makes the report, for the record.

    Returns:
        The files.

    Raises:
        RankwiseError: a package that this needs is not installed.
    """
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise RankwiseError(
            "a report needs jinja2, which is not installed; run: pip install 'rankwise[report]'"
        ) from error
    parts = sections(suite, command)
    drawn = [part.figure for part in parts if part.figure]
    for name in drawn:
        figures.save_png(name, suite, folder / f"{name}.png")
    title = title_of(suite)
    write_text(folder / "report.md", markdown(title, parts))
    pictures = {name: figures.as_svg(name, suite) for name in drawn}
    write_text(folder / "report.html", page(title, parts, pictures))
    names = ["report.md", "report.html", *(f"{name}.png" for name in drawn)]
    return [folder / name for name in names]


def page(title: str, parts: Sequence[Section], pictures: dict[str, str]) -> str:
    """The HTML page.

    Args:
        title: plain text, like all text of the sections: it is escaped here.
        parts: of the report.
        pictures: SVG elements by name, escaped already.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("rankwise.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    safe = {name: Markup(svg) for name, svg in pictures.items()}
    return environment.get_template("page.html").render(title=title, parts=parts, pictures=safe)


def markdown(title: str, parts: Sequence[Section]) -> str:
    """The same as Markdown, its pictures as files beside it."""
    lines = [f"# {_plain(title)}", ""]
    for part in parts:
        lines += [f"## {part.title}", "", part.text, ""]
        if part.figure:
            lines += [f"![{part.title}]({part.figure}.png)", ""]
        for caption, table in part.tables:
            lines += [*([f"{caption}:", ""] if caption else []), *_table(table), ""]
        for heat in part.maps:
            lines += [f"{_plain(heat.title)}:", "", *_table(_heat(heat)), ""]
        lines += [line for note in part.notes for line in (_plain(note), "")]
        lines += [f"*{_plain(part.source)}*", ""]
    return "\n".join(lines)


def _heat(heat: HeatMap) -> Table:
    rows: list[list[tuple[str, Any]]] = [
        [(name, name), *(("" if r is None else f"{r:.1f}", r) for r in row)]
        for name, row in zip(heat.matrices, heat.ranks, strict=True)
    ]
    return Table(["layer", *heat.layers], rows)


def _table(table: Table) -> list[str]:
    head = [_plain(name) for name in table.head]
    rows = [[_plain(text) for text, _ in row] for row in table.rows]
    bars = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(row)} |" for row in (head, bars, *rows)]


def _plain(text: str) -> str:
    """Text that Markdown and the HTML in it leave as it is, in one line."""
    text = " ".join(text.split()).replace("\\", "\\\\")
    for sign in "`*_[]|~":
        text = text.replace(sign, "\\" + sign)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
