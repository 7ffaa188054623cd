"""EVA (arXiv 2410.07170): ranks and starting values from the activations, before any training."""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from rankwise.errors import DataError, ModelError, RankwiseError
from rankwise.methods.base import Kept, LoraMethod, Setting, flag
from rankwise.methods.whole import whole_modules

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer

    from rankwise.plan import RankPlan

LIMIT = 1000  # batches; PEFT itself goes on until every direction stands still


@dataclass(frozen=True)
class EVA(LoraMethod):
    """Rows of A are the leading right singular vectors of each module's inputs; the directions that
    explain most of their module's variance, of all modules, share a budget of r per module.

    A module may end at rank 0, or at up to rho · r. All train as plain LoRA from there.

    Raises:
        RankwiseError: a value out of range.

    Source: arXiv 2410.07170, algorithm 1; PEFT's implementation.

    Example:
        >>> EVA(r=4, rho=2.0).largest
        8
    """

    title: ClassVar[str] = "EVA"
    source: ClassVar[str] = "arXiv 2410.07170"
    claim: ClassVar[str] = "choosing ranks"

    rho: float = flag(2.0, "the largest rank is rho · r; at 1 every module stays at r")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.rho < float("inf"):
            raise RankwiseError(f"rho is {self.rho}; it has to be at least 1")

    @property
    def largest(self) -> int:
        """The largest rank that a module can get."""
        return round(self.r * self.rho)

    def start(self, model: "nn.Module", setting: Setting) -> "RankPlan":
        plan = whole_modules(model, super().start(model, setting), self.title)
        for name, entry in plan.modules.items():
            if self.largest > (limit := min(entry.in_features, entry.out_features)):
                raise ModelError(
                    f"rho · r is {self.largest}, but {name!r} can have no rank above {limit}; "
                    "lower one of them"
                )
        return plan

    def check(self, model: "nn.Module", setting: Setting) -> None:
        self.start(model, setting)

    def attach(self, model: "nn.Module", plan: "RankPlan | None", setting: Setting) -> "nn.Module":
        """Looks at the training rows until the directions stand still.

        Raises:
            DataError: fewer rows than directions.
            ModelError: the directions move on after `LIMIT` batches.
        """
        from peft import EvaConfig, initialize_lora_eva_weights

        from rankwise.lora import build, write_ranks

        assert plan is not None
        # In a language model what is not predicted, prompts and padding, is left out; other tasks'
        # labels say nothing about tokens.
        eva = EvaConfig(rho=self.rho, use_label_mask=setting.task_type == "CAUSAL_LM")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*low_cpu_mem_usage")
            peft_model = build(
                model,
                plan,
                task_type=setting.task_type,
                lora_dropout=self.lora_dropout,
                init_lora_weights="eva",
                eva_config=eva,
            )
        initialize_lora_eva_weights(
            peft_model,
            _Batches(peft_model, setting, self.largest),
            prepare_layer_inputs_fn=_tokens,
            show_progress_bar=False,
        )
        config = peft_model.peft_config["default"]
        config.init_lora_weights, config.eva_config = True, None  # only how the factors began
        write_ranks(peft_model)
        return peft_model

    def keep(self, trainer: "Trainer", plan: "RankPlan | None", setting: Setting) -> Kept:
        """The ranks that the activations gave, rank 0 among them."""
        from rankwise.lora import check, realised

        assert plan is not None
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        found = realised(model)
        ranks = {name: found[name][0] if name in found else 0 for name in plan.modules}
        kept = replace(
            plan.with_ranks(ranks, **{"method": self.describe()} | dict(setting.provenance)),
            r=self.largest,
        )
        check(model, kept)
        return Kept(kept, figures={"pieces": sum(ranks.values())})


class _Batches:
    """Training batches as Trainer makes them, as plain dicts, over and over up to a limit."""

    def __init__(self, model: "nn.Module", setting: Setting, least: int):
        from rankwise.trainer import FiniteTrainer, replaced

        self.size = max(setting.args.train_batch_size, least)
        if len(setting.train) < least:
            raise DataError(
                f"EVA looks for {least} directions (rho · r) in {len(setting.train)} training "
                f"rows; give at least {least}, or lower r"
            )
        # A batch of fewer rows than directions teaches nothing of a module that sees one token of
        # each row (BERT's pooler).
        args = replaced(
            setting.args,
            per_device_train_batch_size=math.ceil(self.size / max(1, setting.args.n_gpu)),
            dataloader_drop_last=len(setting.train) >= self.size,
        )
        options = {k: v for k, v in setting.options.items() if k != "callbacks"}
        trainer = FiniteTrainer(model, args, train_dataset=setting.train, **options)
        self.loader = trainer.get_train_dataloader()

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for _ in range(math.ceil(LIMIT / len(self))):
            for batch in self.loader:
                yield dict(batch)
        raise ModelError(
            f"EVA's directions still move after {LIMIT} batches of {self.size} rows; take larger "
            "batches, or a smaller r or rho"
        )


def _tokens(inputs: Any, indices: Any, name: str) -> Any:
    """A module's inputs (tokens, in) without padding; one that sees a token a row, as they are."""
    x = inputs if hasattr(inputs, "dim") else inputs[0]
    return x.contiguous() if x.dim() == 2 else x[indices.T.unbind()]
