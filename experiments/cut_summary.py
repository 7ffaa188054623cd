"""Sums up experiments/results/cut: the tables of docs/cut.md and README.md, and their figure.

python experiments/cut_summary.py    writes results/cut-summary.json, docs/cut.md, docs/cut.png and
                                     README.md
"""

import json
import statistics
from pathlib import Path
from typing import Any

from summary import replace_block

from rankwise.files import temporary_name, write_json, write_text

HERE = Path(__file__).parent
PAGES = {"cut": HERE.parent / "docs" / "cut.md", "cut-short": HERE.parent / "README.md"}
SUMMARY = HERE / "results" / "cut-summary.json"
SIZES = (4, 8, 16, 32, 64)
ORDERS = (
    "by data",
    "by data, one look",
    "by data, one look, gates at 1",
    "activations",
    "one threshold on σ",
    "energy per layer",
    "one rank by SVD",
    "random",
)
SCRATCH = ("all linear, r=1", "query and value, r=1")
CONTROL = "one threshold on σ"


def main() -> None:
    found = summarise(load())
    write_json(SUMMARY, found)
    for block, page in PAGES.items():
        table = tables(found) if block == "cut" else short_table(found)
        write_text(page, replace_block(page.read_text(encoding="utf-8"), block, table))
    draw(found, HERE.parent / "docs" / "cut.png")


def load() -> dict[str, list[dict[str, Any]]]:
    """Result files that have all arms, by task, in the order of seeds."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((HERE / "results" / "cut").glob("*-seed*.json")):
        found = json.loads(path.read_text())
        if set(found["arms"]) >= {"all pieces", *ORDERS, *SCRATCH}:
            runs.setdefault(path.name.partition("-seed")[0], []).append(found)
    return runs


def summarise(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """By task, means over seeds; over tasks, means of the loss that a cut gives up."""
    found: dict[str, Any] = {"tasks": {task: one_task(seeds) for task, seeds in runs.items()}}
    found["given_up"] = {
        order: {
            str(size): statistics.mean(
                t["given_up"][order][str(size)] for t in found["tasks"].values()
            )
            for size in SIZES
        }
        for order in ORDERS
    }
    found["saved_at_16"] = 1 - found["given_up"]["by data"]["16"] / found["given_up"][CONTROL]["16"]
    found["below_control"] = {
        str(size): sum(
            t["given_up"]["by data"][str(size)] < t["given_up"][CONTROL][str(size)]
            for t in found["tasks"].values()
        )
        for size in SIZES
    }
    return found


def one_task(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    metric = seeds[0]["task"]["metrics"][0]

    def mean(arm: str, size: int | None, name: str) -> float:
        arms = (run["arms"][arm] for run in seeds)
        return statistics.mean((a if size is None else a[str(size)])[name] for a in arms)

    whole = {name: mean("all pieces", None, name) for name in ("loss", metric)}
    return {
        "metric": metric,
        "seeds": [run["seed"] for run in seeds],
        "learning_rate": seeds[0]["recipe"]["learning_rate"],
        "evaluation_rows": seeds[0]["evaluation_rows"],
        "parameters": seeds[0]["parameters"],
        "all pieces": whole,
        "loss": {o: {str(s): mean(o, s, "loss") for s in SIZES} for o in ORDERS},
        "score": {o: {str(s): mean(o, s, metric) for s in SIZES} for o in ORDERS},
        "given_up": {
            o: {str(s): mean(o, s, "loss") - whole["loss"] for s in SIZES} for o in ORDERS
        },
        "scratch": {
            name: {key: mean(name, None, key) for key in ("parameters", "loss", metric)}
            for name in SCRATCH
        },
    }


def tables(found: dict[str, Any]) -> str:
    return "\n\n".join([given_up_table(found), scores_table(found)])


def given_up_table(found: dict[str, Any]) -> str:
    """The loss that each order gives up against all pieces, mean over tasks."""
    lines = [
        f"Loss given up against all pieces, mean over {len(found['tasks'])} tasks:",
        "",
        "| order | " + " | ".join(f"1/{size}" for size in SIZES) + " |",
        "| --- |" + " ---: |" * len(SIZES),
    ]
    for order in ORDERS:
        cells = [f"{found['given_up'][order][str(size)]:+.3f}" for size in SIZES]
        lines.append(f"| {order} | {' | '.join(cells)} |")
    return "\n".join(lines)


def scores_table(found: dict[str, Any]) -> str:
    """The metric in points, by task and size, of the order by data and of its control."""
    head = [f"1/{size}" for size in SIZES]
    lines = [
        "The task's metric in points: by data / one threshold on σ.",
        "",
        "| task, metric | all | " + " | ".join(head) + " | from scratch, r=1 | seeds |",
        "| --- | ---: |" + " ---: |" * (len(head) + 2),
    ]
    for task, t in found["tasks"].items():
        cells = [
            f"{100 * t['score']['by data'][str(s)]:.1f} / {100 * t['score'][CONTROL][str(s)]:.1f}"
            for s in SIZES
        ]
        whole = 100 * t["all pieces"][t["metric"]]
        scratch = 100 * t["scratch"]["all linear, r=1"][t["metric"]]
        name = f"{task}, {t['metric'].replace('_', ' ')}"
        lines.append(
            f"| {name} | {whole:.1f} | {' | '.join(cells)} | {scratch:.1f} | {len(t['seeds'])} |"
        )
    return "\n".join(lines)


def short_table(found: dict[str, Any]) -> str:
    """README's: at 1/8 and 1/32, by data, by σ, at random, and from scratch."""
    lines = [
        "| task, metric | all pieces | 1/8 by data | 1/8 by σ | 1/8 random | 1/8 from scratch | "
        "1/32 by data | 1/32 by σ |",
        "| --- |" + " ---: |" * 7,
    ]
    for task, t in found["tasks"].items():
        score = t["score"]
        values = [
            t["all pieces"][t["metric"]],
            *(score[o]["8"] for o in ("by data", CONTROL, "random")),
            t["scratch"]["all linear, r=1"][t["metric"]],
            *(score[o]["32"] for o in ("by data", CONTROL)),
        ]
        name = f"{task}, {t['metric'].replace('_', ' ')}"
        lines.append(f"| {name} | {' | '.join(f'{100 * v:.1f}' for v in values)} |")
    return "\n".join(lines)


def draw(found: dict[str, Any], path: Path) -> None:
    """The loss given up over the size, all orders, mean over tasks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2, 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shown = [order for order in ORDERS if order != "random"]
    for order in shown:
        values = [found["given_up"][order][str(size)] for size in SIZES]
        width = 2.4 if order == "by data" else 1.2
        axes.plot(SIZES, values, marker="o", markersize=3.5, linewidth=width, label=order)
    axes.set_xscale("log", base=2)
    axes.set_xticks(SIZES, [f"1/{size}" for size in SIZES])
    axes.set_xlabel("share of the LoRA parameters that is kept")
    axes.set_ylabel("loss given up")
    axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    axes.legend(fontsize=8, frameon=False)
    axes.set_title(f"one trained LoRA, cut; mean over {len(found['tasks'])} tasks", fontsize=10)
    with temporary_name(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


if __name__ == "__main__":
    main()
