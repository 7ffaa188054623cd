"""The command `rankwise`: one file a subcommand."""

import os
import sys

TYPE_CHECKING = False  # typing itself is not imported: `rankwise --help` pays for each import
if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS = {
    "run": "a method on your rows, with controls, evaluated and reported",
    "search": "only choose ranks from your data; writes plan.json",
    "train": "a stock PEFT adapter at a plan's ranks, or at one rank",
    "cut": "a smaller adapter out of a trained one, without data",
    "evaluate": "the metrics of an adapter on labelled rows",
    "score": "official figures of a file of generated texts: E2E, WebNLG, DART",
    "demo": "`run` on a small model and rows that packages ship, in five minutes",
}


def main(argv: "Sequence[str] | None" = None) -> None:
    """Entry point. Exits with 2 for wrong input, 1 for a diverged run, 130 when interrupted."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return
    if argv[0] == "--version":
        from importlib.metadata import version

        print(f"rankwise {version('rankwise')}")
        return
    if argv[0] not in COMMANDS:
        _fail(f"no command {argv[0]!r}; there are {', '.join(COMMANDS)}", 2)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _fail("the command line runs in one process; under a launcher call rankwise.search", 2)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from importlib import import_module

    from rankwise.errors import DivergedError, RankwiseError

    try:
        import_module(f"rankwise.cli.{argv[0]}").main(argv[1:])
    except RankwiseError as error:
        _fail(_as_flags(" ".join(str(error).split())), 2)
    except DivergedError as error:
        print(file=sys.stderr)  # the progress bar has not ended its line
        _fail(str(error), 1)
    except KeyboardInterrupt:
        again = argv[0] not in ("evaluate", "cut", "score")
        how = "; the same command with --resume_from_checkpoint goes on" if again else ""
        print(file=sys.stderr)
        _fail(f"stopped{how}", 130)


def _usage() -> str:
    lines = [f"  {name:<10}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: rankwise COMMAND [--flags]",
            "",
            "How small a LoRA adapter can be, from your own data.",
            "",
            *lines,
            "",
            "rankwise COMMAND --help lists its flags. A first run on your own rows:",
            "  rankwise run --model_name_or_path roberta-base --train_file rows.csv \\",
            "    --text_column text --label_column label --output_dir runs/first",
        ]
    )


def quiet() -> None:
    """transformers' load reports and notices would bury the few lines that matter here."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()  # of loading weights; training keeps its own
    from datasets import disable_progress_bars

    disable_progress_bars()
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning)


def _fail(message: str, code: int) -> None:
    print(f"rankwise: {message}", file=sys.stderr)
    raise SystemExit(code)


def _as_flags(message: str) -> str:
    """`text_column=` of a message about Python's arguments as the flag `--text_column`."""
    import re

    return re.sub(
        r"\b(kind|[a-z]+(?:_[a-z]+)+)=(?=(\w|'))?",
        lambda m: f"--{m[1]}" + " " * bool(m[2]),
        message,
    )
