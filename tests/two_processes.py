"""A search, or DyLoRA's training, under torchrun on CPU; process 0 writes the plan or the adapter.

Arguments: batch, folder, "autolora" or "dylora".
"""

import os
import sys
from pathlib import Path

from transformers import TrainingArguments, default_data_collator

from families import family, rows
from rankwise import AutoLoRA, search, train
from rankwise.lora import uniform

of = family("bert-classification")
of.config.hidden_dropout_prob = of.config.attention_probs_dropout_prob = 0.0
out = Path(sys.argv[2])
args = TrainingArguments(
    output_dir=str(out),
    max_steps=5,
    per_device_train_batch_size=int(sys.argv[1]),
    learning_rate=1e-2,
    lr_scheduler_type="constant",
    save_strategy="no",
    report_to="none",
    use_cpu=True,
    ddp_backend="gloo" if "LOCAL_RANK" in os.environ else None,
    disable_tqdm=True,
)
if sys.argv[3] == "dylora":
    model = of.model()
    plan = uniform(model, 4)
    collator = default_data_collator
    trainer = train(model, plan, rows(of, 48), args=args, method="dylora", data_collator=collator)
    if args.process_index == 0:
        trainer.save_nested(out)
else:
    plan = search(
        of.model(),
        rows(of, 48),
        method=AutoLoRA(gate_learning_rate=1e-2, lookahead=1.0),
        args=args,
        data_collator=default_data_collator,
    )
    if args.process_index == 0:
        plan.save(out / "plan.json")
