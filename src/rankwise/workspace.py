"""The output folder: work goes on beside it, and a finished run takes its name in one rename."""

import json
import os
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

from rankwise.errors import CheckpointError, OutputError, RankwiseError
from rankwise.files import (
    claim,
    clear,
    foreign,
    held,
    is_ours,
    mark,
    marker,
    release,
    replace_folder,
    write_json,
)
from rankwise.given import check_path
from rankwise.reading import as_json, read_json

# Of a run's settings, those that a stopped run may go on without.
_FREE = {
    "report_to",
    "logging_steps",
    "save_steps",
    "per_device_eval_batch_size",
    "generation_batch_size",
}
# What only a run that goes on needs; it is not published.
_SCRATCH = ("settings.json", "result.json", "method.json", "search", "training", "arms")


def check_output(output_dir: str | Path, overwrite: bool, resume: bool) -> None:
    """Refuses, before any work and without touching anything, what `open_workspace` would.

    Raises:
        OutputError, CheckpointError: as `open_workspace`.
    """
    target, work = _places(output_dir)
    if resume and not work.exists() and marker(target):
        return  # finished: `is_finished` says whether it is this run
    if target.is_symlink() and not target.exists():
        raise OutputError(f"{target} is a link to nothing; remove it, or give another folder")
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target} is a file; give a folder as --output_dir")
    filled = target.is_dir() and any(target.iterdir())
    if filled and not overwrite:
        raise OutputError(
            f"{target} is not empty; give another --output_dir, or replace what is there by "
            "--overwrite_output_dir"
        )
    if filled and not marker(target):
        raise OutputError(
            f"{target} holds no results of rankwise; empty it yourself, or give another"
        )
    if filled and (other := foreign(target, _SCRATCH)) is not None:
        raise OutputError(
            f"{target} holds {other}, which rankwise did not write; move it away, or give another"
        )
    if resume and not is_ours(work):
        raise CheckpointError(
            f"nothing to resume in {work}; start without --resume_from_checkpoint"
        )
    if not resume and not overwrite and is_ours(work) and worth_keeping(work):
        raise OutputError(
            f"an unfinished run is in {work}; go on with it by --resume_from_checkpoint, or "
            "drop it by --overwrite_output_dir"
        )


def open_workspace(
    output_dir: str | Path, overwrite: bool, resume: bool, settings: dict[str, Any]
) -> Path:
    """The folder `<output_dir>.partial` in which a run works until it is finished.

    It is this process's alone until then.

    Args:
        output_dir: where the results will be.
        overwrite: replace results that are there, and drop an unfinished run.
        resume: go on with an unfinished run.
        settings: what the run stands on: its flags, and under "rests_on" hashes of its rows and
            base weights. A run is only resumed with the same ones, but for those under "after",
            which act when the training is over.

    Raises:
        OutputError: results, or an unfinished run, would be overwritten, no folder can be made, or
            another process works there.
        CheckpointError: nothing to resume, or a run that stood on something else.
    """
    check_output(output_dir, overwrite, resume)
    _, work = _places(output_dir)
    claim(work)
    try:
        check_output(output_dir, overwrite, resume)  # again: now nobody else changes anything
        if resume and (work / "settings.json").is_file():
            _check_settings(work, settings)
        else:
            clear(work)
        write_json(work / "settings.json", settings)
    except BaseException:
        _drop_if_empty(work)
        release(work)
        raise
    return work


def is_finished(output_dir: str | Path, settings: dict[str, Any]) -> bool:
    """Whether the results in a folder are those of this very run, finished and nothing left over.

    Raises:
        OutputError: they are those of a run with other settings.
    """
    target, work = _places(output_dir)
    if work.exists() or not (about := marker(target)):
        return False
    if about.get("settings") != _digest(settings):
        raise OutputError(
            f"{target} holds the results of another run, which is finished; give another "
            "--output_dir, or replace them by --overwrite_output_dir"
        )
    _drop_scratch(target)
    return True


