"""`rankwise evaluate`: the metrics of an adapter on disk."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rankwise.beside import TASK, find_product, read_object, task_of, text_of
from rankwise.cli.arguments import AdapterArguments, FitArguments, OutputArguments, flag, required
from rankwise.cli.job import load, parse_job
from rankwise.decoding import Decoding
from rankwise.errors import ModelError, RankwiseError
from rankwise.methods import by_name, from_description

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
        load_in_4bit=None,
    )
    folder = find_product(required(which.adapter, "adapter", "evaluate"))
    config, about = read_object(folder / "adapter_config.json"), read_object(folder / TASK)
    model.model_name_or_path = model.model_name_or_path or text_of(
        config, "base_model_name_or_path"
    )
    model.model_revision = model.model_revision or text_of(config, "revision")
    options: dict[str, Any] = {}
    if about:  # the labels in the order that the adapter's head learned them
        task = task_of(about, folder / TASK)
        if data.label_names and data.label_names != task.label_names:
            raise ModelError(
                f"the adapter learned the labels {', '.join(task.label_names or ('none',))} in "
                "this order; leave --label_names out"
            )
        options = {"label_names": task.label_names, "kind": data.kind or task.kind}
        data.max_length = data.max_length or about["max_length"]
        model.gguf_file = model.gguf_file or text_of(about, "gguf_file")
        if model.load_in_4bit is None:  # else as the flag says: an adapter fits both
            model.load_in_4bit = about.get("load_in_4bit") is True
        if data.task is None:
            options["text_column"] = data.text_column or task.text_columns
            options["label_column"] = data.label_column or task.label_column
    data.max_length = data.max_length or 128
    model.load_in_4bit = bool(model.load_in_4bit)
    job = load("evaluate", model, data, fit, decoding, **options)
    print(json.dumps(_evaluate(job, folder, about, kept.generations), indent=2))


def _evaluate(
    job: Any, folder: Path, about: dict[str, Any], generations: str | None
) -> dict[str, Any]:
    """The metrics of the adapter, on the rows that the flags give."""
    from safetensors import SafetensorError
    from transformers import Trainer

    from rankwise.evaluation import evaluate, generation
    from rankwise.job import check_generation, most_positions

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
