"""Rows in memory, a finished run loaded again, and what it says of new rows."""

import csv
import json

import pandas
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

import rankwise
from conftest import make_rows, write_jsonl
from families import family
from rankwise import DataError


def arguments(out, **changes):
    settings = {"max_steps": 150, "learning_rate": 1e-2, "per_device_train_batch_size": 16}
    settings |= {"use_cpu": True, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    return TrainingArguments(output_dir=str(out), **(settings | changes))


@pytest.fixture(scope="module")
def finished(tiny_bert, tmp_path_factory):
    """A run on 200 rows in memory."""
    out = tmp_path_factory.mktemp("runs") / "first"
    rankwise.fit("lora", make_rows(200, 0), model=tiny_bert, output_dir=out, args=arguments(out))
    return out


def test_the_quickstart_is_ten_lines(tiny_bert, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps(row) for row in make_rows(400, 0)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    code = f"""
import rankwise
from transformers import TrainingArguments

args = TrainingArguments("out", learning_rate=5e-3, max_steps=250, report_to="none", use_cpu=True)
fitted = rankwise.fit("cut", "rows.jsonl", model={tiny_bert!r}, output_dir="runs/first", args=args)
print(fitted.result.metrics, fitted.plan.parameters)
print(rankwise.predict("runs/first", ["a film lovely great and was", "the plot sad awful"]))
model, tokenizer = rankwise.load("runs/first")
"""
    assert len(code.strip().splitlines()) <= 10
    names: dict = {}
    exec(code, names)
    assert names["fitted"].result.metrics["accuracy"] > 0.9
    found = rankwise.predict("runs/first", ["a film lovely great and was", "the plot sad awful"])
    assert [row["label"] for row in found] == ["good", "bad"]


def test_what_fit_returns_says_what_it_is(tiny_bert, tmp_path):
    out = tmp_path / "out"
    args = arguments(out, max_steps=2)
    fitted = rankwise.fit("lora", make_rows(200, 0), model=tiny_bert, output_dir=out, args=args)
    value, size = fitted.result.metrics["accuracy"], fitted.plan.parameters
    first, *_, last = str(fitted).splitlines()
    said = f"LoRA r=8: accuracy {value:.4f} on 20 validation rows, {size:,} parameters, in {out}"
    assert first == said
    assert last == "No control was trained: nothing here says whether LoRA r=8 helped."
    assert repr(fitted) == f"Fitted({str(out)!r}, 'LoRA r=8')"
    assert fitted.model is fitted.model


@pytest.mark.parametrize("kind", ["dataset", "named", "frame", "splits", "list"])
def test_rows_in_memory_are_as_rows_of_a_file(kind, tiny_bert, tmp_path):
    rows = make_rows(48, 0)
    data = Dataset.from_list(rows)
    given = {
        "dataset": data,
        "named": data.cast_column("label", ClassLabel(names=["bad", "good"])),
        "frame": pandas.DataFrame(rows),
        "splits": DatasetDict({"train": data, "validation": Dataset.from_list(make_rows(8, 1))}),
        "list": rows,
    }[kind]
    args = arguments(tmp_path, max_steps=2)
    found = rankwise.fit("lora", given, model=tiny_bert, output_dir=tmp_path / "a", args=args)
    options = {"validation_file": write_jsonl(tmp_path / "v.jsonl", make_rows(8, 1))}
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    want = rankwise.fit(
        "lora",
        file,
        model=tiny_bert,
        output_dir=tmp_path / "b",
        args=args,
        **(options if kind == "splits" else {}),
    )
    assert found.result.metrics == pytest.approx(want.result.metrics)
    assert found.result.task["label_names"] == ["bad", "good"]


def test_loaded_it_computes_what_peft_does_and_has_its_tokenizer(finished, tiny_bert):
    model, tokenizer = rankwise.load(finished)
    batch = tokenizer(["a film lovely great", "sad plot"], padding=True, return_tensors="pt")
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)
    plain = PeftModel.from_pretrained(base, finished / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, plain(**batch).logits)
    assert not model.training and len(tokenizer) == len(AutoTokenizer.from_pretrained(tiny_bert))
    own = AutoTokenizer.from_pretrained(finished / "adapter")
    assert own("a film")["input_ids"] == tokenizer("a film")["input_ids"]
    plan = rankwise.RankPlan.load(finished / "adapter/plan.json")
    assert plan == rankwise.RankPlan.load(finished / "plan.json")


def test_saving_over_the_adapter_keeps_what_lies_beside_it(finished, tmp_path):
    import shutil

    shutil.copytree(finished / "adapter", tmp_path / "adapter")
    model, _ = rankwise.load(tmp_path / "adapter")
    model.save_pretrained(str(tmp_path / "adapter"))
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"plan.json", "task.json", "tokenizer.json", "adapter_model.safetensors"} <= names


