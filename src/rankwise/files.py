"""Writing files and folders so that a reader never sees half of one, and nobody's files go.

A folder that rankwise makes has a marker in it. Only such a folder is ever emptied or replaced, and
only by the process that holds its lock, which the system takes back when that process dies.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from hashlib import sha256
from pathlib import Path
from typing import Any

from rankwise.errors import OutputError

MARKER = ".rankwise"

_held: dict[Path, int] = {}  # folders of this process, and the open marker that holds the lock


@contextmanager
def temporary_name(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; what is there at the end of the block becomes `path`.

    What a process that was killed in such a block left of the same file goes first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{escape(path.name)}.*.tmp"):
        pid = left.name.removesuffix(".tmp").rpartition(".")[2]
        if re.fullmatch("[0-9]{1,9}", pid) and not _is_alive(int(pid)):
            left.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    import psutil

    return bool(psutil.pid_exists(pid))


def write_text(path: Path, text: str) -> None:
    """Writes text to a temporary name beside `path`, then renames it into place."""
    with temporary_name(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON through `write_text`. NaN is refused: JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def check_new(path: Path, flag: str) -> None:
    """Raises OutputError, naming the flag, where something is there or nothing can be."""
    if _is_there(path, flag):
        raise OutputError(f"{path} exists; give a new {flag}")


def check_folder(path: Path, flag: str) -> None:
    """Raises OutputError, naming the flag, where a folder is not and cannot be made, or written."""
    _is_there(path, flag)  # else it can be made where the nearest folder above can be written
    there = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
    if not there.is_dir():
        raise OutputError(f"{there} is no folder; give another {flag}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise OutputError(f"{there} cannot be written; give another {flag}")


def _is_there(path: Path, flag: str) -> bool:
    """Whether anything has that name. Raises OutputError where no system call takes it."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OutputError(f"cannot make {path}: {reason}; give another {flag}") from error
    return True


def replace_folder(finished: Path, target: Path) -> None:
    """Renames a finished folder to its public name; one that was there goes only after that.

    Whether what is there may go is for the caller to know. What bears the temporary name goes only
    where it is ours, left by a process that was killed between the two renames.
    """
    old = target.with_name(f".{target.name}.old")
    if is_ours(old):
        shutil.rmtree(old)
    if not target.exists():
        finished.rename(target)
        return
    if old.exists() or old.is_symlink():  # somebody else's
        old = Path(tempfile.mkdtemp(prefix=f"{old.name}.", dir=target.parent))
    target.rename(old)
    try:
        finished.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def new_folder(target: Path, *, marked: bool = False) -> Iterator[Path]:
    """A folder beside `target` to fill; at the end of the block it becomes `target`.

    Args:
        target: its public name; a folder that is there is replaced.
        marked: whether the marker stays in it, so that it may be replaced one day.

    Raises:
        OutputError: it cannot be made, or its temporary name is another's.
    """
    work = target.with_name(f".{target.name}.new")
    claim(work)
    try:
        clear(work)
        yield work
        if marked:
            mark(work)
        replace_folder(work, target)
        if not marked:
            (target / MARKER).unlink()
    finally:
        release(work)
        if is_ours(work):
            shutil.rmtree(work, ignore_errors=True)


