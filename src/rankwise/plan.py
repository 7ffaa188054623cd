"""RankPlan: which module gets which rank. Pure data: budget arithmetic, LoraConfig, JSON."""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from heapq import heapify, heappop, heappush
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from peft import LoraConfig

from rankwise.errors import PlanError
from rankwise.files import write_text
from rankwise.given import check_path
from rankwise.reading import Unreadable, parse_json

FORMAT = "rankwise-plan/1"
_HUGE = 2**48  # no matrix, rank or scaling is so large, and products of them stay exact


@dataclass(frozen=True)
class Entry:
    """The rank of one module, or of one part of a fused module, and what it costs.

    Attributes:
        rank: >= 0; 0 leaves the module without an adapter.
        in_features: columns of the update matrix ΔW (out x in).
        out_features: rows of ΔW that this entry covers.
        module: exact name of the module in the base model.
        rows: for a part of a fused projection, the rows [start, stop) of ΔW that it covers (GPT-2's
            `c_attn` holds query, key and value); None where the entry covers the whole module.
        gate: the learned gate values, length k, for information; None for a plan made by hand.
    """

    rank: int
    in_features: int
    out_features: int
    module: str
    rows: tuple[int, int] | None = None
    gate: tuple[float, ...] | None = None

    @property
    def cost(self) -> int:
        """Parameters of one rank-1 piece: in_features + out_features."""
        return self.in_features + self.out_features

    @property
    def parameters(self) -> int:
        """Parameters at this entry's rank."""
        return self.rank * self.cost