def test_an_adapter_of_someone_else_is_loaded_too(tiny_bert, tmp_path):
    from peft import LoraConfig, get_peft_model

    of = family("llama-lm")
    of.model().save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "base")
    model = get_peft_model(
        of.auto.from_pretrained(tmp_path / "base"),
        LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False),
    ).eval()
    model.save_pretrained(tmp_path / "theirs")
    again, _ = rankwise.load(tmp_path / "theirs")
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits)
    with pytest.raises(DataError, match=r"no task\.json, so what it predicts is not known"):
        rankwise.predict(tmp_path / "theirs", ["a film"])


def test_the_command_line_writes_a_prediction_a_row(finished, tmp_path, capsys):
    from rankwise.cli import main

    rows = make_rows(20, 5)
    file = write_jsonl(tmp_path / "in.jsonl", [{"text": row["text"]} for row in rows])
    main(
        f"predict --adapter {finished} --input_file {file} --output_file {tmp_path}/o.jsonl".split()
    )
    found = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    right = [ours["label"] == row["label"] for ours, row in zip(found, rows, strict=True)]
    assert len(right) == 20 and sum(right) >= 18
    assert all(0.5 <= row["probability"] <= 1 for row in found)
    with pytest.raises(SystemExit):
        main(f"predict --adapter {finished} --input_file {file} --output_file {file}".split())
    assert "exists; give a new --output_file" in capsys.readouterr().err


def test_the_name_of_the_output_file_says_its_form(finished, tmp_path, capsys):
    from rankwise.cli import main

    texts = ["a fine, merry film", "dull"]
    file = write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    command = f"predict --adapter {finished} --input_file {file} --output_file {tmp_path}"
    main(f"{command}/o.csv".split())
    with (tmp_path / "o.csv").open(newline="", encoding="utf-8") as lines:
        found = list(csv.DictReader(lines))
    expected = rankwise.predict(finished, texts)
    assert [row["label"] for row in found] == [row["label"] for row in expected]
    assert [float(row["probability"]) for row in found] == pytest.approx(
        [row["probability"] for row in expected], abs=1e-3
    )
    with pytest.raises(SystemExit):
        main(f"{command}/o.xlsx".split())
    assert "it has to end in .jsonl or .csv" in capsys.readouterr().err


def test_tags_are_by_word_and_scores_are_numbers(tiny_bert, tmp_path):
    tagged = [
        {"tokens": row["text"].split(), "tags": ["O"] * 5 + ["B-X"]} for row in make_rows(24, 0)
    ]
    args = arguments(tmp_path, max_steps=2)
    rankwise.fit("lora", tagged, model=tiny_bert, output_dir=tmp_path / "tags", args=args)
    (found,) = rankwise.predict(tmp_path / "tags", [{"tokens": ["a", "film", "was"]}])
    assert len(found["tags"]) == 3 and set(found["tags"]) <= {"O", "B-X"}
    scored = [{"text": row["text"], "label": n / 7} for n, row in enumerate(make_rows(24, 0))]
    rankwise.fit("lora", scored, model=tiny_bert, output_dir=tmp_path / "scores", args=args)
    (found,) = rankwise.predict(tmp_path / "scores", ["a film was"])
    assert isinstance(found["score"], float)


def test_a_language_model_completes(tiny_bert, tmp_path):
    of = family("llama-lm")
    of.model().save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "base")
    rows = [{"prompt": "the film was ", "completion": row["text"]} for row in make_rows(24, 0)]
    args = arguments(tmp_path, max_steps=2)
    rankwise.fit("lora", rows, model=tmp_path / "base", output_dir=tmp_path / "lm", args=args)
    found = rankwise.predict(tmp_path / "lm", ["the film was", "a"], max_new_tokens=4, batch_size=2)
    (alone,) = rankwise.predict(tmp_path / "lm", ["a"], max_new_tokens=4)
    assert found[1] == alone  # padding on the left changes nothing
    model, tokenizer = rankwise.load(tmp_path / "lm")
    ids = tokenizer("a", return_tensors="pt")["input_ids"]
    for _ in range(4):  # greedily, one token after the other
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    want = tokenizer.decode(ids[0, len(tokenizer("a")["input_ids"]) :], skip_special_tokens=True)
    assert alone["completion"] == want


def test_wrong_rows_are_said_in_one_line(finished, tiny_bert, tmp_path, bert):
    with pytest.raises(DataError, match="no column 'text', only body; the run was trained on text"):
        rankwise.predict(finished, [{"body": "a film"}])
    with pytest.raises(DataError, match="input row 1: 'text' is empty, not a text"):
        rankwise.predict(finished, [{"text": None}])
    for wrong, said in ((3, "the rows are a int; give a file"), ([], "there are no rows")):
        with pytest.raises(DataError, match=said):
            rankwise.fit("lora", wrong, model=tiny_bert, output_dir=tmp_path / "no")
    with pytest.raises(DataError, match="have the splits train, dev; name them train, validation"):
        splits = {"train": make_rows(8, 0), "dev": make_rows(8, 1)}
        rankwise.fit("lora", splits, model=tiny_bert, output_dir=tmp_path / "no")
    raw = Dataset.from_list(make_rows(8, 0))
    with pytest.raises(DataError, match=r"columns text, label, none of which .* rankwise\.fit"):
        rankwise.search(bert, raw, args=arguments(tmp_path))
