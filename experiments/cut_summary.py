"""Sums up experiments/results/cut: the tables of docs and README.md, and their figure.

python experiments/cut_summary.py    writes results/cut-summary.json, docs/cut.md, docs/cut.png,
                                     docs/compare.md and README.md
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from summary import replace_block

from rankwise.files import temporary_name, write_json, write_text
from rankwise.report.statistics import t_over_tasks, two_level

HERE = Path(__file__).parent
PAGES = {
    "cut": HERE.parent / "docs" / "cut.md",
    "cut-short": HERE.parent / "README.md",
    "rates": HERE.parent / "docs" / "compare.md",
}
SUMMARY = HERE / "results" / "cut-summary.json"
SIZES = (4, 8, 16, 32, 64)
ORDERS = (
    "by data, four looks",
    "by data, seven looks",
    "by data, one look",
    "activations",
    "one threshold on σ",
    "energy per layer",
    "one rank by SVD",
    "random",
)
TRAINED_ON = ("by data, healed", "one threshold on σ, healed", "by data, half-way")
HEAD = "by data, head re-fitted"
SCRATCH = ("all linear, r=1", "AdaLoRA", "query and value, r=1")
CONTROL = "one threshold on σ"
OURS = "by data, four looks"  # the default, but for the steps that it undoes
DEFAULT = "by data"
WIDE = (DEFAULT, CONTROL, "one rank by SVD", "random")  # of rank 16
MARGIN = 0.01


def main() -> None:
    found = summarise(load()) | {"of_rank_16": rank_16()}
    write_json(SUMMARY, found)
    blocks = {"cut": tables, "cut-short": short_table, "rates": rates_table}
    for block, page in PAGES.items():
        text = replace_block(page.read_text(encoding="utf-8"), block, blocks[block](found))
        write_text(page, text)
    draw(found, HERE.parent / "docs" / "cut.png")


def load(rank: int = 8, orders: Sequence[str] = ORDERS) -> dict[str, list[dict[str, Any]]]:
    """Result files of a rank that have these orders, by task, in the order of seeds."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((HERE / "results" / "cut").glob("*-seed*.json")):
        found = json.loads(path.read_text())
        if found["r"] == rank and set(found["arms"]) >= {"all pieces", *orders}:
            runs.setdefault(path.name.partition("-")[0], []).append(found)
    return runs


def rank_16() -> dict[str, Any]:
    """What the tables say of LoRA of rank 16, by task."""
    shown = ("metric", "seeds", "rates", "parameters", "all pieces", "score", "loss", "given_up")
    found = {task: one_task(seeds) for task, seeds in load(16, WIDE).items()}
    return {task: {key: t[key] for key in shown} for task, t in found.items()}


