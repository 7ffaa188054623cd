"""Several processes under torchrun or accelerate: all of them work, the first writes.

Each process does the same things in the same order, so that the collectives of a Trainer meet. What
the others would write goes to a folder of their own that nobody keeps.
"""

import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from rankwise.workspace import beside

_own: list[TemporaryDirectory[str]] = []  # removed when the process ends


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return processes() == 1 or int(os.environ.get("RANK", "0")) == 0


def processes() -> int:
    """How many the launcher has started; a WORLD_SIZE that is no number counts for nothing."""
    given = os.environ.get("WORLD_SIZE", "").strip()
    return int(given) if given.isdecimal() else 1


def own_folder(output_dir: str | Path, resume: bool) -> str | Path:
    """Where this process writes what the first one writes to `output_dir`; the first's own.

    Where a run is gone on with, it starts as a copy of the first one's, which nobody changes before
    all processes have met, in the first collective.
    """
    if is_first():
        return output_dir
    _own.append(TemporaryDirectory())
    first, own = Path(output_dir).expanduser(), Path(_own[-1].name) / "run"
    if resume:
        for there, here in ((first, own), (beside(first), beside(own))):
            if there.is_dir():
                shutil.copytree(there, here)
    return own
