"""`rankwise search`: choose ranks, write plan.json."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rankwise.cli.arguments import required
from rankwise.cli.job import load, parse_job, settings_of
from rankwise.errors import RankwiseError
from rankwise.methods import DEFAULT_SEARCH

if TYPE_CHECKING:
    from rankwise.plan import RankPlan


def main(argv: Sequence[str]) -> None:
    """Choose the rank of every layer from your data, and write the plan.

    With a method whose one training gives every size, also the adapter at the chosen one, and what
    `rankwise cut` makes the others from.
    """
    parts = parse_job("search", main.__doc__ or "", argv, method=DEFAULT_SEARCH)
    method, model, data, fit, output = parts
    target = required(output.output_dir, "output_dir", "search")
    if not method.chooses:
        raise RankwiseError(f"{method.title} chooses nothing; use rankwise run --method ...")
    from rankwise.workspace import check_output, finish, is_finished, open_workspace

    resume = output.resume_from_checkpoint
    check_output(target, output.overwrite_output_dir, resume)
    job = load("search", model, data, fit).at_rate(fit.learning_rate, method)
    from rankwise.cli.run import show
    from rankwise.cli.show import report, say
    from rankwise.files import write_json
    from rankwise.job import check, rests_on
    from rankwise.plan import RankPlan
    from rankwise.report import save_heatmap
    from rankwise.stages import choose_stage, run_method

    base = check(method, job)
    settings = settings_of(method, model, data, fit)
    settings["rests_on"] = rests_on(job, base)
    if resume and is_finished(target, settings):
        say("this search is finished already")
        say(summary(RankPlan.load(Path(target) / "plan.json"), Path(target)))
        return
    work = open_workspace(target, output.overwrite_output_dir, resume, settings)
    if method.anew:
        plan, found = choose_stage(method, job, work, resume, base)
        write_json(work / "search.json", found | {"method": method.describe(), "ranks": plan.ranks})
        save_heatmap(plan, work / "ranks.png")
        folder = finish(work, target)
    else:
        result = run_method(method, job, work, resume, base)
        report(result, work)
        folder = finish(work, target)
        show(result, folder)
    say(summary(RankPlan.load(folder / "plan.json"), folder))


def summary(plan: "RankPlan", folder: Path) -> str:
    """A plan in a line."""
    ranks = list(plan.ranks.values())
    return (
        f"ranks {min(ranks)} to {max(ranks)} on {len(ranks)} modules, "
        f"mean {sum(ranks) / len(ranks):.2f}, "
        f"{plan.parameters:,} parameters -> {folder / 'plan.json'}"
    )
