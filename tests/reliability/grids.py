"""Bad input of `compare` and `report`: recipes, and the result files of others."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from case import DEEP, LONG, ODD, Case

RECIPE: dict[str, Any] = {
    "model": {"model_name_or_path": "{model}", "dtype": "float32"},
    "data_dir": ".",
    "tasks": {
        "mine": {
            "train_file": "rows.jsonl",
            "validation_file": "rows.jsonl",
            "kind": "classification",
            "text_column": ["text"],
            "label_names": ["a", "b"],
            "max_length": 16,
            "training": {"weight_decay": 0.0},
        }
    },
    "methods": {
        "lora": {"r": 2, "target_modules": ["query"], "rates": [1e-3], "budget": None},
        "chance": {"method": "random", "same_size_as": "lora"},
    },
    "seeds": [0],
    "rates": [1e-3],
    "budget": 500,
    "max_length": 16,
    "training": {"max_steps": 2, "per_device_train_batch_size": 8, "use_cpu": True},
    "tune": {"held_out": 0.2, "max_steps": 2},
    "generation": {"num_beams": 1},
}
LIST = ["compare", "r.yaml", "--output_dir", "out", "--list"]
RUN = LIST[:-1]


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to every value in a value."""
    found = [at] if at else []
    inner = value.items() if isinstance(value, dict) else ()
    return found + [way for key, part in inner for way in places(part, (*at, key))]


def changed(value: Any, way: tuple[Any, ...], new: Any) -> Any:
    """A copy of a value with another one in a place."""
    made = copy.deepcopy(value)
    inner = made
    for key in way[:-1]:
        inner = inner[key]
    inner[way[-1]] = new
    return made


def recipe(**changes: Any) -> str:
    plain = {key: value for key, value in RECIPE.items() if key not in ("budget", "rates")}
    plain = copy.deepcopy(plain) | changes
    return yaml.safe_dump({key: value for key, value in plain.items() if value is not ...})


def shapes() -> list[Case]:
    """Every value of a recipe in turn, replaced by some of other types: cells, or one line."""
    found = []
    rng = random.Random(7)
    for way in places(RECIPE):
        for number, value in rng.sample(list(enumerate(ODD)), 6):
            text = yaml.safe_dump(changed(RECIPE, way, value), allow_unicode=True)
            name = f"{'.'.join(map(str, way))} = {str(value)[:20]} ({number})"
            found.append(Case("recipe values", name, LIST, {"r.yaml": text}, code=None))
    return found


