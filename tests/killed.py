"""The command line in a process that is killed at the end of step KILLED_AT, where that is set.

Arguments: those of the command line.
"""

import os
import signal
import sys
from typing import Any

from transformers import TrainerCallback


class Killed(TrainerCallback):
    """As by the kernel: no handler runs."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        print(f"from step {state.global_step}", file=sys.stderr)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == int(os.environ.get("KILLED_AT", "-1")):
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    from rankwise import cli, stages

    run_training = stages.run_training

    def training(trainer: Any, resume: Any) -> None:
        trainer.add_callback(Killed())
        run_training(trainer, resume)

    stages.run_training = training
    cli.main()
