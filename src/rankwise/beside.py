"""What lies beside an adapter, read and checked: its config, and the task that it was made for."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.errors import AdapterError, ModelError
from rankwise.given import check_path
from rankwise.reading import read_json

if TYPE_CHECKING:
    from rankwise.tasks import Task

TASK = "task.json"


def find_product(path: str | Path) -> Path:
    """What a method handed over: the path itself, or the folder of a method's product in it.

    Raises:
        AdapterError: neither, nor an adapter of someone else's.
    """
    from rankwise.adapter import adapter_folder  # needs torch, which `evaluate --help` does not
    from rankwise.methods import METHODS

    check_path("the adapter", path, AdapterError)
    products = dict.fromkeys(method.product for method in METHODS.values())
    for folder in (Path(path), *(Path(path) / name for name in products)):
        if (folder / TASK).is_file():
            return folder
    return adapter_folder(path, "adapter")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; nothing where there is none. Raises ModelError."""
    if not path.exists():
        return {}
    if not isinstance(found := read_json(path, ModelError), dict):
        raise ModelError(f"{path} holds a {type(found).__name__}; it has to be a JSON object")
    return found


def text_of(about: dict[str, Any], key: str) -> str | None:
    """A text, or nothing, out of such an object. Raises ModelError."""
    if not isinstance(value := about.get(key), str | None):
        raise ModelError(f"{key} is {value!r}; it has to be a text")
    return value


def task_of(about: dict[str, Any], path: Path) -> "Task":
    """The task that an adapter was trained on, its description checked. Raises ModelError."""
    from rankwise.tasks import from_description

    texts = ("name", "kind"), ("text_columns", "metrics", "label_names")
    listed = [about.get(key) for key in texts[1] if about.get(key) is not None]
    length = about.get("max_length")
    sound = (
        all(isinstance(about.get(key), str) for key in texts[0])
        and all(isinstance(v, list) and all(isinstance(x, str) for x in v) for v in listed)
        and isinstance(about.get("label_column"), str | None)
        and isinstance(length, int)
        and not isinstance(length, bool)
        and length > 0
    )
    if not sound or not about.get("text_columns") or about.get("metrics") is None:
        raise ModelError(f"{path} is damaged: it does not describe a task; copy it again")
    return from_description(about)
