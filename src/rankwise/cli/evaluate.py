"""`rankwise evaluate`: the metrics of an adapter on disk."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rankwise.cli import stages
from rankwise.cli.arguments import (
    AdapterArguments,
    DataArguments,
    FitArguments,
    ModelArguments,
    parse,
    required,
)
from rankwise.errors import ModelError

TYPES = (AdapterArguments, ModelArguments, DataArguments, FitArguments)


def main(argv: Sequence[str]) -> None:
    """Evaluate a PEFT adapter on labelled rows. Prints JSON on standard output."""
    which, model, data, fit = parse("evaluate", main.__doc__ or "", TYPES, argv, max_length=None)
    folder = stages.adapter_folder(required(which.adapter, "adapter", "evaluate"), "adapter")
    config = _json(folder / "adapter_config.json")
    model.model_name_or_path = model.model_name_or_path or config.get("base_model_name_or_path")
    model.model_revision = model.model_revision or config.get("revision")
    about = _json(folder / "task.json") if (folder / "task.json").exists() else {}
    options: dict[str, Any] = {}
    if about:  # the labels in the order that the adapter's head learned them
        options = {"label_names": about["label_names"], "kind": data.kind or about["kind"]}
        data.max_length = data.max_length or about["max_length"]
        model.gguf_file = model.gguf_file or about.get("gguf_file")
        if data.task is None:
            options["text_column"] = data.text_column or about["text_columns"]
            options["label_column"] = data.label_column or about["label_column"]
    data.max_length = data.max_length or 128
    job = stages.load_job(model, data, fit, "evaluate", **options)
    print(json.dumps(stages.evaluate_adapter(job, folder), indent=2))


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error
