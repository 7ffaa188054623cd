"""Several processes under torchrun or accelerate: all of them work, the first writes.

Each process does the same things in the same order, so that the collectives of a Trainer meet. What
the others would write goes to a folder of their own that nobody keeps.
"""

import os
import shutil
from multiprocessing.util import Finalize
from pathlib import Path
from tempfile import mkdtemp

from rankwise.workspace import beside


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return processes() == 1 or int(os.environ.get("RANK", "0")) == 0


def processes() -> int:
    """How many the launcher has started; a WORLD_SIZE that is no number counts for nothing."""
    given = os.environ.get("WORLD_SIZE", "").strip()
    return int(given) if given.isdecimal() else 1


def own_folder(output_dir: str | Path, resume: bool) -> str | Path:
    """Where this process writes what the first one writes to `output_dir`; the first's own.

    Where a run is gone on with, it starts as a copy of the first one's. Once torch's process group
    is there, all processes wait here until that is done, before the first changes anything.
    """
    meet()
    found = output_dir if is_first() else _copy(Path(output_dir).expanduser(), resume)
    meet()
    return found


def meet() -> bool:
    """Waits until all processes are here; False where torch's process group is not there yet."""
    if processes() == 1:
        return False
    from torch import distributed

    there = bool(distributed.is_available() and distributed.is_initialized())
    if there:
        distributed.barrier()
    return there


def _copy(first: Path, resume: bool) -> Path:
    """A folder of this process alone, which goes when the process ends."""
    scratch = mkdtemp()
    # not TemporaryDirectory: a forked process would remove its parent's, and leave its own
    Finalize(None, shutil.rmtree, (scratch,), {"ignore_errors": True}, exitpriority=0)
    own = Path(scratch) / "run"
    if resume:
        for there, here in ((first, own), (beside(first), beside(own))):
            if there.is_dir():
                shutil.copytree(there, here)
    return own
