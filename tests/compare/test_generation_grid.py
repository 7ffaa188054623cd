"""A grid on a generation task: rates by the loss, texts of test rows alone, figures in a report."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import GPT2Config, GPT2LMHeadModel

from rankwise.cli import main
from rankwise.compare.cells import cell_file, cells_of, texts_file
from rankwise.compare.execute import execute
from rankwise.compare.recipe import read_recipe
from rankwise.errors import RankwiseError
from rankwise.metrics.suites import score
from rankwise.result import Result

sys.path.append(str(Path(__file__).parents[1] / "tasks"))
from test_causal_lm import byte_level

for package in ("sacrebleu", "nltk", "snowballstemmer", "pycocoevalcap"):
    pytest.importorskip(package)

RECIPE = {
    "tasks": {"e2e_nlg": {"max_train_samples": 16, "max_eval_samples": 3}},
    "methods": {"svd": {"r": 4, "rank": 2}, "plain": {"method": "lora", "same_size_as": "svd"}},
    "seeds": [0],
    "rates": [1e-3, 1e-2],
    "tune": {"held_out": 0.25, "max_steps": 2},
    "max_length": 40,
    "generation": {"num_beams": 1, "max_new_tokens": 5},
    "training": {"max_steps": 4, "per_device_train_batch_size": 4, "use_cpu": True},
}


@pytest.fixture
def recipe_file(tmp_path) -> Path:
    torch.manual_seed(0)
    byte_level().save_pretrained(tmp_path / "model")
    sizes = {"n_positions": 64, "n_embd": 8, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=258, initializer_range=0.5, **sizes))
    model.save_pretrained(tmp_path / "model")
    rows = [{"meaning_representation": f"n[{n}]", "human_reference": f"{n} is"} for n in range(24)]
    tests = [
        {"meaning_representation": f"m[{n}]", "references": [f"{n} is", f"here {n}"]}
        for n in range(5)
    ]
    (tmp_path / "e2e_nlg").mkdir()
    for split, there in (("train", rows), ("test", tests)):
        lines = "".join(json.dumps(row) + "\n" for row in there)
        (tmp_path / "e2e_nlg" / f"{split}.jsonl").write_text(lines)
    about = {"model": str(tmp_path / "model"), "data_dir": str(tmp_path)}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | about))
    return tmp_path / "recipe.yaml"


def test_from_recipe_to_report(recipe_file, tmp_path, monkeypatch):
    monkeypatch.setattr("rankwise.metrics.meteor.tables_folder", lambda: None)
    prompts = []
    real = GPT2LMHeadModel.generate

    def counted(self, **options):
        prompts.append(len(options["input_ids"]))
        assert (options["num_beams"], options["max_new_tokens"]) == (1, 5)
        return real(self, **options)

    monkeypatch.setattr(GPT2LMHeadModel, "generate", counted)
    recipe, out = read_recipe(recipe_file), tmp_path / "grid"
    cells = {cell.name: cell for cell in cells_of(recipe)}
    assert len(cells) == 6
    for cell in cells.values():
        execute(recipe, cells, cell.name, out)
        result = Result.load(cell_file(out, cell.name))
        texts = texts_file(out, cell.name)
        if cell.held_out is not None:
            assert set(result.metrics) == {"loss", "perplexity"} and not texts.exists()
            assert "generation" not in cell.spec
            continue
        kept = [json.loads(line) for line in texts.read_text().splitlines()]
        figures = score("e2e", [k["generated"] for k in kept], [k["references"] for k in kept])
        assert {f.name: f.value for f in figures}.items() <= result.metrics.items()
        assert result.about["floor"].keys() == {"loss", "perplexity"}  # of the base model
        assert result.about["decoding"]["num_beams"] == 1
        assert cell.spec["generation"]["max_new_tokens"] == 5
    # three test inputs a cell that counts; none for rates, and none for the base model
    assert sum(prompts) == 2 * 3
    main(["report", str(out)])
    assert r"e2e\_nlg, bleu" in (out / "report" / "report.md").read_text()


def test_an_unknown_setting_is_named(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"generation": {"num_beam": 1}, "model": "m"}))
    with pytest.raises(RankwiseError, match=r"generation: no key 'num_beam'.*num_beams"):
        read_recipe(path)
