"""Bad input gives one line and leaves nothing behind. `make attack` tries all of it."""

import json
import random
import sys
from pathlib import Path

import pytest
from case import tried
from inputs import cases
from safetensors.torch import load_file, save_file

from rankwise import AdapterError, DataError, ModelError, RankwiseError, tasks
from rankwise.cli import main
from rankwise.cli.job import parse_job
from rankwise.reading import Unreadable, parse_json, parse_yaml
from rankwise.tasks.files import read_file

ALL = {f"{case.family}: {case.name}": case for case in cases()}
ALWAYS = {
    "rows: no label, an encoder",
    "rows: CSV with spaces",
    "rows: JSON lines: mixed labels",
    "evaluate: lacks a lora_B",
    "evaluate: other label names",
    "training_arguments: drop_last",
    "flags: reporter",
    "plans: provenance: a method of other flags",
    "Parquet: a map beside",
}


def drawn() -> list[str]:
    """Those that are tried each time, and one of each family."""
    rng = random.Random(11)
    families = sorted({case.family for case in ALL.values()})
    each = [rng.choice(sorted(n for n, c in ALL.items() if c.family == f)) for f in families]
    return sorted({*ALWAYS, *each})


@pytest.fixture(scope="module")
def trained(stand) -> Path:
    """The finished run."""
    return Path(stand.result)


@pytest.mark.parametrize("name", drawn())
def test_one_line(forks, stand, tmp_path, name):
    assert tried(ALL[name], forks, tmp_path / "c", stand) == ""


def test_no_two_cases_have_one_name():
    assert len(ALL) == len(cases())


# Readers


@pytest.mark.parametrize("text", ["[NaN]", "[1e999]", "[-Infinity]", '{"a": 1, "a": 2}', "9" * 400])
def test_json_that_is_none_of_ours(text):
    with pytest.raises(Unreadable):
        parse_json(text)


def test_json_and_yaml_are_bounded():
    with pytest.raises(Unreadable, match="deep"):
        parse_json("[" * 10**6)
    assert parse_json('["' + "[{" * 500 + '"]') == ["[{" * 500]  # in a string they nest nothing
    with pytest.raises(Unreadable):
        parse_json('"\\ud800"')
    assert parse_json('"\\ud83d\\ude00"') == "😀"
    assert parse_yaml("a: 2024-01-01\nb: 1e-4") == {"a": "2024-01-01", "b": "1e-4"}
    assert parse_yaml("x: &x {a: 1}\ny: {<<: *x, b: 2}")["y"] == {"a": 1, "b": 2}


def test_a_space_behind_the_comma_of_a_header(tmp_path):
    (tmp_path / "a.csv").write_text('text, label\n"a, b", good\nc, " bad"\n')
    assert read_file(tmp_path / "a.csv") == {"text": ["a, b", "c"], "label": ["good", " bad"]}
    (tmp_path / "b.csv").write_text("text,label\n a, good\n")  # here it belongs to the cell
    assert read_file(tmp_path / "b.csv") == {"text": [" a"], "label": [" good"]}
    (tmp_path / "c.jsonl").write_text('{" text": "a", "label ": 1}\n')
    assert read_file(tmp_path / "c.jsonl") == {"text": ["a"], "label": [1]}


def test_an_encoder_is_no_causal_language_model(tiny_bert, tmp_path, caplog):
    (tmp_path / "rows.csv").write_text("text,Label\n" + "fine film,x\nawful film,y\n" * 8)
    task = tasks.load_task(train_file=tmp_path / "rows.csv")
    assert task.kind == "causal_lm"
    assert "text, Label" in caplog.text
    tokenizer = tasks.load_tokenizer(tiny_bert)
    with pytest.raises(ModelError, match=r"an encoder \(bert\).*the columns text, Label"):
        tasks.load_model(task, tiny_bert, tokenizer=tokenizer)


def test_one_name_is_one_label(tmp_path):
    rows = "".join(json.dumps({"text": "a", "label": v}) + "\n" for v in (1, "1", "x") * 4)
    (tmp_path / "rows.jsonl").write_text(rows)
    with pytest.raises(DataError, match="rows 1 and 2: 'label' is 1 in one and '1' in the other"):
        tasks.load_task(train_file=tmp_path / "rows.jsonl")


