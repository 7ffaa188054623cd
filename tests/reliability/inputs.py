"""Bad input of the commands that train, evaluate and cut; and all families that there are."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import calls
import grids
import served
from case import DEEP, LONG, ROWS, Case, train


def flags() -> list[Case]:
    """Flags out of range, or that no file could hold."""
    floats = "learning_rate weight_decay max_grad_norm warmup_steps num_train_epochs lora_dropout"
    found = [
        Case("flags", f"{name} {value}", train(f"--{name}={value}"), {}, (name,))
        for name in floats.split()
        for value in ("nan", "inf", "-1")
        if (name, value) != ("num_train_epochs", "-1")
    ]
    table = {
        "max_steps 0": (["--max_steps", "0"], "max_steps is 0"),
        "max_steps -3": (["--max_steps", "-3"], "max_steps is -3"),
        "save_steps 0": (["--save_steps", "0"], "save_steps"),
        "huge int": (["--seed", LONG], "seed"),
        "huge rank": (["--r", "9" * 40], "r"),
        "NUL": (["--text_column", "a\0b"], "NUL"),
        "no UTF-8": (["--label_column", "a\udc80"], "UTF-8"),
        "over-long path": (["--output_dir", "x" * 5000], ""),
        "over-long rows": (["--train_file", "x" * 5000], ""),
        "over-long folder": (["--data_dir", "x" * 5000], ""),
        "over-long plan": (["--plan", "x" * 5000], ""),
        "over-long flags": (["--config", "x" * 5000], ""),
        "over-long work": (["--output_dir", "x" * 250], ""),
        "home of nobody": (["--output_dir", "~nobody-there/x"], ""),
        "alpha inf": (["--lora_alpha", "inf"], "lora_alpha"),
        "typo": (["--lerning_rate", "1"], "did you mean --learning_rate"),
        "another method's": (["--gate_learning_rate", "1"], "a flag of method autolora"),
        "reporter": (["--report_to", "neptune"], "report_to"),
        "schedule": (["--lr_scheduler_type", "reduce_lr_on_plateau_x"], ""),
        "schedule with arguments": (["--lr_scheduler_type", "cosine_with_min_lr"], "min_lr"),
        "device": (["--dtype", "int8"], ""),
    }
    return found + [
        Case("flags", n, train(*more), {}, (word,)) for n, (more, word) in table.items()
    ]


def arguments() -> list[Case]:
    """--training_arguments."""
    table = {
        "NaN": '{"adam_beta1": NaN}',
        "infinite": '{"adam_epsilon": 1e999}',
        "a text": '{"adam_beta1": "x"}',
        "a bool": '{"adam_beta1": true}',
        "a list": '{"dataloader_num_workers": [1]}',
        "deep": '{"lr_scheduler_kwargs": ' + DEEP + "}",
        "digits": '{"eval_steps": ' + LONG + "}",
        "surrogate": '{"run_name": "\\ud800"}',
        "twice": '{"adam_beta1": 0.9, "adam_beta1": 0.8}',
        "optimizer": '{"optim": "lomo"}',
        "no optimizer": '{"optim": "zigzag"}',
        "drop_last": '{"dataloader_drop_last": true}',
        "scheduler kwargs": '{"lr_scheduler_kwargs": {"nonsense": 1}}',
        "beta 2": '{"adam_beta2": 2.0}',
    }
    return [
        Case("training_arguments", name, train("--training_arguments", text))
        for name, text in table.items()
    ]


def yaml() -> list[Case]:
    """Files of flags."""
    bombs = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 10)}]\n" for n in range(8)
    )
    table = {
        "a date": ("seed: 2024-01-01", "seed"),
        "bytes": ("seed: !!binary aGVsbG8=", "type bytes"),
        "a set": ("seed: !!set {a, b}", "type set"),
        "an object": ("seed: !!python/object/apply:os.system [touch owned]", "not YAML"),
        "itself": ("seed: &a [*a]", "recursive"),
        "itself as a map": ("training_arguments: &a {b: *a}", "recursive"),
        "a bomb": (bombs, "too many values"),
        "deep": ("seed: " + DEEP, ""),
        "NaN": ("learning_rate: .nan", "nan"),
        "infinite": ("learning_rate: -.inf", "inf"),
        "digits": ("seed: " + LONG, ""),
        "twice": ("seed: 1\nseed: 2", "twice"),
        "Latin-1": (b"output_dir: \xe4", "UTF-8"),
        "a list for a key": ("? [a, b]\n: 1", ""),
        "a typo": ("lerning_rate: 1", "learning_rate"),
        "NUL": ('output_dir: "a\\0b"', ""),
        "surrogate": ('output_dir: "\\ud800"', ""),
    }
    return [
        Case("YAML", n, train("--config", "c.yaml"), {"c.yaml": text}, (word,))
        for n, (text, word) in table.items()
    ] + [
        Case("YAML", "a folder", train("--config", "."), {}, ("cannot read",)),
        Case("YAML", "shared", train("--config", "c.yaml"), {"c.yaml": "keep: 0.5\n"}, code=0),
    ]


def json_rows() -> list[Case]:
    """Rows as JSON lines, an array, CSV."""
    good = ROWS.splitlines()[0]
    lines = {
        "deep": '{"text": "a", "label": "b", "x": ' + DEEP + "}",
        "digits": '{"text": "a", "label": ' + LONG + "}",
        "surrogate": '{"text": "\\ud800", "label": "b"}',
        "infinite label": '{"text": "a", "label": Infinity}',
        "a list": "[1, 2]",
        "no text": '{"text": 5, "label": "b"}',
        "a label that is an object": '{"text": "a", "label": {"x": 1}}',
        "twice": '{"text": "a", "text": "b", "label": "b"}',
        "half a line": '{"text": "a"',
        "mixed labels": '{"text": "a", "label": 1}\n{"text": "b", "label": "1"}',
    }
    found = [
        Case(
            "rows", f"JSON lines: {n}", train(), {"rows.jsonl": f"{ROWS}{line}\n"}, ("rows.jsonl",)
        )
        for n, line in lines.items()
        if n not in ("infinite label", "no text", "a label that is an object", "mixed labels")
    ]
    found += [
        Case("rows", f"JSON lines: {n}", train(), {"rows.jsonl": f"{ROWS}{lines[n]}\n"}, ("train",))
        for n in ("infinite label", "no text", "a label that is an object", "mixed labels")
    ]
    files = {
        "rows.json": ("[" + good, "an array cut short"),
        "rows.csv": (b"text,label\n\xe4,b\n", "Latin-1"),
        "a.csv": ("text,label\n" + 'a,"b\n' * 3, "an open quote"),
        "b.csv": ("text\n" + "a\nb\n" * 9, "no label, an encoder"),
        "c.csv": ("text,Label\n" + "a,x\nb,y\n" * 9, "a label in another case"),
        "d.csv": ("text , text\n" + "a,x\nb,y\n" * 9, "a name twice but for spaces"),
        "e.jsonl": ("\ufeff\n", "nothing but a mark"),
        "f.csv": (",,\n" * 5, "no names"),
        "g.jsonl": ("\0" * 100, "NUL"),
    }
    found += [
        Case("rows", name, train(rows=file), {file: text}, ())
        for file, (text, name) in files.items()
    ]
    spaced = "text, label\n" + "fine film, good\nawful film, bad\n" * 12
    return [
        *found,
        Case("rows", "CSV with spaces", train(rows="s.csv"), {"s.csv": spaced}, code=0),
        Case("rows", "a folder", train(rows="."), {}, ()),
    ]


def _parquet(write: Callable[[Any, Any], None]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        texts = [f"{'fine' if n % 2 else 'awful'} film {n}" for n in range(24)]
        write(path, (pa, pq, texts))

    return make


def parquet() -> list[Case]:
    """Rows as Parquet, with what its metadata may say."""

    def table(labels: Any, extra: dict[str, Any], metadata: bytes | None) -> Callable[[Path], None]:
        def write(path: Path, tools: Any) -> None:
            pa, pq, texts = tools
            columns = {"text": texts, "label": labels or [n % 2 for n in range(24)]}
            made = pa.table(columns | {k: v(pa) for k, v in extra.items()})
            if metadata is not None:
                made = made.replace_schema_metadata({"huggingface": metadata})
            pq.write_table(made, path)

        return _parquet(write)

    def about(**features: Any) -> bytes:
        plain = {"text": {"dtype": "string", "_type": "Value"}}
        plain["label"] = {"dtype": "int64", "_type": "Value"}
        return json.dumps({"info": {"features": plain | features}}).encode()

    classes = {"names": ["a", "b"], "_type": "ClassLabel"}
    maps = {"m": lambda pa: pa.array([[("k", 1)]] * 24, pa.map_(pa.string(), pa.int64()))}
    raw = {"b": lambda pa: pa.array([b"\xff"] * 24)}
    good = {
        "a map beside": table(None, maps, None),
        "bytes beside": table(None, raw, None),
        "classes by name": table(None, {}, about(label=classes)),
    }
    bad = {
        "a class out of range": table([0, 7] * 12, {}, about(label=classes)),
        "metadata that is no JSON": table(None, {}, b"{nonsense"),
        "metadata of another shape": table(None, {}, b"[1]"),
        "classes without names": table(None, {}, about(label={"_type": "ClassLabel"})),
        "a map as label": table([{"x": 1}] * 24, {}, None),
        "garbage": b"PAR1" + b"\0" * 50 + b"PAR1",
        "empty": b"",
    }
    argv = train(rows="rows.parquet")
    return [
        Case("Parquet", n, argv, {"rows.parquet": make}, code=0) for n, make in good.items()
    ] + [Case("Parquet", n, argv, {"rows.parquet": make}, ()) for n, make in bad.items()]


def plans() -> list[Case]:
    """Plans, edited."""
    argv = ["train", *train("--plan", "plan.json")[5:]]  # no rank and no targets beside a plan

    def edit(change: Callable[[dict], Any]) -> Callable[[Path], None]:
        def make(path: Path) -> None:
            raw = json.loads((path.parent / "good-plan.json").read_text())
            change(raw)
            path.write_text(json.dumps(raw))

        return make

    def entry(**values: Any) -> Callable[[Path], None]:
        return edit(lambda raw: next(iter(raw["modules"].values())).update(values))

    table = {
        "a huge rank": entry(rank=10**30),
        "an infinite rank": entry(rank=float("inf")),
        "a rank that is true": entry(rank=True),
        "half a rank": entry(rank=1.5),
        "a gate that is true": entry(gate=[True]),
        "rows that are huge": entry(rows=[10**30, 10**30 + 32]),
        "a module that is a list": entry(module=["x"]),
        "an infinite scaling": edit(lambda raw: raw.update(scaling=float("inf"))),
        "a huge scaling": edit(lambda raw: raw.update(scaling=1e300)),
        "a scaling that is true": edit(lambda raw: raw.update(scaling=True)),
        "r that is true": edit(lambda raw: raw.update(r=True)),
        "provenance that is a text": edit(lambda raw: raw.update(provenance="x")),
        "no modules": edit(lambda raw: raw.update(modules={})),
        "deep": '{"format": ' + DEEP + "}",
        "digits": '{"r": ' + LONG + "}",
        "Latin-1": b'{"format": "\xe4"}',
        "surrogate": '{"format": "\\ud800"}',
        "twice": '{"r": 1, "r": 2}',
    }
    found = [Case("plans", n, argv, {"plan.json": make}, ("plan",)) for n, make in table.items()]
    foreign = {
        "a method that is a list": ["x"],
        "a method that is a text": "their tool\n# heading | <b>",
        "a method of other flags": {"name": "DyLoRA", "nonsense": 1},
        "flags of other types": {"name": "DyLoRA", "r": "x"},
        "a class that is a list": {"name": ["DyLoRA"]},
        "a method with half its record": {"name": "DyLoRA"},
    }
    for name, method in foreign.items():
        change = edit(lambda raw, method=method: raw.update(provenance={"method": method}))
        found.append(Case("plans", f"provenance: {name}", argv, {"plan.json": change}, code=0))
    return found


def adapters() -> list[Case]:
    """Adapters to evaluate and to cut."""
    evaluate = ["evaluate", "--adapter", "a", "--test_file", "rows.jsonl", "--use_cpu"]
    cut = ["cut", "--adapter", "a", "--rank", "1", "--output_dir", "out"]

    def tensors(change: Callable[[dict], Any]) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            from safetensors.torch import load_file, save_file

            found = load_file(folder / "adapter_model.safetensors")
            found = change(found) or found
            save_file(found, folder / "adapter_model.safetensors", metadata={"format": "pt"})

        return make

    def written(name: str, **values: Any) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            about = json.loads((folder / name).read_text()) | values
            (folder / name).write_text(json.dumps(about))

        return make

    def text(name: str, content: Any) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            data = content if isinstance(content, bytes) else content.encode()
            (folder / name).write_bytes(data)

        return make

    def without_b(found: dict) -> None:
        del found[min(n for n in found if "lora_B" in n)]

    def nan(found: dict) -> None:
        found[min(found)].view(-1)[0] = float("nan")

    config, task = "adapter_config.json", "task.json"
    both = {
        "lacks a lora_B": tensors(without_b),
        "NaN": tensors(nan),
        "a shape": tensors(lambda t: {n: v[:1] for n, v in t.items()}),
        "no config": text(config, ""),
        "a config that is a list": text(config, "[1]"),
        "a deep config": text(config, DEEP),
        "a config of Latin-1": text(config, b'{"a": "\xe4"}'),
        "digits in the config": text(config, '{"r": ' + LONG + "}"),
        "r that is a text": written(config, r="x"),
        "an infinite alpha": text(config, '{"peft_type": "LORA", "lora_alpha": 1e999}'),
        "garbage for weights": text("adapter_model.safetensors", b"\xff" * 64),
        "no weights": text("adapter_model.safetensors", b""),
    }
    ours = {
        "base of another type": written(config, base_model_name_or_path=5),
        "base that is a list": written(config, base_model_name_or_path=["x"]),
        "target_modules of a type": written(config, target_modules=7),
        "task that is a list": text(task, "[1]"),
        "task of nothing": text(task, "{}"),
        "task without a kind": written(task, kind=None),
        "task of a kind that is a list": written(task, kind=["x"]),
        "labels that are numbers": written(task, label_names=[1, 2]),
        "labels that are a text": written(task, label_names="ab"),
        "a length that is a text": written(task, max_length="x"),
        "a length that is infinite": text(task, '{"max_length": 1e999}'),
        "a method that is a number": written(task, method=5),
        "a method of other flags": written(task, method={"name": "LoRA", "x": 1}),
        "a method that is a list": written(task, method={"name": ["LoRA"]}),
        "a method's rank of text": written(task, method={"name": "LoRA", "r": "x"}),
        "a deep task": text(task, DEEP),
    }
    found = [Case("evaluate", n, evaluate, {}, change=c) for n, c in (both | ours).items()]
    huge = written(config, lora_alpha=1e300)
    odd = written(config, base_model_name_or_path="x\n---\n[/bold] \x1b[2J")
    cuts = both | {"a number for base": written(config, base_model_name_or_path=5)}
    codes = {"a number for base": 0}
    found += [Case("cut", n, cut, {}, change=c, code=codes.get(n, 2)) for n, c in cuts.items()]
    labels = [*evaluate, "--label_names", "b", "a"]
    return [
        *found,
        Case("cut", "an odd base name", cut, {}, change=odd, code=0),
        Case("cut", "a huge alpha", cut, {}, change=huge, code=0),
        Case("cut", "fp8", cut, {}, ("float8",), change=tensors(_to_fp8)),
        Case("cut", "energy NaN", [*cut[:3], "--energy", "nan", *cut[5:]], {}, ("energy",)),
        Case("cut", "keep inf", [*cut[:3], "--keep", "inf", *cut[5:]], {}, ("keep",)),
        Case("cut", "a link to nothing", [*cut[:-1], "link"], {}, ("link",)),
        Case("evaluate", "other label names", labels, {}, ("label_names",)),
    ]


def _to_fp8(found: dict) -> dict:
    import torch

    return {name: tensor.to(torch.float8_e4m3fn) for name, tensor in found.items()}


def cases() -> list[Case]:
    """All of them, those of other files too."""
    families = (flags, arguments, yaml, json_rows, parquet, plans, adapters)
    others = (*calls.FAMILIES, *served.FAMILIES, *grids.FAMILIES)
    return [case for family in (*families, *others) for case in family()]
