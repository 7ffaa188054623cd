"""`rankwise report`: what a comparison found, from its result files alone."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from rankwise.cli.arguments import flag
from rankwise.cli.flags import Group, parse
from rankwise.errors import RankwiseError
from rankwise.escape import terminal


@dataclass
class ReportArguments:
    """The report."""

    results: tuple[str, ...] = flag(
        (), "folders of `compare`, or result files; may stand without --results"
    )
    output_dir: str | None = flag(None, "without it, report/ in the first folder")


def main(argv: Sequence[str]) -> None:
    """Write report.html, report.md and pictures from the result files of `compare`."""
    paths = list(takewhile(lambda word: not word.startswith("-"), argv))
    argv = argv[len(paths) :]
    (given,) = parse("report", main.__doc__ or "", [Group("report", ReportArguments(tuple(paths)))],
                     argv)  # fmt: skip
    if not given.results:
        raise RankwiseError("rankwise report needs a folder of results; see rankwise report --help")
    from rankwise.files import check_folder
    from rankwise.report.sections import said_of
    from rankwise.report.suite import load
    from rankwise.report.write import write_report

    suite = load(given.results)
    first = Path(given.results[0])
    folder = Path(given.output_dir or (first if first.is_dir() else first.parent) / "report")
    check_folder(folder, "--output_dir")
    for problem in suite.problems:
        print(f"rankwise: {terminal(problem)}", file=sys.stderr)
    for path in write_report(suite, folder, said_of(given.results)):
        print(path)
