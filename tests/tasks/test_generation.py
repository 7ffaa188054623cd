"""Generation: several references a row, the loss of the text alone, and batches on the left."""

import json
from pathlib import Path

import pytest
import torch
from test_causal_lm import byte_level
from torch.nn import functional
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from rankwise.decoding import Decoding, drop_partial, generate, generate_rows, left_padded
from rankwise.errors import DataError, RankwiseError
from rankwise.tasks import Generation, load_task
from rankwise.tasks.generation import BETWEEN, END

TRAIN = [
    {"mr": "name[A], food[Thai]", "ref": "A serves Thai food."},
    {"mr": "name[A], food[Thai]", "ref": "Thai food is at A."},
    {"mr": "name[B]", "ref": "B is there."},
]
TEST = [
    {"mr": "name[C]", "references": ["C is there.", "There is C.", "There you find C."]},
    {"mr": "name[A], food[Indian]", "references": ["A has Indian food."]},
]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def task(tmp_path) -> Generation:
    files = {"train": TRAIN, "validation": TRAIN, "test": TEST}
    paths = {f"{k}_file": write(tmp_path / f"{k}.jsonl", rows) for k, rows in files.items()}
    return load_task(**paths, text_column=("mr", "ref"), kind="generation")


def tiny(kind: str):
    """A random decoder over bytes whose next token hangs on all before it."""
    torch.manual_seed(0)
    if kind == "gpt2":
        sizes = {"n_positions": 128, "n_embd": 16, "n_layer": 2, "n_head": 2}
        config = GPT2Config(vocab_size=258, initializer_range=0.5, **sizes)
        return GPT2LMHeadModel(config).eval()
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def tokenizer():
    found = byte_level()
    found.pad_token = found.eos_token
    return found


# Rows


def test_training_rows_stay_and_evaluated_ones_are_one_an_input(task):
    assert len(task.train) == 3
    assert task.train["ref"][:] == [[row["ref"]] for row in TRAIN]
    assert task.validation["ref"][:] == [[TRAIN[0]["ref"], TRAIN[1]["ref"]], [TRAIN[2]["ref"]]]
    assert task.test["ref"][:] == [row["references"] for row in TEST]
    assert task.test["mr"][:] == [row["mr"] for row in TEST]


def test_lists_of_references_stay_where_an_input_is_there_twice(tmp_path):
    rows = [{"mr": "x", "references": ["a", "b"]}, {"mr": "x", "references": ["c"]}]
    found = load_task(
        test_file=write(tmp_path / "t.jsonl", rows), text_column=("mr", "ref"), kind="generation"
    )
    assert found.test["ref"][:] == [["a", "b"], ["c"]]


def test_known_tasks_read_as_they_are_laid_out(tmp_path):
    row = {"category": "Artist", "triples": ["a | b | c", "d | e | f"]}
    write(tmp_path / "train.jsonl", [row | {"category": "Food", "text": "t"}] * 2)
    write(
        tmp_path / "test.jsonl",
        [
            row | {"references": ["t", "u"]},
            row | {"category": "Food", "triples": ["g | h | i"], "references": ["v"]},
        ],
    )
    found = load_task("web_nlg", data_dir=tmp_path)
    assert found.train["triples"][0] == f"a | b | c{BETWEEN}d | e | f"
    assert found.test["group"][:] == ["unseen", "seen"]
    assert found.main_metric == "loss" and not found.greater_is_better
    assert (
        load_task(
            "e2e",
            train_file=write(
                tmp_path / "e.jsonl", [{"meaning_representation": "m", "human_reference": "r"}] * 2
            ),
        ).name
        == "e2e_nlg"
    )


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"mr": "x", "ref": None}, "train row 1: 'ref' is empty"),
        ({"mr": [], "ref": "x"}, "train row 1: 'mr' is empty"),
        ({"mr": "x", "ref": 7}, "train row 1: 'ref' is 7, neither a text"),
        ({"mr": "x"}, "train has no column 'ref'"),
    ],
)
def test_what_is_no_text_is_named(tmp_path, row, said):
    with pytest.raises(DataError, match=said):
        load_task(
            train_file=write(tmp_path / "t.jsonl", [row]),
            text_column=("mr", "ref"),
            kind="generation",
        )


# Loss


def test_every_reference_is_learned_and_the_input_is_not(task):
    rows = task.encode(task.test, tokenizer())
    assert len(rows) == 4
    learned = [
        tokenizer().decode([n for n in row["labels"] if n != -100], skip_special_tokens=True)
        for row in rows
    ]
    assert learned == [text for row in TEST for text in row["references"]]


