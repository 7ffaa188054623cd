"""What all tests share, made here, offline: a tiny BERT on disk, rows that it can learn, and a
process without rankwise."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

GOOD = "fine great lovely warm bright happy".split()
BAD = "awful grim cold dull sad broken".split()
FILLER = "the a film plot was and very it book song".split()


def make_rows(count: int, seed: int) -> list[dict]:
    """Short texts of filler words with two good or two bad words among them, and which of both."""
    rng = random.Random(seed)
    rows = []
    for n in range(count):
        words = rng.sample(FILLER, 4) + rng.sample(BAD if n % 2 else GOOD, 2)
        rng.shuffle(words)
        rows.append({"text": " ".join(words), "label": "bad" if n % 2 else "good"})
    rng.shuffle(rows)
    return rows


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory) -> str:
    """A folder with a random BERT (hidden 32, 2 layers) and a word-level tokenizer that loads."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {token: n for n, token in enumerate([*special, *FILLER, *GOOD, *BAD])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    PreTrainedTokenizerFast(
        tokenizer_object=inner,
        model_max_length=192,
        unk_token="[UNK]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        mask_token="[MASK]",
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=192,
        initializer_range=0.2,
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def bert(tiny_bert):
    """The tiny BERT with a head of two classes, the same weights every time."""
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)


def write_splits(folder: Path, **counts: int) -> str:
    """A file of so many rows a split, each drawn with a seed of its own; gives back the folder."""
    for seed, (split, count) in enumerate(counts.items()):
        write_jsonl(folder / f"{split}.jsonl", make_rows(count, seed))
    return str(folder)


@pytest.fixture(scope="session")
def rows_dir(tmp_path_factory) -> str:
    """A folder with train, validation and test JSON lines: 60 rows, a good or a bad text each."""
    return write_splits(tmp_path_factory.mktemp("rows"), train=36, validation=12, test=12)


@pytest.fixture(scope="session")
def many_rows_dir(tmp_path_factory) -> str:
    """The same with enough validation rows to order pieces by and to judge them on."""
    return write_splits(tmp_path_factory.mktemp("many-rows"), train=36, validation=80, test=12)


@pytest.fixture(scope="session")
def plain_peft():
    """Asks the process without rankwise for the logits of an adapter, loaded and merged."""
    from safetensors.torch import load_file, save_file

    script = Path(__file__).with_name("without_rankwise.py")
    process = subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def ask(auto: str, base: Path, adapter: Path, inputs: dict, folder: Path) -> dict:
        save_file(inputs, folder / "inputs.safetensors")
        request = {
            "auto": auto,
            "base": str(base),
            "adapter": str(adapter),
            "inputs": str(folder / "inputs.safetensors"),
            "out": str(folder / "out.safetensors"),
        }
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        reply = process.stdout.readline().strip()
        assert reply == "done", reply
        return load_file(folder / "out.safetensors")

    yield ask
    process.stdin.close()
    process.wait(timeout=30)


@pytest.fixture(scope="session")
def forks():
    """Runs commands in children, which may be killed; for tests/reliability."""
    from forks import Forks

    process = Forks(os.environ.get("RANKWISE_SOURCE"))
    yield process
    process.close()


@pytest.fixture(scope="session")
def stand(forks, tiny_bert, tmp_path_factory):
    """A finished run, a chat model and its adapter, for tests/reliability; nothing writes there."""
    from small import given

    return given(forks, tiny_bert, tmp_path_factory.mktemp("given"))
