"""The hub: what a model card says to machines, and the upload of one folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.errors import RankwiseError

if TYPE_CHECKING:
    from rankwise.result import Result

PIPELINES = {
    "classification": "text-classification",
    "regression": "text-classification",
    "tagging": "token-classification",
    "causal_lm": "text-generation",
    "chat": "text-generation",
    "generation": "text-generation",
}


def metadata(result: "Result", base: str | None, library: str, lora: bool) -> dict[str, Any]:
    """The YAML at the head of a run's model card, by the hub's conventions.

    Args:
        result: the run's record.
        base: the base model; a folder's name is left out, since the hub refuses one.
        library: that loads what lies in the folder; "" for none that the hub knows.
        lora: whether that is a LoRA adapter.
    """
    from rankwise.tasks import KNOWN

    known = base if base and not Path(base).exists() else None
    task = result.task
    pipeline = PIPELINES.get(task["kind"])
    hub = KNOWN[task["name"]].hub[0] if task["name"] in KNOWN else None
    names = [name for name in task["metrics"] if name in result.metrics]
    tags = [f"base_model:adapter:{known}"] if known and library == "peft" else []
    found: dict[str, Any] = {
        "base_model": known,
        "library_name": library or None,
        "pipeline_tag": pipeline,
        "license": None if known is None else _licence(known),
        "datasets": None if hub is None else [hub],
        "metrics": names or None,
        "tags": [*tags, *["lora"] * lora, "rankwise"],
    }
    if pipeline and names:
        dataset = {"name": task["name"], "type": hub or task["name"], "split": result.split}
        metrics = [{"type": n, "name": n, "value": round(result.metrics[n], 6)} for n in names]
        results = [{"task": {"type": pipeline}, "dataset": dataset, "metrics": metrics}]
        found["model-index"] = [{"name": result.name, "results": results}]
    return {key: value for key, value in found.items() if value is not None}


def _licence(base: str) -> str | None:
    """The licence on the base model's own card, where that lies in the cache."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    try:
        file = try_to_load_from_cache(base, "README.md")
        return ModelCard.load(file).data.license if isinstance(file, str) else None
    except (OSError, ValueError):
        return None


def check_push(repository: str | None) -> None:
    """Raises RankwiseError, before any work, where an upload would fail for want of a token."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if repository is None:
        return
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise RankwiseError(
            f"--push_to_hub {repository} is no repository's name: {error}"
        ) from error
    if get_token() is None:
        raise RankwiseError(
            "--push_to_hub needs a token of the hub; run hf auth login, or set HF_TOKEN"
        )


def push(folder: Path, repository: str) -> str:
    """Uploads one folder, an adapter's, and nothing beside it. Returns where it is.

    Raises:
        RankwiseError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=str(folder)))
    except (HfHubHTTPError, OSError) as error:
        raise RankwiseError(
            f"cannot upload {folder} to {repository}: {str(error).splitlines()[0]}; the run is "
            "finished, upload it by hf upload"
        ) from error
