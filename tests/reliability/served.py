"""Bad input of what comes after a training: export, verify, predict, score, and rows of chats."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from case import DEEP, FAST, LONG, Case

EXPORT = ["export", "--adapter", "s", "--to", "vllm", "--output_dir", "out"]


def _spoken(change: Callable[[Path], None] | None = None) -> dict[str, Any]:
    """A copy of the Llama's adapter, changed, as the folder "s"."""

    def write(folder: Path) -> None:
        source = (folder.parent / "spoken").read_text()
        shutil.copytree(source, folder)
        if change is not None:
            change(folder)

    return {"spoken": "{spoken}", "s": write}


def _config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def _text(name: str, content: str | bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(data)

    return change


def _tensors(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        found = load_file(folder / "adapter_model.safetensors")
        found = change(found) or found
        save_file(found, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    return make


def _renamed(found: dict) -> dict:
    return {name.replace("q_proj", "w_proj"): tensor for name, tensor in found.items()}


def _wide(found: dict) -> dict:
    import torch

    return {
        name: torch.cat([t, t], 1 if "lora_A" in name else 0).contiguous()
        for name, t in found.items()
    }


def _huge(found: dict) -> dict:
    """Of a rank that no engine takes."""
    import torch

    return {
        name: torch.zeros(1000, t.shape[1]) if "lora_A" in name else torch.zeros(t.shape[0], 1000)
        for name, t in found.items()
    }


def _nan(found: dict) -> None:
    found[min(found)].view(-1)[0] = float("nan")


def _deep_rank(folder: Path) -> None:
    _tensors(_huge)(folder)
    _config(r=1000, lora_alpha=1000, rank_pattern={}, alpha_pattern={})(folder)


FOREIGN = {
    "NaN": _tensors(_nan),
    "no config": _text("adapter_config.json", ""),
    "a config that is a list": _text("adapter_config.json", "[1]"),
    "a deep config": _text("adapter_config.json", DEEP),
    "garbage for weights": _text("adapter_model.safetensors", b"\xff" * 64),
    "another kind of adapter": _config(peft_type="IA3"),
    "DoRA": _config(use_dora=True),
    "r that is a text": _config(r="x"),
    "patterns that are a list": _config(rank_pattern=["x"]),
    "a pattern that is no pattern": _config(rank_pattern={"(": 2}),
}


def exports() -> list[Case]:
    """Adapters to export, and engines."""
    found = [Case("export", n, EXPORT, _spoken(c), ()) for n, c in FOREIGN.items()]
    engines = "sglang tgi lorax tensorrt-llm llama.cpp ollama mlx peft merged vllm".split()
    for engine in engines:
        argv = [*EXPORT[:4], engine, *EXPORT[5:]]
        based = engine in ("sglang", "tgi", "lorax", "llama.cpp", "ollama", "mlx", "merged")
        odd = {
            "a base that is a number": (_config(base_model_name_or_path=5), based),
            "a base that is nowhere": (_config(base_model_name_or_path="nowhere/none"), based),
            "a base of a list": (_config(base_model_name_or_path=["x"]), based),
            "no base": (_config(base_model_name_or_path=None), based),
            "a revision that is a list": (_config(revision=["x"]), False),
            "a task that PEFT has not": (_config(task_type="x"), False),
            "a task that is a list": (_config(task_type=["x"]), False),
            "another base's modules": (_tensors(_renamed), based),
            "another base's shapes": (_tensors(_wide), based),
            "a rank above the limit": (_deep_rank, engine in ("vllm", "tgi", "lorax")),
            "alpha that is huge": (_config(lora_alpha=1e300), False),
            "alpha that is nothing": (_config(lora_alpha=None), True),
            "a head": (_config(modules_to_save=["lm_head"]), False),
        }
        found += [
            Case("export", f"{engine}: {n}", argv, _spoken(c), (), 2 if sure else None)
            for n, (c, sure) in odd.items()
        ]
        bert = [*argv[:2], "a", *argv[3:]]
        found.append(Case("export", f"{engine}: a classifier of BERT", bert, {}, (), None))
    plain = _spoken()
    flags = {
        "to nobody": (["--to", "vlm"], "'vlm'"),
        "no such adapter": (["--adapter", "none"], "none"),
        "a file for an adapter": (["--adapter", "rows.jsonl"], ""),
        "a long name for an adapter": (["--adapter", "x" * 5000], "too long"),
        "an output that exists": (["--output_dir", "s"], "exists"),
        "an output in a file": (["--output_dir", "rows.jsonl/x"], ""),
        "a link for an output": (["--output_dir", "link"], "link"),
        "a long output": (["--output_dir", "x" * 5000], ""),
        "no rank": (["--rank", "0"], "rank is 0"),
        "a rank below 0": (["--rank", "-3"], "rank is -3"),
        "a rank above the limit": (["--rank", "100000"], "100000"),
        "a type that nobody knows": (["--to", "merged", "--dtype", "int7"], "int7"),
        "shards of nothing": (["--to", "merged", "--max_shard_size", "x"], "max_shard_size"),
        "no such GGUF file": (["--to", "merged", "--gguf_file", "none.gguf"], "none.gguf"),
    }
    found += [Case("export", n, [*EXPORT, *more], plain, (w,)) for n, (more, w) in flags.items()]
    return found


def verifies() -> list[Case]:
    """Exports to verify."""
    argv = ["verify", "s", "--against", "{spoken}"]
    found = [Case("verify", n, argv, _spoken(c), ()) for n, c in FOREIGN.items()]
    record = {
        "a record that is a list": "[1]",
        "a record of nothing": '{"x": 1}',
        "a record for nobody": '{"to": "vlm"}',
        "a record for a number": '{"to": 5}',
        "a deep record": DEEP,
    }
    found += [
        Case("verify", n, argv, _spoken(_text("export.json", text)), ())
        for n, text in record.items()
    ]
    mlx = {
        "mlx's parameters that are none": "{}",
        "mlx's parameters of a text": '{"lora_parameters": "x"}',
        "mlx's rank of a text": '{"lora_parameters": {"rank": "x", "scale": "y"}}',
    }

    def as_mlx(text: str) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            _text("export.json", '{"to": "mlx"}')(folder)
            shutil.copy(folder / "adapter_model.safetensors", folder / "adapters.safetensors")
            _text("adapter_config.json", text)(folder)

        return change

    def garbled(folder: Path) -> None:
        as_mlx("{}")(folder)
        _text("adapters.safetensors", b"\xff" * 64)(folder)

    found += [Case("verify", n, argv, _spoken(as_mlx(text)), ()) for n, text in mlx.items()]
    return [
        *found,
        Case("verify", "garbage for mlx", argv, _spoken(garbled), ()),
        Case("verify", "garbage for GGUF", argv, _spoken(_text("adapter.gguf", b"GGUF\xff" * 9))),
        Case("verify", "nothing for GGUF", argv, _spoken(_text("adapter.gguf", b""))),
        Case("verify", "another base's shapes", argv, _spoken(_tensors(_wide))),
        Case("verify", "another's modules", argv, _spoken(_tensors(_renamed))),
        Case("verify", "no argument", ["verify"], {}, ("--folder",)),
        Case("verify", "no such folder", ["verify", "none"], {}, ("none",)),
        Case("verify", "a file", ["verify", "rows.jsonl"], {}, ("rows.jsonl",)),
        Case(
            "verify", "against nothing", ["verify", "{spoken}", "--against", "none"], {}, ("none",)
        ),
        Case("verify", "for nobody", ["verify", "{spoken}", "--to", "vlm"], {}, ("'vlm'",)),
    ]


def predictions() -> list[Case]:
    """Rows to predict."""
    argv = ["predict", "--adapter", "a", "--input_file", "in.jsonl", "--output_file", "out.jsonl"]
    rows = {
        "no such column": ('{"x": "a"}\n', "'text'"),
        "an empty file": ("", "in.jsonl"),
        "blank lines": ("\n\n", "in.jsonl"),
        "half a line": ('{"text": "a"', "in.jsonl"),
        "a list": ("[1, 2]\n", "in.jsonl"),
        "a number for a text": ('{"text": 5}\n', "text"),
        "no text": ('{"text": null}\n', "text"),
        "a list for a text": ('{"text": ["a"]}\n', "text"),
        "Latin-1": (b'{"text": "\xe4"}\n', "UTF-8"),
        "deep": ('{"text": ' + DEEP + "}\n", "deep"),
        "NUL": (b"\0" * 99, ""),
    }
    found = [
        Case("predict", n, argv, {"in.jsonl": text}, (word,)) for n, (text, word) in rows.items()
    ]
    good = {"in.jsonl": '{"text": "a fine film"}\n'}
    flags = {
        "no adapter": (["--adapter", "none"], "none"),
        "a long name for an adapter": (["--adapter", "x" * 5000], "too long"),
        "a long name for rows": (["--input_file", "x" * 5000], "too long"),
        "a base model": (["--adapter", "{model}"], ""),
        "an adapter of another": (["--adapter", "{spoken}"], "task.json"),
        "another base": (["--model_name_or_path", "{chat}"], ""),
        "no base": (["--model_name_or_path", "nowhere/none"], "nowhere/none"),
        "no such file": (["--input_file", "none.csv"], "none.csv"),
        "a folder": (["--input_file", "."], ""),
        "an output that exists": (["--output_file", "in.jsonl"], "exists"),
        "an output of another kind": (["--output_file", "out.txt"], "out.txt"),
        "an output in a file": (["--output_file", "rows.jsonl/x.csv"], ""),
        "a long output": (["--output_file", "x" * 5000 + ".csv"], ""),
        "no batches": (["--batch_size", "0"], "batch_size is 0"),
        "batches below 0": (["--batch_size", "-3"], "batch_size is -3"),
        "no tokens": (["--max_new_tokens", "0"], "max_new_tokens is 0"),
    }
    found += [Case("predict", n, [*argv, *more], good, (w,)) for n, (more, w) in flags.items()]

    def task(**values: Any) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            file = folder / "task.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | values))

        return change

    odd = {
        "a kind that nobody knows": task(kind="riddle"),
        "no columns": task(text_columns=[]),
        "columns of numbers": task(text_columns=[5]),
        "labels too few": task(label_names=["a"]),
        "no labels": task(label_names=None),
        "a huge length": task(max_length=10**9),
        "a method that nobody knows": task(method={"name": "Zigzag"}),
        "a base of a list": task(base=["x"]),
    }
    found += [Case("predict", n, argv, good, (), change=c) for n, c in odd.items()]
    return found


def scores() -> list[Case]:
    """Generated texts and references."""
    argv = ["score", "--task", "e2e", "--hypotheses", "h.txt", "--references", "r.txt"]
    good = {"h.txt": "a b c d\ne f g h\n", "r.txt": "a b c d\n\ne f g h\n"}
    rows = {
        "fewer texts": ({"h.txt": "a b\n"}, "1 texts"),
        "more texts": ({"h.txt": "a\nb\nc\n"}, "3 texts"),
        "no texts": ({"h.txt": ""}, "h.txt"),
        "blank texts": ({"h.txt": "\n\n"}, "h.txt"),
        "no references": ({"r.txt": ""}, "r.txt"),
        "half a line of JSON": ({"r.txt": '{"references": ["a"]}\n{"refer'}, "r.txt:2"),
        "JSON of another name": ({"r.txt": '{"texts": ["a"]}\n{"texts": ["b"]}\n'}, "references"),
        "JSON of numbers": ({"r.txt": '{"references": [1]}\n{"references": [2]}\n'}, "references"),
        "JSON without texts": ({"r.txt": '{"references": []}\n{"references": [""]}\n'}, "input 1"),
        "deep JSON": ({"r.txt": '{"references": ' + DEEP + "}\n"}, "r.txt:1"),
        "digits in JSON": ({"r.txt": '{"references": ' + LONG + "}\n"}, "r.txt:1"),
        "halves of pairs": ({"r.txt": '{"references": ["\\ud800"]}\n' * 2}, "r.txt:1"),
        "Latin-1": ({"h.txt": b"\xe4\n\xe4\n"}, "h.txt"),
    }
    found = [Case("score", n, argv, good | files, (word,)) for n, (files, word) in rows.items()]
    flags = {
        "no such task": (["--task", "e3e"], "e3e"),
        "no such file": (["--hypotheses", "none.txt"], "none.txt"),
        "a folder": (["--references", "."], ""),
        "files of other lengths": (["--references", "r.txt", "h.txt"], "different numbers"),
        "a long name": (["--hypotheses", "x" * 5000], ""),
    }
    return found + [Case("score", n, [*argv, *more], good, (w,)) for n, (more, w) in flags.items()]


def chats() -> list[Case]:
    """Rows of conversations."""
    argv = ["run", "--method", "lora", "--control", "none", "--kind", "chat", *FAST, "--r", "2"]
    argv += ["--model_name_or_path", "{chat}", "--train_file", "c.jsonl", "--output_dir", "out"]
    good = {
        "messages": [{"role": "user", "content": "red"}, {"role": "assistant", "content": "cat"}]
    }
    table: dict[str, Any] = {
        "no known form": {"question": "a", "reply": "b"},
        "no messages": {"messages": []},
        "None for messages": {"messages": None},
        "a text for messages": {"messages": "hello"},
        "texts for messages": {"messages": ["hello"]},
        "a number for messages": {"messages": 5},
        "no role": {"messages": [{"content": "a"}]},
        "None for a role": {"messages": [{"role": None, "content": "a"}]},
        "a role that nobody has": {"messages": [{"role": "chorus", "content": "a"}]},
        "no answer": {"messages": [{"role": "user", "content": "a"}]},
        "None for a content": {"messages": [*good["messages"][:1], _turn(None)]},
        "a number for a content": {"messages": [*good["messages"][:1], _turn(5)]},
        "parts for a content": {
            "messages": [*good["messages"][:1], _turn([{"type": "text", "text": "a"}])]
        },
        "an empty content": {"messages": [*good["messages"][:1], _turn("")]},
        "no completion": {"prompt": "a"},
        "None for a completion": {"prompt": "a", "completion": None},
        "a number for a completion": {"prompt": "a", "completion": 5},
        "a text behind turns": {"prompt": good["messages"][:1], "completion": "cat"},
        "a dict for a prompt": {"prompt": {"role": "user"}, "completion": "cat"},
        "no output": {"instruction": "a", "input": "b"},
        "a list for an instruction": {"instruction": ["a"], "output": "b"},
        "a list for an input": {"instruction": "a", "input": ["b"], "output": "c"},
        "nothing": {},
    }
    line = json.dumps(good) + "\n"
    may = ("an empty content", "a role that nobody has", "a list for an input")
    found = []
    for name, row in table.items():
        alone = (json.dumps(row) + "\n") * 20
        for where, text in {"all": alone, "the last": line * 19 + json.dumps(row) + "\n"}.items():
            code = None if name in may else 2
            found.append(Case("chat", f"{name}, {where}", argv, {"c.jsonl": text}, (), code))
    files = {"c.jsonl": line * 20}
    plain = [*argv, "--model_name_or_path", "{model}"]
    return [
        *found,
        Case("chat", "a tokenizer without a template", plain, files, ("chat template",)),
        Case("chat", "well formed", argv, files, code=0),
    ]


def _turn(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def cards() -> list[Case]:
    """Names that go into a card."""
    nasty = "x\n---\nlicense: mit\n# [b](http://x) <img src=x> \x1b[2J `y` [/x]"
    engines = ("peft", "vllm", "tensorrt-llm")
    return [
        Case(
            "cards",
            f"{engine}: a hostile base",
            [*EXPORT[:4], engine, *EXPORT[5:]],
            _spoken(_config(base_model_name_or_path=nasty)),
            code=0,
        )
        for engine in engines
    ]


FAMILIES = (exports, verifies, predictions, scores, chats, cards)
