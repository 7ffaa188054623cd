"""Causal language models: what is learned of a row, and the exact mean loss."""

import json
import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    EvalPrediction,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from rankwise.errors import DataError
from rankwise.tasks import CausalLM, load_model, load_task, load_tokenizer
from rankwise.tasks.causal_lm import perplexity

EOS = "<|endoftext|>"


def byte_level(bos: bool = False) -> PreTrainedTokenizerFast:
    """GPT-2's kind of tokenizer, one token a byte, no padding token; bos as Llama sets it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate([EOS, "<s>", *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=EOS, bos_token="<s>")


@pytest.fixture
def tiny(tmp_path) -> Path:
    """A folder with a decoder of one layer and its tokenizer."""
    torch.manual_seed(0)
    byte_level().save_pretrained(tmp_path / "model")
    config = GPT2Config(
        vocab_size=258, n_positions=64, n_embd=8, n_layer=1, n_head=2, initializer_range=0.5
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def load(tmp_path):
    def load(rows, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        return load_task(train_file=path, validation_file=path, **options)

    return load


def decoded(tokenizer, row) -> tuple[str, str]:
    """(all of the row, what is learned of it)"""
    learned = [label for label in row["labels"] if label != -100]
    return tokenizer.decode(row["input_ids"]), tokenizer.decode(learned)


def test_only_the_completion_and_the_end_are_learned(load):
    task = load([{"prompt": "Q: 1+1? A:", "completion": " two"}])
    assert (task.kind, task.task_type) == ("causal_lm", "CAUSAL_LM")
    assert task.text_columns == ("prompt", "completion")
    tokenizer = byte_level()
    row = task.encode(task.train, tokenizer)[0]
    assert decoded(tokenizer, row) == (f"Q: 1+1? A: two{EOS}", f" two{EOS}")
    assert row["labels"][:10] == [-100] * 10
    assert row["labels"][10:] == row["input_ids"][10:]
    assert row["attention_mask"] == [1] * 15


def test_all_of_a_text_is_learned(load):
    task = load([{"text": "abc"}])
    tokenizer = byte_level(bos=True)
    row = task.encode(task.train, tokenizer)[0]
    assert decoded(tokenizer, row) == (f"<s>abc{EOS}", f"<s>abc{EOS}")


def test_bos_is_set_once_before_the_prompt(load):
    task = load([{"prompt": "ab", "completion": "cd"}])
    tokenizer = byte_level(bos=True)
    row = task.encode(task.train, tokenizer)[0]
    assert decoded(tokenizer, row) == (f"<s>abcd{EOS}", f"cd{EOS}")


def test_columns_of_any_name(load):
    task = load(
        [{"mr": "name[X]", "ref": "X is.", "id": 1}], text_column=("mr", "ref"), kind="causal_lm"
    )
    tokenizer = byte_level()
    row = task.encode(task.train, tokenizer)[0]
    assert decoded(tokenizer, row) == (f"name[X]X is.{EOS}", f"X is.{EOS}")


def test_a_cut_text_has_no_end_to_learn(load):
    task = load([{"text": "abcdef"}])
    tokenizer = byte_level()
    assert decoded(tokenizer, task.encode(task.train, tokenizer, 6)[0])[0] == "abcdef"
    assert decoded(tokenizer, task.encode(task.train, tokenizer, 4)[0])[0] == "abcd"
    assert decoded(tokenizer, task.encode(task.train, tokenizer, 7)[0])[0] == f"abcdef{EOS}"


def test_prompts_that_fill_max_length_are_left_out_and_counted(load, caplog):
    rows = [{"prompt": "p" * size, "completion": "c"} for size in (3, 7, 8, 20)]
    task = load(rows)
    encoded = task.encode(task.train, byte_level(), max_length=8)
    assert [len(ids) for ids in encoded["input_ids"]] == [5, 8]
    assert "left out 2 of 4 rows with nothing to learn within max_length=8" in caplog.text


def test_nothing_left_to_learn(load):
    task = load([{"prompt": "long prompt", "completion": "c"}] * 2)
    with pytest.raises(DataError, match="all 2 rows have nothing to learn within max_length=8"):
        task.encode(task.train, byte_level(), max_length=8)


def test_empty_completion_is_named(load):
    with pytest.raises(DataError, match="train row 1: 'completion' is empty"):
        load([{"prompt": "a", "completion": None}])


def test_padding_is_not_learned_though_it_is_eos(tiny, load):
    task = load([{"text": "ab"}, {"text": "abcdef"}])
    tokenizer = load_tokenizer(tiny)
    assert tokenizer.pad_token == EOS
    encoded = task.encode(task.train, tokenizer)
    batch = task.data_collator(tokenizer)([encoded[0], encoded[1]])
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 7)
    assert batch["labels"][0].tolist() == [*encoded[0]["input_ids"], *[-100] * 4]
    assert batch["labels"][0, 2] == tokenizer.eos_token_id
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 7]


# Loss and perplexity


def test_perplexity_of_uniform_guesses_is_the_vocabulary_size():
    task = CausalLM("t", ("text",), None, None, ("perplexity", "loss"))
    labels = torch.tensor([[-100, 3, 1, 2], [0, 1, -100, -100]])
    sums = task.preprocess_logits(torch.zeros(2, 4, 10), labels)
    torch.testing.assert_close(sums, torch.tensor([[3 * math.log(10), 3.0], [math.log(10), 1.0]]))
    found = task.compute_metrics()(EvalPrediction(predictions=sums.numpy(), label_ids=labels))
    assert found == pytest.approx({"perplexity": 10.0, "loss": math.log(10)})


def test_sums_are_those_of_each_token():
    torch.manual_seed(1)
    task = CausalLM("t", ("text",), None, None, ("perplexity", "loss"))
    logits = torch.randn(2, 5, 7)
    labels = torch.tensor([[1, 2, 3, 4, 5], [6, -100, 0, 2, -100]])
    sums = task.preprocess_logits((logits, "cache"), labels)
    for row in range(2):
        expected = [
            -logits[row, place].log_softmax(-1)[labels[row, place + 1]]
            for place in range(4)
            if labels[row, place + 1] != -100
        ]
        assert sums[row, 1] == len(expected)
        assert sums[row, 0].item() == pytest.approx(sum(expected).item(), rel=1e-5)


def test_perplexity_does_not_overflow():
    assert perplexity(0.0) == 1.0
    assert perplexity(1000.0) == math.inf


def test_trainer_reports_the_mean_over_tokens(tiny, load, tmp_path):
    task = load([{"text": text} for text in ("ab", "abcdefgh" * 4, "zzz")])
    task.check_metrics()
    tokenizer = load_tokenizer(tiny)
    model = load_model(task, tiny, tokenizer=tokenizer)
    assert type(model).__name__ == "GPT2LMHeadModel"
    encoded = task.encode(task.validation, tokenizer)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path / "out"),
            per_device_eval_batch_size=2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        eval_dataset=encoded,
        data_collator=task.data_collator(tokenizer),
        compute_metrics=task.compute_metrics(),
        preprocess_logits_for_metrics=task.preprocess_logits,
    )
    found = trainer.evaluate()

    # One row at a time, without padding.
    total, tokens = 0.0, 0
    model.eval()
    for row in encoded:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            mean = model(input_ids=ids, labels=ids).loss.item()
        total, tokens = total + mean * (ids.numel() - 1), tokens + ids.numel() - 1
    assert found["eval_loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert found["eval_perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-4)
