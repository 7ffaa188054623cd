"""Sums up experiments/results/autolora: README.md's tables, and whether seeds agree on ranks.

python experiments/summary.py            writes results/autolora-summary.json, README.md, ranks.png
                                         (README.md's table of costs is benchmarks/results')
python experiments/summary.py --check    exits with 1 where README.md is out of date
"""

import argparse
import json
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rankwise import RankPlan
from rankwise.files import write_json, write_text
from rankwise.report import save_heatmap
from rankwise.report.statistics import agreement, spread
from rankwise.result import Result

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
COST = HERE.parent / "benchmarks" / "results" / "step_cost.json"
STEPS = {
    "lora": "plain PEFT LoRA",
    "adalora": "PEFT AdaLoRA",
    "gated": "LoRA with a gate",
    "finite_difference": "AutoLoRA, `finite_difference` (default)",
    "finite_difference_two_sided": "AutoLoRA, two-sided",
    "exact": "AutoLoRA, `exact`",
    "first_order": "AutoLoRA, `first_order`",
    "dylora": "DyLoRA",
    "dylora_frozen": "DyLoRA, frozen",
}
METRIC = {
    "accuracy": "accuracy",
    "pearson": "Pearson",
    "matthews_correlation": "Matthews",
    "f1": "F1",
}
# by the column of the table, which of a run's results: itself, or one of its controls
ARMS = {"learned": None, "uniform r=4": 0, "random, same size": 1}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    runs = load()
    summary = {task: summarise(found) for task, found in runs.items()}
    text = README.read_text(encoding="utf-8")
    new = replace_block(text, "results", results_table(summary))
    new = replace_block(new, "agreement", agreement_table(summary))
    new = replace_block(new, "cost", cost_table(json.loads(COST.read_text())))
    if check:
        raise SystemExit(
            0 if new == text else "README.md is out of date: run experiments/summary.py"
        )
    write_json(HERE / "results" / "autolora-summary.json", summary)
    write_text(README, new)
    plan = RankPlan.load(HERE / "results" / "autolora" / "mrpc-seed0.plan.json")
    save_heatmap(plan, HERE.parent / "docs" / "ranks.png")


def load() -> dict[str, list[Result]]:
    """Runs by task, in the order of seeds."""
    runs: dict[str, list[Result]] = {}
    for path in sorted((HERE / "results" / "autolora").glob("*-seed*.json")):
        if path.name.endswith(".plan.json"):
            continue
        runs.setdefault(path.name.partition("-seed")[0], []).append(Result.load(path))
    return runs


def summarise(runs: list[Result]) -> dict[str, Any]:
    """One task: mean and sd over seeds of the main metric per arm, of the gains, of the ranks."""
    metric = runs[0].task["metrics"][0]
    score = {arm: [pick(run, which).metrics[metric] for run in runs] for arm, which in ARMS.items()}
    gain = {
        arm: spread([a - b for a, b in zip(score["learned"], score[arm], strict=True)])
        for arm in list(ARMS)[1:]
    }
    return {
        "metric": metric,
        "seeds": [run.training["seed"] for run in runs],
        "eval_rows": runs[0].rows["evaluated"],
        "train_rows": runs[0].rows["train"],
        "learning_rate": runs[0].training["learning_rate"],
        "score": {arm: spread(values) for arm, values in score.items()},
        "gain_over": gain,
        "parameters": {
            arm: spread([pick(run, which).lora_parameters for run in runs])
            for arm, which in ARMS.items()
        },
        "mean_rank": spread([round(statistics.mean(run.ranks.values()), 4) for run in runs]),
        "lowest_rank": min(min(run.ranks.values()) for run in runs),
        "highest_rank": max(max(run.ranks.values()) for run in runs),
        "agreement": agreement([list(run.ranks.values()) for run in runs]),
    }


def pick(run: Result, control: int | None) -> Result:
    """The run's own result, or one of its controls'."""
    return run if control is None else run.controls[control]


def results_table(summary: dict[str, Any]) -> str:
    rows = []
    for task, found in sorted(summary.items(), key=order):
        scores = [points(found["score"][arm]) for arm in ARMS]
        gains = [points(found["gain_over"][arm], sign=True) for arm in list(ARMS)[1:]]
        rows.append([label(task, found), *scores, *gains, len(found["seeds"])])
    head = ["task, metric", *ARMS, "learned − uniform", "learned − random", "seeds"]
    return table(head, rows)


def agreement_table(summary: dict[str, Any]) -> str:
    rows = []
    for task, found in sorted(summary.items(), key=order):
        if found["agreement"] is None:
            continue
        mean, agreement = found["mean_rank"], found["agreement"]
        rows.append(
            [
                task,
                f"{found['lowest_rank']} to {found['highest_rank']}",
                f"{mean['mean']:.2f} ± {mean['sd']:.2f}",
                f"{agreement['mean_correlation']:+.2f}",
                f"{agreement['p']:.2f}",
            ]
        )
    correlation = "correlation of ranks between seeds"
    return table(["task", "ranks found", "mean rank", correlation, "p (permutation)"], rows)


def cost_table(found: dict[str, Any]) -> str:
    """What a step costs, as ratios to plain LoRA's in the same run."""
    rows = []
    for key, name in STEPS.items():
        ratios = found["ratios_to_lora"][key]
        time = f"{ratios['time']:.2f} ({ratios['time_q1']:.2f} to {ratios['time_q3']:.2f})"
        every = f"{ratios['all_ranks']:.3f}" if "all_ranks" in ratios else ""
        rows.append([name, time, f"{ratios['peak']:.2f}", every])
    return table(["step", "time", "peak memory", "all ranks"], rows)


def order(item: tuple[str, dict[str, Any]]) -> tuple[int, str]:
    return -len(item[1]["seeds"]), item[0]


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Markdown: the first column to the left, the others to the right as numbers are."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def label(task: str, found: dict[str, Any]) -> str:
    """A task and its metric, at the head of a row."""
    return f"{task}, {METRIC[found['metric']]}"


def points(value: dict[str, float], sign: bool = False) -> str:
    """In points, x 100: mean ± sd, or the one value there is."""
    mean = f"{100 * value['mean']:{'+' if sign else ''}.1f}"
    return mean if value["n"] < 2 else f"{mean} ± {100 * value['sd']:.1f}"


def replace_block(text: str, name: str, block: str) -> str:
    """The text between `<!-- name -->` and `<!-- /name -->` replaced."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"README.md has no block <!-- {name} -->")
    return pattern.sub(lambda m: m[1] + block + "\n" + m[2], text)


if __name__ == "__main__":
    main()
