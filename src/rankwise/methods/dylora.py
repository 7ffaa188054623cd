"""DyLoRA (arXiv 2210.07558): one training run, an adapter for every rank of a range afterwards.

Each optimizer step draws a rank b and trains the first b rank-1 pieces of every layer alone:
h = W0 x + (α/b) B[:, :b] A[:b, :] x (the paper's algorithm 1). The loop is `rankwise.nested`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rankwise.errors import AdapterError, DataError, PlanError, RankwiseError
from rankwise.methods.base import Kept, LoraMethod, Setting, flag
from rankwise.plan import RankPlan

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer, TrainingArguments

    from rankwise.choose import ByLayer, Loss

Distribution = Literal["uniform", "geometric"]
TRAINED_BY = ("r_min", "rank_distribution", "geometric_p", "rank_weights", "frozen")


@dataclass(frozen=True)
class DyLoRA(LoraMethod):
    """Which rank is trained at each step, what moves then, and which rank is handed over.

    Raises:
        RankwiseError: a value out of range.

    Example:
        >>> trainer = rankwise.train(model, plan, rows, args=args, method=DyLoRA(frozen=True))
    """

    title: ClassVar[str] = "DyLoRA"
    source: ClassVar[str] = "arXiv 2210.07558, algorithm 1"
    claim: ClassVar[str] = "one training for all ranks"
    chooses: ClassVar[bool] = True

    target_modules: tuple[str, ...] | str | None = flag(
        None, "modules to adapt, by name or suffix, or all-linear; without it, query and value"
    )
    r_min: int = flag(1, "the smallest rank trained; the largest is r")
    rank_distribution: Distribution = flag("uniform", "of the rank b drawn at each step")
    geometric_p: float = flag(0.15, "p of the geometric distribution, P(b) ∝ p (1-p)^(b-1)")
    rank_weights: tuple[float, ...] | None = flag(
        None, "instead of a distribution: one probability per rank from r_min to r, summing to 1"
    )
    frozen: bool = flag(
        False, "only the b-th piece moves in a step; the others keep still bit for bit"
    )
    validation_fraction: float = flag(0.1, "share of the training rows that compares the ranks")
    tolerance: float | None = flag(
        None,
        "how far below the best rank the picked one may lie; without it, one standard error",
        after=True,
    )
    pick_rank: int | None = flag(None, "hand over this rank, whatever the curve says", after=True)
    budget: int | None = flag(
        None, "hand over the largest rank of at most so many parameters", after=True
    )
    by_layer: bool = flag(
        False, "within the budget choose ranks layer by layer, by loss", after=True
    )
    nested_adapter: str | None = flag(
        None, "folder of a finished run: choose anew out of what it trained, on its rows", path=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.r_min, int) or self.r_min < 1:
            raise RankwiseError(f"r_min is {self.r_min!r}; a rank is an integer of at least 1")
        self._check_distribution()
        ways = [k for k in ("tolerance", "pick_rank", "budget") if getattr(self, k) is not None]
        if len(ways) > 1:
            raise RankwiseError(f"{ways[0]} and {ways[1]} both choose the rank; give one")
        if self.tolerance is not None and not self.tolerance >= 0:
            raise RankwiseError(f"tolerance is {self.tolerance}; it has to be >= 0")
        if self.by_layer and self.budget is None:
            raise RankwiseError("by_layer chooses ranks within a budget; give one")

    def _check_distribution(self) -> None:
        if not 0 < self.geometric_p < 1:
            raise RankwiseError(f"geometric_p is {self.geometric_p}; it has to lie between 0 and 1")
        default = type(self).__dataclass_fields__["geometric_p"].default
        if self.rank_distribution != "geometric" and self.geometric_p != default:
            raise RankwiseError("geometric_p is for rank_distribution geometric; give that too")
        if self.rank_weights is None:
            return
        if self.rank_distribution != "uniform":
            raise RankwiseError("rank_weights are a distribution of their own; leave the other out")
        # a list, or numpy's numbers, which JSON does not hold
        object.__setattr__(self, "rank_weights", tuple(map(float, self.rank_weights)))
        if not all(0 <= w <= 1 for w in self.rank_weights):
            raise RankwiseError(
                f"rank_weights are {self.rank_weights}; each has to lie from 0 to 1"
            )
        if abs(sum(self.rank_weights) - 1) > 1e-6:
            raise RankwiseError(
                f"rank_weights sum to {sum(self.rank_weights):g}; they have to sum to 1"
            )
        if self.rank_weights[-1] == 0:
            raise RankwiseError(
                "the last of rank_weights is 0, so the largest rank would never be trained; "
                "lower r instead"
            )

    def probabilities(self, r: int) -> dict[int, float]:
        """The probability of every b from r_min to the largest rank r.

        Raises:
            RankwiseError: r_min above r, or another number of weights than of ranks.

        Example:
            >>> DyLoRA(rank_weights=(0.25, 0.75), r_min=3).probabilities(4)
            {3: 0.25, 4: 0.75}
        """
        if self.r_min > r:
            raise RankwiseError(f"r_min is {self.r_min}, above the largest rank {r}")
        ranks = range(self.r_min, r + 1)
        if self.rank_weights is not None:
            if len(self.rank_weights) != len(ranks):
                raise RankwiseError(
                    f"there are {len(self.rank_weights)} rank_weights for the {len(ranks)} ranks "
                    f"{self.r_min} to {r}; give one for each"
                )
            total = sum(self.rank_weights)
            return {b: w / total for b, w in zip(ranks, self.rank_weights, strict=True)}
        if self.rank_distribution == "uniform":
            return dict.fromkeys(ranks, 1 / len(ranks))
        p = self.geometric_p
        geometric = {b: p * (1 - p) ** (b - 1) for b in ranks}
        total = sum(geometric.values())
        return {b: weight / total for b, weight in geometric.items()}

    def trained(self, r: int) -> list[int]:
        """The ranks that are ever drawn, in ascending order."""
        return [b for b, p in self.probabilities(r).items() if p > 0]

    def draw(self, r: int, seed: int, step: int) -> int:
        """b of one optimizer step: a function of seed and step, and of nothing else.

        So all layers, micro-batches and processes of a step share it, and a resumed run draws what
        the run that was never stopped would have drawn.
        """
        import numpy as np

        probabilities = self.probabilities(r)
        rng = np.random.default_rng([seed, step])
        return int(rng.choice(list(probabilities), p=list(probabilities.values())))

    def rate_for(self, config: Any) -> float:
        # in frozen mode one row and column moves a step: docs/dylora.md's sweep has it at 3e-3
        rate = super().rate_for(config)
        return 3 * rate if self.frozen else rate

    def arguments(self, args: "TrainingArguments") -> "TrainingArguments":
        from transformers.training_args import OptimizerNames

        from rankwise.trainer import gated_arguments

        if args.load_best_model_at_end:
            raise RankwiseError("load_best_model_at_end knows one rank; leave it out with dylora")
        if args.batch_eval_metrics or args.include_for_metrics:
            raise RankwiseError(
                "a standard error resamples predictions and labels; leave batch_eval_metrics and "
                "include_for_metrics out"
            )
        if args.bf16_full_eval or args.fp16_full_eval:
            raise RankwiseError(
                "bf16_full_eval and fp16_full_eval round the factors themselves, and with them "
                "every adapter cut afterwards; leave them out with dylora"
            )
        optim = OptimizerNames(args.optim).value
        if self.frozen and ("layerwise" in optim or "lomo" in optim):
            raise RankwiseError(
                f"optim is {optim}, which steps inside the backward pass, where nothing can be "
                "kept frozen; take another, or dylora without frozen"
            )
        return gated_arguments(args)

    def start(self, model: "nn.Module", setting: Setting) -> RankPlan:
        if self.nested_adapter is None:
            return super().start(model, setting)
        return self._trained_before(model, setting)

    def check(self, model: "nn.Module", setting: Setting) -> None:
        from rankwise.choose import uniform_within
        from rankwise.rows import two_sets

        metric = setting.metric
        if metric != "loss" and setting.options.get("compute_metrics") is None:
            raise RankwiseError(
                f"metric_for_best_model is {metric!r}, but there is no compute_metrics to compute "
                "it"
            )
        plan = one_rank(self.start(model, setting))
        trained = self.trained(plan.r)
        if self.pick_rank is not None and self.pick_rank not in trained:
            raise RankwiseError(f"pick_rank is {self.pick_rank}; the ranks trained are {trained}")
        if self.by_layer:
            two_sets(setting.held_out, None, 0.5, setting.args.seed)
        if self.budget is not None:
            uniform_within(plan, self.budget, trained)

    def _trained_before(self, model: "nn.Module", setting: Setting) -> RankPlan:
        """The plan of `nested_adapter`, where the other flags and the rows agree with it."""
        from rankwise.adapter import Adapter, adapter_folder
        from rankwise.lora import check_fits
        from rankwise.methods import from_description
        from rankwise.rows import fingerprint

        folder = adapter_folder(self.nested_adapter or "", "nested")
        plan = Adapter.load(folder).plan
        if plan is None:
            raise AdapterError(f"{folder} holds an adapter of one rank; give a DyLoRA run")
        check_fits(model, plan)
        before: Any = from_description(plan.provenance.get("method"))
        defaults = type(self)()
        if self.r not in (plan.r, defaults.r):
            raise RankwiseError(f"r is {self.r}, but the adapter has {plan.r}; omit it")
        for key in TRAINED_BY:
            given = getattr(self, key)
            if given not in (getattr(before, key), getattr(defaults, key)):
                raise RankwiseError(
                    f"the flags give {key} {given!r}, but the adapter was trained with "
                    f"{getattr(before, key)!r}; leave them out"
                )
        if plan.provenance.get("train_sha256") != fingerprint(setting.train):
            raise DataError(
                f"{folder} was not trained on the rows that these flags give, so the others may be "
                "its own; give its data flags, validation_fraction and seed"
            )
        return plan

    def attach(self, model: "nn.Module", plan: RankPlan | None, setting: Setting) -> "nn.Module":
        if self.nested_adapter is None:
            assert plan is not None
            return super().attach(model, one_rank(plan), setting)
        from peft import PeftModel

        from rankwise.adapter import adapter_folder

        folder = adapter_folder(self.nested_adapter, "nested")
        return PeftModel.from_pretrained(model, str(folder), is_trainable=True)

    def trainer(self, model: Any, plan: RankPlan | None, setting: Setting) -> "Trainer":
        from rankwise.nested import NestedTrainer

        assert plan is not None
        plan = one_rank(plan)
        method: DyLoRA = self
        if self.nested_adapter is None:
            self.probabilities(plan.r)
            plan = replace(plan, provenance=dict(setting.provenance))
        else:
            from rankwise.methods import from_description

            method = from_description(plan.provenance["method"])  # type: ignore[assignment]
        return NestedTrainer(
            model,
            setting.args,
            plan=plan,
            method=method,
            configuration=setting.configuration,
            trained=self.nested_adapter is not None,
            train_dataset=setting.train,
            **setting.options,
        )

    def keep(self, trainer: Any, plan: RankPlan | None, setting: Setting) -> Kept:
        from rankwise.choose import pick, uniform_within
        from rankwise.nested import curve

        found = curve(
            trainer,
            setting.held_out,
            metric=setting.metric,
            greater_is_better=setting.greater_is_better,
            score_rows=setting.score_rows,
        )
        figures: dict[str, Any] = {}
        nested: RankPlan = trainer.plan
        about = nested.provenance | {"curve": found.to_dict()}
        if self.by_layer:
            choice = self._by_layer(trainer, found.sizes, setting)
            figures |= {"picked_by": "layer", "by_layer": _figures(choice)}
            kept = choice.plan
            about |= {"budget": self.budget}
        elif self.budget is not None:
            kept = uniform_within(nested, self.budget, found.sizes)
            figures["picked_by"] = "budget"
            about |= {"budget": self.budget}
        else:
            b = self.pick_rank or pick(found, self.tolerance)
            kept = RankPlan.uniform(nested, b)
            by = "tolerance" if self.tolerance is not None else "one standard error"
            figures["picked_by"] = "the user" if self.pick_rank else by
        return Kept(replace(kept, provenance=about), found, figures)

    def _by_layer(self, trainer: Any, ranks: tuple[int, ...], setting: Setting) -> "ByLayer":
        """Ranks by layer within the budget: chosen on one half of the held-out rows, judged on the
        other.
        """
        from tqdm.auto import tqdm

        from rankwise.choose import ranks_by_layer
        from rankwise.nested import size_loss
        from rankwise.rows import two_sets

        two = two_sets(setting.held_out, None, 0.5, setting.args.seed)
        total = len(trainer.plan.modules) * (len(ranks) - 1) + 3
        with tqdm(
            total=total, desc="loss of each module at each rank", disable=setting.args.disable_tqdm
        ) as bar:
            losses = [
                _counted(size_loss(trainer, rows), bar.update)
                for rows in (two.train, two.validation)
            ]
            assert self.budget is not None
            return ranks_by_layer(losses[0], trainer.plan, self.budget, ranks, losses[1])

    def hand_over(self, trainer: Any, kept: Kept, folder: Path) -> None:
        from rankwise.adapter import Adapter

        assert kept.plan is not None
        trainer.save_nested(folder / "nested")
        trainer.set_ranks(kept.plan.ranks)
        Adapter.load(folder / "nested").truncate(kept.plan).save(folder / "adapter")


def one_rank(plan: RankPlan) -> RankPlan:
    """The plan with its one rank as the largest; raises PlanError where there are several."""
    if len(ranks := set(plan.ranks.values())) != 1:
        raise PlanError(
            f"DyLoRA draws one rank for all modules, but the plan has ranks {min(ranks)} to "
            f"{max(ranks)}; give rankwise.uniform(model, r)"
        )
    return replace(plan, r=ranks.pop())


def _counted(loss: "Loss", advance: Callable[[], Any]) -> "Loss":
    """The same loss; each call moves a progress bar on."""

    def call(ranks: Mapping[str, int]) -> float:
        value = loss(ranks)
        advance()
        return value

    return call


def _figures(choice: "ByLayer") -> dict[str, Any]:
    return {
        "pays": choice.pays,
        "by_layer_loss": choice.by_layer_loss,
        "uniform_loss": choice.uniform_loss,
        "ranks": choice.by_layer.ranks,
        "uniform_rank": max(choice.uniform.ranks.values()),
        "parameters": choice.by_layer.parameters,
        "uniform_parameters": choice.uniform.parameters,
    }
