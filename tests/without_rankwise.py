"""A process in which rankwise cannot be imported: loads adapters with plain PEFT, writes logits.

Reads one JSON object a line: {"auto", "base", "adapter", "inputs", "out"}; `inputs` is a
safetensors file; `out` becomes one with "logits", and "merged" for LoRA. A folder
without an adapter's config is a whole model. Answers each with one line.
"""

import json
import sys
from pathlib import Path

sys.modules["rankwise"] = None  # type: ignore[assignment]  # import rankwise now raises ImportError

import torch  # noqa: E402
import transformers  # noqa: E402
from peft import PeftModel  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer(request)
            print("done", flush=True)
        except Exception as error:
            print(f"{type(error).__name__}: {error}".replace("\n", " "), flush=True)


@torch.no_grad()
def answer(request: dict) -> None:
    auto = getattr(transformers, request["auto"])
    inputs = load_file(request["inputs"])
    if not (Path(request["adapter"]) / "adapter_config.json").is_file():
        whole = auto.from_pretrained(request["adapter"]).eval()
        save_file({"logits": whole(**inputs).logits.contiguous()}, request["out"])
        return
    base = auto.from_pretrained(request["base"])
    model = PeftModel.from_pretrained(base, request["adapter"]).eval()
    found = {"logits": model(**inputs).logits.contiguous()}
    if model.active_peft_config.peft_type == "LORA":
        found["merged"] = model.merge_and_unload()(**inputs).logits.contiguous()
    save_file(found, request["out"])


main()