def summarise(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """By task, means over seeds; over tasks, means of the loss that a cut gives up."""
    tasks = {task: one_task(seeds) | {"trained": trained(seeds)} for task, seeds in runs.items()}
    given_up = loss_given_up(tasks, ORDERS)
    return {
        "tasks": tasks,
        "rates": rates(),
        "paired": {name: paired(runs, name) for name in ("metric", "loss")},
        "head": before_and_after(runs, OURS, HEAD),
        "undoing": undoing(runs),
        "given_up": given_up,
        "saved_at_16": 1 - given_up[OURS]["16"] / given_up[CONTROL]["16"],
        "below_control": {
            s: sum(t["given_up"][OURS][s] < t["given_up"][CONTROL][s] for t in tasks.values())
            for s in NAMES
        },
    }


NAMES = tuple(map(str, SIZES))


def loss_given_up(tasks: dict[str, Any], orders: Sequence[str]) -> dict[str, dict[str, float]]:
    """By order and size, the mean over tasks."""
    return {
        order: {s: statistics.mean(t["given_up"][order][s] for t in tasks.values()) for s in NAMES}
        for order in orders
    }


def paired(runs: dict[str, list[dict[str, Any]]], name: str) -> dict[str, Any]:
    """By size, what the order by data has more than σ's threshold on the same adapter: the mean
    over tasks, and its intervals by both ways of `rankwise.report.statistics`."""
    found = {}
    for size in NAMES:
        by_task = []
        for seeds in runs.values():
            metric = seeds[0]["task"]["metrics"][0] if name == "metric" else "loss"
            arms = ([run["arms"][arm][size][metric] for run in seeds] for arm in (OURS, CONTROL))
            by_task.append([a - b for a, b in zip(*arms, strict=True)])
        two, over = two_level(by_task), t_over_tasks(by_task)
        found[size] = {
            "mean": two.mean,
            "two_level": [two.low, two.high],
            "t_over_tasks": [over.low, over.high],
        }
    return found


def before_and_after(
    runs: dict[str, list[dict[str, Any]]], before: str, after: str
) -> dict[str, Any]:
    """By task, two arms on the same adapters, of the seeds that have both."""
    found = {}
    for task, seeds in runs.items():
        have = [run for run in seeds if {before, after} <= set(run["arms"])]
        if have:
            metric = have[0]["task"]["metrics"][0]
            sizes = [size for size in NAMES if size in have[0]["arms"][after]]
            found[task] = {
                "seeds": [run["seed"] for run in have],
                "metric": metric,
                **{
                    arm: {
                        size: {name: mean(have, arm, size, name) for name in (metric, "loss")}
                        for size in sizes
                    }
                    for arm in (before, after)
                },
            }
    return found


def undoing(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What undoing steps that were too long does to the order by data, and σ's beside it."""
    found = before_and_after(runs, OURS, DEFAULT)
    controls = before_and_after(runs, DEFAULT, CONTROL)
    for task, about in found.items():
        have = [run for run in runs[task] if DEFAULT in run["arms"]]
        about["looks"] = [run["arms"][DEFAULT]["looks"] for run in have]
        about[CONTROL] = controls[task][CONTROL]
    return found


def trained(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the seeds that have every arm with a training of its own that the first seed has."""
    wanted = {*TRAINED_ON, *SCRATCH} & set(seeds[0]["arms"])
    found = one_task([run for run in seeds if wanted <= set(run["arms"])])
    shown = (OURS, *TRAINED_ON)
    values = {key: {a: v for a, v in found[key].items() if a in shown} for key in ("score", "loss")}
    return {key: found[key] for key in ("metric", "seeds", "all pieces", "scratch")} | values


def rates() -> dict[str, Any]:
    """What LoRA of rank 8 scores on held-out training rows at each learning rate, by task."""
    found: dict[str, Any] = {}
    for path in sorted((HERE / "results" / "cut" / "tune").glob("*-seed0-*.json")):
        task, _, rest = path.name.partition("-")
        if not rest.startswith("all-pieces"):
            continue
        run = json.loads(path.read_text())
        about = found.setdefault(task, {"metric": run["metrics"][0]})
        about[f"{run['learning_rate']:g}"] = run.get("held_out")
    return found


def rates_table(found: dict[str, Any]) -> str:
    """By task, the metric in points and the loss at each rate."""
    names = ("0.0001", "0.001", "0.003")
    lines = [
        f"| task, metric | {' | '.join(f'{float(name):.0e}' for name in names)} |",
        "| --- |" + " ---: |" * len(names),
    ]
    for task, by_rate in found["rates"].items():
        runs = (by_rate[name] for name in names)
        cells = [f"{100 * run[by_rate['metric']]:.1f} / {run['loss']:.3f}" for run in runs]
        lines.append(f"| {task}, {by_rate['metric'].replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def one_task(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    metric = seeds[0]["task"]["metrics"][0]
    whole = {name: mean(seeds, "all pieces", None, name) for name in ("loss", metric)}
    cut = [
        arm for arm in (*ORDERS, DEFAULT, *TRAINED_ON) if all(arm in run["arms"] for run in seeds)
    ]
    scratch = [arm for arm in SCRATCH if all(arm in run["arms"] for run in seeds)]
    sizes = {arm: [s for s in NAMES if s in seeds[0]["arms"][arm]] for arm in cut}
    loss = {arm: {s: mean(seeds, arm, s, "loss") for s in sizes[arm]} for arm in cut}
    score = {arm: {s: mean(seeds, arm, s, metric) for s in sizes[arm]} for arm in cut}
    return {
        "metric": metric,
        "seeds": [run["seed"] for run in seeds],
        "rates": seeds[0]["rates"],
        "steps": seeds[0]["steps"],
        "evaluation_rows": seeds[0]["evaluation_rows"],
        "parameters": seeds[0]["parameters"],
        "all pieces": whole,
        "loss": loss,
        "score": score,
        "given_up": {a: {s: v - whole["loss"] for s, v in loss[a].items()} for a in cut},
        "scratch": {
            arm: {key: mean(seeds, arm, None, key) for key in ("parameters", "loss", metric)}
            for arm in scratch
        },
        "as_good": {
            arm: as_good(score[arm], whole[metric])
            for arm in (OURS, DEFAULT, CONTROL)
            if arm in cut
        },
    }


def mean(seeds: list[dict[str, Any]], arm: str, size: str | None, name: str) -> float:
    arms = (run["arms"][arm] for run in seeds)
    return statistics.mean((a if size is None else a[size])[name] for a in arms)


def as_good(score: dict[str, float], whole: float) -> int:
    """The largest n so that 1/n and all larger sizes lie within a point of all pieces; or 1."""
    found = 1
    for name, value in score.items():
        if value < whole - MARGIN:
            break
        found = int(name)
    return found


def tables(found: dict[str, Any]) -> str:
    said = "The task's metric in points, and the loss: by data / one threshold on σ."
    lost = "Loss given up against all pieces, mean over {} tasks:"
    parts = [given_up_table(found["given_up"], lost.format(len(found["tasks"])))]
    parts += [scores_table(found["tasks"], said), paired_table(found)]
    if found["undoing"]:
        parts.append(undoing_table(found["undoing"]))
    parts.append(trained_table(found))
    if found["head"]:
        head = (
            "Metric in points / loss of the cut by data (four looks) → after a tenth of the steps "
            "for its head alone:"
        )
        parts.append(before_and_after_table(found["head"], OURS, HEAD, head))
    if wide := found["of_rank_16"]:
        said = "LoRA of rank 16, whose 1/8 has as many parameters as 1/4 above:"
        parts.append(scores_table(wide, said, DEFAULT))
        lost = f"Of rank 16: {lost[0].lower()}{lost[1:]}"
        parts.append(given_up_table(loss_given_up(wide, WIDE), lost.format(len(wide))))
    return "\n\n".join([*filter(None, parts), aims(found)])


def given_up_table(given_up: dict[str, dict[str, float]], said: str) -> str:
    """The loss that each order gives up against all pieces, mean over tasks."""
    lines = [
        said,
        "",
        "| order | " + " | ".join(f"1/{size}" for size in SIZES) + " |",
        "| --- |" + " ---: |" * len(SIZES),
    ]
    for order, by_size in given_up.items():
        cells = [f"{by_size[s]:+.3f}" for s in NAMES]
        lines.append(f"| {order} | {' | '.join(cells)} |")
    return "\n".join(lines)


def scores_table(tasks: dict[str, Any], said: str, ours: str = OURS) -> str:
    """The metric in points, by task and size, of the order by data and of its control."""
    lines = [
        said,
        "",
        "| task | | all | " + " | ".join(f"1/{size}" for size in SIZES) + " | seeds |",
        "| --- | --- | ---: |" + " ---: |" * (len(SIZES) + 1),
    ]
    for task, t in tasks.items():
        for name, scale, digits in ((t["metric"], 100, 1), ("loss", 1, 3)):
            values = t["loss"] if name == "loss" else t["score"]
            pairs = ((values[ours][s], values[CONTROL][s]) for s in NAMES)
            cells = [f"{scale * a:.{digits}f} / {scale * b:.{digits}f}" for a, b in pairs]
            head = f"{task} | {name.replace('_', ' ')} | {scale * t['all pieces'][name]:.{digits}f}"
            lines.append(f"| {head} | {' | '.join(cells)} | {len(t['seeds'])} |")
    return "\n".join(lines)


def paired_table(found: dict[str, Any]) -> str:
    """By data less σ: means over tasks of paired differences, with their intervals."""
    lines = [
        "By data less σ, paired by task and seed; more points and a lower loss are better. Mean "
        "over tasks, and its 95 % interval by a bootstrap of tasks and seeds / by t over tasks, "
        "the more careful one:",
        "",
        "| | " + " | ".join(f"1/{size}" for size in SIZES) + " |",
        "| --- |" + " ---: |" * len(SIZES),
    ]
    for name, head, scale, digits in (("metric", "points", 100, 1), ("loss", "loss", 1, 3)):
        cells = []
        for size in NAMES:
            about = found["paired"][name][size]
            ends = (about[way] for way in ("two_level", "t_over_tasks"))
            said = " / ".join(
                " to ".join(f"{scale * end:+.{digits}f}" for end in pair) for pair in ends
            )
            cells.append(f"{scale * about['mean']:+.{digits}f} ({said})")
        lines.append(f"| {head} | {' | '.join(cells)} |")
    return "\n".join(lines)


def before_and_after_table(found: dict[str, Any], before: str, after: str, said: str) -> str:
    """Two arms, a cell `before → after`."""
    sizes = list(next(iter(found.values()))[after])
    lines = [
        said,
        "",
        "| task | " + " | ".join(f"1/{size}" for size in sizes) + " | seeds |",
        "| --- |" + " ---: |" * (len(sizes) + 1),
    ]
    for task, t in found.items():
        cells = []
        for size in sizes:
            both = (t[arm][size] for arm in (before, after))
            cells.append(" → ".join(f"{100 * m[t['metric']]:.1f} / {m['loss']:.3f}" for m in both))
        lines.append(f"| {task} | {' | '.join(cells)} | {len(t['seeds'])} |")
    return "\n".join(lines)


def undoing_table(found: dict[str, Any]) -> str:
    """What undoing does, how many looks it took, and how often the loss is then below σ's."""
    said = (
        "Metric in points / loss of the order by data in four looks, none of whose steps is undone "
        "→ by default: one look more, at 1/32, and steps undone that were too long:"
    )
    sizes = list(next(iter(found.values()))[DEFAULT])

    def means(arm: str, size: str) -> str:
        points, loss = (
            statistics.mean(t[arm][size][name or t["metric"]] for t in found.values())
            for name in (None, "loss")
        )
        return f"{100 * points:.1f} / {loss:.3f}"

    lower = {
        arm: {
            size: sum(t[arm][size]["loss"] < t[CONTROL][size]["loss"] for t in found.values())
            for size in sizes
        }
        for arm in (OURS, DEFAULT)
    }
    looks = ", ".join(f"{task} {', '.join(map(str, t['looks']))}" for task, t in found.items())
    both = ", ".join(
        f"{means(OURS, size)} → {means(DEFAULT, size)} at 1/{size} (σ {means(CONTROL, size)})"
        for size in sizes[1:]
    )
    counts = ", ".join(
        f"{lower[OURS][size]} → {lower[DEFAULT][size]} of {len(found)} at 1/{size}"
        for size in sizes[1:]
    )
    return (
        f"{before_and_after_table(found, OURS, DEFAULT, said)}\n\nMean over these tasks: "
        f"{both}. A lower loss than σ's: on {counts}. Looks, with the undone ones: {looks}."
    )


def trained_table(found: dict[str, Any]) -> str:
    """What training adds: healed cuts, a cut half-way, and small adapters from scratch."""
    lines = [
        "Metric in points / loss, where a training follows the cut (by seven looks) or takes its "
        "place:",
        "",
        "| task | all | 1/8 by data | healed | half-way | from scratch, r=1 | AdaLoRA "
        "| 1/32 by data | healed | half-way | query and value, r=1 | seeds |",
        "| --- |" + " ---: |" * 11,
    ]
    for task, t in ((task, t["trained"]) for task, t in found["tasks"].items()):
        score, loss = t["score"], t["loss"]

        def cell(arm: str, size: str, score: Any = score, loss: Any = loss) -> str:
            there = arm in score and size in score[arm]
            return f"{100 * score[arm][size]:.1f} / {loss[arm][size]:.3f}" if there else ""

        def scratch(arm: str, t: Any = t) -> str:
            run = t["scratch"].get(arm)
            return f"{100 * run[t['metric']]:.1f} / {run['loss']:.3f}" if run else ""

        cells = [
            f"{100 * t['all pieces'][t['metric']]:.1f} / {t['all pieces']['loss']:.3f}",
            cell(OURS, "8"),
            cell("by data, healed", "8"),
            cell("by data, half-way", "8"),
            scratch("all linear, r=1"),
            scratch("AdaLoRA"),
            cell(OURS, "32"),
            cell("by data, healed", "32"),
            cell("by data, half-way", "32"),
            scratch("query and value, r=1"),
            str(len(t["seeds"])),
        ]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(lines)


def aims(found: dict[str, Any]) -> str:
    """What was aimed at, and what came out."""
    tasks, below = found["tasks"], found["below_control"]
    smaller = [
        f"{task} 1/{t['as_good'][OURS]} by data, 1/{t['as_good'][CONTROL]} by σ"
        for task, t in tasks.items()
    ]
    return (
        "A lower loss than σ's: on "
        + ", ".join(f"{below[s]} of {len(tasks)} tasks at 1/{s}" for s in NAMES[1:])
        + f". Of the loss that σ gives up at 1/16 the order by data saves "
        f"{100 * found['saved_at_16']:.0f} %, in the mean over tasks. The smallest size within a "
        f"point of all pieces in the metric: {'; '.join(smaller)}."
    )


def short_table(found: dict[str, Any]) -> str:
    """README's: at 1/8 and 1/32, by data, by σ, at random, and from scratch."""
    lines = [
        "| task, metric | all pieces | 1/8 by data | 1/8 by σ | 1/8 random | 1/8 from scratch | "
        "1/32 by data | 1/32 by σ | seeds |",
        "| --- |" + " ---: |" * 8,
    ]
    for task, t in found["tasks"].items():
        score, scratch = t["score"], t["trained"]["scratch"].get("all linear, r=1")
        values = [
            t["all pieces"][t["metric"]],
            *(score[o]["8"] for o in (OURS, CONTROL, "random")),
            None if scratch is None else scratch[t["metric"]],
            *(score[o]["32"] for o in (OURS, CONTROL)),
        ]
        name = f"{task}, {t['metric'].replace('_', ' ')}"
        cells = ["" if v is None else f"{100 * v:.1f}" for v in values]
        if scratch is not None and t["trained"]["seeds"] != t["seeds"]:
            cells[4] += f" (seed {', '.join(map(str, t['trained']['seeds']))})"
        lines.append(f"| {name} | {' | '.join(cells)} | {len(t['seeds'])} |")
    return "\n".join(lines)


def draw(found: dict[str, Any], path: Path) -> None:
    """The loss given up over the size, all orders, mean over tasks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shown = [order for order in ORDERS if order != "random"]
    for order in shown:
        values = [found["given_up"][order][name] for name in NAMES]
        width = 2.4 if order == OURS else 1.2
        style = "--" if "SVD" in order else "-"  # it lies on the line of the energy
        axes.plot(SIZES, values, style, marker="o", markersize=3.5, linewidth=width, label=order)
    axes.set_xscale("log", base=2)
    axes.set_xticks(SIZES, [f"1/{size}" for size in SIZES])
    axes.set_xlabel("share of the LoRA parameters that is kept")
    axes.set_ylabel("loss given up")
    axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes.set_title(f"one trained LoRA, cut; mean over {len(found['tasks'])} tasks", fontsize=10)
    with temporary_name(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


if __name__ == "__main__":
    main()
