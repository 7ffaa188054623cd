"""`rankwise evaluate`: the metrics of an adapter on disk."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rankwise.cli.arguments import AdapterArguments, flag, required
from rankwise.cli.job import load, parse_job
from rankwise.decoding import Decoding
from rankwise.errors import ModelError
from rankwise.methods import METHODS, by_name, from_description


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
        max_length=None,
    )
    folder = _folder(required(which.adapter, "adapter", "evaluate"))
    config, about = _json(folder / "adapter_config.json"), _json(folder / "task.json")
    model.model_name_or_path = model.model_name_or_path or config.get("base_model_name_or_path")
    model.model_revision = model.model_revision or config.get("revision")
    options: dict[str, Any] = {}
    if about:  # the labels in the order that the adapter's head learned them
        options = {"label_names": about["label_names"], "kind": data.kind or about["kind"]}
        data.max_length = data.max_length or about["max_length"]
        model.gguf_file = model.gguf_file or about.get("gguf_file")
        if data.task is None:
            options["text_column"] = data.text_column or about["text_columns"]
            options["label_column"] = data.label_column or about["label_column"]
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
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"cannot load the adapter {folder}: {str(error).splitlines()[0]}"
        ) from error
    trainer = Trainer(model, job.arguments(folder.parent), **job.options())
    check_generation(job, most_positions(model))
    found = evaluate(job, trainer)
    with TemporaryDirectory() as scratch:  # of a text file that nobody asked for
        file = Path(generations or Path(scratch) / "generations.jsonl")
        texts = generation(job, model, file, resume=generations is not None)
    found |= texts.pop("metrics", {})
    return {"split": job.split, "rows": len(job.evaluation), **found, **texts}


def _json(path: Path) -> dict[str, Any]:
    """What a file holds; nothing where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error
