"""The shape of the house: who imports whom, who knows a method's name, what upgrades take away."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rankwise import methods
from rankwise.methods import METHODS

SRC = Path(__file__).parents[1] / "src" / "rankwise"
FILES = sorted(SRC.rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(SRC.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(tree: ast.AST) -> set[str]:
    """Modules of ours that are imported when the module is: not inside functions, not for types."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or typing_only(node):
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rankwise"):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.startswith("rankwise")}
        else:
            found |= imports(node)
    return found


def test_no_circle_of_imports():
    graph = {name: imports(ast.parse(path.read_text())) for name, path in MODULES.items()}
    state: dict[str, int] = {}

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert state.get(name) != 1, " -> ".join((*way, name))
        if state.get(name) == 2:
            return
        state[name] = 1
        for other in sorted(graph.get(name, ())):
            visit(other, (*way, name))
        state[name] = 2

    for name in graph:
        visit(name, ())


def test_no_file_outside_methods_names_a_method():
    """Classes, and names that are no words of their own ("lora" is one, and so is "random")."""
    classes = {type(method).__name__ for method in METHODS.values()} - {"LoRA"}
    names = {name for name in METHODS if re.search("lora|tuning|houlsby|compacter", name)} - {
        "lora"
    }
    pattern = re.compile(rf"\b({'|'.join(sorted(classes | names, key=len, reverse=True))})\b")
    hits = []
    for path in FILES:
        where = path.relative_to(SRC).as_posix()
        if where.startswith("methods/"):
            continue
        for line in code_lines(path):
            if pattern.search(line):
                hits.append(f"{where}: {line.strip()}")
    assert not hits, "\n".join(hits)


def code_lines(path: Path) -> list[str]:
    """The file without docstrings and comments, as Python would write it."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            node.body[0] = ast.Pass()
    return ast.unparse(tree).splitlines()


def test_every_method_is_a_name_of_the_package():
    classes = {type(method).__name__ for method in METHODS.values()}
    assert classes <= set(methods.__all__)
    assert len(classes) == len({type(method) for method in METHODS.values()})


def test_a_flag_named_as_a_slot_is_refused():
    with pytest.raises(TypeError, match="'start' is a slot"):

        class Wrong(methods.Method):
            start: float = 0.9


def test_no_method_is_asked_for_by_its_class():
    for path in FILES:
        text = path.read_text()
        if "methods" not in path.parts:
            assert not re.search(r"isinstance\([^)]*(DyLoRA|AutoLoRA)", text), path


@pytest.mark.parametrize(
    ("code", "without"),
    [
        ("import rankwise", "torch transformers peft datasets numpy yaml rich"),
        ("import rankwise.methods", "torch transformers peft datasets numpy"),
        ("import rankwise.adapter", "transformers peft datasets"),
        ("import rankwise.orders", "transformers peft datasets"),
        ("import rankwise.surgeon", "transformers peft datasets"),
        ("import rankwise.tasks", "torch transformers peft datasets"),
    ],
)
def test_what_an_import_does_not_load(code, without):
    script = f"import sys; {code}; print(*[m for m in {without.split()!r} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.stdout.strip() == "", found.stdout + found.stderr


# Names of other libraries that are not part of their documented interface, and who needs them.
PRIVATE = {
    "peft.tuners.tuners_utils._maybe_include_all_linear_layers": "lora.py: all-linear",
    "peft.tuners.lora.LoraLayer.update_layer": "lora.py: r, scaling and factors of a layer",
    "peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING": "lora.py: defaults",
    "peft.tuners.lora.layer._ConvNd": "curvature.py: a convolution is refused",
    "peft.tuners.lora.Embedding": "curvature.py: embeddings are watched otherwise",
    "peft.tuners.adalora.AdaLoraLayer": "methods/allocator.py: masks and factors",
    "peft.tuners.adalora.RankAllocator.update_and_allocate": "methods/allocator.py: the budget",
    "transformers.TrainingArguments._setup_devices": "trainer.py, cli/job.py: _n_gpu is set there",
    "transformers.Trainer._save": "trainer.py: what a checkpoint holds",
    "transformers.Trainer._save_checkpoint": "trainer.py: no checkpoint of NaN",
    "transformers.Trainer._save_rng_state": "trainer.py: those of all processes in one folder",
    "transformers.Trainer._load_from_checkpoint": "trainer.py: what a checkpoint holds",
    "transformers.Trainer._remove_unused_columns": "bilevel.py: validation rows as training rows",
    "transformers.Trainer._get_collator_with_removed_columns": "bilevel.py: the same",
    "transformers.Trainer._prepare_inputs": "bilevel.py: batches of validation rows",
    "transformers.Trainer._get_num_items_in_batch": "bilevel.py: the loss of a validation batch",
    "transformers.Trainer._clip_grad_norm": "bilevel.py: gates do not count in clipping",
    "transformers.Trainer.evaluation_loop": "trainer.py: the losses of batches",
    "tqdm.std.tqdm._instances": "cli: bars end before the last line",
    "transformers.integrations.get_reporting_integration_callbacks": "trainer.py: checked early",
}


@pytest.mark.parametrize("name", PRIVATE)
def test_private_names_of_other_libraries_are_there(name):
    """An upgrade that took one away fails here, with its name and who needs it."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for attribute in parts[cut:]:
            found = getattr(found, attribute, None)
        assert found is not None, f"{name} is gone; needed by {PRIVATE[name]}"
        return
    raise AssertionError(f"{name} is gone; needed by {PRIVATE[name]}")
