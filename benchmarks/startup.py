"""What a user waits for before any work: `rankwise --help`, and the cut of an adapter of 100 MB.

    python benchmarks/startup.py [--rounds 5] [--output benchmarks/results/startup.json]

Each is a whole process, side by side with what it cannot be faster than: `--help` with
`python -c pass`, the cut with a process that reads the same file with safetensors and writes it
again. In turn, A B A B, and the ratio is taken within a round, so that a machine whose speed drifts
does not decide.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from rankwise.files import write_json

RESULT = Path(__file__).parent / "results" / "startup.json"
MODULES, WIDTH, R = 48, 4096, 64  # 48 x 2 x 64 x 4096 x 4 bytes = 101 MB
READ_AND_WRITE = (
    "from safetensors.torch import load_file, save_file; import sys; "
    "save_file(load_file(sys.argv[1]), sys.argv[2])"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        size = write_adapter(folder / "big")
        help_ratio = ratios(
            lambda _: [sys.executable, "-c", "from rankwise.cli import main; main(['--help'])"],
            lambda _: [sys.executable, "-c", "pass"],
            args.rounds,
        )
        cut_ratio = ratios(
            lambda i: cut(folder / "big", folder / f"cut-{i}"),
            lambda i: [
                *(sys.executable, "-c", READ_AND_WRITE),
                *(str(folder / "big" / "adapter_model.safetensors"), str(folder / f"{i}.st")),
            ],
            args.rounds,
        )
    found = {
        "rounds": args.rounds,
        "adapter_bytes": size,
        "help_over_python": help_ratio | {"aim": 3.0},
        "cut_over_read_and_write": cut_ratio | {"aim": 2.0},
    }
    write_json(args.output, found)
    for name in ("help_over_python", "cut_over_read_and_write"):
        print(f"{name}: median {found[name]['median']:.2f} (aim {found[name]['aim']})")


def write_adapter(folder: Path) -> int:
    """A LoRA adapter of random factors; its size in bytes."""
    folder.mkdir(parents=True)
    names = [f"model.layers.{i}.proj" for i in range(MODULES)]
    weights = {}
    for name in names:
        weights[f"base_model.model.{name}.lora_A.weight"] = torch.randn(R, WIDTH)
        weights[f"base_model.model.{name}.lora_B.weight"] = torch.randn(WIDTH, R)
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": R, "lora_alpha": R, "target_modules": names}
    write_json(folder / "adapter_config.json", config)
    return (folder / "adapter_model.safetensors").stat().st_size


def cut(adapter: Path, target: Path) -> list[str]:
    code = "from rankwise.cli import main; main()"
    flags = ["--adapter", str(adapter), "--rank", "16", "--output_dir", str(target)]
    return [sys.executable, "-c", code, "cut", *flags]


def ratios(ours, theirs, rounds: int) -> dict[str, float]:
    """Ours over theirs, round by round; the first round warms the caches and does not count."""
    found = []
    for i in range(rounds + 1):
        a, b = seconds(ours(i)), seconds(theirs(i))
        if i:
            found.append(a / b)
    low, middle, high = statistics.quantiles(found, n=4, method="inclusive")
    return {"low": round(low, 3), "median": round(middle, 3), "high": round(high, 3)}


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
