"""Several processes under torchrun or accelerate: all of them work, the first writes and speaks.

Each process does the same things in the same order, so that the collectives of a Trainer meet. What
the others would write goes to a folder of their own that nobody keeps.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

from rankwise.cli.arguments import OutputArguments
from rankwise.workspace import beside

TRAINING = ("run", "search", "train", "evaluate")
_scratch: list[str] = []


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return processes() == 1 or int(os.environ.get("RANK", "0")) == 0


def processes() -> int:
    """How many the launcher has started; a WORLD_SIZE that is no number counts for nothing."""
    given = os.environ.get("WORLD_SIZE", "").strip()
    return int(given) if given.isdecimal() else 1


@contextmanager
def only_the_first_speaks(command: str) -> Iterator[bool]:
    """Silences all processes but the first. Yields whether this one has anything to do.

    A command that trains nothing is the first one's alone.
    """
    if is_first():
        yield True
        return
    with ExitStack() as stack:
        nothing = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(redirect_stdout(nothing))
        stack.enter_context(redirect_stderr(nothing))
        _scratch[:] = [stack.enter_context(TemporaryDirectory())]
        yield command in TRAINING


def own_output(output: OutputArguments) -> None:
    """Gives processes other than the first a folder of their own to write to.

    Where a run is gone on with, it starts as a copy of the first one's, which nobody changes before
    all processes have met, in the first collective.
    """
    if not _scratch or output.output_dir is None:
        return
    first, own = Path(output.output_dir).expanduser(), Path(_scratch[0]) / "run"
    if output.resume_from_checkpoint:
        for there, here in ((first, own), (beside(first), beside(own))):
            if there.is_dir():
                shutil.copytree(there, here)
    output.output_dir = str(own)


def check_launcher(what: str, able: bool = False) -> None:
    """Raises RankwiseError, before anything is loaded, where the launcher shards parameters.

    Args:
        what, able: see `rankwise.sharded.refuse_sharded`.
    """
    if processes() > 1:
        from rankwise.sharded import refuse_sharded

        refuse_sharded(what, able=able)
