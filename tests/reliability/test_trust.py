"""What is read from others runs no code, reaches no network, and writes nothing elsewhere."""

import json
import pickle
import shutil
from pathlib import Path

import grids
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


# Adapters, base models, recipes, plans and results of others


def changed(folder: Path, file: str, **values) -> None:
    """Other values in a JSON file."""
    about = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps(about | values))


@pytest.fixture
def work(tmp_path, stand):
    """A folder to work in, with rows and copies of both adapters, and a secret beside it."""
    (tmp_path / "secret").write_text("mine")
    place = tmp_path / "work"
    place.mkdir()
    (place / "rows.jsonl").write_text(ROWS)
    shutil.copytree(Path(stand.result) / "adapter", place / "a")
    shutil.copytree(stand.spoken, place / "s")
    yield place
    # whatever was tried: nothing beside the folder, and what was there is as it was
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret", "work"]
    assert (tmp_path / "secret").read_text() == "mine"


EVALUATE = ["evaluate", "--adapter", "a", "--test_file", "rows.jsonl", "--use_cpu"]
PREDICT = ["predict", "--adapter", "a", "--input_file", "rows.jsonl", "--output_file", "p.jsonl"]
MERGE = ["export", "--adapter", "s", "--to", "merged", "--output_dir", "merged"]
VERIFY = ["verify", "s"]


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/x", "ftp://127.0.0.1/x", "//127.0.0.1/x"])
def test_a_base_that_is_an_address_is_not_asked(forks, work, address):
    """Online: what is no hub id and no folder reaches nobody."""
    for folder in ("a", "s"):
        changed(work / folder, "adapter_config.json", base_model_name_or_path=address)
    changed(work / "a", "task.json", base=address)
    for argv in (EVALUATE, PREDICT, MERGE, VERIFY):
        done = forks.run(argv, work, watch=True, online=True)
        assert done.forbidden == [] and not done.crashed, done.err
        assert done.code == 2 or argv is VERIFY, done.err  # which says that it has no base model


def test_code_beside_an_adapter_or_its_base_is_not_run(forks, stand, work, tmp_path):
    """`auto_map` in every config that has one, PEFT's `auto_mapping`, and the code beside them."""
    code = f"open({str(tmp_path / 'owned')!r}, 'w')"
    for name, source in (("bert", stand.model), ("llama", stand.chat)):
        shutil.copytree(source, work / name)
    theirs = {"AutoConfig": "theirs.C", "AutoModelForSequenceClassification": "theirs.M"}
    theirs |= {"AutoModelForCausalLM": "theirs.M", "AutoModel": "theirs.M"}
    for folder, base in (("a", "bert"), ("s", "llama")):
        for place in (work, work / folder, work / base):
            (place / "theirs.py").write_text(code)
        changed(work / base, "config.json", model_type="theirs", auto_map=theirs)
        tokenizer = {"auto_map": {"AutoTokenizer": ["theirs.T", "theirs.T"]}}
        tokenizer["tokenizer_class"] = "Theirs"
        changed(work / base, "tokenizer_config.json", **tokenizer)
        changed(work / folder, "tokenizer_config.json", **tokenizer)
        about = {"parent_library": "theirs", "base_model_class": "M"}
        changed(work / folder, "adapter_config.json", auto_mapping=about, auto_map=theirs)
        base = str(work / base)
        changed(work / folder, "adapter_config.json", base_model_name_or_path=base)
    changed(work / "a", "task.json", base=str(work / "bert"))
    trained = [word.replace("{model}", "bert") for word in train()]
    vllm = ["export", "--adapter", "s", "--to", "vllm", "--output_dir", "v"]
    cut = ["cut", "--adapter", "a", "--rank", "1", "--output_dir", "c"]
    for argv in (trained, EVALUATE, PREDICT, MERGE, VERIFY, vllm, cut):
        done = forks.run(argv, work, watch=True)
        assert done.forbidden == [] and not done.crashed, done.err
        assert done.code == 2 or argv in (vllm, cut, VERIFY), done.err


@pytest.mark.parametrize("text", ["true", "yes", "'1'", "[1]"])
def test_no_file_lets_code_run(forks, stand, work, text):
    (work / "c.yaml").write_text(f"trust_remote_code: {text}\n")
    model = f"{{model_name_or_path: {stand.model}, trust_remote_code: {text}}}"
    recipe = f"model: {model}\ntasks: {{t: {{train_file: rows.jsonl}}}}\nmethods: [lora]\n"
    (work / "r.yaml").write_text(recipe)
    trained = [word.replace("{model}", stand.model) for word in train("--config", "c.yaml")]
    for argv in (trained, ["compare", "r.yaml", "--output_dir", "out", "--list"]):
        done = forks.run(argv, work, watch=True)
        assert done.code == 2 and done.forbidden == []
        assert "give --trust_remote_code on the command line" in done.line


def test_a_tag_of_yaml_runs_nothing(forks, stand, work):
    for tag in ("!!python/object/apply:os.system [touch owned]", "!!python/name:os.system"):
        (work / "c.yaml").write_text(f"seed: {tag}\n")
        (work / "r.yaml").write_text(f"model: {tag}\n")
        trained = [word.replace("{model}", stand.model) for word in train("--config", "c.yaml")]
        for argv in (trained, ["compare", "r.yaml", "--output_dir", "out"]):
            done = forks.run(argv, work, watch=True)
            assert done.code == 2 and "not YAML" in done.line and done.forbidden == []
    assert not (work / "owned").exists()


