"""The model card of an adapter: what it is, its ranks, its figures and those of the controls."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from rankwise.errors import RankwiseError
from rankwise.escape import markdown
from rankwise.files import write_text
from rankwise.hub import metadata
from rankwise.methods import from_description
from rankwise.plan import RankPlan
from rankwise.reading import read_json
from rankwise.report.heatmap import grid
from rankwise.result import Result

# How a method's product is loaded, by who reads it.
LOADED = {
    "peft": "A stock PEFT adapter: load it with `PeftModel.from_pretrained(base, folder)`.",
    "transformers": "A stock model: load it with transformers' `from_pretrained(folder)`.",
    "": "Load it with `rankwise evaluate`, or through the method's own `load`.",
}


def write_card(folder: Path, result: Result, plan: RankPlan | None) -> None:
    """Writes README.md into an adapter's folder, in place of PEFT's empty one.

    Args:
        folder: of the adapter.
        result: its record, with the controls'.
        plan: its ranks; None for a method without.
    """
    method = from_description(result.method)
    config = folder / "adapter_config.json"
    base = read_json(config).get("base_model_name_or_path") if config.exists() else ""
    ranks = [] if plan is None else ["## Ranks", "", *_rank_table(plan), ""]
    scaling = "" if plan is None else f" Scaling {plan.scaling:g} (lora_alpha / r) in every layer."
    kind = "LoRA adapter" if plan is not None else f"{result.name}, {method.product}"
    body = [
        f"# {markdown(kind)} for {markdown(result.model)} on {markdown(result.task['name'])}",
        "",
        LOADED[method.stock],
        f"It has {result.trainable_parameters:,} trained parameters, task head included."
        if plan is None
        else _choice(plan),
        *_why(result),
        "",
        *_engines(plan),
        *ranks,
        f"## Figures on {result.rows['evaluated']} {result.split} rows, one seed",
        "",
        *_figures([result, *result.controls]),
        "",
        "## Training",
        "",
        f"{_training(result)}{scaling}",
        "",
    ]
    about = metadata(result, base, method.stock, lora=plan is not None)
    header = f"---\n{yaml.safe_dump(about, sort_keys=False, allow_unicode=True)}---\n\n"
    write_text(folder / "README.md", header + "\n".join(body))


def _why(result: Result) -> list[str]:
    """Why it has this size, where a choice was made."""
    said = result.figures.get("choice")
    return ["", f"The size: {said}."] if isinstance(said, str) else []


def _engines(plan: RankPlan | None) -> list[str]:
    """Which engines misread ranks by layer; nothing where all ranks are alike."""
    if plan is None or len(set(plan.module_ranks().values())) == 1:
        return []
    return [
        "Its ranks differ by layer. PEFT and vLLM read that; llama.cpp, Ollama and TensorRT-LLM "
        "compute another function without a word, and SGLang, TGI, LoRAX and mlx-lm refuse it. For "
        "those: `rankwise export --adapter FOLDER --to llama.cpp --output_dir DIR`.",
        "",
    ]


def _training(result: Result) -> str:
    if result.cost["steps"] == 0:
        return "Cut out of an adapter that an earlier run had trained."
    training = result.training
    rows = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"]
    return (
        f"AdamW, learning rate {training['learning_rate']:g}, {result.cost['steps']} steps of "
        f"{rows} rows per device, seed {training['seed']}."
    )


def _choice(plan: RankPlan) -> str:
    ranks = set(plan.ranks.values())
    size = f"({plan.parameters:,} LoRA parameters)"
    if len(ranks) == 1:
        whole = plan.r > max(ranks) and "trained_ranks" in plan.provenance
        how = f", cut out of a training of ranks up to {plan.r}" if whole else ""
        return f"Every adapted module has rank {ranks.pop()}{how} {size}."
    return f"Its ranks differ by layer {size}; they come from {_method(plan)}."


def _method(plan: RankPlan) -> str:
    method = plan.provenance.get("method")
    try:
        return markdown(from_description(method).says(plan))
    except (RankwiseError, TypeError, ValueError, KeyError, AttributeError):  # another tool's
        return f"a {markdown(method)} plan" if isinstance(method, str) else "a plan made by hand"


def _rank_table(plan: RankPlan) -> list[str]:
    layers, matrices, ranks = grid(plan.ranks)
    names = [markdown(name) for name in matrices]
    lines = ["| layer | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(matrices)]
    for i, layer in enumerate(layers):
        cells = ["" if row[i] is None else str(row[i]) for row in ranks]
        lines.append(f"| {markdown(layer)} | " + " | ".join(cells) + " |")
    return lines


def _figures(results: Sequence[Result]) -> list[str]:
    metrics = results[0].task["metrics"]
    lines = [
        "| method | " + " | ".join(map(markdown, metrics)) + " | trainable parameters |",
        "| --- |" + " ---: |" * (len(metrics) + 1),
    ]
    for result in results:
        cells = [f"{result.metrics[m]:.4f}" if m in result.metrics else "" for m in metrics]
        lines.append(
            f"| {markdown(result.name)} | {' | '.join(cells)} | {result.trainable_parameters:,} |"
        )
    return lines
