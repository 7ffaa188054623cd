"""rankwise where accelerate's FSDP 2 shards over CPU processes (gloo), which torch can.

accelerate looks at its FSDP settings only where there are several GPUs: here it is told so.
Arguments: those of the command line.
"""

import sys
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType

_made = PartialState.__init__


def several(self: PartialState, *args: Any, **kwargs: Any) -> None:
    _made(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState.__init__ = several
    from rankwise import cli, stages

    evaluate = stages.evaluated

    def evaluated(job: Any, trainer: Any) -> Any:
        """Says what the model is made of where it is evaluated."""
        model = trainer.model.get_base_model()
        kinds = {type(p.data).__name__ for p in trainer.model.parameters()}
        print(*kinds, "in", type(model).__name__.removeprefix("FSDP"), file=sys.stderr)
        return evaluate(job, trainer)

    stages.evaluated = evaluated
    cli.main()