def test_the_loss_is_that_of_the_texts_alone(task, tmp_path):
    """Against log-probabilities summed token by token from the logits of each row by itself."""
    model, words = tiny("gpt2"), tokenizer()
    trainer = Trainer(
        model,
        TrainingArguments(
            str(tmp_path), per_device_eval_batch_size=3, report_to="none", use_cpu=True
        ),
        data_collator=task.data_collator(words),
        compute_metrics=task.measure,
        preprocess_logits_for_metrics=task.preprocess_logits,
    )
    total, count = 0.0, 0
    for row in TEST:
        for text in row["references"]:
            prompt, learned = words(row["mr"] + END)["input_ids"], words(text)["input_ids"]
            learned = [*learned, words.eos_token_id]
            with torch.no_grad():
                logits = model(torch.tensor([prompt + learned])).logits[0]
            for place, token in enumerate(learned, len(prompt)):
                total -= float(functional.log_softmax(logits[place - 1], -1)[token])
                count += 1
    found = trainer.evaluate(task.encode(task.test, words))
    assert found["eval_loss"] == pytest.approx(total / count, rel=1e-5)


# Texts


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_gives_what_each_prompt_gives_alone(kind, beams):
    model, words = tiny(kind), tokenizer()
    prompts = [words(text)["input_ids"] for text in ("a", "some longer text", "bc", "x y z")]
    options = {"num_beams": beams, "max_new_tokens": 12}
    together = found_texts(model, words, prompts, Decoding(**options, generation_batch_size=4))
    alone = found_texts(model, words, prompts, Decoding(**options, generation_batch_size=1))
    assert together == alone
    assert len(set(alone)) > 1


def found_texts(model, words, prompts, decoding) -> list[str]:
    found = {}
    for places, texts in generate(model, words, prompts, decoding):
        found |= dict(zip(places, texts, strict=True))
    return [found[n] for n in range(len(prompts))]


def test_greedy_texts_are_the_likeliest_token_after_token():
    model, words = tiny("llama"), tokenizer()
    prompt = words("ab")["input_ids"]
    ids = list(prompt)
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    decoding = Decoding(num_beams=1, max_new_tokens=6, no_repeat_ngram_size=0)
    (text,) = found_texts(model, words, [prompt], decoding)
    assert text == words.decode(ids[2:], skip_special_tokens=True).strip()


def test_padding_is_on_the_left():
    ids, mask = left_padded([[5], [6, 7]], padding=0)
    assert ids.tolist() == [[0, 5], [6, 7]] and mask.tolist() == [[0, 1], [1, 1]]


def test_a_stopped_generation_goes_on_where_it_was(task, tmp_path, monkeypatch):
    model, words = tiny("gpt2"), tokenizer()
    decoding = Decoding(num_beams=2, max_new_tokens=8, generation_batch_size=1)
    whole = generate_rows(model, words, task, task.test, decoding, tmp_path / "whole.jsonl")
    calls = []
    real = model.generate

    def stops(**options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(**options)

    monkeypatch.setattr(model, "generate", stops)
    file = tmp_path / "texts.jsonl"
    with pytest.raises(KeyboardInterrupt):
        generate_rows(model, words, task, task.test, decoding, file)
    assert not file.exists()
    with (tmp_path / "texts.jsonl.partial").open("a") as partial:
        partial.write('[1, "half a li')
    assert generate_rows(model, words, task, task.test, decoding, file, resume=True) == whole
    assert len(calls) == 3  # one text was there
    assert file.read_text() == (tmp_path / "whole.jsonl").read_text()
    kept = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["generated"] for row in kept] == whole
    assert kept[0]["references"] == TEST[0]["references"]


def test_texts_of_another_model_are_generated_anew(task, tmp_path):
    model, words = tiny("gpt2"), tokenizer()
    file = tmp_path / "texts.jsonl"
    partial = tmp_path / "texts.jsonl.partial"
    decoding = Decoding(num_beams=1, max_new_tokens=4)
    right = generate_rows(model, words, task, task.test, decoding, file)
    about = partial.read_text().splitlines()[0]
    partial.write_text(f'{about}\n[0, "kept"]\n')
    assert generate_rows(model, words, task, task.test, decoding, file, True) == ["kept", right[1]]
    partial.write_text(f'{about}\n[0, "stale"]\n')
    with torch.no_grad():
        model.lm_head.weight.add_(1e-3)
    assert "stale" not in generate_rows(model, words, task, task.test, decoding, file, resume=True)
    drop_partial(file)
    assert not partial.exists()


def test_figures_of_seen_and_unseen_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("rankwise.metrics.meteor.tables_folder", lambda: None)
    for package in ("sacrebleu", "snowballstemmer", "anyascii"):
        pytest.importorskip(package)
    rows = [
        {"category": c, "triples": [c], "references": [f"{c} is a known category of things ."]}
        for c in ("Artist", "Food", "Athlete")
    ]
    found = load_task("web_nlg", test_file=write(tmp_path / "test.jsonl", rows))
    texts = ["nothing", "Food is a known category of things.", "nothing"]
    figures = {f.name: f.value for f in found.score_texts(found.test, texts)}
    assert figures["bleu_seen"] == pytest.approx(1.0) and figures["ter_seen"] == 0.0
    assert figures["bleu_unseen"] < figures["bleu"] < 1
    assert figures["ter_unseen"] == pytest.approx(1.0)


@pytest.mark.parametrize("option", ["num_beams", "max_new_tokens", "generation_batch_size"])
def test_a_number_out_of_range_is_named(option):
    with pytest.raises(RankwiseError, match=f"--{option} is 0; it has to be at least 1"):
        Decoding(**{option: 0})