def recipes() -> list[Case]:
    """Recipes that cannot work."""
    svd = {"lora": {"r": 2, "target_modules": ["query"]}, "svd": {"r": 2}}
    listed = {
        "an unknown key": (recipe(metods=["lora"]), "did you mean 'methods'"),
        "an unknown method": (recipe(methods=["autolroa"]), "did you mean 'autolora'"),
        "an unknown task": (recipe(tasks=["mrcp"]), "did you mean 'mrpc'"),
        "an unknown flag": (recipe(methods={"lora": {"lora_alfa": 1}}), "lora_alpha"),
        "an unknown flag of training": (recipe(training={"lerning_rate": 1.0}), "learning_rate"),
        "another method's flag": (recipe(methods={"lora": {"by_layer": True}}), "by_layer"),
        "the size of nobody": (recipe(methods={"lora": {"same_size_as": "x"}}), "'x'"),
        "its own size": (recipe(methods={"lora": {"same_size_as": "lora"}}), "size of"),
        "a ring of sizes": (
            recipe(methods={"svd": {"same_size_as": "lora"}, "lora": {"same_size_as": "svd"}}),
            "takes another's",
        ),
        "NaN for a rate": (recipe(rates=[float("nan")]), "nan"),
        "rates and a rate": (recipe(rates=[1e-3], training={"learning_rate": 1e-3}), "rates"),
        "other counts of rates": (
            recipe(rates=[1e-3, 1e-2], methods={"lora": {"rates": [1e-3]}}),
            "as many",
        ),
        "no methods": (recipe(methods=[]), "methods is []"),
        "no tasks": (recipe(tasks={}), "tasks is {}"),
        "no seeds": (recipe(seeds=[]), "seeds"),
        "no model": (recipe(model=...), "names no model"),
        "a seed twice": (recipe(seeds=[1, 1]), "seeds"),
        "a method twice": (recipe(methods=["lora", "lora"]), "twice"),
        "a key twice": ("model: a\nmodel: b\n", "twice"),
        "recursive": ("model: &a [*a]\n", ""),
        "deep": (f"model: {DEEP}", "deep"),
        "digits": (f"budget: {LONG}", "digits"),
        "bytes": (b"model: \xe4", "UTF-8"),
        "an object": ("model: !!python/object/apply:os.system [touch owned]", "not YAML"),
        "nothing": ("", "a recipe maps keys to values"),
        "a list": ("- a\n", "a recipe maps keys to values"),
    }
    found = [Case("recipe", n, LIST, {"r.yaml": t}, (w,)) for n, (t, w) in listed.items()]
    whole = {
        "no such model": (recipe(model="nowhere/none"), "nowhere/none"),
        "a model that is a file": (recipe(model="rows.jsonl"), "rows.jsonl"),
        "no such rows": (recipe(tasks={"mine": {"train_file": "none.jsonl"}}), "none.jsonl"),
        "no such kind": (
            recipe(tasks={"mine": {"train_file": "rows.jsonl", "kind": "riddle"}}),
            "riddle",
        ),
        "no such column": (
            recipe(tasks={"mine": {"train_file": "rows.jsonl", "label_column": "x"}}),
            "'x'",
        ),
        "no such module": (recipe(methods={"lora": {"target_modules": ["x"]}}), "'x'"),
        "a rank above the matrix": (recipe(methods={"lora": {"r": 10**6}}), ""),
        "a budget below one piece": (recipe(methods={"svd": {"budget": 1}}), "budget"),
        "a budget below nothing": (recipe(methods={"svd": {"budget": -1}}), "budget is -1"),
        "a budget of many": (recipe(methods=svd, budget=[1, 2]), "budget is [1, 2]"),
        "no such schedule": (recipe(training={"lr_scheduler_type": "zigzag"}), "zigzag"),
        "no such reporter": (recipe(training={"max_steps": 2, "report_to": "zeppelin"}), ""),
        "arguments of no type": (
            recipe(training={"training_arguments": {"adam_beta1": "x"}}),
            "adam_beta1",
        ),
    }
    found += [Case("recipe", n, RUN, {"r.yaml": t}, (w,)) for n, (t, w) in whole.items()]
    good = {"r.yaml": recipe()}
    flags = {
        "no recipe": (["compare", "--output_dir", "out"], "--recipe"),
        "no such recipe": (["compare", "none.yaml", "--output_dir", "out"], "none.yaml"),
        "no output": (["compare", "r.yaml"], "--output_dir"),
        "no workers": ([*RUN, "--workers", "0"], "workers is 0"),
        "no such cell": ([*RUN, "--cell", "mine-x"], "mine-x"),
        "an output that is a file": (["compare", "r.yaml", "--output_dir", "rows.jsonl"], ""),
        "an output in a file": (["compare", "r.yaml", "--output_dir", "rows.jsonl/x"], ""),
        "a long output": (["compare", "r.yaml", "--output_dir", "x" * 5000], ""),
        "a workflow into a file": (
            ["compare", "r.yaml", "--output_dir", "rows.jsonl", "--snakefile"],
            "",
        ),
        "no steps to estimate": ([*RUN, "--estimate", "-1"], "estimate is -1"),
    }
    return found + [Case("recipe", n, argv, good, (w,)) for n, (argv, w) in flags.items()]


def damaged() -> list[Case]:
    """Results of a grid that are damaged: set aside, and their cells run again."""

    def cells(content: str | bytes | None) -> Callable[[Path], None]:
        def write(marker: Path) -> None:
            from rankwise.compare.cells import cell_file, cells_of
            from rankwise.compare.recipe import read_recipe

            folder = marker.parent
            for cell in cells_of(read_recipe(folder / "r.yaml", str(folder))):
                path = cell_file(folder / "out", cell.name)
                path.parent.mkdir(parents=True, exist_ok=True)
                if content is None:
                    path.mkdir()
                else:
                    path.write_bytes(content.encode() if isinstance(content, str) else content)

        return write

    table = {
        "half a file": '{"schema": "rankwise-res',
        "another schema": '{"schema": "rankwise-result/0"}',
        "a list": "[]",
        "Latin-1": b'{"a": "\xe4"}',
        "deep": DEEP,
        "a failure that says nothing": '{"schema": "rankwise-failure/1"}',
    }
    files = {"r.yaml": recipe(methods={"lora": {"r": 2, "target_modules": ["query"]}})}
    found = [
        Case("damaged cells", f"{n}, listed", LIST, {**files, "mark": cells(text)}, code=0)
        for n, text in table.items()
    ]
    found += [
        Case("damaged cells", n, RUN, {**files, "mark": cells(table[n])}, code=0)
        for n in ("half a file", "another schema")
    ]
    folder = {**files, "mark": cells(None)}
    return [
        *found,
        Case("damaged cells", "a folder in a cell's place", RUN, folder, ("folder",)),
        Case("damaged cells", "a folder, listed", LIST, folder, ("folder",)),
    ]