def test_rows_that_are_evaluated_and_trained_on(tmp_path, caplog):
    rows = "".join(json.dumps({"text": f"a {n}", "label": n % 2}) + "\n" for n in range(12))
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(rows)
    tasks.load_task(data_dir=tmp_path)
    assert "11 of the 12 test rows are training rows too" in caplog.text


# Adapters that are not whole


def test_an_adapter_with_a_factor_missing_is_not_loaded(trained, bert, tmp_path):
    from rankwise.methods import by_name

    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((trained / "adapter" / name).read_bytes())
    weights = tmp_path / "adapter_model.safetensors"
    whole = load_file(weights)
    gone = min(name for name in whole if "lora_B" in name)
    save_file({n: t for n, t in whole.items() if n != gone}, weights)
    with pytest.raises(AdapterError, match=r"lacks '.*lora_B"):
        by_name("lora").load(bert, tmp_path)


def test_nan_in_an_adapter_is_said_of_the_adapter(trained, bert, tmp_path):
    from rankwise.methods import by_name

    (tmp_path / "adapter_config.json").write_bytes(
        (trained / "adapter" / "adapter_config.json").read_bytes()
    )
    tensors = load_file(trained / "adapter" / "adapter_model.safetensors")
    tensors[min(tensors)].view(-1)[0] = float("nan")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="NaN or infinite weights"):
        by_name("lora").load(bert, tmp_path)


# The command line


def test_whose_flag_it_is_and_what_was_meant(capsys):
    for argv, words in (
        (["train", "--lerning_rate", "1"], "did you mean --learning_rate?"),
        (["run", "--method", "lora", "--by_layer"], "a flag of method dylora"),
        (["cut", "--learning_rate", "1"], "a flag of run, search and train"),
        (["train", "--lr", "1"], "did you mean --learning_rate?"),
        (["trian"], "did you mean train?"),
    ):
        with pytest.raises(SystemExit):
            main(argv)
        assert words in capsys.readouterr().err


def test_help_shows_what_a_command_has_a_use_for(capsys):
    for command, shown, hidden in (
        ("evaluate", "--per_device_eval_batch_size", "--learning_rate"),
        ("cut", "--overwrite_output_dir", "--resume_from_checkpoint"),
    ):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        out = capsys.readouterr().out
        assert shown in out and hidden not in out


def test_commands_share_a_file(tmp_path):
    text = "seed: 7\nkeep: 0.5\ngate_learning_rate: 0.1\nadapter: a\ncontrol: [lora]\n"
    (tmp_path / "c.yaml").write_text(text)
    for command, method in (("train", "lora"), ("run", "autolora"), ("evaluate", "")):
        found = parse_job(command, "", ["--config", str(tmp_path / "c.yaml")], method=method)
        assert any(getattr(part, "seed", None) == 7 for part in found)
    (tmp_path / "c.yaml").write_text(text + "lerning_rate: 1\n")
    with pytest.raises(RankwiseError, match="did you mean --learning_rate"):
        parse_job("train", "", ["--config", str(tmp_path / "c.yaml")], method="lora")


def test_a_broken_library_is_one_line_and_a_traceback_on_demand(monkeypatch, capsys):
    def broken(argv):
        raise TypeError("unexpected\nkeyword")

    monkeypatch.setattr("rankwise.cli.cut.main", broken)
    for flags, traceback in ((["cut"], False), (["cut", "--debug"], True)):
        with pytest.raises(SystemExit) as stop:
            main(flags)
        err = capsys.readouterr().err
        assert stop.value.code == 1
        assert err.splitlines()[-1].startswith("rankwise: TypeError: unexpected keyword")
        assert ("Traceback" in err) == traceback


@pytest.mark.parametrize("size", ["", " ", "x", "1"])
def test_a_world_size_that_is_none(monkeypatch, capsys, size):
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(SystemExit):
        main(["cut"])
    assert "rankwise cut needs --adapter" in capsys.readouterr().err


def test_a_reader_that_goes_away(tmp_path):
    """`rankwise ... | head`: no traceback."""
    import subprocess

    script = "import sys; from rankwise.cli import main; main(['run', '--help'])"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()
    process.wait()
