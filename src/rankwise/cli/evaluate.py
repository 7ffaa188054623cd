"""`rankwise evaluate`: the metrics of an adapter on disk."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rankwise.cli.arguments import AdapterArguments, FitArguments, OutputArguments, flag, required
from rankwise.cli.job import load, parse_job
from rankwise.decoding import Decoding
from rankwise.errors import ModelError, RankwiseError
from rankwise.methods import METHODS, by_name, from_description
from rankwise.reading import read_json

# Flags of a training and of an output folder, which an evaluation has no use for.
UNUSED = {f.name for part in (FitArguments, OutputArguments) for f in fields(part)} - {
    "per_device_eval_batch_size",
    "bf16",
    "seed",
    "use_cpu",
    "training_arguments",
}


@dataclass
class KeepArguments:
    """Texts that are generated."""

    generations: str | None = flag(
        None, "file that generated texts are kept in; a stopped evaluation goes on from it"
    )


def main(argv: Sequence[str]) -> None:
    """Evaluate an adapter, or what else a run made, on labelled rows. Prints JSON."""
    model, data, fit, _, which, kept, decoding = parse_job(
        "evaluate",
        main.__doc__ or "",
        argv,
        method="",
        more=[AdapterArguments(), KeepArguments(), Decoding()],
        hidden=UNUSED,
        max_length=None,
    )
    folder = _folder(required(which.adapter, "adapter", "evaluate"))
    config, about = _object(folder / "adapter_config.json"), _object(folder / "task.json")
    model.model_name_or_path = model.model_name_or_path or _text(config, "base_model_name_or_path")
    model.model_revision = model.model_revision or _text(config, "revision")
    options: dict[str, Any] = {}
    if about:  # the labels in the order that the adapter's head learned them
        task = _task(about, folder / "task.json")
        if data.label_names and data.label_names != task.label_names:
            raise ModelError(
                f"the adapter learned the labels {', '.join(task.label_names or ('none',))} in "
                "this order; leave --label_names out"
            )
        options = {"label_names": task.label_names, "kind": data.kind or task.kind}
        data.max_length = data.max_length or about["max_length"]
        model.gguf_file = model.gguf_file or _text(about, "gguf_file")
        if data.task is None:
            options["text_column"] = data.text_column or task.text_columns
            options["label_column"] = data.label_column or task.label_column
    data.max_length = data.max_length or 128
    job = load("evaluate", model, data, fit, decoding, **options)
    print(json.dumps(_evaluate(job, folder, about, kept.generations), indent=2))


def _folder(path: str) -> Path:
    """What a method handed over: the path itself, or the folder of a method's product in it."""
    products = dict.fromkeys(method.product for method in METHODS.values())
    for folder in (Path(path), *(Path(path) / name for name in products)):
        if (folder / "task.json").is_file():
            return folder
    from rankwise.adapter import adapter_folder

    return adapter_folder(path, "adapter")


def _evaluate(
    job: Any, folder: Path, about: dict[str, Any], generations: str | None
) -> dict[str, Any]:
    """The metrics of the adapter, on the rows that the flags give."""
    from safetensors import SafetensorError
    from transformers import Trainer

    from rankwise.job import check_generation, evaluate, generation, most_positions

    method = from_description(about["method"]) if "method" in about else by_name("lora")
    try:
        model = method.load(job.fresh_model(), folder)
    except RankwiseError:
        raise
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(f"cannot load the adapter {folder}: {said}") from error
    trainer = Trainer(model, job.arguments(folder.parent), **job.options())
    check_generation(job, most_positions(model))
    found = evaluate(job, trainer)
    with TemporaryDirectory() as scratch:  # of a text file that nobody asked for
        file = Path(generations or Path(scratch) / "generations.jsonl")
        texts = generation(job, model, file, resume=generations is not None)
    found |= texts.pop("metrics", {})
    return {"split": job.split, "rows": len(job.evaluation), **found, **texts}


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; nothing where there is none."""
    if not path.exists():
        return {}
    if not isinstance(found := read_json(path, ModelError), dict):
        raise ModelError(f"{path} holds a {type(found).__name__}; it has to be a JSON object")
    return found


def _text(about: dict[str, Any], key: str) -> str | None:
    """A text, or nothing, out of a file."""
    if not isinstance(value := about.get(key), str | None):
        raise ModelError(f"{key} is {value!r}; it has to be a text")
    return value


def _task(about: dict[str, Any], path: Path) -> Any:
    """The task that an adapter was trained on, its description checked."""
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
    if not sound or about.get("text_columns") is None or about.get("metrics") is None:
        raise ModelError(f"{path} is damaged: it does not describe a task; copy it again")
    return from_description(about)