def finish(work: Path, output_dir: str | Path) -> Path:
    """Renames the work folder to its public name, and drops what only a resumed run would need."""
    target, _ = _places(output_dir)
    mark(work, settings=_digest(read_json(work / "settings.json")))
    replace_folder(work, target)
    release(work)
    _drop_scratch(target)
    return target


def abandon(drop: bool = True) -> list[Path]:
    """Lets go of the folders that this process works in.

    Args:
        drop: whether folders go in which nothing is done yet, so that they are in nobody's way.

    Returns:
        Those that a run can go on in.
    """
    kept = []
    for work in held():
        begun = (work / "settings.json").is_file()
        if worth_keeping(work) or (begun and not drop):
            kept.append(work)
        elif is_ours(work):
            shutil.rmtree(work, ignore_errors=True)
        release(work)
    return kept


def worth_keeping(work: Path) -> bool:
    """Whether a stage was finished in a work folder, or a checkpoint begun."""
    return any(
        path.name.startswith("checkpoint-") or path.suffix in (".json", ".safetensors")
        for path in work.rglob("*")
        if path.parent != work or path.name in ("plan.json", "result.json")
    )


def _places(output_dir: str | Path) -> tuple[Path, Path]:
    """The public folder, and the one that is worked in."""
    check_path("output_dir", output_dir, OutputError)
    try:
        target = Path(output_dir).expanduser()
    except RuntimeError as error:  # ~nobody
        raise OutputError(f"--output_dir {str(output_dir)!r}: {error}") from error
    if target.name in ("", ".."):
        raise OutputError(
            f"--output_dir {str(output_dir)!r} has no name of its own; give a new folder"
        )
    work = beside(target)
    try:
        os.lstat(work)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # too long, in a file, not ours to look at
        reason = getattr(error, "strerror", None) or str(error)
        raise OutputError(
            f"cannot make --output_dir {target}: {reason}; give another folder"
        ) from error
    return target, work


def beside(target: Path) -> Path:
    """The folder that is worked in until the results take their name."""
    return target.with_name(target.name + ".partial")


def _drop_scratch(target: Path) -> None:
    for name in _SCRATCH:
        if (path := target / name).is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _drop_if_empty(work: Path) -> None:
    if not worth_keeping(work) and not (work / "settings.json").is_file():
        shutil.rmtree(work, ignore_errors=True)


def _check_settings(work: Path, settings: dict[str, Any]) -> None:
    try:
        saved = read_json(work / "settings.json")
    except RankwiseError as error:
        raise CheckpointError(f"{error}; start over with --overwrite_output_dir") from error
    now = as_json(settings)
    before, after = saved.pop("rests_on", {}), now.pop("rests_on", {})
    for part in (saved, now):
        part.pop("after", None)
    saved, now = _by_flag(saved), _by_flag(now)
    for key in sorted((set(saved) | set(now)) - _FREE):
        if saved.get(key) != now.get(key):
            raise CheckpointError(
                f"the run in {work} had --{key} {saved.get(key)}, now it is {now.get(key)}; "
                "resume with the old settings, or start over with --overwrite_output_dir"
            )
    for key in sorted(set(before) | set(after)):
        if before.get(key) != after.get(key):
            raise CheckpointError(
                f"the run in {work} began with other {key} (then {_short(before.get(key))}, now "
                f"{_short(after.get(key))}); put those back, or start over with "
                "--overwrite_output_dir"
            )


def _short(value: Any) -> str:
    return str(value)[:12] if isinstance(value, str) else str(value)


def _by_flag(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with those of a method, a model, ... beside the others, so that one is named."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        inner = value if isinstance(value, dict) else {key: value}
        flat |= {key if name == "name" else name: part for name, part in inner.items()}
    return flat


def _digest(settings: dict[str, Any]) -> str:
    """A hash of all settings that a result hangs on: the marker says no path."""
    kept = {key: value for key, value in settings.items() if key not in _FREE}
    return sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