@dataclass(frozen=True)
class RankPlan:
    """Module name -> rank: the deliverable of every search, and all that retraining needs.

    Attributes:
        modules: entries by name. The name is that of the module in the base model, followed by the
            part's name for a part of a fused module (`transformer.h.0.attn.c_attn.q`).
        r: the largest rank that the search could have chosen (the papers' k).
        scaling: LoRA's factor in front of B A, lora_alpha / r, the same for every module: a module
            of another rank keeps its scale because `alpha_pattern` follows `rank_pattern`.
        provenance: where the plan comes from: method, model, data fingerprint, seeds, versions.

    Example:
        >>> plan = RankPlan.load("runs/mrpc/plan.json")
        >>> model = get_peft_model(base, plan.lora_config(task_type="SEQ_CLS"))
        >>> plan.check(model)
    """

    modules: dict[str, Entry]
    r: int
    scaling: float = 2.0
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _validate(self)

    def __repr__(self) -> str:
        ranks = self.ranks.values()
        return (
            f"RankPlan({len(ranks)} modules, rank {min(ranks)} to {max(ranks)} of {self.r}, "
            f"{self.parameters:,} parameters)"
        )

    def _repr_html_(self) -> str:
        """What a notebook shows: the ranks, matrices by layers."""
        from rankwise.report.heatmap import html_table

        return html_table(repr(self), self.ranks)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank by entry name."""
        return {name: entry.rank for name, entry in self.modules.items()}

    @property
    def parameters(self) -> int:
        """Trainable LoRA parameters of the whole plan, task head not counted."""
        return sum(entry.parameters for entry in self.modules.values())

    def with_ranks(self, ranks: Mapping[str, int], **provenance: Any) -> "RankPlan":
        """The same modules at other ranks; the gate values are dropped, they explain other ranks.

        Args:
            ranks: one rank >= 0 per entry name.
            **provenance: replaces the provenance.

        Raises:
            PlanError: a name that the plan lacks, or one that `ranks` lacks.
        """
        if set(ranks) != set(self.modules):
            odd = sorted(set(ranks) ^ set(self.modules))[0]
            raise PlanError(f"ranks and plan differ in the entry {odd!r}; give one rank per entry")
        modules = {n: replace(e, rank=int(ranks[n]), gate=None) for n, e in self.modules.items()}
        return replace(self, modules=modules, provenance=provenance)

    @classmethod
    def uniform(cls, like: "RankPlan", rank: int) -> "RankPlan":
        """The plan that gives every module the same rank: the control every claim needs.

        Args:
            like: its modules and scaling are taken. For a model there is `rankwise.uniform`.
            rank: of every module, >= 1.

        Raises:
            PlanError: rank < 1.

        Example:
            >>> RankPlan.uniform(plan, 4).parameters
            36864
        """
        if rank < 1:
            raise PlanError(f"r is {rank}; a uniform plan needs a rank of at least 1")
        return like.with_ranks(dict.fromkeys(like.modules, rank), method="uniform", r=rank)

    @classmethod
    def random(cls, like: "RankPlan", seed: int, budget: int | None = None) -> "RankPlan":
        """A plan drawn uniformly from all plans of the same modules and the same parameter count.

        Ranks run from 1 (0 for an entry that `like` leaves at 0) to `like.r`; from 0 where the
        budget is below rank 1 everywhere. The second control: a learned plan that does not beat
        random ones has learned nothing about ranks.

        Args:
            like: the plan whose modules and largest rank are taken.
            seed: of numpy's generator.
            budget: parameters of the drawn plan; None is those of `like`.

        Raises:
            PlanError: no plan has exactly so many parameters.

        Example:
            >>> RankPlan.random(like=plan, seed=0).parameters == plan.parameters
            True
        """
        used = {name: entry for name, entry in like.modules.items() if entry.rank > 0}
        if not used:
            raise PlanError("every rank of the plan is 0; there is nothing to draw")
        budget = like.parameters if budget is None else budget
        r = max(like.r, *like.ranks.values())  # a plan edited by hand may exceed its largest rank
        most = [min(r, e.in_features, e.out_features) for e in used.values()]
        costs = [entry.cost for entry in used.values()]
        least = 1 if budget >= sum(costs) else 0
        import numpy as np

        drawn = _random_ranks(costs, most, budget, np.random.default_rng(seed), least)
        ranks = dict.fromkeys(like.modules, 0) | dict(zip(used, drawn, strict=True))
        source = like.provenance.get("method")
        return like.with_ranks(ranks, method="random", seed=seed, like=source)

    def lora_config(self, **kwargs: Any) -> "LoraConfig":
        """The stock `peft.LoraConfig` of this plan.

        The commonest rank becomes `r`; `rank_pattern` and `alpha_pattern` name the other modules
        exactly. Parts of a fused module add up to one rank of that module.

        Args:
            **kwargs: anything else that LoraConfig takes (`task_type`, `lora_dropout`, ...), but
                not what the plan decides: `r`, `lora_alpha`, the patterns, `target_modules`.

        Raises:
            PlanError: a kwarg that the plan decides, or a plan with no rank above 0.

        Example:
            >>> model = get_peft_model(base, plan.lora_config(task_type="SEQ_CLS"))
        """
        decided = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules"}
        if clash := sorted(decided & set(kwargs)) + [k for k in ("use_rslora",) if kwargs.get(k)]:
            raise PlanError(f"{clash[0]} is decided by the plan; leave it out of lora_config()")
        ranks = self.module_ranks()
        if not ranks:
            raise PlanError("every rank of the plan is 0; at least one module needs rank >= 1")
        from peft import LoraConfig

        layers = {name: (r, tidy(self.scaling * r)) for name, r in ranks.items()}
        return LoraConfig(
            target_modules=exact_targets(list(ranks), {e.module for e in self.modules.values()}),
            **patterns(layers),
            **kwargs,
        )

    def to_axolotl(self) -> str:
        """The plan as the block of YAML that Axolotl takes: `lora_rank_pattern` and its like.

        Raises:
            PlanError: an alpha that is no whole number, which Axolotl refuses; no rank above 0.
        """
        config = self.lora_config()
        for name, alpha in {"lora_alpha": config.lora_alpha, **config.alpha_pattern}.items():
            if not isinstance(alpha, int):
                raise PlanError(
                    f"{name} has alpha {alpha:g}, and Axolotl takes whole numbers; make the plan "
                    "with a whole scaling (lora_alpha a multiple of r)"
                )
        targets = config.target_modules
        block = {
            "adapter": "lora",
            "lora_r": config.r,
            "lora_alpha": config.lora_alpha,
            "lora_target_modules": targets
            if isinstance(targets, str)
            else list(self.module_ranks()),
            "lora_rank_pattern": config.rank_pattern,
            "lora_alpha_pattern": config.alpha_pattern,
        }
        import yaml

        return yaml.safe_dump(block, sort_keys=False)

    def module_ranks(self) -> dict[str, int]:
        """Rank by module as PEFT sees it: parts of a fused module added up, rank 0 left out."""
        ranks: Counter[str] = Counter()
        for entry in self.modules.values():
            ranks[entry.module] += entry.rank
        return {name: r for name, r in ranks.items() if r > 0}

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON, one line per module, through a temporary name."""
        write_text(Path(path), self.to_json())

    def to_json(self) -> str:
        """The plan as JSON text, one line per module so that it can be read and edited by hand."""
        lines = []
        for name, entry in self.modules.items():
            value: dict[str, Any] = {
                "rank": entry.rank,
                "in": entry.in_features,
                "out": entry.out_features,
            }
            if entry.rows is not None:
                value |= {"module": entry.module, "rows": list(entry.rows)}
            if entry.gate is not None:
                value["gate"] = [round(g, 6) for g in entry.gate]
            lines.append(f"    {json.dumps(name)}: {json.dumps(value, allow_nan=False)}")
        provenance = json.dumps(self.provenance, indent=2, sort_keys=True, allow_nan=False)
        provenance = provenance.replace("\n", "\n  ")
        body = ",\n".join(lines)
        return (
            f'{{\n  "format": "{FORMAT}",\n  "r": {self.r},\n'
            f'  "scaling": {json.dumps(self.scaling)},\n  "modules": {{\n{body}\n  }},\n'
            f'  "provenance": {provenance}\n}}\n'
        )

    @classmethod
    def load(cls, path: str | Path) -> "RankPlan":
        """Reads and validates a plan written by `save`, possibly edited by hand since.

        Raises:
            PlanError: no such file, not JSON, or an entry out of range; the message names it.
        """
        check_path("the plan", path, PlanError)
        try:
            text = Path(path).expanduser().read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise PlanError(f"cannot read the plan {str(path)!r}: {error}") from error
        try:
            return cls.from_json(text)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error

    @classmethod
    def from_json(cls, text: str) -> "RankPlan":
        """The inverse of `to_json`. Raises PlanError with the entry's name."""
        try:
            raw = parse_json(text)
        except Unreadable as error:
            raise PlanError(str(error)) from error
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            found = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
            raise PlanError(f'"format" is {found!r}; a plan has "format": "{FORMAT}"')
        if unknown := sorted(set(raw) - {"format", "r", "scaling", "modules", "provenance"}):
            raise PlanError(f"unknown key {unknown[0]!r}")
        modules = raw.get("modules")
        if not isinstance(modules, dict):
            raise PlanError('"modules" is missing or not an object')
        provenance = raw.get("provenance") or {}
        if not isinstance(provenance, dict):
            raise PlanError(f'"provenance" is {provenance!r}; it has to be an object')
        return cls(
            modules={name: _entry(name, value) for name, value in modules.items()},
            r=raw.get("r", 0),
            scaling=raw.get("scaling", 0),
            provenance=provenance,
        )


