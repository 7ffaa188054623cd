"""The cut at the end of somebody else's training: a callback for any Trainer."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from rankwise.batches import batches_of, labelled
from rankwise.errors import AdapterError, DataError
from rankwise.files import replace_folder
from rankwise.orders import Ordered
from rankwise.surgeon import order


class CutAtEnd(TrainerCallback):
    """At the end of a training, orders the adapter by held-out rows and cuts it to a size.

    Writes into the training's output folder `ordered/`, from which `rankwise cut` makes every other
    size, and `cut/`, a stock PEFT adapter. The trained adapter stays as it is. For tools that take
    a callback by its class path: `rankwise.trainers.CutAtEnd`.

    Args:
        trainer: whose held-out rows order. None takes the batches that the last evaluation of the
            training saw, so there has to have been one.
        keep, budget, rank: the size, as `Ordered.cut` takes it; keep = 1/4 where none is given.
        rows: at most so many rows order.

    Example:
        >>> trainer.add_callback(rankwise.trainers.CutAtEnd(trainer, keep=1 / 16))
        >>> trainer.train()
    """

    def __init__(
        self,
        trainer: Trainer | None = None,
        *,
        keep: float | None = None,
        budget: int | None = None,
        rank: int | None = None,
        rows: int = 400,
    ):
        size = {"keep": keep, "budget": budget, "rank": rank}
        self.size: dict[str, Any] = {k: v for k, v in size.items() if v is not None}
        if len(self.size) > 1:
            raise AdapterError("give one of keep, budget and rank")
        self.size = self.size or {"keep": 0.25}
        self.trainer, self.rows = trainer, rows

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        if self.trainer is not None:
            ordered = order(self.trainer, batches_of(self.trainer, limit=self.rows), seed=args.seed)
        elif (loader := kwargs.get("eval_dataloader")) is not None:
            ordered = order(model, _some(loader, self.rows), seed=args.seed)
        else:
            raise DataError(
                "CutAtEnd saw no held-out rows: set eval_dataset and eval_strategy, or give it the "
                "trainer"
            )
        if state.is_world_process_zero:
            save_cut(ordered, Path(args.output_dir), **self.size)


def _some(batches: Iterable[Any], rows: int) -> list[dict[str, Any]]:
    """The first batches of a loader that hold so many rows."""
    found: list[dict[str, Any]] = []
    count = 0
    for batch in batches:
        if count >= rows:
            break
        found.append(labelled(batch, None))
        count += len(found[-1]["input_ids"])
    return found


def save_cut(ordered: Ordered, folder: Path, **size: Any) -> None:
    """Writes `ordered/` and `cut/` into a folder, in place of those of an earlier training."""
    work = folder / ".cutting"
    ordered.save(work / "ordered")
    ordered.cut(**size).save(work / "cut")
    for name in ("ordered", "cut"):
        replace_folder(work / name, folder / name)
    work.rmdir()