def claim(folder: Path) -> None:
    """Makes a folder, or takes up one of ours, for this process alone: until `release` or its end.

    Raises:
        OutputError: another process works in it, it is not ours, or it cannot be made.
    """
    folder = Path(os.path.abspath(folder))
    if folder in _held:
        return
    try:
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise OutputError(f"{folder} is in the way; move it, or give another folder")
        folder.mkdir(parents=True, exist_ok=True)
        names = os.listdir(folder)
        if names and MARKER not in names:
            raise OutputError(
                f"{folder} holds files that rankwise did not write ({names[0]}); move it away, or "
                "give another folder"
            )
        opened = os.open(folder / MARKER, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except (OSError, ValueError) as error:
        raise _not_made(folder, error) from error
    if not _locked(opened):
        said = os.read(opened, 4096).decode(errors="replace").strip()
        os.close(opened)
        raise OutputError(
            f"another process works in {folder} ({said or 'it has just begun'}); wait for it, stop "
            "it, or give another folder"
        )
    with suppress(OSError):
        if os.path.samestat(os.fstat(opened), os.stat(folder / MARKER)):
            _held[folder] = opened
            _write(opened, f"process {os.getpid()}")
            return
    os.close(opened)  # it was finished and renamed between the two calls
    raise OutputError(f"another process has just finished with {folder}; look at its results")


def release(folder: Path) -> None:
    """Lets other processes have the folder."""
    if (opened := _held.pop(Path(os.path.abspath(folder)), None)) is not None:
        os.close(opened)


def held() -> list[Path]:
    """The folders that this process works in."""
    return list(_held)


def is_ours(folder: Path) -> bool:
    """Whether a folder was made by rankwise: it has the marker."""
    marker = folder / MARKER
    return not folder.is_symlink() and marker.is_file() and not marker.is_symlink()


def clear(folder: Path) -> None:
    """Drops all in a folder that this process holds, but the marker."""
    assert Path(os.path.abspath(folder)) in _held
    for path in folder.iterdir():
        if path.name == MARKER:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def mark(folder: Path, **about: Any) -> None:
    """Writes into the marker of a folder that is finished which files in it are ours.

    Files get the mode that any new file has: safetensors gives those it writes to their owner
    alone.

    Args:
        folder: that this process holds.
        **about: more for the marker, as JSON holds it.
    """
    for path in folder.rglob(".*.tmp"):  # of a process that was killed while it wrote
        path.unlink()
    mask = os.umask(0)
    os.umask(mask)
    files = _files(folder)
    for name in files:
        (folder / name).chmod(0o666 & ~mask)
    text = json.dumps({"format": "rankwise-folder/1", **about, "files": files}, indent=2)
    _write(_held[Path(os.path.abspath(folder))], text + "\n")


def marker(folder: Path) -> dict[str, Any]:
    """What `mark` wrote; nothing for a folder that is not ours, or was never finished."""
    try:
        about = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    listed = isinstance(about, dict) and isinstance(about.get("files"), list)
    return about if listed and is_ours(folder) else {}


def foreign(folder: Path, ours: tuple[str, ...] = ()) -> str | None:
    """The first file in a folder that is not one of ours; None where all are.

    Args:
        folder: to look through.
        ours: names right in the folder that are ours beside what the marker lists.
    """
    known = set(marker(folder).get("files", ()))
    others = (name for name in _files(folder) if name.split("/")[0] not in ours)
    return next((name for name in others if name not in known), None)


def content(path: Path) -> str:
    """sha256 of a file, or of all files in a folder; of nothing where there is none."""
    digest = sha256()
    for name in _files(path) if path.is_dir() else [""]:
        file = path / name if name else path
        if file.is_file():
            digest.update(name.encode("utf-8", "backslashreplace") + b"\0")
            with file.open("rb") as opened:
                while block := opened.read(2**20):
                    digest.update(block)
    return digest.hexdigest()


def _files(folder: Path) -> list[str]:
    """All that is no folder, links included, in order."""
    found = []
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        found += [
            os.path.relpath(os.path.join(place, name), folder).replace(os.sep, "/")
            for name in (*files, *links)
        ]
    return sorted(name for name in found if name != MARKER)


def _locked(opened: int) -> bool:
    """Takes the lock of an open file; whether it is ours now."""
    try:
        import fcntl
    except ImportError:  # Windows, where a folder with an open file could not be renamed anyway
        return True
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _write(opened: int, text: str) -> None:
    """In place, since the lock belongs to this very file."""
    os.lseek(opened, 0, os.SEEK_SET)
    os.truncate(opened, 0)
    data = text.encode("utf-8", "backslashreplace")
    while data:
        data = data[os.write(opened, data) :]


def _not_made(folder: Path, error: Exception) -> OutputError:
    reason = getattr(error, "strerror", None) or str(error)
    return OutputError(f"cannot make {folder}: {reason}; give another --output_dir")


def _forget() -> None:
    """In a forked child, such as a loader of rows: the lock is the parent's, and dies with it."""
    for opened in _held.values():
        with suppress(OSError):
            os.close(opened)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
