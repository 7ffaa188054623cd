"""Runs commands in forked children of a process that has imported everything: a run takes a second.

`Forks` starts this file as that process. A child may be killed at its n-th file operation or after
some seconds, may find the disk full from its n-th file operation on, or may not go on the network.
"""

import io
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod")


@dataclass(frozen=True)
class Done:
    """How a command ended: its exit code (negative: the signal), output, and file operations."""

    code: int
    out: str
    err: str
    operations: int
    forbidden: list[str]

    @property
    def line(self) -> str:
        """The last line of standard error."""
        return (self.err.strip().splitlines() or [""])[-1]

    @property
    def crashed(self) -> bool:
        """Whether there is a traceback."""
        return "Traceback (most recent call last)" in self.err


class Forks:
    """The process that forks; ends with `close`."""

    def __init__(self, source: str | None = None):
        environment = dict(os.environ, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
        if source is not None:
            environment["PYTHONPATH"] = source
        environment.pop("WORLD_SIZE", None)
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,  # a Ctrl-C is for who asks, who then ends this by `close`
        )

    def start(self, argv: list[str], cwd: Path, **how: Any) -> dict[str, Any]:
        """Starts a command; see `child` for what may be asked of it."""
        return self._ask({"argv": [str(word) for word in argv], "cwd": str(cwd), **how})

    def wait(self, started: dict[str, Any], kill_after: float | None = None) -> Done:
        """Its end; it is killed after so many seconds, and in any case after 120."""
        return Done(**self._ask({"wait": started, "kill_after": kill_after}))

    def run(self, argv: list[str], cwd: Path, kill_after: float | None = None, **how: Any) -> Done:
        """Both."""
        return self.wait(self.start(argv, cwd, **how), kill_after)

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        """Ends it, and the commands that still run."""
        self.process.terminate()
        self.process.wait(timeout=30)
        self.process.stdin.close()
        self.process.stdout.close()


REACHES = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")
RUNS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.startfile")
DATA = ("torch", "numpy", "collections", "_codecs", "transformers")
"""Packages whose classes a checkpoint or a tensor is made of."""


def suspect(event: str, args: tuple[Any, ...], root: str) -> str:
    """What a command does that nothing it read may make it do; "" for anything else."""
    if event in RUNS or (event in REACHES and not isinstance(args[1], str | bytes)):
        return f"{event} {args[:3]}"  # a local socket's address is a text
    if event == "socket.getaddrinfo" or event == "socket.gethostbyname":
        return f"{event} {args[:2]}"
    if event == "pickle.find_class" and str(args[0]).partition(".")[0] not in DATA:
        return f"{event} {args}"
    if event == "import" and str(args[0]).partition(".")[0] == "theirs":
        return f"{event} {args[0]}"
    if event == "open" and str(args[0]).endswith("secret"):
        return f"{event} {args[0]}"
    writes = event == "open" and isinstance(args[2], int) and args[2] & WRITES
    if (writes or event in CHANGES) and isinstance(args[0], str | bytes | os.PathLike):
        path = os.path.realpath(os.path.abspath(os.fsdecode(args[0])))
        scratch = os.path.join(os.path.realpath(tempfile.gettempdir()), "tmp")
        cache = "/matplotlib" in path  # its list of fonts, in the home folder
        if not path.startswith((root, scratch, "/dev/", "/proc/")) and not cache:
            return f"{event} {path}"
    return ""


