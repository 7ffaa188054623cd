"""Whether a result is more than a model would score that was taught nothing."""

import math
import re

from rankwise.result import Result
from rankwise.tasks.metrics import METRICS, find_metric

LEARNED = 2.0  # standard errors above what a model that was taught nothing scores


def scale(metric: str) -> float | None:
    """What makes points, hundredths of the best value, of a metric; None where it has no end."""
    found = re.search(r"to (\d+)", find_metric(metric).range) if metric in METRICS else None
    return 100 / float(found[1]) if found else None


def learned(result: Result) -> bool | None:
    """Whether a result is above what a model that was taught nothing scores, by two standard errors
    of so many rows; None where the file does not say what that is."""
    metric = str(result.task["metrics"][0])  # a base model's texts are not scored, its loss is
    floor = result.about.get("floor", {}).get(metric)
    if floor is None and "0 for" in find_metric(metric).range:
        floor = 0.0
    if not isinstance(floor, int | float):
        return None
    rows = max(1, result.rows.get("evaluated", 1))
    known = find_metric(metric)
    better = (1 if known.greater_is_better else -1) * (result.metrics[metric] - floor)
    if scale(metric) is None:  # a loss, say: of the base model as it was
        return bool(better > 0.01 * abs(floor))
    share = floor if 0 < floor < 1 else 0.5
    spread = 1.0 if "-1" in known.range else math.sqrt(share * (1 - share))
    return bool(better > LEARNED * spread / math.sqrt(rows) * (100 / (scale(metric) or 100)))
