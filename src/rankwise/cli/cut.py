"""`rankwise cut`: an adapter of smaller rank out of one that is trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rankwise.beside import TASK
from rankwise.cli.arguments import (
    AdapterArguments,
    CutArguments,
    OutputArguments,
    flags_elsewhere,
    required,
)
from rankwise.cli.flags import Group, parse
from rankwise.errors import AdapterError, OutputError
from rankwise.files import foreign, marker, write_json
from rankwise.reading import read_json

if TYPE_CHECKING:
    from rankwise.adapter import Adapter


def main(argv: Sequence[str]) -> None:
    """Cut an adapter to a smaller rank: without data, base model or GPU.

    One that a run ordered is cut by its order; a nested one keeps its first pieces, as trained. Any
    other PEFT LoRA adapter is cut by the exact SVD of its own updates.
    """
    which, cut, output = parse(
        "cut",
        main.__doc__ or "",
        [
            Group("adapter", AdapterArguments()),
            Group("size", CutArguments()),
            Group("output", OutputArguments(), frozenset(["resume_from_checkpoint"])),
        ],
        argv,
        flags_elsewhere(),
    )
    from rankwise.adapter import ORDER, OTHER_SIZES, Adapter, adapter_folder
    from rankwise.files import new_folder

    # of a run the one with all pieces, before the one that was picked out of it
    given = required(which.adapter, "adapter", "cut")
    source = adapter_folder(given, *OTHER_SIZES, "adapter")
    target = Path(required(output.output_dir, "output_dir", "cut"))
    ways = [
        name
        for name in ("rank", "energy", "budget", "keep", "plan")
        if getattr(cut, name) is not None
    ]
    if len(ways) != 1:
        raise AdapterError(
            "give one of --rank, --energy, --budget, --keep and --plan; got "
            + (" and ".join(f"--{way}" for way in ways) or "none")
        )
    _check_target(target, source, output)
    adapter = Adapter.load(source)
    by_order = (source / ORDER).is_file() and not cut.svd and cut.energy is None
    smaller = _by_order(source, cut) if by_order else _cut(adapter, cut)
    with new_folder(target, marked=True) as work:
        smaller.write(work)
        if (source / TASK).is_file():
            write_json(work / TASK, read_json(source / TASK, AdapterError))
    from rankwise.cli.show import say
    from rankwise.report.table import print_cuts

    print_cuts(smaller.cuts)
    if source != Path(given) and (source / "truncation.json").is_file():
        say(
            f"note: {given} has no {' or '.join(f'{name}/' for name in OTHER_SIZES)} any more, so "
            f"this is a cut of {source}, which was cut before"
        )
    say(
        f"{adapter.parameters:,} -> {smaller.parameters:,} stored LoRA parameters, a stock PEFT "
        f"adapter in {target}"
    )


def _check_target(target: Path, source: Path, output: OutputArguments) -> None:
    if output.resume_from_checkpoint:
        raise OutputError("cut takes seconds; there is nothing to resume")
    if target.resolve() == source.resolve() or target.resolve() in source.resolve().parents:
        raise OutputError(f"--output_dir {target} holds the adapter itself; give another")
    if not target.name:
        raise OutputError(f"--output_dir {target} has no name of its own; give a new folder")
    if target.is_symlink() and not target.exists():
        raise OutputError(f"{target} is a link to nothing; remove it, or give another folder")
    filled = target.is_file() or (target.is_dir() and any(target.iterdir()))
    if filled and not output.overwrite_output_dir:
        raise OutputError(
            f"{target} is not empty; give another --output_dir, or --overwrite_output_dir"
        )
    if filled and (not marker(target) or not (target / "truncation.json").is_file()):
        raise OutputError(f"{target} was not written by rankwise cut; give another")
    if filled and (other := foreign(target)) is not None:
        raise OutputError(
            f"{target} holds {other}, which rankwise did not write; move it away, or give another"
        )


def _by_order(source: Path, cut: CutArguments) -> "Adapter":
    from rankwise.orders import Ordered

    if cut.plan is not None:
        raise AdapterError(
            "--plan cuts a nested adapter; this one was ordered and takes --budget, --keep or "
            "--rank, or --energy or --svd to be cut by singular values instead"
        )
    return Ordered.load(source).cut(cut.budget, keep=cut.keep, rank=cut.rank)


def _cut(adapter: "Adapter", cut: CutArguments) -> "Adapter":
    from rankwise.choose import uniform_within
    from rankwise.plan import RankPlan

    if cut.keep is not None:
        cut.budget = int(cut.keep * adapter.parameters)
    if adapter.plan is None or cut.svd:
        if cut.plan is not None:
            raise AdapterError(
                "--plan cuts a nested adapter; this one takes --rank, --energy, --budget"
            )
        return adapter.truncate_svd(cut.rank, energy=cut.energy, budget=cut.budget)
    if cut.energy is not None:
        raise AdapterError(
            "--energy needs singular values, and a nested adapter is cut as it was trained; give "
            "--rank or --budget, or --svd to cut it by SVD all the same"
        )
    if cut.budget is not None:
        return adapter.truncate(uniform_within(adapter.plan, cut.budget, adapter.trained_ranks))
    if cut.plan is not None:
        return adapter.truncate(RankPlan.load(cut.plan))
    return adapter.truncate(cut.rank or 0)
