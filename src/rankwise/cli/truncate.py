"""`rankwise truncate`: an adapter of smaller rank out of one that is trained."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from rankwise.adapter import Adapter
from rankwise.cli.arguments import AdapterArguments, CutArguments, OutputArguments, parse, required
from rankwise.cli.stages import adapter_folder, console
from rankwise.elastic import uniform_within
from rankwise.errors import AdapterError, OutputError
from rankwise.files import replace_folder
from rankwise.plan import RankPlan
from rankwise.report import print_cuts

TYPES = (AdapterArguments, CutArguments, OutputArguments)


def main(argv: Sequence[str]) -> None:
    """Cut an adapter to a smaller rank: without data, base model or GPU.

    One that DyLoRA trained keeps its first pieces, as trained. Any other PEFT LoRA adapter is
    truncated by the exact SVD of its own updates.
    """
    which, cut, output = parse("truncate", main.__doc__ or "", TYPES, argv)
    # of a run the nested one, before the one that was picked out of it
    source = adapter_folder(required(which.adapter, "adapter", "truncate"), "nested", "adapter")
    target = Path(required(output.output_dir, "output_dir", "truncate"))
    ways = [name for name in ("r", "energy", "budget", "plan") if getattr(cut, name) is not None]
    if len(ways) != 1:
        raise AdapterError(
            "give one of --r, --energy, --budget and --plan; got "
            + (" and ".join(f"--{way}" for way in ways) or "none")
        )
    _check_target(target, source, output)
    adapter = Adapter.load(source)
    smaller = _cut(adapter, cut)
    work = target.with_name(f".{target.name}.new")
    shutil.rmtree(work, ignore_errors=True)
    smaller.save(work)
    if (source / "task.json").is_file():
        shutil.copy(source / "task.json", work / "task.json")
    replace_folder(work, target)
    print_cuts(smaller.cuts)
    console.print(
        f"{adapter.parameters:,} -> {smaller.parameters:,} stored LoRA parameters, a stock PEFT "
        f"adapter in {target}"
    )


def _check_target(target: Path, source: Path, output: OutputArguments) -> None:
    if output.resume_from_checkpoint:
        raise OutputError("truncate takes seconds; there is nothing to resume")
    if target.resolve() == source.resolve() or target.resolve() in source.resolve().parents:
        raise OutputError(f"--output_dir {target} holds the adapter itself; give another")
    filled = target.is_file() or (target.is_dir() and any(target.iterdir()))
    if filled and not output.overwrite_output_dir:
        raise OutputError(
            f"{target} is not empty; give another --output_dir, or --overwrite_output_dir"
        )
    of_a_run = (target.parent / "metrics.json").is_file()
    if filled and (of_a_run or not (target / "truncation.json").is_file()):
        raise OutputError(f"{target} was not written by rankwise truncate; give another")


def _cut(adapter: Adapter, cut: CutArguments) -> Adapter:
    if adapter.plan is None or cut.svd:
        if cut.plan is not None:
            raise AdapterError(
                "--plan cuts a nested adapter; this one takes --r, --energy, --budget"
            )
        return adapter.truncate_svd(cut.r, energy=cut.energy, budget=cut.budget)
    if cut.energy is not None:
        raise AdapterError(
            "--energy needs singular values, and a nested adapter is cut as it was trained; give "
            "--r or --budget, or --svd to cut it by SVD all the same"
        )
    if cut.budget is not None:
        return adapter.truncate(uniform_within(adapter.plan, cut.budget, adapter.trained_ranks))
    if cut.plan is not None:
        return adapter.truncate(RankPlan.load(cut.plan))
    return adapter.truncate(cut.r or 0)