def _entry(name: str, value: Any) -> Entry:
    if not isinstance(value, dict):
        raise PlanError(
            f'entry {name!r} is {value!r}; it has to be an object with "rank", "in", "out"'
        )
    if unknown := sorted(set(value) - {"rank", "in", "out", "module", "rows", "gate"}):
        raise PlanError(f"entry {name!r} has the unknown key {unknown[0]!r}")
    for key, least in (("rank", 0), ("in", 1), ("out", 1)):
        number = value.get(key)
        if type(number) is not int or not least <= number < _HUGE:
            raise PlanError(
                f'entry {name!r}: "{key}" is {number!r}; it has to be an integer >= {least}'
            )
    rows, gate, module = value.get("rows"), value.get("gate"), value.get("module", name)
    if not isinstance(module, str):
        raise PlanError(f'entry {name!r}: "module" is {module!r}; it has to be a name')
    if rows is not None and (
        not isinstance(rows, list)
        or len(rows) != 2
        or not all(isinstance(row, int) and not isinstance(row, bool) for row in rows)
        or rows[1] - rows[0] != value["out"]
    ):
        raise PlanError(f'entry {name!r}: "rows" is {rows!r}; it has to be [start, start + out]')
    if gate is not None and (
        not isinstance(gate, list)
        or not all(isinstance(g, int | float) and not isinstance(g, bool) for g in gate)
    ):
        raise PlanError(f'entry {name!r}: "gate" is {gate!r}; it has to be a list of numbers')
    return Entry(
        rank=value["rank"],
        in_features=value["in"],
        out_features=value["out"],
        module=module,
        rows=None if rows is None else (rows[0], rows[1]),
        gate=None if gate is None else tuple(float(g) for g in gate),
    )


