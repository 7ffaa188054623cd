"""What the order of a trained adapter costs, in training steps of the same adapter.

    python benchmarks/order_cost.py [--rounds 5]

MiniLM (22.7 million parameters), LoRA of rank 8 on all linear layers, batch 32, 64 tokens,
2 classes, float32, one thread; the order by data looks at 400 rows. Both live in one process and
take turns: a figure is the median over rounds of one order's CPU seconds over those of one training
step in the same round. An order that costs as much as n steps is 5 % of a training of 20 n steps.

Only ratios are written to benchmarks/results/order_cost.json: seconds belong to a machine.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

from rankwise.cli.demo import MODEL_PACKAGE, package_folder
from rankwise.files import write_json
from rankwise.surgeon import LADDER, by_data

RESULT = Path(__file__).parent / "results" / "order_cost.json"
ROWS, BATCH, TOKENS, STEPS = 400, 32, 64, 4
LADDERS: dict[str, tuple[float, ...]] = {"default": LADDER, "one look": ()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
    batches = [rows(BATCH) for _ in range(ROWS // BATCH)]

    def step() -> None:
        model.train()
        for batch in batches[:STEPS]:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    found: dict[str, list[float]] = {name: [] for name in LADDERS}
    looks: dict[str, int] = {}
    for _ in range(rounds):
        _, one = timed(step)
        for name, ladder in LADDERS.items():
            order, seconds = timed(lambda ladder=ladder: by_data(model, batches, ladder=ladder))
            looks[name] = order.provenance["looks"]
            found[name].append(seconds * STEPS / one)
    result: dict[str, Any] = {
        "rows": len(batches) * BATCH,
        "batch": BATCH,
        "tokens": TOKENS,
        "rounds": rounds,
        "steps": {
            name: {
                "looks": looks[name],
                "median": round(statistics.median(values), 1),
                "low": round(min(values), 1),
                "high": round(max(values), 1),
            }
            for name, values in found.items()
        },
    }
    write_json(RESULT, result)
    for name, value in result["steps"].items():
        print(f"{name}: {value['looks']} looks cost {value['median']} training steps")


def adapted() -> Any:
    """A model whose adapter does something: B is not zero."""
    folder = package_folder(MODEL_PACKAGE) / "model"
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    model = get_peft_model(
        base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="SEQ_CLS")
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    return model


def rows(count: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1000, 20000, (count, TOKENS))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.randint(0, 2, (count,)),
    }


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and its CPU seconds."""
    started = time.process_time()
    return call(), time.process_time() - started


if __name__ == "__main__":
    main()