def child(
    argv: list[str],
    cwd: str,
    log: str,
    kill_at: int | None = None,
    kill_on: str | None = None,
    full_at: int | None = None,
    largest: int | None = None,
    interrupt_at: int | None = None,
    number: int = signal.SIGTERM,
    watch: bool = False,
    online: bool = False,
) -> None:
    """The command, in the forked process.

    Args:
        argv: of `command`.
        cwd: its folder; only file operations below it are counted.
        log: a name for files that say what happened.
        kill_at: SIGKILL at the start of this file operation.
        kill_on: SIGKILL at the first one on a path that has this in it.
        full_at: from this file operation on, nothing can be created.
        largest: bytes of the largest file that can be written.
        interrupt_at, number: sends itself this signal at this file operation.
        watch: note what it writes outside `cwd` and the folders that tempfile makes, reads that is
            named "secret", connects to, looks up, runs, unpickles, or imports that is "theirs".
        online: huggingface_hub may ask the hub, as without HF_HUB_OFFLINE.
    """
    os.chdir(cwd)
    count, forbidden = 0, []
    roots = (os.path.realpath(cwd), os.path.realpath(sys.prefix), os.path.realpath(sys.base_prefix))

    def inside(path: object) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        return os.path.realpath(os.path.abspath(os.fsdecode(path))).startswith(roots[0])

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if watch and (said := suspect(event, args, roots[0])):
            forbidden.append(said)
        writes = event == "open" and isinstance(args[2], int) and args[2] & WRITES
        if not (writes or event in CHANGES) or not inside(args[0]):
            return
        count += 1
        if count == kill_at or (kill_on is not None and kill_on in os.fsdecode(args[0])):
            os.kill(os.getpid(), signal.SIGKILL)
        if count == interrupt_at:
            os.kill(os.getpid(), number)
        if full_at is not None and count >= full_at and (writes or event == "os.mkdir"):
            raise OSError(28, "No space left on device", str(args[0]))

    for stream, name in ((1, "out"), (2, "err")):
        opened = os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, stream)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    if largest is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
    if watch:
        sys.stdin = io.StringIO("y\n" * 99)  # says yes to whatever is asked
    if online:
        import huggingface_hub.constants

        huggingface_hub.constants.HF_HUB_OFFLINE = False
    sys.addaudithook(hook)
    for asks in (signal.SIGHUP, signal.SIGTERM):  # whatever started the tests may ignore them
        signal.signal(asks, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)

    code = 0
    try:
        command(argv)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    watch = False
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    full_at = kill_at = interrupt_at = kill_on = None
    Path(f"{log}.json").write_text(json.dumps({"operations": count, "forbidden": forbidden}))
    os._exit(code)


def command(argv: list[str]) -> None:
    """What `rankwise` does; with "python" and a text, what a call of the library does, whose error
    is then printed as that of a command."""
    if argv[0] != "python":
        from rankwise.cli import main

        main(argv)
        return
    from rankwise import RankwiseError

    try:
        exec(compile(argv[1], "call", "exec"), {"__name__": "call"})
    except RankwiseError as error:
        print(f"rankwise: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def serve() -> None:
    """Reads questions, one a line."""
    running: set[int] = set()

    def stop(*_: object) -> None:
        for pid in running:
            with suppress(OSError):
                os.killpg(pid, signal.SIGKILL)
        os._exit(0)

    import torch  # noqa: F401

    import rankwise.cli.compare
    import rankwise.cli.cut
    import rankwise.cli.demo
    import rankwise.cli.evaluate
    import rankwise.cli.export
    import rankwise.cli.predict
    import rankwise.cli.report
    import rankwise.cli.run
    import rankwise.cli.score
    import rankwise.cli.search
    import rankwise.cli.show
    import rankwise.cli.train
    import rankwise.cli.verify
    import rankwise.compare.cells
    import rankwise.fitting
    import rankwise.orders
    import rankwise.predicting
    import rankwise.report.write
    import rankwise.serving.verify
    import rankwise.surgeon  # noqa: F401

    signal.signal(signal.SIGTERM, stop)
    logs = tempfile.mkdtemp()
    answers = os.dup(1)
    os.dup2(2, 1)
    for number, line in enumerate(sys.stdin):
        question = json.loads(line)
        if "wait" in question:
            answer = ended(**question["wait"], kill_after=question["kill_after"])
            running.discard(question["wait"]["pid"])
        else:
            log = f"{logs}/{number}"
            pid = os.fork()
            if pid == 0:
                os.setsid()
                child(**question, log=log)
            running.add(pid)
            answer = {"pid": pid, "log": log}
        os.write(answers, (json.dumps(answer) + "\n").encode())


def ended(pid: int, log: str, kill_after: float | None) -> dict[str, Any]:
    """Waits for a child."""
    deadline = time.monotonic() + (kill_after or 120)
    while (found := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            deadline += 120
        time.sleep(0.01)
    about = {"operations": 0, "forbidden": []}
    if Path(f"{log}.json").exists():
        about = json.loads(Path(f"{log}.json").read_text())
    code = os.waitstatus_to_exitcode(found[1])
    texts = {
        name: Path(f"{log}.{name}").read_text(errors="replace")
        if Path(f"{log}.{name}").exists()
        else ""
        for name in ("out", "err")
    }
    return {"code": code, **texts, **about}


if __name__ == "__main__":
    serve()
