"""A recipe as a Snakemake workflow: for clusters, with that engine's executors and retries."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from rankwise.compare.cells import Cell
from rankwise.files import write_text

TEXT = """# Written by rankwise compare --snakefile; run it in this folder:
#     snakemake --cores all --keep-going --retries 1 --rerun-triggers mtime
# with an executor plugin for a cluster, and --default-resources for its memory, time and GPUs.
# A cell whose failure would only be repeated leaves a file that says so, and stops nothing.

NEEDS = {needs}


rule all:
    input:
        expand("cells/{{name}}.json", name=NEEDS),


rule cell:
    output:
        "cells/{{name}}.json",
    input:
        # ancient: what is there stays, whatever wrote it and when
        lambda wildcards: [ancient(f"cells/{{name}}.json") for name in NEEDS[wildcards.name]],
    threads: {threads}
    shell:
        {command}
"""


def write_snakefile(
    path: Path, cells: Sequence[Cell], command: Sequence[str], threads: int
) -> None:
    """Writes a workflow whose rules run one cell each.

    Args:
        path: of the Snakefile, in the folder that has `cells/`.
        cells: all of them.
        command: of a cell, up to its name.
        threads: of a cell.
    """
    needs = json.dumps({cell.name: cell.needs for cell in cells}, indent=4)
    # the braces that a path may have are doubled: Snakemake formats the line
    line = shlex.join(command).replace("{", "{{").replace("}", "}}")
    line = f"OMP_NUM_THREADS={{threads}} {line} {{wildcards.name}}"
    write_text(path, TEXT.format(needs=needs, threads=threads, command=json.dumps(line)))
