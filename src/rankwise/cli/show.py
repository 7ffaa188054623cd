"""What the commands print and draw of a result."""

from pathlib import Path

from rich.console import Console

from rankwise.choose import Curve
from rankwise.escape import terminal
from rankwise.methods import from_description
from rankwise.plan import RankPlan
from rankwise.report import save_curves, save_heatmap, write_card
from rankwise.result import Result


def say(text: str) -> None:
    """Prints a line on standard error; nothing in it is markup, or moves the cursor."""
    Console(stderr=True, markup=False, emoji=False, highlight=False).print(
        terminal(text), soft_wrap=True
    )


def report(result: Result, folder: Path) -> None:
    """Writes metrics.json, the pictures and the card into a run's folder."""
    file = folder / "plan.json"
    plan = RankPlan.load(file) if file.is_file() else None
    result.save(folder / "metrics.json")
    if plan is not None:
        save_heatmap(plan, folder / "ranks.png")
    if result.curve is not None:
        draw(result, Curve.from_dict(result.curve), folder / "curve.png")
    product = folder / from_description(result.method).product
    if product.is_dir():
        write_card(product, result, plan)


def draw(result: Result, curve: Curve, path: Path) -> None:
    """The metric against the size, with standard errors, and the size that was handed over."""
    ranks = set((result.ranks or {}).values())
    mark = result.lora_parameters
    if curve.unit == "rank":
        mark = ranks.pop() if len(ranks) == 1 else None
    save_curves(
        {result.name: (curve.sizes, curve.values, curve.standard_errors)},
        curve.metric.replace("_", " "),
        path,
        mark=mark,
        spread="standard error",
        unit=curve.unit,
    )
