"""The output folder: work goes on beside it, and a finished run takes its name in one rename."""

import json
import shutil
from pathlib import Path
from typing import Any

from rankwise.errors import CheckpointError, OutputError
from rankwise.files import replace_folder, write_json

# Of a run's settings, those that a stopped run may go on without.
_FREE = {"report_to", "logging_steps", "save_steps", "per_device_eval_batch_size"}


def open_workspace(
    output_dir: str, overwrite: bool, resume: bool, settings: dict[str, Any]
) -> Path:
    """The folder `<output_dir>.partial` in which a run works until it is finished.

    Args:
        output_dir: where the results will be.
        overwrite: replace results that are there, and drop an unfinished run.
        resume: go on with an unfinished run.
        settings: the run's flags; a run is only resumed with the same ones.

    Raises:
        OutputError: results, or an unfinished run, would be overwritten, or no folder can be made.
        CheckpointError: nothing to resume, or a run with other settings.
    """
    target = check_free(output_dir, overwrite)
    work = target.with_name(target.name + ".partial")
    if resume:
        _check_settings(work, settings)
        return work
    if work.exists():
        if not overwrite:
            raise OutputError(
                f"an unfinished run is in {work}; go on with it by --resume_from_checkpoint, or "
                "drop it by --overwrite_output_dir"
            )
        shutil.rmtree(work)
    try:
        work.mkdir(parents=True)
    except OSError as error:
        raise OutputError(
            f"cannot make {work}: {error.strerror}; give another --output_dir"
        ) from error
    write_json(work / "settings.json", settings)
    return work


def check_free(output_dir: str, overwrite: bool) -> Path:
    """The folder of the results. Raises OutputError where some are there that have to stay."""
    target = Path(output_dir)
    if target.name in ("", ".."):
        raise OutputError(f"--output_dir {output_dir!r} has no name of its own; give a new folder")
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target} is a file; give a folder as --output_dir")
    filled = target.is_dir() and any(target.iterdir())
    if filled and overwrite and not (target / "metrics.json").is_file():
        raise OutputError(
            f"{target} holds no results of rankwise; empty it yourself, or give another"
        )
    if filled and not overwrite:
        raise OutputError(
            f"{target} is not empty; give another --output_dir, or replace what is there by "
            "--overwrite_output_dir"
        )
    return target


def _check_settings(work: Path, settings: dict[str, Any]) -> None:
    try:
        saved = json.loads((work / "settings.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"nothing to resume in {work}; start without --resume_from_checkpoint"
        ) from error
    saved, now = _by_flag(saved), _by_flag(json.loads(json.dumps(settings)))
    for key in sorted((set(saved) | set(now)) - _FREE):
        if saved.get(key) != now.get(key):
            raise CheckpointError(
                f"the run in {work} had --{key} {saved.get(key)}, now it is {now.get(key)}; "
                "resume with the old settings, or start over with --overwrite_output_dir"
            )


def _by_flag(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with those of a method, a model, ... beside the others, so that one is named."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        inner = value if isinstance(value, dict) else {key: value}
        flat |= {key if name == "name" else name: part for name, part in inner.items()}
    return flat


def finish(work: Path, output_dir: str) -> Path:
    """Renames the work folder to its public name, and drops what only a resumed run would need."""
    target = Path(output_dir)
    replace_folder(work, target)
    for file in ("settings.json", "result.json"):
        (target / file).unlink(missing_ok=True)
    for scratch in ("search", "training", "arms"):
        shutil.rmtree(target / scratch, ignore_errors=True)
    return target
