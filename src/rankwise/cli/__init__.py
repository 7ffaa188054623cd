"""The command `rankwise`: one file a subcommand, and one boundary that turns errors into a line."""

import os
import signal
import sys

TYPE_CHECKING = False  # typing itself is not imported: `rankwise --help` pays for each import
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, NoReturn

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
FULL = 2**24  # a disk with fewer free bytes is called full


_asked: list[int] = []  # the signals that asked this process to end


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
    if argv[0] not in COMMANDS:
        _fail(f"no command {argv[0]!r}{_meant(argv[0])}; there are {', '.join(COMMANDS)}", 2)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    before = _listen()
    _asked.clear()
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
        _explain(error, debug)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _let_go()


def _listen() -> "dict[int, Any]":
    """Lets the signals that ask a process to end raise an error, and returns their old handlers.

    Which signal it was is noted: what is being imported may turn the error into one of its own.
    """

    def stop(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends it at once
        _asked.append(number)
        raise KeyboardInterrupt

    before = {}
    for name in ("SIGTERM", "SIGHUP", "SIGINT"):
        number = getattr(signal, name, None)
        try:
            # nohup ignores SIGHUP, and that is to stay
            default = (signal.SIG_DFL, signal.default_int_handler)
            if number is not None and signal.getsignal(number) in default:
                before[number] = signal.signal(number, stop)
        except ValueError:  # not in the main thread
            pass
    return before


def _explain(error: BaseException, debug: bool) -> "NoReturn":
    """One line for what stopped a command, and the exit."""
    from rankwise.errors import DivergedError, RankwiseError

    asked = bool(_asked) or isinstance(error, KeyboardInterrupt)
    if isinstance(error, RankwiseError) and not asked:
        _let_go()
        _fail(_as_flags(" ".join(str(error).split())), 2)
    _end_bars()
    print(file=sys.stderr)  # what was being written has not ended its line
    if isinstance(error, DivergedError) and not asked:
        _fail(str(error), 1)
    if asked:
        number = _asked[0] if _asked else signal.SIGINT
        name = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
        _fail(f"stopped{name}{_how_to_go_on(drop=False)}", 128 + number)
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _fail("who read the output has closed it", 1)
    message = _broken(error)
    more = "" if debug else "; --debug shows where"
    _fail(f"{message}{more}{_how_to_go_on(drop=True)}", 1)


def _end_bars() -> None:
    """Progress bars draw themselves once more when they go; that has to be before the last line."""
    if (tqdm := sys.modules.get("tqdm.std")) is not None:
        for bar in list(tqdm.tqdm._instances):
            bar.close()


def _broken(error: BaseException) -> str:
    """What broke, in one line: the disk, the memory, or another library's error as it is."""
    said = " ".join(str(error).split())[:500] or "no message"
    kind = type(error).__name__
    full = [place for place in _places() if _is_full(place)]
    if getattr(error, "errno", None) == 28 or (full and not isinstance(error, MemoryError)):
        where = getattr(error, "filename", None) or (full or ["the output folder"])[0]
        return f"the disk is full ({where}): {said}"
    if isinstance(error, OSError):
        return f"the system refuses: {said}"
    return f"{kind}: {said}"


def _places() -> list[str]:
    import tempfile

    files = sys.modules.get("rankwise.files")
    return [*(str(path) for path in (files.held() if files else [])), tempfile.gettempdir()]


def _is_full(place: str) -> bool:
    import shutil

    try:
        return shutil.disk_usage(place).free < FULL
    except OSError:
        return False


def _how_to_go_on(drop: bool) -> str:
    kept = _let_go(drop)
    return "; the same command with --resume_from_checkpoint goes on" if kept else ""


def _let_go(drop: bool = True) -> "list[Any]":
    """Ends this process's hold on its folders; those in which there is something to go on with."""
    workspace = sys.modules.get("rankwise.workspace")
    return workspace.abandon(drop) if workspace else []


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
    from datasets import disable_progress_bars

    disable_progress_bars()
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning)


def _fail(message: str, code: int) -> "NoReturn":
    from rankwise.escape import terminal

    print(f"rankwise: {terminal(message)}", file=sys.stderr)
    raise SystemExit(code)


def _as_flags(message: str) -> str:
    """`text_column=` of a message about Python's arguments as the flag `--text_column`."""
    import re

    return re.sub(
        r"\b(kind|[a-z]+(?:_[a-z]+)+)=(?=(\w|'))?",
        lambda m: f"--{m[1]}" + " " * bool(m[2]),
        message,
    )