def _validate(plan: RankPlan) -> None:
    if not plan.modules:
        raise PlanError("the plan has no modules")
    if not isinstance(plan.r, int) or isinstance(plan.r, bool) or not 1 <= plan.r < _HUGE:
        raise PlanError(f'"r" is {plan.r!r}; it has to be an integer >= 1')
    number = isinstance(plan.scaling, int | float) and not isinstance(plan.scaling, bool)
    if not number or not 0 < plan.scaling < _HUGE:
        raise PlanError(f'"scaling" is {plan.scaling!r}; it has to be a number > 0')
    for name, entry in plan.modules.items():
        if entry.rank < 0:
            raise PlanError(f'entry {name!r}: "rank" is {entry.rank}; it has to be an integer >= 0')
        limit = min(entry.in_features, entry.out_features)
        if entry.rank > limit:
            raise PlanError(
                f'entry {name!r}: "rank" is {entry.rank}, more than its matrix of '
                f"{entry.out_features} x {entry.in_features} can have; the most is {limit}"
            )


def exact_targets(names: list[str], known: set[str]) -> list[str] | str:
    """PEFT takes each name as an ending; where one ends another's, a regex of whole names."""
    if any(f".{other}".endswith(f".{name}") and name != other for name in names for other in known):
        return "|".join(re.escape(name) for name in names)
    return names


def _exact(name: str) -> str:
    """PEFT reads pattern keys as regular expressions, `(.*\\.)?(key)$`: match this name alone."""
    return f"^{re.escape(name)}"


def tidy(number: float) -> int | float:
    """8.0 as 8: PEFT types lora_alpha as an int, though it takes both."""
    nearest = round(number)
    return nearest if math.isclose(number, nearest, rel_tol=1e-12) else number


def patterns(layers: Mapping[str, tuple[int, int | float]]) -> dict[str, Any]:
    """(r, lora_alpha) by module as a LoraConfig says them: the commonest, and patterns for others.

    An adapter of one rank has no pattern, which not every server reads.
    """
    (r, alpha), _ = Counter(layers.values()).most_common(1)[0]
    others = {_exact(name): pair for name, pair in layers.items() if pair != (r, alpha)}
    return {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {key: pair[0] for key, pair in others.items()},
        "alpha_pattern": {key: pair[1] for key, pair in others.items()},
    }


def within_budget(
    losses: Mapping[str, Mapping[int, float]],
    costs: Mapping[str, int],
    budget: int,
    start: Mapping[str, int],
) -> dict[str, int]:
    """Ranks from `start` up: always the step that lowers the loss most per parameter and fits.

    A step may raise a rank by several at once: the best average over the step counts, so that a
    piece of no use does not stop the search before a useful one that comes after it.

    Args:
        losses: by module and rank, the loss with that module alone at that rank. Losses of
            different modules are taken to add up.
        costs: parameters of one rank-1 piece, by module.
        budget: parameters in all.
        start: ranks to begin at; they have to fit.

    Returns:
        Ranks by module, at least those of `start`.

    Example:
        >>> within_budget({"a": {1: 3.0, 2: 1.0}, "b": {1: 3.0, 2: 2.5}}, {"a": 8, "b": 8}, 24,
        ...               {"a": 1, "b": 1})
        {'a': 2, 'b': 1}
    """
    ranks = dict(start)
    left = budget - sum(rank * costs[name] for name, rank in ranks.items())
    place = {name: i for i, name in enumerate(ranks)}

    def best(name: str) -> tuple[float, int, int, str] | None:
        """The step of one module that gains most: (-gain per parameter, place, rank, name)."""
        here = ranks[name]
        steps = [
            (-(losses[name][here] - loss) / ((rank - here) * costs[name]), place[name], rank, name)
            for rank, loss in losses[name].items()
            if rank > here and (rank - here) * costs[name] <= left
        ]
        return min(steps, default=None)

    steps = [step for name in ranks if (step := best(name)) is not None]
    heapify(steps)
    while steps:
        step = heappop(steps)
        name, rank = step[3], step[2]
        if (now := best(name)) != step:  # it no longer fits; what fits gains less
            if now is not None:
                heappush(steps, now)
            continue
        if step[0] >= 0:
            break
        left -= (rank - ranks[name]) * costs[name]
        ranks[name] = rank
        if (following := best(name)) is not None:
            heappush(steps, following)
    return ranks


