"""A command under torchrun or accelerate: which processes take part in it, and that one speaks."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout

from rankwise.cli.arguments import OutputArguments
from rankwise.launched import is_first, own_folder, processes

TRAINING = ("run", "search", "train", "evaluate")


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
        yield command in TRAINING


def own_output(output: OutputArguments) -> None:
    """Gives processes other than the first a folder of their own to write to."""
    if output.output_dir is not None:
        output.output_dir = str(own_folder(output.output_dir, output.resume_from_checkpoint))


def check_launcher(what: str, able: bool = False) -> None:
    """Raises RankwiseError, before anything is loaded, where the launcher shards parameters.

    Args:
        what, able: see `rankwise.sharded.refuse_sharded`.
    """
    if processes() > 1:
        from rankwise.sharded import refuse_sharded

        refuse_sharded(what, able=able)
