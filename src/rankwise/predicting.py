"""`load` and `predict`: a finished run, or any LoRA adapter, ready to use."""

from pathlib import Path
from typing import Any, NamedTuple

from rankwise.adapter import CONFIG, Adapter
from rankwise.beside import TASK, find_product, read_object, task_of, text_of
from rankwise.errors import DataError, ModelError
from rankwise.given import check_count
from rankwise.methods.base import check_whole

_LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, AttributeError)


class Loaded(NamedTuple):
    """A model with its adapter, in eval mode, and the tokenizer that it was trained with."""

    model: Any
    tokenizer: Any


def load(
    folder: str | Path,
    *,
    model_name_or_path: str | None = None,
    gguf_file: str | None = None,
    load_in_4bit: bool | None = None,
) -> Loaded:
    """The model and tokenizer of an adapter's folder, ready to predict.

    Args:
        folder: of a finished run, of what it made, or of any PEFT LoRA adapter.
        model_name_or_path, gguf_file: the base model, where it is not what the folder says.
        load_in_4bit: whether the base's weights are kept in 4 bits; None is as the run had them.

    Raises:
        AdapterError: no adapter there. ModelError: the base model cannot be loaded.

    Example:
        >>> model, tokenizer = rankwise.load("runs/first")
        >>> model(**tokenizer("a fine film", return_tensors="pt")).logits.argmax()
        tensor(1)
    """
    where = find_product(folder)
    about = read_object(where / TASK)
    if about:
        return _of_task(where, about, model_name_or_path, gguf_file, load_in_4bit)
    from transformers import AutoTokenizer

    from rankwise.serving.base import base_of, put_on

    base = base_of(Adapter.load(where), where, model_name_or_path, gguf_file)
    model = put_on(base.model(None), where).eval()
    check_whole(model, where)
    own = (where / "tokenizer_config.json").is_file()
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(where) if own else base.name_or_path,
            **({"trust_remote_code": False} if own else base.where),
        )
    except _LOAD_ERRORS as error:
        raise ModelError(f"no tokenizer in {where} or {base.name_or_path}: {error}") from error
    return Loaded(model, tokenizer)


def _of_task(
    where: Path,
    about: dict[str, Any],
    model_name_or_path: str | None,
    gguf_file: str | None,
    load_in_4bit: bool | None,
) -> Loaded:
    from rankwise import tasks
    from rankwise.methods import by_name, from_description

    method = from_description(about["method"]) if "method" in about else by_name("lora")
    task = task_of(about, where / TASK)
    config = read_object(where / CONFIG)
    name = (
        model_name_or_path or text_of(about, "base") or text_of(config, "base_model_name_or_path")
    )
    if not name:
        raise ModelError(f"{where} does not say its base model; give model_name_or_path")
    file = gguf_file or text_of(about, "gguf_file")
    revision = None if model_name_or_path else text_of(config, "revision")
    own = (where / "tokenizer_config.json").is_file()
    tokenizer = (
        tasks.load_tokenizer(where)
        if own
        else tasks.load_tokenizer(name, gguf_file=file, revision=revision)
    )
    in_4bit = about.get("load_in_4bit") is True if load_in_4bit is None else load_in_4bit
    options: dict[str, Any] = {"gguf_file": file, "revision": revision, "load_in_4bit": in_4bit}
    model = tasks.load_model(task, name, tokenizer=tokenizer, **options)
    try:
        return Loaded(method.load(model, where).eval(), tokenizer)
    except _LOAD_ERRORS as error:
        raise ModelError(f"cannot load {where}: {str(error).splitlines()[0]}") from error


def predict(
    folder: str | Path,
    data: Any,
    *,
    batch_size: int = 32,
    max_new_tokens: int = 64,
    model_name_or_path: str | None = None,
    gguf_file: str | None = None,
    load_in_4bit: bool | None = None,
) -> list[dict[str, Any]]:
    """What a finished run's model says of rows, in their order.

    A class and its probability, a score, tags by word, or the completion of a prompt.

    Args:
        folder: of a finished run, or what it made.
        data: rows with the task's text columns: a file, a datasets.Dataset, a DataFrame, a list of
            dicts, or a list of texts where the task has one text column.
        batch_size: rows in a forward pass.
        max_new_tokens: of a completion, at most.
        model_name_or_path, gguf_file, load_in_4bit: as `load`.

    Raises:
        DataError: no such column, or no run that says what its task was.
        AdapterError, ModelError: as `load`.

    Example:
        >>> rankwise.predict("runs/first", ["a fine film"])
        [{'label': 'good', 'probability': 0.981}]
    """
    from rankwise.tasks.files import read_file, read_rows

    check_count("batch_size", batch_size)
    check_count("max_new_tokens", max_new_tokens)
    where = find_product(folder)
    about = read_object(where / TASK)
    if not about:
        raise DataError(
            f"{where} has no task.json, so what it predicts is not known; take rankwise.load, or a "
            "folder that rankwise run or fit wrote"
        )
    task = task_of(about, where / TASK)
    if isinstance(data, list) and data and all(isinstance(text, str) for text in data):
        name = "prompt" if task.text_columns == ("messages",) else task.text_columns[0]
        data = [{name: text} for text in data]
    rows = read_file(data) if isinstance(data, str | Path) else read_rows(data)
    needed = task.text_columns if task.labelled else task.text_columns[:1]
    forms = needed == ("messages",)  # which comes in several
    if missing := [name for name in needed if name not in rows and not forms]:
        raise DataError(
            f"the rows have no column {missing[0]!r}, only {', '.join(rows)}; the run was trained "
            f"on {', '.join(needed)}"
        )
    model, tokenizer = load(
        where,
        model_name_or_path=model_name_or_path,
        gguf_file=gguf_file,
        load_in_4bit=load_in_4bit,
    )
    return task.predict(
        model,
        tokenizer,
        rows,
        max_length=about["max_length"],
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
    )
