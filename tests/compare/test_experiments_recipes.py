"""The recipes of experiments/ are read, and each of their methods runs a few steps.

On one task of each kind (RANKWISE_EVERY_TASK=1: on each task), on a tiny random model of the
architecture that the recipe is meant for, and on rows made here.
"""

import os
import random
import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import BAD, FILLER, GOOD, write_jsonl
from rankwise.compare.cells import cells_of
from rankwise.compare.estimate import estimates
from rankwise.compare.recipe import read_recipe
from rankwise.tasks.known import KNOWN, known_name

RECIPES = sorted((Path(__file__).parents[2] / "experiments" / "recipes").glob("*.yaml"))
FAMILY = {"minilm": "bert", "smollm2": "llama", "roberta": "roberta", "gpt2": "gpt2"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_is_read(path):
    recipe = read_recipe(path, data_dir="rows", model="some-model")
    cells = cells_of(recipe)
    finals = [cell for cell in cells if cell.held_out is None]
    assert len(finals) == len(recipe.tasks) * len(recipe.methods) * len(recipe.seeds)
    assert all(len(cell.rates) == len(recipe.methods[0].rates) for cell in finals)
    # whatever chooses or controls has a LoRA of one size beside it
    assert any(entry.method.title == "LoRA" for entry in recipe.methods)
    assert not re.search(r"[\s\"]/\w", path.read_text())  # no place of one machine


def rows_of(task: str, count: int, seed: int) -> list[dict]:
    """Rows with the columns of a known task."""
    rng = random.Random(seed)
    text = lambda: " ".join(rng.sample([*FILLER, *GOOD, *BAD], 6))  # noqa: E731
    known = KNOWN[known_name(task)]
    found = []
    for _ in range(count):
        row: dict = {column: text() for column in known.text_columns}
        if known.kind == "tagging":
            row["tokens"] = row["tokens"].split()
            row[known.label_column] = [rng.randrange(len(known.label_names)) for _ in row["tokens"]]
        elif known.kind == "regression":
            row["label"] = round(rng.uniform(0, 5), 2)
        elif known.kind == "classification":
            row["label"] = rng.randrange(len(known.label_names))
        found.append(row)
    return found


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("all-tasks")
    for name in (n.rpartition("/")[2] for n in KNOWN):
        (folder / name).mkdir()
        for seed, (split, count) in enumerate((("train", 500), ("validation", 40))):
            write_jsonl(folder / name / f"{split}.jsonl", rows_of(name, count, seed))
    return folder


@pytest.fixture(scope="module")
def model_of(tiny_bert, tmp_path_factory):
    """A folder with a tiny random model of a family, and a tokenizer."""
    import torch
    from transformers import (
        AutoModel,
        AutoTokenizer,
        BertConfig,
        GPT2Config,
        LlamaConfig,
        RobertaConfig,
    )

    def make(family: str) -> str:
        tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
        tokenizer.model_max_length, tokenizer.eos_token = 512, "[SEP]"
        shared = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 3}
        sizes = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "max_position_embeddings": 520,
        }
        config = {
            "bert": lambda: BertConfig(**shared, **sizes),
            "roberta": lambda: RobertaConfig(**shared, **sizes),
            "llama": lambda: LlamaConfig(**shared, **sizes, num_key_value_heads=1),
            "gpt2": lambda: GPT2Config(**shared, n_embd=32, n_layer=2, n_head=2, n_positions=520),
        }[family]()
        folder = tmp_path_factory.mktemp("models") / family
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return make


def kind_of(task) -> str:
    return KNOWN[known_name(task.data.task)].kind


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_method_runs_on_every_task(path, rows, model_of):
    family = next(of for name, of in FAMILY.items() if path.stem.startswith(name))
    recipe = read_recipe(path, data_dir=str(rows), model=model_of(family))
    training = {k: v for k, v in recipe.training.items() if k != "bf16"}  # for a GPU
    recipe = replace(recipe, training=training)
    if not os.environ.get("RANKWISE_EVERY_TASK"):  # tasks of one kind differ in their rows alone
        recipe = replace(recipe, tasks=tuple({kind_of(t): t for t in recipe.tasks}.values()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = estimates(recipe, cells_of(recipe), steps=4)
    assert {(e.task, e.method): e.error for e in found if e.error} == {}
    assert len(found) == len(recipe.tasks) * len(recipe.methods)
    assert all(estimate.hours > 0 for estimate in found)
