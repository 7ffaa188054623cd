"""`rankwise verify`: whether an export computes what its adapter does."""

from collections.abc import Sequence
from dataclasses import dataclass

from rankwise.cli.arguments import flag, required
from rankwise.cli.export import BaseArguments
from rankwise.cli.flags import Group, parse
from rankwise.errors import ExportError


@dataclass
class VerifyArguments:
    """What is compared with what."""

    folder: str | None = flag(None, "what rankwise export wrote, or any adapter; may stand alone")
    against: str | None = flag(None, "the adapter that it was made of; without it, itself")
    to: str | None = flag(None, "whose rules count; without it, what the export says")


def main(argv: Sequence[str]) -> None:
    """Compare an export with its adapter: by the engine's rules, in PEFT, and in llama.cpp.

    Exits with 2 where one of them differs by more than its tolerance. What is not here (the base
    model, llama-cpp-python) is skipped, and says so.
    """
    argv = list(argv)
    if argv and not argv[0].startswith("-"):  # rankwise verify FOLDER --against ADAPTER
        argv.insert(0, "--folder")
    what, base = parse(
        "verify",
        main.__doc__ or "",
        [Group("comparison", VerifyArguments()), Group("base model", BaseArguments())],
        argv,
    )
    folder = required(what.folder, "folder", "verify")
    from rankwise.cli import quiet
    from rankwise.serving.verify import verify

    quiet()
    checks = verify(
        folder,
        what.against or folder,
        to=what.to,
        model_name_or_path=base.model_name_or_path,
        gguf_file=base.gguf_file,
    )
    for check in checks:
        word = {True: "same", False: "DIFFERS", None: "skipped"}[check.passed]
        figures = (
            "" if check.found is None else f" {check.found:.2e} (at most {check.tolerance:.2e})"
        )
        print(f"{check.what}: {word}{figures}; {check.says}")
    if wrong := [check.what for check in checks if check.passed is False]:
        raise ExportError(f"{folder} computes another function than the adapter: {wrong[0]} differ")
