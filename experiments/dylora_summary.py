"""Sums up experiments/results/dylora: the tables of docs/dylora.md, and its figure.

python experiments/dylora_summary.py     writes results/dylora-summary.json, docs/dylora.{md,png}
"""

import json
import statistics
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from summary import METRIC, label, points, replace_block, spread, table

from rankwise.files import temporary_name, write_json, write_text
from rankwise.report import draw_curves

HERE = Path(__file__).parent
DOC = HERE.parent / "docs" / "dylora.md"
UNLEARNED = ("cola", "rte")
RANKS = [str(b) for b in range(1, 9)]
SHOWN = ("1", "2", "4", "8")
ARMS = {
    "LoRA trained at that rank": "lora",
    "DyLoRA": "dylora",
    "DyLoRA, frozen": "dylora-frozen",
    "LoRA of rank 8, cut by SVD": "svd",
    "LoRA of rank 8, first pieces": "first-pieces",
}


def main() -> None:
    summary = summarise(load())
    text = replace_block(DOC.read_text(encoding="utf-8"), "evidence", tables(summary))
    write_json(HERE / "results" / "dylora-summary.json", summary)
    write_text(DOC, text)
    draw(summary, HERE.parent / "docs" / "dylora.png")


def load() -> dict[str, list[dict[str, Any]]]:
    """Complete runs by task, in the order of seeds; all arms of one have as many steps."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((HERE / "results" / "dylora").glob("*-seed*.json")):
        run = json.loads(path.read_text())
        wanted = {*ARMS.values(), *(f"lora-{b}" for b in RANKS)} - {"lora"}
        if wanted <= set(run["arms"]):
            runs.setdefault(path.name.partition("-seed")[0], []).append(run)
    return runs


def score(run: dict[str, Any], arm: str, b: str) -> float:
    """The task's main metric of an arm at a rank."""
    key = f"lora-{b}" if arm == "lora" else arm
    return run["arms"][key]["ranks"][b][run["task"]["metrics"][0]]