FIELDS = (
    "schema name method claim task model rows split training metrics trainable_parameters "
    "lora_parameters ranks cost curve figures about resampled verdict controls"
).split()
INNER = [
    *(("task", name) for name in ("name", "metrics", "kind")),
    *(("training", name) for name in ("seed", "learning_rate")),
    *(("metrics", name) for name in ("accuracy", "loss")),
    *(("cost", name) for name in ("train_seconds", "search_seconds")),
    *(("about", name) for name in ("cell", "floor", "machine", "judged", "versions", "command")),
]


def reports() -> list[Case]:
    """Files that are no results, and results whose every field is something else."""
    argv = ["report", "m.json", "--output_dir", "out"]
    bad = {
        "half a file": '{"schema": "rankwise-res',
        "another schema": '{"schema": "rankwise-result/0"}',
        "a list": "[]",
        "nothing": "",
        "Latin-1": b'{"a": "\xe4"}',
        "deep": DEEP,
        "digits": '{"schema": ' + LONG + "}",
        "NaN": '{"schema": NaN}',
        "a failure alone": '{"schema": "rankwise-failure/1", "cell": {}, "error": "", "again": 1}',
        "a plan": "{}",
    }
    found = [Case("report", n, argv, {"m.json": text}, ("m.json",)) for n, text in bad.items()]
    found += [
        Case("report", "no argument", ["report"], {}, ("needs a folder",)),
        Case("report", "no such folder", ["report", "none"], {}, ("none",)),
        Case("report", "an empty folder", ["report", "d"], {"d": Path.mkdir}, ("no result",)),
        Case("report", "a link to nothing", ["report", "link"], {}, ("link",)),
        Case("report", "a long name", ["report", "x" * 5000], {}, ()),
        Case("report", "into a file", ["report", "{result}", "--output_dir", "rows.jsonl"]),
    ]
    rng = random.Random(5)
    for way in [(name,) for name in FIELDS] + INNER:
        for value in rng.sample([v for v in ODD if v == v and abs(_number(v)) < 1e308], 4):
            name = f"{'.'.join(way)} = {str(value)[:20]}"
            found.append(
                Case("report values", name, argv, {"m.json": _of_run(way, value)}, code=None)
            )
    return found


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _of_run(way: tuple[Any, ...], value: Any) -> Callable[[Path], None]:
    """A good record with another value in a place."""

    def write(path: Path) -> None:
        path.write_text(json.dumps(changed(GOOD, way, value)))

    return write


GOOD: dict[str, Any] = {
    "schema": "rankwise-result/1",
    "name": "LoRA",
    "method": {"name": "LoRA", "r": 2},
    "claim": "",
    "task": {"name": "mine", "kind": "classification", "metrics": ["accuracy"]},
    "model": "tiny",
    "rows": {"train": 24, "held_out": 0, "evaluated": 24},
    "split": "test",
    "training": {"seed": 0, "learning_rate": 1e-3},
    "metrics": {"loss": 0.5, "accuracy": 0.75},
    "trainable_parameters": 100,
    "lora_parameters": 90,
    "ranks": {"layer.0.query": 2, "layer.1.query": 2},
    "cost": {"search_seconds": 0.0, "train_seconds": 1.0, "steps": 2},
    "curve": None,
    "figures": {},
    "about": {
        "command": "run",
        "cell": {"name": "c", "spec": {"task": {"label": "mine"}, "method": {"label": "lora"}}},
        "floor": {"accuracy": 0.5},
        "machine": {"processor": "P", "cores": 1},
        "judged": {"0.001": 0.5},
        "versions": {"rankwise": "0.1.0"},
    },
    "resampled": [0.5, 0.6],
    "verdict": "",
    "controls": [],
}
FAMILIES = (shapes, recipes, damaged, reports)
