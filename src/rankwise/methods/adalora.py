"""AdaLoRA (arXiv 2303.10512): ΔW = P Λ Q, and a budget of singular values that shrinks in training.

Layers, importance scores and schedule are PEFT's. The run around them, with PEFT's allocator called
at every step, and the way back to plain LoRA are in `rankwise.methods.allocator`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rankwise.errors import RankwiseError
from rankwise.methods.base import Kept, LoraMethod, Setting, flag
from rankwise.methods.whole import whole_modules

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer

    from rankwise.plan import RankPlan


@dataclass(frozen=True)
class AdaLoRA(LoraMethod):
    """Starts every module at rank r and takes away singular values, over all modules at once.

    The least important piece of any module goes first, where importance is the smoothed product of
    sensitivity |w · ∂L/∂w| and its uncertainty (eq. 7 to 11), until `target_r` pieces a module are
    left on average. A module may end at rank 0.

    Raises:
        RankwiseError: a value out of range.

    Source: arXiv 2303.10512, algorithm 1. Two departures of PEFT from the paper: its scale is
    lora_alpha / init_r, and pieces are counted, not parameters, so one of a wide module costs the
    budget no more than one of a narrow module. The default phases are shares close to those of the
    paper's GLUE runs.

    Example:
        >>> AdaLoRA(r=8, target_r=2).phases(1000)
        {'total_step': 1000, 'tinit': 100, 'tfinal': 500, 'deltaT': 10}
    """

    title: ClassVar[str] = "AdaLoRA"
    source: ClassVar[str] = "arXiv 2303.10512"
    claim: ClassVar[str] = "choosing ranks"
    resumable: ClassVar[bool] = False  # a checkpoint lacks the masked pieces and the scores

    target_r: int | None = flag(None, "average rank at the end; without it, r // 2")
    tinit: float = flag(0.1, "share of the steps before anything is taken away")
    tfinal: float = flag(0.5, "share of the steps after the last piece is taken away")
    deltaT: float = flag(0.01, "share of the steps from one allocation to the next, at least one")
    beta1: float = flag(0.85, "smoothing of the sensitivity")
    beta2: float = flag(0.85, "smoothing of its uncertainty")
    orth_reg_weight: float = flag(0.5, "weight of the orthogonality term in the training loss")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_r is None and self.r < 2:
            raise RankwiseError(f"r is {self.r}; AdaLoRA takes pieces away, give at least 2")
        if self.target_r is not None and (
            not isinstance(self.target_r, int) or not 1 <= self.target_r < self.r
        ):
            raise RankwiseError(
                f"target_r is {self.target_r!r}; it has to be an integer from 1 to r - 1 = "
                f"{self.r - 1}"
            )
        for name in ("tinit", "tfinal", "deltaT"):
            if not 0 <= (share := getattr(self, name)) < 1:
                raise RankwiseError(
                    f"{name} is {share}; it is a share of the steps, at least 0 and below 1"
                )
        if self.tinit + self.tfinal >= 1:
            raise RankwiseError(
                f"tinit + tfinal is {self.tinit + self.tfinal:g}; it has to be below 1, or no step "
                "is left to take pieces away"
            )
        for name in ("beta1", "beta2"):
            if not 0 < (beta := getattr(self, name)) < 1:
                raise RankwiseError(f"{name} is {beta}; it has to lie between 0 and 1")
        if not 0 <= self.orth_reg_weight < float("inf"):
            raise RankwiseError(f"orth_reg_weight is {self.orth_reg_weight}; it has to be >= 0")

    @property
    def target(self) -> int:
        """The average rank at the end."""
        return self.r // 2 if self.target_r is None else self.target_r

    def phases(self, total_step: int) -> dict[str, int]:
        """PEFT's schedule, in optimizer steps.

        Raises:
            RankwiseError: fewer steps than the schedule needs.
        """
        tinit, tfinal = int(self.tinit * total_step), int(self.tfinal * total_step)
        # The last mask comes at step total_step - tfinal, and needs scores from a step before it.
        if total_step - tfinal <= max(tinit, 1):
            raise RankwiseError(
                f"AdaLoRA has {total_step} optimizer steps, with its last mask at step "
                f"{total_step - tfinal}; it needs a step of scores before that: train longer, or "
                "lower tfinal"
            )
        between = max(1, round(self.deltaT * total_step))
        return {"total_step": total_step, "tinit": tinit, "tfinal": tfinal, "deltaT": between}

    def check(self, model: "nn.Module", setting: Setting) -> None:
        from rankwise.methods.allocator import steps

        if setting.args.load_best_model_at_end:
            raise RankwiseError(
                "AdaLoRA's checkpoints cannot be loaded again; leave load_best_model_at_end out"
            )
        if setting.args.label_smoothing_factor and self.orth_reg_weight:
            raise RankwiseError(
                "PEFT adds AdaLoRA's orthogonality term to the model's own loss, which "
                "label_smoothing_factor replaces; leave one of the two at 0"
            )
        if setting.options.get("compute_loss_func") and self.orth_reg_weight:
            raise RankwiseError(
                "PEFT adds AdaLoRA's orthogonality term to the model's own loss, which "
                "compute_loss_func replaces; set orth_reg_weight=0"
            )
        self.phases(steps(setting.args, setting.train))
        self.start(model, setting)

    def start(self, model: "nn.Module", setting: Setting) -> "RankPlan":
        return whole_modules(model, super().start(model, setting), self.title)

    def attach(self, model: "nn.Module", plan: "RankPlan | None", setting: Setting) -> "nn.Module":
        from rankwise.methods.allocator import build, steps

        assert plan is not None
        return build(
            model,
            plan,
            target_r=self.target,
            beta1=self.beta1,
            beta2=self.beta2,
            task_type=setting.task_type,
            lora_dropout=self.lora_dropout,
            **self.phases(steps(setting.args, setting.train)),
        )

    def trainer(self, model: "nn.Module", plan: "RankPlan | None", setting: Setting) -> "Trainer":
        from rankwise.methods.allocator import AllocatingTrainer

        return AllocatingTrainer(
            model,
            setting.args,
            orth_reg_weight=self.orth_reg_weight,
            train_dataset=setting.train,
            **setting.options,
        )

    def keep(self, trainer: "Trainer", plan: "RankPlan | None", setting: Setting) -> Kept:
        """The ranks that the last mask leaves, rank 0 among them.

        Raises:
            RankwiseError: the allocator did not run up to its last mask.
        """
        from rankwise.methods.allocator import final_mask

        assert plan is not None
        mask = final_mask(trainer)
        ranks = {name: sum(mask[name]) for name in plan.modules}
        figures: dict[str, Any] = {"pieces": sum(ranks.values()), "target_r": self.target}
        about = {"method": self.describe()} | dict(setting.provenance)
        return Kept(
            plan.with_ranks(ranks, **about), figures=figures | self.phases(trainer.state.max_steps)
        )

    def hand_over(self, trainer: "Trainer", kept: Kept, folder: Path) -> None:
        """Writes `folder/adapter`, a plain LoRA adapter of the ranks kept, which is exactly the
        trained function; so is `trainer.model` afterwards."""
        from rankwise.methods.allocator import convert

        assert kept.plan is not None
        convert(trainer, kept.plan)
        super().hand_over(trainer, kept, folder)
