"""What is read from others runs no code, reaches no network, and writes nothing elsewhere."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import yaml as pyyaml
from case import ROWS, train
from same import names

from rankwise import escape
from rankwise.adapter import card_header

FAST = "--max_steps 2 --per_device_train_batch_size 8 --use_cpu".split()


class Payload:
    """What writes a file where it is unpickled."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def write_parquet(path: Path, address: str) -> None:
    """Rows with a column that nobody asks for, an image by what the metadata say of it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [f"{'fine' if n % 2 else 'awful'} film {n}" for n in range(24)]
    images = [{"bytes": None, "path": address}] * 24
    table = pa.table({"text": texts, "label": [n % 2 for n in range(24)], "image": images})
    features = {
        "text": {"dtype": "string", "_type": "Value"},
        "label": {"dtype": "int64", "_type": "Value"},
        "image": {"_type": "Image"},
    }
    about = json.dumps({"info": {"features": features}}).encode()
    pq.write_table(table.replace_schema_metadata({"huggingface": about}), path)


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/x.png", "{}/secret"])
def test_an_image_that_nobody_asks_for_is_not_fetched(forks, tiny_bert, tmp_path, address):
    work = tmp_path / "work"
    work.mkdir()
    (tmp_path / "secret").write_text("mine")
    write_parquet(work / "rows.parquet", address.format(tmp_path))
    argv = [word.format(model=tiny_bert) for word in train(rows="rows.parquet")]
    done = forks.run(argv, work, watch=True)
    assert done.code == 0, done.err
    assert done.forbidden == []


def test_no_pickle_is_ever_loaded(forks, tiny_bert, tmp_path):
    """As weights of an adapter, of a base model, and in a checkpoint that is gone on with."""
    owned, work = tmp_path / "owned", tmp_path / "work"
    work.mkdir()
    (work / "rows.jsonl").write_text(ROWS)
    payload = pickle.dumps(Payload(owned))
    adapter = work / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": tiny_bert, "r": 2, "lora_alpha": 4}
    (adapter / "adapter_config.json").write_text(
        json.dumps(config | {"target_modules": ["query"], "task_type": "SEQ_CLS"})
    )
    (adapter / "adapter_model.bin").write_bytes(payload)
    base = work / "base"
    shutil.copytree(tiny_bert, base)
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(payload)
    evaluate = ["evaluate", "--adapter", "adapter", "--test_file", "rows.jsonl", "--use_cpu"]
    trained = [w.format(model=base) for w in train()]
    for argv in (
        [*evaluate, "--label_names", "a", "b", "--text_column", "text"],
        ["cut", "--adapter", "adapter", "--rank", "1", "--output_dir", "cut"],
        trained,
    ):
        done = forks.run(argv, work)
        assert done.code in (1, 2) and not done.crashed, done.err
    argv = [w.format(model=tiny_bert) for w in train("--max_steps", "6", "--save_steps", "2")]
    assert forks.run(argv, work, kill_on="checkpoint-6").code == -9
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (work / "out.partial" / "training" / "checkpoint-4" / name).write_bytes(payload)
    (work / "out.partial" / "training" / "checkpoint-4" / "whole.json").unlink(missing_ok=True)
    done = forks.run([*argv, "--resume_from_checkpoint"], work)
    assert done.code == 0, done.err
    assert not owned.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["work"]


def test_a_model_s_own_code_is_not_run_unasked(forks, tiny_bert, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    (work / "rows.jsonl").write_text(ROWS)
    shutil.copytree(tiny_bert, work / "model")
    config = json.loads((work / "model" / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Theirs"}}
    (work / "model" / "config.json").write_text(json.dumps(config))
    (work / "model" / "theirs.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')")
    done = forks.run([w.format(model=work / "model") for w in train()], work, watch=True)
    assert done.code == 2 and done.forbidden == [], done.err
    assert names(tmp_path / "work") and not (tmp_path / "owned").exists()


# What is shown

NASTY = "x\n---\nlicense: mit\n# [bold](http://x) | <img src=x> \x1b[2J\x9b31m\u202e `y` [/x]"


@pytest.mark.parametrize("text", [NASTY, "yes", "null", "1e3", "a: b", "- a", "#a", "", "é", "~"])
def test_a_value_of_yaml_is_read_back_as_it_was(text):
    assert pyyaml.safe_load(f"key: {escape.yaml(text)}") == {"key": text}


def test_a_terminal_gets_no_control_characters():
    shown = escape.terminal(NASTY + "\udc80")
    assert not [c for c in shown if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160]
    assert "\u202e" not in shown and "\\x1b[2J" in shown


def test_a_line_of_markdown_is_the_text_and_nothing_else():
    from markdown_it import MarkdownIt

    tokens = MarkdownIt().enable("table").parse(f"| a |\n| --- |\n| {escape.markdown(NASTY)} |\n")
    kinds = {child.type for token in tokens for child in token.children or ()}
    assert kinds <= {"text", "text_special"}
    assert sum(token.type == "td_open" for token in tokens) == 1
    assert not [token for token in tokens if token.type.startswith(("html", "heading", "hr"))]


def test_html_is_text():
    assert "<" not in escape.html(NASTY) and '"' not in escape.html('a"b')


@pytest.mark.parametrize("base", [NASTY, "a b", "../../x", "x: y", 5, None, ["x"], "a/b/c"])
def test_a_card_names_a_hub_id_or_nothing(base):
    front = card_header(base).split("---")[1]
    assert set(pyyaml.safe_load(front)) == {"library_name", "tags"}
    assert pyyaml.safe_load(card_header("org/name").split("---")[1])["base_model"] == "org/name"


def test_labels_and_paths_reach_the_terminal_as_text(forks, tiny_bert, tmp_path):
    """An escape in a label, and what rich takes for markup in a path."""
    label = "\x1b]0;owned\x07"
    rows = "".join(
        json.dumps({"text": f"a {n}", "label": f"{label}{n % 2}"}) + "\n" for n in range(24)
    )
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": "a", "label": label}) + "\n")
    argv = [word.format(model=tiny_bert) for word in train()]
    done = forks.run([*argv, "--test_file", "test.jsonl"], tmp_path)
    assert done.code == 2 and "\x1b]" not in done.err and "\\x1b]0;owned" in done.err, done.err
    argv[argv.index("out")] = "o[/x]ut"
    done = forks.run(argv, tmp_path)
    assert done.code == 0 and "o[/x]ut" in done.err, done.err
    assert "\x1b]" not in done.err + done.out
    card = (tmp_path / "o[/x]ut" / "adapter" / "README.md").read_text()
    assert "\x1b" not in card
