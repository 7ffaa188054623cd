"""The slots of a method on a tiny model, in the order in which `rankwise.fit` runs them."""

from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from families import Family, arguments, batch, rows
from rankwise.methods.base import Kept, Method, Setting
from rankwise.trainer import task_type_of


def setting_of(of: Family, folder: Path, **changes: Any) -> Setting:
    """Four steps over 24 rows, unless `changes` say otherwise."""
    args = arguments(folder / "run", **{"max_steps": 4, "label_names": ["labels"]} | changes)
    task_type = task_type_of(of.model())
    return Setting(train=rows(of), held_out=rows(of, seed=2), args=args, task_type=task_type)


def trained(method: Method, of: Family, folder: Path, **changes: Any) -> tuple[Any, Any, Setting]:
    """(trainer after training, plan, setting); the base model lies in `folder/base`."""
    model = of.model()
    model.save_pretrained(folder / "base")
    setting = setting_of(of, folder, **changes)
    set_seed(0)
    method.check(model, setting)
    plan = method.start(model, setting)
    trainer = method.trainer(method.attach(model, plan, setting), plan, setting)
    trainer.train()
    return trainer, plan, setting


def handed_over(
    method: Method, of: Family, folder: Path, **changes: Any
) -> tuple[torch.Tensor, Kept, Any]:
    """(logits of the trained model, what was kept, the trainer), the adapter written."""
    trainer, plan, setting = trained(method, of, folder, **changes)
    kept = method.keep(trainer, plan, setting)
    expected = logits(trainer.model, of)
    method.hand_over(trainer, kept, folder)
    torch.testing.assert_close(logits(trainer.model, of), expected, rtol=1e-5, atol=1e-6)
    return expected, kept, trainer


@torch.no_grad()
def logits(model: torch.nn.Module, of: Family) -> torch.Tensor:
    return model.eval()(**batch(of)).logits
