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
    "predict": "what a finished run's model says of your rows",
    "export": "an adapter as vLLM, llama.cpp, Ollama and others take it",
    "verify": "whether an export computes what its adapter does",
    "evaluate": "the metrics of an adapter on labelled rows",
    "compare": "methods over tasks and seeds, from a recipe",
    "report": "what a comparison found, from its result files",
    "score": "official figures of a file of generated texts: E2E, WebNLG, DART",
    "demo": "`run` on a small model and rows that packages ship, in five minutes",
}


def main(argv: "Sequence[str] | None" = None) -> None:
    """Entry point.

    Exits with 2 for wrong input, 1 for a run that diverged or that something broke, and with 128
    and the signal's number where one stopped it (130 for Ctrl-C). With `--debug` among the flags,
    what broke is shown with its traceback.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    debug = "--debug" in argv
    argv = [word for word in argv if word != "--debug"]
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return
    if argv[0] == "--version":
        from importlib.metadata import version

        print(f"rankwise {version('rankwise')}")
        return
    # from here on: `--help` need not wait for what signals take to import
    from rankwise.cli.boundary import explain, fail, let_go, listen, restore

    if argv[0] not in COMMANDS:
        fail(f"no command {argv[0]!r}{_meant(argv[0])}; there are {', '.join(COMMANDS)}", 2)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    before = listen()
    try:
        from importlib import import_module

        from rankwise.cli.launched import only_the_first_speaks

        with only_the_first_speaks(argv[0]) as needed:
            if needed:
                import_module(f"rankwise.cli.{argv[0]}").main(argv[1:])
        sys.stdout.flush()
    except SystemExit:
        raise
    except BaseException as error:
        if debug:
            import traceback

            traceback.print_exception(error)
        explain(error, debug)
    finally:
        restore(before)
        let_go()


def _meant(name: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, COMMANDS, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


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
    import logging as plain

    plain.getLogger("bitsandbytes").setLevel(plain.ERROR)  # a kernel that is not used here
    from datasets import disable_progress_bars

    disable_progress_bars()
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning)
