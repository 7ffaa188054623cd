"""`rankwise cut` on a run that kept an order: any size without model, data, PEFT, transformers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rankwise import Adapter, Ordered
from rankwise.cli import main

FAST = "--max_steps 4 --per_device_train_batch_size 8 --learning_rate 1e-2 --use_cpu".split()
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "task.json"]


@pytest.fixture(scope="module")
def finished(tiny_bert, many_rows_dir, tmp_path_factory) -> Path:
    """The folder of a run of `cut`."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    data = ["--model_name_or_path", tiny_bert, "--data_dir", many_rows_dir]
    main(["run", "--method", "cut", "--r", "4", *data, *FAST, "--output_dir", str(folder)])
    return folder


def refused(capsys, argv: list[str], *words: str) -> None:
    """One line on standard error, exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.startswith("rankwise: ") and err.count("\n") == 1, err
    assert all(word in err for word in words), err


def same(folder: Path, adapter: Adapter) -> bool:
    found = load_file(folder / "adapter_model.safetensors")
    return found.keys() == adapter.weights.keys() and all(
        torch.equal(t, adapter.weights[name]) for name, t in found.items()
    )


@pytest.mark.parametrize(
    ("flag", "size"), [("--budget", 700), ("--keep", 0.25), ("--rank", 2)], ids=str
)
def test_it_is_the_cut_of_the_order_in_the_run(finished, tmp_path, flag, size):
    main(["cut", "--adapter", str(finished), flag, str(size), "--output_dir", str(tmp_path / "a")])
    expected = Ordered.load(finished / "ordered").cut(**{flag.strip("-"): size})
    assert same(tmp_path / "a", expected)
    assert Adapter.load(tmp_path / "a").config == expected.config
    assert set(FILES) <= {path.name for path in (tmp_path / "a").iterdir()}
    assert expected.parameters < Adapter.load(finished / "ordered").parameters


def test_the_folder_of_the_order_may_be_given_too(finished, tmp_path):
    for name, source in (("run", finished), ("ordered", finished / "ordered")):
        out = str(tmp_path / name)
        main(["cut", "--adapter", str(source), "--keep", "0.3", "--output_dir", out])
    assert same(tmp_path / "run", Adapter.load(tmp_path / "ordered"))


def test_the_size_that_the_run_picked_comes_out_again(finished, tmp_path):
    size = json.loads((finished / "metrics.json").read_text())["lora_parameters"]
    out = tmp_path / "again"
    main(["cut", "--adapter", str(finished), "--budget", str(size), "--output_dir", str(out)])
    assert same(out, Adapter.load(finished / "adapter"))


def test_no_library_of_models_or_data_is_imported(finished, tmp_path):
    """Nor could it be: they are not there in this process."""
    script = (
        "import sys\n"
        "gone = ('transformers', 'peft', 'datasets', 'accelerate')\n"
        "sys.modules.update(dict.fromkeys(gone))\n"
        "from rankwise.cli import main\n"
        "main(sys.argv[1:])\n"
        "assert not any(m.split('.')[0] in gone and sys.modules[m] for m in sys.modules)\n"
    )
    argv = ["cut", "--adapter", str(finished), "--budget", "700", "--output_dir"]
    done = subprocess.run(
        [sys.executable, "-c", script, *argv, str(tmp_path / "cut")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert same(tmp_path / "cut", Ordered.load(finished / "ordered").cut(700))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--energy", "0.9"], ["an ordered adapter takes --budget, --keep or --rank"]),
        (["--plan", "plan.json"], ["an ordered adapter takes"]),
        (["--rank", "2", "--svd"], ["an ordered adapter takes"]),
        (["--budget", "3"], ["3 parameters hold no piece"]),
        (["--budget", "1000000"], ["budget is 1000000; the adapter has"]),
        (["--keep", "1.5"], ["keep is 1.5"]),
        (["--keep", "nan"], ["--keep", "nan is no finite number"]),
        (["--rank", "0"], ["rank is 0; it has to be at least 1"]),
        (["--rank", "2", "--keep", "0.5"], ["--rank and --keep"]),
        ([], ["got none"]),
    ],
    ids=str,
)
def test_what_an_order_cannot_give_is_refused_in_one_line(finished, tmp_path, capsys, flags, words):
    out = tmp_path / "cut"
    refused(capsys, ["cut", "--adapter", str(finished), *flags, "--output_dir", str(out)], *words)
    assert not list(tmp_path.iterdir())


def test_a_damaged_order_is_refused_in_one_line(finished, tmp_path, capsys):
    ordered = tmp_path / "ordered"
    Ordered.load(finished / "ordered").save(ordered)
    (ordered / "pieces.safetensors").write_bytes(b"no tensors")
    argv = ["cut", "--adapter", str(ordered), "--keep", "0.5", "--output_dir", str(tmp_path / "x")]
    refused(capsys, argv, "no order can be read")
