"""The model card of an adapter: what it is, its ranks, its figures and those of the controls."""

import json
from pathlib import Path
from typing import Any

from rankwise.adapter import card_header
from rankwise.files import write_text
from rankwise.methods import AutoLoRA
from rankwise.plan import RankPlan
from rankwise.report.heatmap import grid
from rankwise.tasks import Task


def write_card(
    folder: Path,
    plan: RankPlan,
    metrics: dict[str, Any],
    task: Task,
    arms: dict[str, dict[str, Any]],
) -> None:
    """Writes README.md into an adapter's folder, in place of PEFT's empty one.

    Args:
        folder: of the adapter.
        plan: its ranks.
        metrics: of metrics.json: the training settings and the evaluation.
        task: what it was trained for.
        arms: figures by arm, controls included.
    """
    model = metrics["model"]
    config = json.loads((folder / "adapter_config.json").read_text())
    body = [
        f"# LoRA adapter for {model} on {task.name}",
        "",
        "A stock PEFT adapter: load it with `PeftModel.from_pretrained(base, folder)`.",
        _choice(plan),
        "",
        "## Ranks",
        "",
        *_rank_table(plan),
        "",
        f"## Figures on {metrics['eval']['rows']} {metrics['eval']['split']} rows, one seed",
        "",
        *_figures(task, arms),
        "",
        "## Training",
        "",
        f"{_training(metrics)} Scaling {plan.scaling:g} (lora_alpha / r) in every layer.",
        "",
    ]
    header = card_header(config["base_model_name_or_path"])
    write_text(folder / "README.md", header + "\n".join(body))


def _training(metrics: dict[str, Any]) -> str:
    if metrics["steps"] == 0:
        return "Cut out of an adapter that an earlier run had trained."
    training = metrics["training"]
    rows = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"]
    return (
        f"AdamW, learning rate {training['learning_rate']:g}, {metrics['steps']} steps of {rows} "
        f"rows per device, seed {training['seed']}."
    )


def _choice(plan: RankPlan) -> str:
    ranks = set(plan.ranks.values())
    size = f"({plan.parameters:,} LoRA parameters)"
    if len(ranks) == 1:
        method = plan.provenance.get("method")
        cut = isinstance(method, dict) and method.get("name") == "dylora"
        how = f", cut from a DyLoRA training of ranks up to {plan.r}" if cut else ""
        return f"Every adapted module has rank {ranks.pop()}{how} {size}."
    return f"Its ranks differ by layer {size}; they come from {_method(plan)}."


def _method(plan: RankPlan) -> str:
    method = plan.provenance.get("method")
    if not isinstance(method, dict):
        return f"a {method} plan" if method else "a plan made by hand"
    if method.get("name") == "dylora":
        return "a DyLoRA training of all ranks, chosen within a budget"
    learned = AutoLoRA(**method)
    gates = [(e.rank, e.gate) for e in plan.modules.values() if e.gate is not None]
    edited = any(r != len(learned.kept(list(gate))) for r, gate in gates)
    return f"AutoLoRA ({learned.gate} gate)" + (", edited by hand since" if edited else "")


def _rank_table(plan: RankPlan) -> list[str]:
    layers, matrices, ranks = grid(plan)
    lines = ["| layer | " + " | ".join(matrices) + " |", "| --- |" + " ---: |" * len(matrices)]
    for i, layer in enumerate(layers):
        cells = ["" if row[i] is None else str(row[i]) for row in ranks]
        lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    return lines


def _figures(task: Task, arms: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "| ranks | " + " | ".join(task.metrics) + " | trainable parameters |",
        "| --- |" + " ---: |" * (len(task.metrics) + 1),
    ]
    for name, figures in arms.items():
        cells = [f"{figures['eval'][m]:.4f}" if m in figures["eval"] else "" for m in task.metrics]
        lines.append(f"| {name} | {' | '.join(cells)} | {figures['trainable_parameters']:,} |")
    return lines