def first_pieces(sizes: Sequence[int], ranks: Sequence[int]) -> list[float]:
    """The gate that keeps the first pieces of each entry of a layer.

    With size / rank on the pieces that stay, LoRA's scale alpha / size becomes alpha / rank.

    Args:
        sizes: pieces of each entry, in their order on the rank axis.
        ranks: how many of each stay, at least 1.

    Example:
        >>> first_pieces([4, 2], [2, 2])
        [2.0, 2.0, 0.0, 0.0, 1.0, 1.0]
    """
    return [
        size / rank if j < rank else 0.0
        for size, rank in zip(sizes, ranks, strict=True)
        for j in range(size)
    ]


def _random_ranks(
    costs: list[int],
    most: list[int],
    budget: int,
    rng: "np.random.Generator",
    least: int = 1,
) -> list[int]:
    """Ranks in [least, most], Σ rank x cost = budget, uniform over all such lists.

    likely[i][b] is the probability that modules from i on cost b in all if each rank is drawn
    alone, with weights exp(-tilt x rank x cost). All lists of one cost have the same weight, so
    among them the draw is uniform for every tilt. The tilt is chosen so that the expected cost is
    the budget, which keeps the probabilities far from underflow.
    """
    import numpy as np

    unit = reduce(gcd, costs)
    steps = np.array([cost // unit for cost in costs])
    total = budget // unit
    tilt = _tilt(steps, most, total, least)
    weights = [_weights(step, top, tilt, least) for step, top in zip(steps, most, strict=True)]
    likely = [np.zeros(total + 1) for _ in range(len(steps) + 1)]
    likely[-1][0] = 1.0
    for i in range(len(steps) - 1, -1, -1):
        for r, weight in enumerate(weights[i], least):
            if (spent := r * steps[i]) <= total:
                likely[i][spent:] += weight * likely[i + 1][: total + 1 - spent]
    ranks = []
    for i, step in enumerate(steps):
        after = [
            likely[i + 1][total - r * step] if r * step <= total else 0.0
            for r in range(least, most[i] + 1)
        ]
        p = weights[i] * after
        if p.sum() == 0:
            raise PlanError(f"no plan of these modules has exactly {budget:,} parameters")
        ranks.append(int(rng.choice(len(p), p=p / p.sum())) + least)
        total -= ranks[-1] * step
    return ranks


def _weights(step: int, most: int, tilt: float, least: int) -> "np.ndarray":
    import numpy as np

    exponents = -tilt * step * np.arange(least, most + 1)
    weights = np.exp(exponents - exponents.max())
    return weights / weights.sum()


def _tilt(steps: "np.ndarray", most: list[int], total: int, least: int) -> float:
    """The tilt at which the expected cost is the budget, by bisection."""
    import numpy as np

    kinds = Counter(zip(steps.tolist(), most, strict=True))
    low, high = -60.0, 60.0
    for _ in range(40):
        tilt = (low + high) / 2
        cost = sum(
            count * step * float(_weights(step, top, tilt, least) @ np.arange(least, top + 1))
            for (step, top), count in kinds.items()
        )
        low, high = (tilt, high) if cost > total else (low, tilt)
    return (low + high) / 2
