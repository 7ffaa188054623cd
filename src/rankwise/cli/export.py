"""`rankwise export`: an adapter in the form that a serving engine takes."""

from collections.abc import Sequence
from dataclasses import dataclass

from rankwise.cli.arguments import AdapterArguments, flag, required
from rankwise.cli.flags import Group, parse


@dataclass
class ExportArguments:
    """To which engine, and where to."""

    to: str | None = flag(
        None,
        "vllm, sglang, tgi, lorax, tensorrt-llm, llama.cpp, ollama, mlx, peft, or merged",
    )
    output_dir: str | None = flag(None, "a new folder")
    rank: int | None = flag(None, "pad to at least this rank; without it, to the adapter's largest")
    max_shard_size: str = flag("2GB", "of merged weights, a file")


@dataclass
class BaseArguments:
    """The base model, where it is not what the adapter's config says."""

    model_name_or_path: str | None = flag(None, "hub id or folder of the base model")
    gguf_file: str | None = flag(None, "name of a GGUF file in it")
    dtype: str | None = flag(None, "of merged weights; without it, that of the base's files")


def main(argv: Sequence[str]) -> None:
    """Write an adapter as a serving engine takes it: one rank, the scales folded in, no patterns.

    Not every engine honours ranks and scales by layer, and some compute a wrong function without a
    word; docs/serving.md has the table.
    """
    which, to, base = parse(
        "export",
        main.__doc__ or "",
        [
            Group("adapter", AdapterArguments()),
            Group("engine", ExportArguments()),
            Group("base model", BaseArguments()),
        ],
        argv,
    )
    adapter = required(which.adapter, "adapter", "export")
    engine = required(to.to, "to", "export")
    target = required(to.output_dir, "output_dir", "export")
    from rankwise.cli import quiet
    from rankwise.serving.export import export

    quiet()
    done = export(
        adapter,
        engine,
        target,
        rank=to.rank,
        model_name_or_path=base.model_name_or_path,
        gguf_file=base.gguf_file,
        dtype=base.dtype,
        max_shard_size=to.max_shard_size,
    )
    from rankwise.cli.show import say

    rank = "" if done.rank is None else f", rank {done.rank}"
    say(
        f"{done.bytes_before:,} -> {done.bytes_after:,} bytes{rank}, for {done.engine} in "
        f"{done.folder}"
    )
    if done.note:
        say(f"  note: {done.note}")
    if done.start:
        say(f"  start it with: {done.start}")
    say(f"  prove it: rankwise verify {done.folder} --against {adapter}")
