"""AutoLoRA (arXiv 2403.09113): a selection variable per rank-1 piece, learned on validation data.

The loop in which gates and factors learn on different rows is `rankwise.bilevel`.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rankwise.errors import RankwiseError
from rankwise.methods.base import Kept, LoraMethod, Setting, flag

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Trainer, TrainingArguments

    from rankwise.plan import RankPlan

GateKind = Literal["softmax", "unconstrained", "sigmoid"]
Estimator = Literal["finite_difference", "exact", "first_order"]


@dataclass(frozen=True)
class AutoLoRA(LoraMethod):
    """How AutoLoRA's gate α is made from β, how β moves, and when a rank-1 piece is kept.

    Every layer starts with r pieces (the paper's k); those with α_j >= 1/k stay (section 4.4), and
    the plan is trained from scratch on all rows (section 4.5).

    Raises:
        RankwiseError: a value out of range.

    Example:
        >>> plan = rankwise.search(model, train, method=AutoLoRA(gate="sigmoid"))
    """

    title: ClassVar[str] = "AutoLoRA"
    source: ClassVar[str] = "arXiv 2403.09113, sections 4.2 to 4.5 and 5.5"
    claim: ClassVar[str] = "choosing ranks"
    anew: ClassVar[bool] = True
    chooses: ClassVar[bool] = True

    target_modules: tuple[str, ...] | str | None = flag(
        None, "modules to adapt, by name or suffix, or all-linear; without it, query and value"
    )
    gate: GateKind = flag(
        "softmax", "α = softmax(β) per layer (eq. 3); the others are ablations of section 5.5"
    )
    estimator: Estimator = flag(
        "finite_difference", "of the hypergradient; first_order is the ablation η = 0"
    )
    gate_learning_rate: float = flag(1e-3, "AdamW's learning rate of the gates")
    gate_weight_decay: float = flag(0.0, "AdamW's weight decay of the gates")
    lookahead: float | None = flag(
        None, "learning rate of the look-ahead step (η, eq. 4); without it, the factors' current"
    )
    radius: float | None = flag(
        None, "length of the finite difference's step; without it, 0.01, or 0.1 under bf16"
    )
    two_sided: bool = flag(False, "central differences: a fourth pass a step")
    validation_fraction: float = flag(0.5, "share of the training rows that the gates learn on")
    search_learning_rate: float | None = flag(
        None, "of the factors during the search; without it, learning_rate"
    )
    num_search_epochs: float | None = flag(None, "passes of the search; without it, as training")
    max_search_steps: int = flag(-1, "optimizer steps of the search; overrides num_search_epochs")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gate not in ("softmax", "unconstrained", "sigmoid"):
            raise RankwiseError(f"gate is {self.gate!r}; take softmax, unconstrained or sigmoid")
        estimators = ("finite_difference", "exact", "first_order")
        if self.estimator not in estimators:
            raise RankwiseError(f"estimator is {self.estimator!r}; take {', '.join(estimators)}")
        for name in ("gate_weight_decay", "lookahead"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise RankwiseError(f"{name} is {value}; it has to be >= 0")
        for name in ("gate_learning_rate", "radius", "search_learning_rate", "num_search_epochs"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise RankwiseError(f"{name} is {value}; it has to be > 0")

    def activation(self, beta: "Tensor") -> "Tensor":
        """β (k,) of one layer -> α (k,)."""
        import torch

        if self.gate == "softmax":
            return torch.softmax(beta, dim=0)  # eq. 3
        return torch.sigmoid(beta) if self.gate == "sigmoid" else beta

    def initial(self, k: int) -> float:
        """Starting β: every piece alike; 1/k where α is β itself, so that Σα = 1 as for softmax."""
        return 1.0 / k if self.gate == "unconstrained" else 0.0

    def kept(self, alpha: list[float]) -> list[int]:
        """Pieces of one layer that stay, 0-based: α_j >= threshold (section 4.4), at least one.

        The threshold is 1/k for softmax, Σα/k without the constraint, 0.5 for the sigmoid. Where
        rounding leaves none, the largest α stays.
        """
        k = len(alpha)
        threshold = {"softmax": 1 / k, "unconstrained": sum(alpha) / k, "sigmoid": 0.5}[self.gate]
        kept = [j for j, a in enumerate(alpha) if a >= threshold]
        return kept or [max(range(k), key=alpha.__getitem__)]

    def arguments(self, args: "TrainingArguments") -> "TrainingArguments":
        from transformers.training_args import OptimizerNames

        from rankwise.trainer import gated_arguments, replaced

        if args.fp16:
            raise RankwiseError(
                "fp16 scales losses, which a hypergradient cannot see; use bf16 or float32"
            )
        if "adamw" not in (optim := OptimizerNames(args.optim).value):
            raise RankwiseError(f"optim is {optim}; a search takes an AdamW, for its gates too")
        if args.torch_compile and self.estimator == "exact":
            raise RankwiseError(
                "torch.compile has no double backward; use finite_difference or no compile"
            )
        changes: dict[str, Any] = {"eval_strategy": "no", "load_best_model_at_end": False}
        if self.search_learning_rate is not None:
            changes["learning_rate"] = self.search_learning_rate
        if self.num_search_epochs is not None:
            changes |= {"num_train_epochs": self.num_search_epochs, "max_steps": -1}
        if self.max_search_steps > 0:
            changes["max_steps"] = self.max_search_steps
        return replaced(gated_arguments(args), **changes)

    def trainer(self, model: Any, plan: "RankPlan | None", setting: Setting) -> "Trainer":
        from rankwise.bilevel import SearchTrainer
        from rankwise.gate import attach

        assert plan is not None
        return SearchTrainer(
            model,
            setting.args,
            gated=attach(model, plan, self.activation, self.initial(self.r)),
            method=self,
            train_dataset=setting.train,
            validation_dataset=setting.held_out,
            configuration=setting.configuration,
            **setting.options,
        )

    def keep(self, trainer: Any, plan: "RankPlan | None", setting: Setting) -> Kept:
        from rankwise.gate import gate_values

        assert plan is not None
        trainer.stop_unless_finite_parameters()
        alphas = gate_values(trainer.gated)
        self._stop_unless_moved(alphas, trainer.state.global_step)
        learned = plan.with_ranks({name: len(self.kept(a)) for name, a in alphas.items()})
        modules = {n: replace(e, gate=tuple(alphas[n])) for n, e in learned.modules.items()}
        return Kept(replace(learned, modules=modules))

    def says(self, plan: "RankPlan") -> str:
        gates = [(e.rank, e.gate) for e in plan.modules.values() if e.gate is not None]
        edited = any(rank != len(self.kept(list(gate))) for rank, gate in gates)
        return f"AutoLoRA ({self.gate} gate)" + (", edited by hand since" if edited else "")

    def _stop_unless_moved(self, alphas: dict[str, list[float]], steps: int) -> None:
        """A gate that never moved says nothing, but α_j >= 1/k would keep every piece."""
        from transformers.utils import logging

        still = [name for name, alpha in alphas.items() if len(alpha) > 1 and len(set(alpha)) == 1]
        if len(still) == sum(len(alpha) > 1 for alpha in alphas.values()) > 0:
            raise RankwiseError(
                f"no gate moved in {steps} steps, so nothing was learned; look at the number of "
                "steps, the warmup and the learning rates "
                f"(gates: {self.gate_learning_rate:g})"
            )
        if still:
            logger = logging.get_logger(__name__)
            logger.warning(f"the gates of {still} never moved; their ranks are the largest")
