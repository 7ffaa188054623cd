"""Parameters of which FSDP gives each process a part: asked for, refused, gathered, written.

An order needs activations, and those are whole; of the parameters only what an adapter trains is
gathered. It is FSDP 2 alone (`torch.distributed.fsdp.fully_shard`), whose parts are `DTensor`s.
"""

import os
from typing import TYPE_CHECKING, Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from rankwise.errors import RankwiseError

if TYPE_CHECKING:
    from transformers import TrainingArguments


def sharding(args: "TrainingArguments | None" = None) -> str | None:
    """What will shard parameters: "FSDP 2", "FSDP 1", "DeepSpeed", or None.

    accelerate's own config file says so in the environment and in its state, not in `args`.

    Args:
        args: of the training; None where there are none yet.
    """
    state: Any = AcceleratorState() if AcceleratorState._shared_state else None
    kind = "" if state is None else str(state.distributed_type.value)
    asked = {name: getattr(args, name, None) for name in ("fsdp", "deepspeed", "fsdp_plugin_args")}
    if asked["deepspeed"] or _is_on("ACCELERATE_USE_DEEPSPEED") or kind == "DEEPSPEED":
        return "DeepSpeed"
    if kind == "FSDP":
        return f"FSDP {state.fsdp_plugin.fsdp_version}"
    if asked["fsdp"]:
        return f"FSDP {(asked['fsdp_plugin_args'] or {}).get('fsdp_version', 1)}"
    return f"FSDP {os.environ.get('FSDP_VERSION', '1')}" if _is_on("ACCELERATE_USE_FSDP") else None


def refuse_sharded(
    what: str, args: "TrainingArguments | None" = None, *, able: bool = False
) -> None:
    """Raises RankwiseError where each process would have a part of a parameter that is needed.

    Args:
        what: a method's title, or a command.
        args: see `sharding`.
        able: whether it works under FSDP 2.
    """
    kind = sharding(args)
    if kind is None or (able and kind == "FSDP 2"):
        return
    instead = "set fsdp_version: 2, take torchrun" if able and "FSDP" in kind else "take torchrun"
    raise RankwiseError(
        f"{kind} gives each process a part of every parameter, and {what} needs them whole; "
        f"{instead} (several processes, nothing sharded), or train with {kind} elsewhere and give "
        "the saved adapter to rankwise.order"
    )


def load_everywhere() -> None:
    """Lets each process read the base from its files, whatever accelerate was told.

    With `fsdp_cpu_ram_efficient_loading` a new head has no memory on any process but the first, and
    accelerate, which matches an optimizer's tensors to the sharded ones by their addresses, takes
    one of the head's for another: parts of the head are not trained (accelerate 1.15).
    """
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def _is_on(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true", "yes")


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP 2 has sharded any parameter of a model."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the parts of all processes; all of them have to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def put(target: Tensor, value: Tensor) -> None:
    """Copies a whole tensor into one that may be sharded, in place."""
    if isinstance(target, DTensor):
        value = distribute_tensor(
            value.to(target.device, target.dtype), target.device_mesh, target.placements
        )
    target.copy_(value)


def agreed(model: nn.Module, answer: Any) -> Any:
    """The first process's answer, where a model is sharded.

    All processes have to run the same passes then, and rounding may give them different answers.
    """
    if not is_sharded(model):
        return answer
    told = [answer]
    torch.distributed.broadcast_object_list(told, src=0)
    return told[0]


def gathered(model: Any) -> dict[str, Any]:
    """What a PEFT model's `save_pretrained` needs to write what is trained, where it is sharded."""
    if not is_sharded(model):
        return {}
    named = model.named_parameters()
    return {"state_dict": {name: whole(p.detach()) for name, p in named if p.requires_grad}}
