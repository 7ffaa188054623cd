"""A Trainer that stops at a bad loss; arguments, checkpoints and resuming, which all share."""

import gc
import inspect
import shutil
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from rankwise.errors import CheckpointError, DivergedError, RankwiseError
from rankwise.files import write_json
from rankwise.fourbit import keep_gradients
from rankwise.reading import as_json, read_json
from rankwise.sharded import refuse_sharded

FEW_BATCHES = 8  # too few for the standard error of a mean over batches

logger = logging.get_logger(__name__)

TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForQuestionAnswering": "QUESTION_ANS",
}


class FiniteTrainer(Trainer):
    """A Trainer that stops at the first NaN or infinite loss, before it reaches the parameters.

    Args:
        model: what is trained.
        args: TrainingArguments.
        configuration: what a checkpoint has to agree with to be resumed, written into each; None
            writes nothing and resumes any.
        trainer_class: another library's Trainer (TRL's), which prepares rows and computes the loss.
        **trainer: of transformers.Trainer, or of `trainer_class`.
    """

    def __new__(cls, *_: Any, trainer_class: type[Trainer] | None = None, **__: Any) -> Any:
        found: Any = cls if trainer_class is None else over(cls, trainer_class)
        return super().__new__(found)

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        configuration: Mapping[str, Any] | None = None,
        trainer_class: type[Trainer] | None = None,
        **trainer: Any,
    ):
        super().__init__(model, args=args, **trainer)  # the second positional is not args in all
        keep_gradients(model)  # evaluations in between would take those of a 4-bit base
        self.configuration = configuration
        self._good: str | None = None  # the last checkpoint of this run
        self._batch_losses: list[Tensor] = []
        # Trainer takes `**kwargs` in a model's forward as a promise to divide the loss by
        # num_items_in_batch. Language models do; the other heads ignore it, and the loss of a step
        # would be the sum over its micro-batches instead of their mean.
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        if trainer_class is None and task_type_of(base) not in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
            self.model_accepts_loss_kwargs = False

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._stop_unless_finite(loss)
        return loss

    def _stop_unless_finite(self, loss: Tensor) -> None:
        if torch.isfinite(loss).all():
            return
        last = self._good
        kept = f"the last good checkpoint is {last}" if last else "no checkpoint had been saved yet"
        raise DivergedError(
            f"the loss is {float(loss)} at step {self.state.global_step + 1}; {kept}. "
            f"Lower the learning rate (now {self.args.learning_rate:g}) or look at the data"
        )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.stop_unless_finite_parameters()  # never save what a bad gradient left behind
        super()._save_checkpoint(model, trial)
        self._good = f"{self.args.output_dir}/checkpoint-{self.state.global_step}"
        if self.args.should_save:
            seal(Path(self._good))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        self._write_configuration(Path(output_dir or str(self.args.output_dir)))

    def _save_rng_state(self, output_dir: str) -> None:
        """Those of all processes into the first one's folder: the others may have their own."""
        super()._save_rng_state(output_dir)
        if self.args.world_size == 1:
            return
        own = Path(output_dir) / f"rng_state_{self.args.process_index}.pth"
        for name, content in gather_object([(own.name, own.read_bytes())]):
            if self.args.should_save and not (Path(output_dir) / name).exists():
                (Path(output_dir) / name).write_bytes(content)

    def _write_configuration(self, folder: Path) -> None:
        if self.configuration is not None and self.args.should_save:
            write_json(folder / "search.json", dict(self.configuration))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        self._good = resume_from_checkpoint
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        self._batch_losses.clear()
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        loss, logits, labels = super().prediction_step(*args, **kwargs)
        if loss is not None:
            self._batch_losses.append(loss.detach().float().mean())
        return loss, logits, labels

    def batch_losses(self) -> np.ndarray:
        """The mean loss of each batch of the last evaluation, over all processes."""
        losses = self.accelerator.gather(torch.stack(self._batch_losses).to(self.args.device))
        if len(losses) < FEW_BATCHES:
            logger.warning_once(
                f"the standard error of the loss comes from {len(losses)} evaluation batches; "
                "lower per_device_eval_batch_size, or give compute_metrics"
            )
        return losses.cpu().double().numpy()

    def measure(self, dataset: Any, loss_only: bool = False) -> EvalLoopOutput:
        """Evaluates the model as it stands; without predictions where the loss is all there is."""
        loader = self.get_test_dataloader(dataset)
        return self.evaluation_loop(
            loader, "Evaluation", prediction_loss_only=loss_only, metric_key_prefix="eval"
        )

    def stop_unless_finite_parameters(self) -> None:
        """Raises DivergedError where a finite loss had a gradient that was not."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not torch.isfinite(parameter).all():
                raise DivergedError(
                    f"{name} is not finite after step {self.state.global_step}; the last good "
                    f"checkpoint: {self._good}. Lower the learning rate"
                )


class GatedTrainer(FiniteTrainer):
    """Trains a model with gates attached; its checkpoints hold what a gated run needs to go on."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Trainable tensors, raw, and what they belong to."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        trainable = {n: p.detach().contiguous() for n, p in _trainable(self.model)}
        save_file(trainable, folder / "search.safetensors")
        self._write_configuration(folder)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        self._good = resume_from_checkpoint
        try:
            saved = load_file(Path(resume_from_checkpoint) / "search.safetensors")
            with torch.no_grad():
                for name, parameter in _trainable(self.model):
                    parameter.copy_(saved[name])
        except (OSError, KeyError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(
                f"cannot read {resume_from_checkpoint}/search.safetensors: {error}; resume from an "
                "earlier checkpoint"
            ) from error


def over(ours: Any, theirs: Any) -> Any:
    """A class of ours on top of another library's Trainer.

    Raises:
        RankwiseError: no Trainer, or one that copies the adapter, which gates would break.
    """
    if not (isinstance(theirs, type) and issubclass(theirs, Trainer)):
        raise RankwiseError(f"trainer_class is {theirs!r}; give a subclass of transformers.Trainer")
    taken = inspect.signature(theirs).parameters
    if issubclass(ours, GatedTrainer) and {"ref_model", "reward_funcs"} & set(taken):
        raise RankwiseError(
            f"this method puts gates on the adapter, which {theirs.__name__} copies by the "
            "names of its parameters; take method='cut', which trains it as it is"
        )
    return (
        ours if issubclass(ours, theirs) else type(f"Finite{theirs.__name__}", (ours, theirs), {})
    )


def task_type_of(model: nn.Module) -> str | None:
    name = type(model).__name__
    return next((kind for suffix, kind in TASK_TYPES.items() if name.endswith(suffix)), None)


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def run_training(trainer: Trainer, resume_from_checkpoint: str | bool | None) -> None:
    """Starts a trainer, from a checkpoint where one is asked for.

    Args:
        trainer: what a method's `trainer` slot made.
        resume_from_checkpoint: a folder, True for the last complete one, None for a fresh start.

    Raises:
        CheckpointError: nothing there, or a checkpoint of another configuration.
    """
    configuration = getattr(trainer, "configuration", None)
    found = find_checkpoint(str(trainer.args.output_dir), resume_from_checkpoint, configuration)
    state = None if found is None else TrainerState.load_from_json(f"{found}/{TRAINER_STATE_NAME}")
    if found is None or state is None or state.global_step < state.max_steps:
        trainer.train(resume_from_checkpoint=found)
        return
    # Trainer would take one more step from a checkpoint of the last one
    trainer.state = state
    trainer._load_from_checkpoint(found)


SEAL = "whole.json"


def seal(checkpoint: Path) -> None:
    """Writes, last of all, what belongs to a checkpoint: size and CRC-32 of every file in it."""
    paths = [path for path in sorted(checkpoint.iterdir()) if path.is_file()]  # FSDP has folders
    files = {path.name: _sum(path) for path in paths if path.name != SEAL}
    write_json(checkpoint / SEAL, files)


def _sum(path: Path) -> list[int]:
    total = size = 0
    with path.open("rb") as file:
        while block := file.read(2**20):
            total, size = zlib.crc32(block, total), size + len(block)
    return [size, total]


def missing(checkpoint: Path) -> str:
    """What a checkpoint lacks to be gone on with exactly, in words; "" where it is whole.

    One of ours has a seal, which tells a single changed byte. One of a stock Trainer has none: its
    files have to be there and to be whole archives.
    """
    try:
        step = read_json(checkpoint / TRAINER_STATE_NAME).get("global_step")
        if not isinstance(step, int) or isinstance(step, bool):
            return f"no step in its {TRAINER_STATE_NAME}"
        for name in ("optimizer.pt", "scheduler.pt"):
            if not (checkpoint / name).is_file():
                return f"no {name}, without which the optimizer would begin anew"
        if (checkpoint / SEAL).is_file():
            for name, said in read_json(checkpoint / SEAL).items():
                if not (checkpoint / name).is_file() or _sum(checkpoint / name) != said:
                    return f"its {name} is damaged"
            return ""
        for path in (*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    return f"its {path.name} is damaged"
        weights = list(checkpoint.glob("*.safetensors"))
        for path in weights:
            with safe_open(path, framework="pt") as file:
                file.keys()
        return "" if weights else "no weights in safetensors"
    except (OSError, AttributeError, RankwiseError, zipfile.BadZipFile, SafetensorError) as error:
        return str(error)


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest whole checkpoint in a folder. A run killed while saving leaves half of one."""
    numbered = [
        (int(number), path)
        for path in Path(folder).glob("checkpoint-*")
        if (number := path.name.removeprefix("checkpoint-")).isdecimal()
    ]
    return next((path for _, path in sorted(numbered, reverse=True) if not missing(path)), None)


def drop_damaged(folder: str | Path) -> Path | None:
    """The newest whole checkpoint; newer ones, which Trainer would count among its own, go."""
    found = last_checkpoint(folder)
    newest = -1 if found is None else int(found.name.removeprefix("checkpoint-"))
    for path in Path(folder).glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if not number.isdecimal() or int(number) > newest:
            logger.warning(f"{path} is left out: {missing(path)}")
            shutil.rmtree(path)
    return found


def find_checkpoint(
    output_dir: str | Path,
    resume_from_checkpoint: str | bool | None,
    configuration: Mapping[str, Any] | None = None,
) -> str | None:
    """The checkpoint to resume from, checked against the configuration that would resume it.

    Args:
        output_dir: where True looks for the last complete checkpoint.
        resume_from_checkpoint: a folder, True, or None or False for a fresh start.
        configuration: what the checkpoint's `search.json` has to agree with; None does not look.

    Raises:
        CheckpointError: nothing there, or a checkpoint of another configuration.
    """
    if not resume_from_checkpoint:
        return None
    if resume_from_checkpoint is True:
        path = last_checkpoint(output_dir)
        if path is None:
            raise CheckpointError(f"no complete checkpoint in {output_dir}; start without resuming")
    else:
        path = Path(resume_from_checkpoint)
        if not (path / "trainer_state.json").is_file():
            raise CheckpointError(
                f"{path} is not a complete checkpoint: no trainer_state.json in it"
            )
        if why := missing(path):
            raise CheckpointError(f"{path} is not a complete checkpoint: {why}")
    if configuration is not None:
        try:
            saved = read_json(path / "search.json")
        except RankwiseError as error:
            raise CheckpointError(f"{path} is not a checkpoint of a search: {error}") from error
        _same_configuration(path, saved, as_json(dict(configuration)))
    return str(path)


def _same_configuration(path: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    for key in sorted(set(saved) | set(current)):
        was, now = saved.get(key), current.get(key)
        if key == "versions" or was == now:
            continue
        if isinstance(was, dict) and isinstance(now, dict):  # the first that differs, not all
            inner = next(k for k in sorted(set(was) | set(now)) if was.get(k) != now.get(k))
            key, was, now = f"{key}.{inner}", was.get(inner), now.get(inner)
        raise CheckpointError(
            f"{path} belongs to another run: {key} was {was!r} and is now {now!r}; start "
            "afresh, or resume with the old settings"
        )


def check_arguments(args: TrainingArguments) -> None:
    """Builds what a training takes from its arguments once, dry, on a model of one weight.

    So an optimizer, a schedule or a reporter that is not to be had shows before any work.

    Raises:
        RankwiseError: it cannot be built, or a number is out of its range; says which.
    """
    for name in ("weight_decay", "learning_rate", "max_grad_norm", "warmup_steps"):
        value = getattr(args, name)
        if not 0 <= value < float("inf"):
            raise RankwiseError(f"{name} is {value}; it has to be at least 0")
    if args.max_steps == 0:
        raise RankwiseError("max_steps is 0; give at least 1, or -1 to train num_train_epochs")
    model = nn.Linear(1, 1)
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        special = {"optimizer_dict", "params", "model"} & set(options)
        optimizer = None if special else kind(model.parameters(), **options)
    except Exception as error:
        raise RankwiseError(f"optim {args.optim} cannot be built: {_line(error)}") from error
    try:
        if optimizer is not None:
            get_scheduler(
                args.lr_scheduler_type,
                optimizer,
                num_warmup_steps=1,
                num_training_steps=10,
                scheduler_specific_kwargs=args.lr_scheduler_kwargs or None,
            )
    except Exception as error:
        kind_of = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        raise RankwiseError(
            f"lr_scheduler_type {kind_of} cannot be built: {_line(error)}; its arguments go "
            "into --training_arguments as lr_scheduler_kwargs"
        ) from error
    if said := _missing_reporter(args):
        raise RankwiseError(f"--report_to: {said}")


def _missing_reporter(args: TrainingArguments) -> str:
    """Why a reporter cannot be had, in words; "" where all can."""
    hook = sys.unraisablehook
    sys.unraisablehook = lambda _: None  # half-made, some break when they are thrown away too
    try:
        for reporter in get_reporting_integration_callbacks(args.report_to):
            reporter()
    except Exception as error:
        return _line(error)
    finally:
        gc.collect()
        sys.unraisablehook = hook
    return ""


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def default_arguments(scratch: str, rate: float) -> TrainingArguments:
    """What a training is done with where the user gives no TrainingArguments."""
    return TrainingArguments(
        output_dir=scratch,
        learning_rate=rate,
        num_train_epochs=3,
        per_device_train_batch_size=32,
        warmup_steps=0.06,
        save_strategy="no",
        report_to="none",
    )


def gated_arguments(args: TrainingArguments) -> TrainingArguments:
    """The user's arguments, for a training with gates; refused where gates would be lost.

    Raises:
        RankwiseError: several GPUs in one process, sharded parameters, a batch size that is found
            by starting over.
    """
    if args.n_gpu > 1:
        raise RankwiseError(
            f"{args.n_gpu} GPUs in one process; use `accelerate launch`, or CUDA_VISIBLE_DEVICES=0"
        )
    refuse_sharded("a training with gates", args)
    if args.auto_find_batch_size:
        raise RankwiseError("auto_find_batch_size starts a search over half-way; give a batch size")
    if not args.gradient_checkpointing:
        return replaced(args)
    # reentrant checkpointing refuses autograd.grad
    kwargs = args.gradient_checkpointing_kwargs or {}
    return replaced(args, gradient_checkpointing_kwargs=kwargs | {"use_reentrant": False})


def labelled(args: TrainingArguments) -> TrainingArguments:
    """With the name of the labels, which Trainer cannot read off a PEFT model."""
    return args if args.label_names is not None else replaced(args, label_names=["labels"])


def replaced(args: TrainingArguments, **changes: Any) -> TrainingArguments:
    """`dataclasses.replace`, which counts the GPUs again where someone had set their number."""
    new = replace(args, **changes)
    new._n_gpu = args.n_gpu
    return new


def decisive(args: TrainingArguments) -> dict[str, Any]:
    """The training arguments that a resumed search must share with the one that was stopped."""
    names = (
        "learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps "
        "num_train_epochs max_steps per_device_train_batch_size "
        "gradient_accumulation_steps optim optim_args train_sampling_strategy "
        "weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm bf16 seed "
        "data_seed label_smoothing_factor neftune_noise_alpha "
        "average_tokens_across_devices"
    ).split()
    given = args.to_dict()
    return {name: given.get(name) for name in names}
