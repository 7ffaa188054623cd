"""`rankwise train`: a stock adapter at a plan's ranks, or at one rank everywhere."""

from collections.abc import Sequence

from rankwise.cli import run as run_command
from rankwise.cli.arguments import ControlArguments
from rankwise.cli.job import parse_job


def main(argv: Sequence[str]) -> None:
    """Train a stock PEFT adapter at a plan's ranks (--plan) or at one rank everywhere (--r)."""
    parts = parse_job("train", main.__doc__ or "", argv, method="lora")
    method, model, data, fit, output = parts
    run_command.run("train", method, model, data, fit, output, ControlArguments(()))
