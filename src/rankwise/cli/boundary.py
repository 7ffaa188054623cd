"""The boundary of the command line: whatever stops a command becomes one line and an exit code."""

import os
import signal
import sys

TYPE_CHECKING = False  # typing itself is not imported: `rankwise --help` pays for each import
if TYPE_CHECKING:
    from typing import Any, NoReturn

FULL = 2**24  # a disk with fewer free bytes is called full
LONGEST = 500  # characters of a word that are shown

_asked: list[int] = []  # the signals that asked this process to end


def listen() -> "dict[int, Any]":
    """Lets the signals that ask a process to end raise an error, and returns their old handlers.

    Which signal it was is noted: what is being imported may turn the error into one of its own.
    """

    def stop(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends it at once
        _asked.append(number)
        raise KeyboardInterrupt

    _asked.clear()
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


def restore(before: "dict[int, Any]") -> None:
    """Gives signals the handlers that `listen` found."""
    for number, handler in before.items():
        signal.signal(number, handler)


def explain(error: BaseException, debug: bool) -> "NoReturn":
    """One line for what stopped a command, and the exit."""
    from rankwise.errors import DivergedError, RankwiseError

    asked = bool(_asked) or isinstance(error, KeyboardInterrupt)
    if isinstance(error, RankwiseError) and not asked:
        let_go()
        _end_bars()
        fail(_as_flags(" ".join(str(error).split())), 2)
    _end_bars()
    print(file=sys.stderr)  # what was being written has not ended its line
    if isinstance(error, DivergedError) and not asked:
        fail(str(error), 1)
    if asked:
        number = _asked[0] if _asked else signal.SIGINT
        name = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
        fail(f"stopped{name}{_how_to_go_on(drop=False)}", 128 + number)
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        fail("who read the output has closed it", 1)
    message = _broken(error)
    more = "" if debug else "; --debug shows where"
    fail(f"{message}{more}{_how_to_go_on(drop=True)}", 1)


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
    kept = let_go(drop)
    return "; the same command with --resume_from_checkpoint goes on" if kept else ""


def let_go(drop: bool = True) -> "list[Any]":
    """Ends this process's hold on its folders; those in which there is something to go on with."""
    workspace = sys.modules.get("rankwise.workspace")
    return workspace.abandon(drop) if workspace else []


def fail(message: str, code: int) -> "NoReturn":
    from rankwise.escape import terminal

    print(f"rankwise: {terminal(_shortened(message))}", file=sys.stderr)
    raise SystemExit(code)


def _shortened(message: str) -> str:
    """Values that go on without a space for longer than any path, by their beginning and length."""
    return " ".join(
        word if len(word) <= LONGEST else f"{word[:60]}... ({len(word):,} characters)"
        for word in message.split(" ")
    )


def _as_flags(message: str) -> str:
    """`text_column=` of a message about Python's arguments as the flag `--text_column`."""
    import re

    return re.sub(
        r"\b(kind|[a-z]+(?:_[a-z]+)+)=(?=(\w|'))?",
        lambda m: f"--{m[1]}" + " " * bool(m[2]),
        message,
    )
