"""The command line on two processes: the same plan and adapter as one with their batches."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoTokenizer, BertConfig, BertModel, TrainingArguments

from conftest import make_rows, write_jsonl
from rankwise import RankPlan, RankwiseError
from rankwise.trainer import refuse_sharded

TWO = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]


@pytest.fixture(scope="module")
def model(tiny_bert, tmp_path_factory):
    """The tiny BERT without dropout, which two processes would draw otherwise than one."""
    folder = tmp_path_factory.mktemp("no-dropout") / "bert"
    shutil.copytree(tiny_bert, folder)
    config = BertConfig.from_pretrained(tiny_bert)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    BertModel.from_pretrained(tiny_bert, config=config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(folder)
    return str(folder)


def flags(model, folder: Path, batch: int, **more) -> list[str]:
    train = write_jsonl(folder / "train.jsonl", make_rows(48, 0))
    other = write_jsonl(folder / "validation.jsonl", make_rows(80, 1))
    test = write_jsonl(folder / "test.jsonl", make_rows(16, 2))
    given = {
        "model_name_or_path": model,
        "train_file": train,
        "validation_file": other,
        "test_file": test,
        "per_device_train_batch_size": batch,
        "max_steps": 12,
        "learning_rate": 1e-2,
        "use_cpu": "true",
        "control": "none",
    } | more
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def launch(argv: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess:
    source = str(Path(__file__).parents[1] / "src")
    env = os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [sys.executable, *argv], env=env, capture_output=True, text=True, cwd=folder, timeout=120
    )


@pytest.mark.slow
def test_torchrun_finds_the_plan_and_the_adapter_of_one_process(model, tmp_path):
    arguments = flags(model, tmp_path, 4)
    found = launch(
        [*TWO, "-m", "rankwise", "run", *arguments, "--output_dir", "two", "--lora_r", "4"],
        tmp_path,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stderr.count("in two:") == 1  # one process speaks
    arguments = flags(model, tmp_path, 8)
    alone = launch(
        ["-m", "rankwise", "run", *arguments, "--output_dir", "one", "--r", "4"], tmp_path
    )
    assert alone.returncode == 0, alone.stderr[-3000:]
    one, two = tmp_path / "one", tmp_path / "two"
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
    assert RankPlan.load(one / "plan.json").ranks == RankPlan.load(two / "plan.json").ranks
    for name in ("ordered", "adapter"):
        file = f"{name}/adapter_model.safetensors"
        ours, theirs = load_file(two / file), load_file(one / file)
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert_close(ours[key], tensor, rtol=1e-3, atol=1e-4)
    metrics = [json.loads((f / "metrics.json").read_text())["metrics"] for f in (one, two)]
    assert metrics[1] == pytest.approx(metrics[0], abs=1e-4)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["one", "two"]


@pytest.mark.slow
def test_accelerate_starts_it_from_its_config_file(model, tmp_path):
    config = tmp_path / "accelerate.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_machines: 1\n"
        "num_processes: 2\nuse_cpu: true\nmixed_precision: 'no'\nmain_training_function: main\n"
        "machine_rank: 0\nmain_process_ip: 127.0.0.1\nmain_process_port: 0\n"
    )
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(config), "-m", "rankwise"]
    run = ["train", *flags(model, tmp_path, 4, max_steps=4), "--output_dir", "out"]
    run = [part for part in run if part not in ("--control", "none")]
    found = launch([*launcher, *run], tmp_path)
    assert found.returncode == 0, found.stderr[-3000:]
    about = json.loads((tmp_path / "out/metrics.json").read_text())
    assert about["cost"]["steps"] == 4 and (tmp_path / "out/adapter").is_dir()


def test_a_resumed_run_and_a_foreign_command_say_what_to_do(model, tmp_path):
    arguments = flags(model, tmp_path, 4)
    environment = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    run = ["-m", "rankwise", "run", *arguments, "--output_dir", "o", "--resume_from_checkpoint"]
    found = launch(run, tmp_path, **environment)
    assert found.returncode == 2
    assert "--resume_from_checkpoint works in one process, and there are 2" in found.stderr
    other = launch(["-m", "rankwise", "cut"], tmp_path, **(environment | {"RANK": "1"}))
    assert other.returncode == 0 and not other.stderr  # the first process says what is missing


def test_sharding_is_refused_wherever_it_was_asked_for(tmp_path, monkeypatch):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    refuse_sharded(args)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as accelerate launch does from its YAML
    with pytest.raises(RankwiseError, match=r"FSDP shards parameters.* without FSDP"):
        refuse_sharded(args)
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    args.deepspeed = {"zero_optimization": {"stage": 3}}
    with pytest.raises(RankwiseError, match="DeepSpeed shards parameters"):
        refuse_sharded(args)