OUT = ["../../x", "/tmp/rankwise-owned/x", "..", "a/../../../x"]


@pytest.mark.parametrize("name", OUT)
def test_a_name_is_no_path(forks, stand, work, name):
    """Of tasks and methods in recipes, of an adapter's task, of a plan's modules, of results."""
    recipe = {"model": stand.model, "tasks": {name: {"train_file": "rows.jsonl"}}}
    recipe |= {"methods": {name: {"method": "lora", "r": 2}}, "data_dir": str(work)}
    (work / "r.yaml").write_text(pyyaml.safe_dump(recipe))
    changed(work / "a", "task.json", name=name, kind="classification")
    plan = json.loads((Path(stand.result) / "plan.json").read_text())
    entry = next(iter(plan["modules"].values())) | {"module": name}
    plan |= {"modules": {name: entry}, "provenance": {"method": {"name": name}, "model": name}}
    (work / "plan.json").write_text(json.dumps(plan))
    result = changed_result(("about", "cell", "name"), name)
    for way in (("name",), ("task", "name"), ("model",), ("method", "name")):
        result = grids.changed(result, way, name)
    (work / "m.json").write_text(json.dumps(result))
    trained = [word.replace("{model}", stand.model) for word in train("--plan", "plan.json")]
    for argv in (
        ["compare", "r.yaml", "--output_dir", "grid", "--list"],
        ["compare", "r.yaml", "--output_dir", "grid", "--snakefile"],
        ["train", *trained[5:]],
        EVALUATE,
        ["report", "m.json", "--output_dir", "report"],
        ["cut", "--adapter", "a", "--rank", "1", "--output_dir", "c"],
    ):
        done = forks.run(argv, work, watch=True)
        assert done.code in (0, 2) and not done.crashed, done.err
        assert done.forbidden == []


def changed_result(way, value):
    return grids.changed(grids.GOOD, way, value)


def test_a_link_in_an_adapter_brings_nothing_along(forks, work, tmp_path):
    """A link to a file of the user's is not exported, where it might be published."""
    for name in ("vocab.txt", "chat_template.jinja", "plan.json"):
        (work / "s" / name).symlink_to(tmp_path / "secret")
    (work / "s" / "vocab.json").write_text("{}")
    (work / "s" / "merges.txt").symlink_to("vocab.json")  # as within the hub's cache
    argv = ["export", "--adapter", "s", "--to", "vllm", "--output_dir", "out"]
    done = forks.run(argv, work, watch=True)
    assert done.code == 0 and done.forbidden == [], done.err
    assert {"vocab.json", "merges.txt"} <= set(names(work / "out"))
    assert not {"vocab.txt", "chat_template.jinja", "plan.json"} & set(names(work / "out"))


def test_a_chat_template_runs_nothing(forks, stand, work):
    """Jinja's ways out of its sandbox, and rows that point at pictures on the network."""
    shutil.copytree(stand.chat, work / "chat")
    argv = ["run", "--method", "lora", "--control", "none", "--kind", "chat", *FAST, "--r", "2"]
    argv += ["--model_name_or_path", "chat", "--train_file", "c.jsonl", "--output_dir", "out"]
    turn = {"role": "user", "content": "red"}
    row = {"messages": [turn, {"role": "assistant", "content": "cat"}]}
    (work / "c.jsonl").write_text((json.dumps(row) + "\n") * 20)
    template = (work / "chat" / "chat_template.jinja").read_text()
    attack = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__ }}"
    (work / "chat" / "chat_template.jinja").write_text(attack + template)
    done = forks.run(argv, work, watch=True)
    assert done.code == 2 and not done.crashed and done.forbidden == [], done.err
    (work / "chat" / "chat_template.jinja").write_text(template)
    picture = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}}
    row["messages"][0] = {"role": "user", "content": [picture]}
    (work / "c.jsonl").write_text((json.dumps(row) + "\n") * 20)
    done = forks.run(argv, work, watch=True, online=True)
    assert done.code == 2 and not done.crashed and done.forbidden == [], done.err


def test_what_is_sent_away_is_a_flag_of_its_own(forks, stand, work):
    """Trainer's own upload, which a file of arguments could ask for."""
    for key in ("push_to_hub", "hub_model_id"):
        argv = train("--training_arguments", json.dumps({key: True}))
        done = forks.run([w.replace("{model}", stand.model) for w in argv], work, watch=True)
        assert done.code == 2 and "give --push_to_hub" in done.line and done.forbidden == []


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


def test_an_exports_card_says_what_it_is(forks, work):
    """Of a base model whose name is Markdown, YAML and an escape."""
    changed(work / "s", "adapter_config.json", base_model_name_or_path=NASTY)
    argv = ["export", "--adapter", "s", "--to", "vllm", "--output_dir", "out"]
    done = forks.run(argv, work, watch=True)
    assert done.code == 0 and done.forbidden == [], done.err
    card = (work / "out" / "README.md").read_text()
    assert "\x1b" not in card and "img" not in card
    assert set(pyyaml.safe_load(card.split("---")[1])) == {"library_name", "tags"}


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
