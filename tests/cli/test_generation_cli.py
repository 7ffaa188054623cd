"""`rankwise run` and `evaluate` on a generation task: figures, texts beside them, resumed."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from rankwise import Result
from rankwise.cli import main

sys.path.append(str(Path(__file__).parents[1] / "tasks"))
from test_causal_lm import byte_level

for package in ("sacrebleu", "nltk", "snowballstemmer", "pycocoevalcap"):
    pytest.importorskip(package)

FAST = (
    "--method lora --r 2 --control lora:r=1 --max_steps 4 --per_device_train_batch_size 4 "
    "--learning_rate 1e-2 --use_cpu --save_steps 2 --num_beams 2 --max_new_tokens 6 "
    "--generation_batch_size 2"
).split()


@pytest.fixture(autouse=True)
def no_tables(monkeypatch):
    """Reading METEOR's tables takes seconds."""
    monkeypatch.setattr("rankwise.metrics.meteor.tables_folder", lambda: None)


@pytest.fixture
def flags(tmp_path) -> list[str]:
    torch.manual_seed(0)
    tokenizer = byte_level()
    tokenizer.save_pretrained(tmp_path / "model")
    sizes = {"n_positions": 48, "n_embd": 8, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=258, initializer_range=0.5, **sizes))
    model.save_pretrained(tmp_path / "model")
    rows = [{"meaning_representation": f"n[{n}]", "human_reference": f"{n} is"} for n in range(12)]
    tests = [{"meaning_representation": "n[x]", "references": ["x is", "here x"]}] * 3
    for split, there in (("train", rows), ("validation", rows[:4]), ("test", tests)):
        lines = "".join(json.dumps(row) + "\n" for row in there)
        (tmp_path / f"{split}.jsonl").write_text(lines)
    data = ["--task", "e2e", "--data_dir", str(tmp_path), "--max_length", "40"]
    return ["--model_name_or_path", str(tmp_path / "model"), *data]


def test_a_run_generates_and_an_evaluation_gives_the_same(flags, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    argv = ["run", *flags, *FAST, "--output_dir", str(out)]

    def stops(self, rows, texts):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # killed once the texts are there
        patch.setattr("rankwise.tasks.Generation.score_texts", stops)
        with pytest.raises(SystemExit):
            main(argv)
    assert (tmp_path / "out.partial" / "generations.jsonl.partial").is_file()
    main([*argv, "--resume_from_checkpoint"])
    found = Result.load(out / "metrics.json")
    assert {"loss", "perplexity", "bleu", "nist", "rouge_l", "cider"} <= found.metrics.keys()
    assert found.about["signatures"].keys() <= found.metrics.keys()
    assert found.about["decoding"]["num_beams"] == 2
    texts = [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()]
    assert [row["references"] for row in texts] == [["x is", "here x"]] * 3
    assert (out / "controls" / "lora-generations.jsonl").is_file()
    assert "bleu" in found.controls[0].metrics
    capsys.readouterr()
    kept = tmp_path / "again.jsonl"
    main(
        [
            *("evaluate", *flags, "--adapter", str(out), "--use_cpu", *FAST[-6:]),
            *("--generations", str(kept)),
        ]
    )
    again = json.loads(capsys.readouterr().out)
    assert kept.read_text() == (out / "generations.jsonl").read_text()
    assert {name: again[name] for name in found.metrics} == pytest.approx(found.metrics)


def test_an_input_too_long_to_go_on_is_said_before_training(flags, tmp_path, capsys):
    argv = ["run", *flags, *FAST, "--max_new_tokens", "48", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert "--max_new_tokens 48, but the model takes 48; give fewer" in err.replace("\n", " ")
