"""Peak memory of a piece of work: the GPU's where there is one, else the process's."""

import gc
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Peak:
    """A running measurement.

    Attributes:
        device: what is measured.
        of: "CUDA allocations", "resident set", or "resident set since start" where the system
            cannot forget an earlier peak.
    """

    device: torch.device
    of: str

    def read(self) -> int:
        """Bytes at the highest point so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if self.of == "resident set":
            line = next(x for x in _STATUS.read_text().splitlines() if x.startswith("VmHWM"))
            return int(line.split()[1]) * 1024
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_memory(device: torch.device) -> Peak:
    """Starts measuring: earlier peaks are forgotten where the system can."""
    gc.collect()  # a model that went before may only be held by a cycle
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return Peak(device, "CUDA allocations")
    try:
        _CLEAR.write_text("5")  # Linux: resets VmHWM
        return Peak(device, "resident set")
    except OSError:
        return Peak(device, "resident set since start")