def summarise(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Per task and for the mean over tasks: mean and sd over seeds by arm and rank, and gaps."""
    found = {}
    for task, of in runs.items():
        scores = {a: {b: [score(run, a, b) for run in of] for b in RANKS} for a in ARMS.values()}
        found[task] = {
            "metric": of[0]["task"]["metrics"][0],
            "seeds": [run["training"]["seed"] for run in of],
            "steps": of[0]["arms"]["dylora"]["steps"],
            "train_rows": of[0]["train_rows"],
            "evaluation_rows": of[0]["evaluation_rows"],
            **spreads(scores),
            "elastic": elastic(of),
            "longer": longer(of),
        }
    # Tasks at which LoRA itself is no better than guessing do not tell arms apart: they only make
    # the mean difference look small.
    learned = {task: of for task, of in runs.items() if task not in UNLEARNED}
    means = [mean_over_tasks(runs)]
    means += [mean_over_tasks(learned)] if learned and len(learned) < len(runs) else []
    return {"tasks": found, "means": means}


def spreads(scores: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Mean and sd of scores by arm and rank, and of their differences to LoRA, seed by seed."""
    gaps = {
        arm: {
            b: [x - y for x, y in zip(scores[arm][b], scores["lora"][b], strict=True)]
            for b in RANKS
        }
        for arm in scores
        if arm != "lora"
    }
    return {
        "scores": {arm: {b: spread(v) for b, v in of.items()} for arm, of in scores.items()},
        "minus_lora": {arm: {b: spread(v) for b, v in of.items()} for arm, of in gaps.items()},
    }


def mean_over_tasks(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Scores averaged over tasks first, so that the sd is that of the mean over seeds."""
    by_seed = {task: {run["training"]["seed"]: run for run in of} for task, of in runs.items()}
    seeds = sorted(set.intersection(*(set(of) for of in by_seed.values())))
    scores = {
        arm: {
            b: [
                statistics.fmean(score(of[seed], arm, b) for of in by_seed.values())
                for seed in seeds
            ]
            for b in RANKS
        }
        for arm in ARMS.values()
    }
    return {"tasks": list(runs), "seeds": seeds, **spreads(scores)}


def elastic(runs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Ranks by layer minus one rank at the same size, on rows that they were not chosen on; None
    for a task with too few rows.
    """
    metric = runs[0]["task"]["metrics"][0]
    of = [run["arms"]["elastic"] for run in runs if "elastic" in run["arms"]]
    if not of:
        return None
    return {
        "rank": of[0]["rank"],
        "rows_chosen_on": of[0]["rows_chosen_on"],
        "elastic": spread([run["elastic"][metric] for run in of]),
        "uniform": spread([run["uniform"][metric] for run in of]),
        "gain": spread([run["elastic"][metric] - run["uniform"][metric] for run in of]),
        "gain_in_loss": spread([run["uniform"]["loss"] - run["elastic"]["loss"] for run in of]),
    }


def longer(runs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """DyLoRA trained for more steps, and its differences to LoRA at each rank; None where there is
    no such run.
    """
    of = [run for run in runs if "dylora-longer" in run["arms"]]
    if not of:
        return None
    arms = ("dylora-longer", "dylora", "lora")
    scores = {arm: {b: [score(run, arm, b) for run in of] for b in RANKS} for arm in arms}
    steps = of[0]["arms"]["dylora-longer"]["steps"] / of[0]["arms"]["dylora"]["steps"]
    seeds = [run["training"]["seed"] for run in of]
    return {"times_the_steps": round(steps, 2), "seeds": seeds, **spreads(scores)}


def tables(summary: dict[str, Any]) -> str:
    parts = [mean_table(mean) for mean in summary["means"]]
    parts += [task_table(summary["tasks"]), longer_table(summary["tasks"])]
    return "\n\n".join(filter(None, [*parts, elastic_table(summary["tasks"])]))


def mean_table(mean: dict[str, Any]) -> str:
    seeds = ", ".join(map(str, mean["seeds"]))
    others = {name: arm for name, arm in ARMS.items() if arm != "lora"}
    rows = []
    for b in RANKS:
        gaps = [points(mean["minus_lora"][arm][b], sign=True) for arm in others.values()]
        rows.append([b, points(mean["scores"]["lora"][b]), *gaps])
    return (
        f"Mean over {', '.join(mean['tasks'])}; points, mean ± sd over seeds {seeds}. LoRA is "
        "trained at each rank; the other columns are differences to it:\n\n"
        + table(["rank", "LoRA", *others], rows)
    )


def task_table(tasks: dict[str, Any]) -> str:
    rows = []
    for task, found in tasks.items():
        for b in SHOWN:
            scores = [points(found["scores"][arm][b]) for arm in ARMS.values()]
            rows.append([label(task, found), b, *scores, len(found["seeds"])])
    head = ["task, metric", "rank", *ARMS, "seeds"]
    return "By task, the scores at four of the ranks:\n\n" + table(head, rows)


def longer_table(tasks: dict[str, Any]) -> str:
    rows = []
    for task, found in tasks.items():
        if (run := found["longer"]) is None:
            continue
        for b in SHOWN:
            scores = [points(run["scores"][arm][b]) for arm in ("lora", "dylora", "dylora-longer")]
            gap = points(run["minus_lora"]["dylora-longer"][b], sign=True)
            rows.append([label(task, found), b, *scores, gap, len(run["seeds"])])
    if not rows:
        return ""
    head = ["task, metric", "rank", "LoRA", "DyLoRA", "longer", "longer − LoRA", "seeds"]
    return (
        "DyLoRA trained four times as long, which is half of what LoRA at each rank takes:\n\n"
        + table(head, rows)
    )


def elastic_table(tasks: dict[str, Any]) -> str:
    rows = []
    for task, found in tasks.items():
        if (by_layer := found["elastic"]) is None:
            continue
        scores = [points(by_layer["uniform"]), points(by_layer["elastic"])]
        rows.append([label(task, found), *scores, points(by_layer["gain"], sign=True)])
    head = ["task, metric", "rank 3 everywhere", "by layer", "gain"]
    return "Ranks by layer (`--by_layer`) against one rank at the same size:\n\n" + table(
        head, rows
    )


def draw(summary: dict[str, Any], path: Path) -> None:
    """One panel per task: a curve over ranks for each arm, a band of one sd over seeds."""
    tasks = summary["tasks"]
    rows = 1 if len(tasks) < 4 else 2
    columns = -(-len(tasks) // rows)
    figure = Figure(figsize=(max(7.5, 3.6 * columns), 3.2 * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (task, found) in zip(panels, tasks.items(), strict=False):
        series = {}
        for name, arm in ARMS.items():
            values = [found["scores"][arm][b] for b in RANKS]
            means = [100 * value["mean"] for value in values]
            series[name] = ([int(b) for b in RANKS], means, [100 * v["sd"] for v in values])
        draw_curves(axes, series)
        axes.set_title(f"{task}, seeds: {len(found['seeds'])}", fontsize=10)
        axes.set_ylabel(f"{METRIC[found['metric']]}, points")
        axes.set_xlabel("rank")
    for axes in panels[len(tasks) :]:
        axes.set_axis_off()
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    with temporary_name(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


if __name__ == "__main__":
    main()
