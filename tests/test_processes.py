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
from rankwise.sharded import refuse_sharded

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


def check_alike(one, two):
    """Files, plans, adapters and metrics of two finished runs; returns their records."""
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
    assert RankPlan.load(one / "plan.json").ranks == RankPlan.load(two / "plan.json").ranks
    for name in ("ordered", "adapter"):
        file = f"{name}/adapter_model.safetensors"
        ours, theirs = load_file(two / file), load_file(one / file)
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert_close(ours[key], tensor, rtol=1e-3, atol=1e-4)
    records = [json.loads((folder / "metrics.json").read_text()) for folder in (one, two)]
    assert records[1]["metrics"] == pytest.approx(records[0]["metrics"], abs=1e-4)
    return records


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
    check_alike(tmp_path / "one", tmp_path / "two")
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


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("method", ["cut", "autolora", "dylora"])
def test_a_run_that_was_killed_on_two_processes_goes_on_exactly(method, tiny_bert, tmp_path):
    """With dropout, which each process draws for itself: its random state is in the checkpoint."""
    given = flags(tiny_bert, tmp_path, 4, save_steps=3, method=method)
    run = [str(Path(__file__).with_name("killed.py")), "run", *given, "--lora_r", "2"]
    whole = launch([*TWO, *run, "--output_dir", "whole"], tmp_path)
    assert whole.returncode == 0, whole.stderr[-3000:]
    killed = launch([*TWO, *run, "--output_dir", "out"], tmp_path, KILLED_AT="8")
    assert killed.returncode != 0
    (checkpoint,) = (tmp_path / "out.partial").glob("*/checkpoint-6")
    states = [(checkpoint / f"rng_state_{n}.pth").read_bytes() for n in range(2)]
    assert states[0] != states[1]
    again = [*run, "--output_dir", "out", "--resume_from_checkpoint"]
    if method == "cut":
        alone = launch(again, tmp_path)
        assert alone.returncode == 2
        assert "began with other processes (then 2, now 1)" in alone.stderr
    resumed = launch([*TWO, *again], tmp_path)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "from step 6" in resumed.stderr
    assert json.loads((tmp_path / "out/metrics.json").read_text())["about"]["resumed"] is True
    file = "adapter/adapter_model.safetensors"
    ours, theirs = load_file(tmp_path / "out" / file), load_file(tmp_path / "whole" / file)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert_close(ours[key], tensor, rtol=0, atol=1e-6)
    plans = [RankPlan.load(tmp_path / name / "plan.json").ranks for name in ("out", "whole")]
    assert plans[0] == plans[1]
    if method == "cut":
        finished = launch([*TWO, *again], tmp_path)
        assert finished.returncode == 0 and "finished already" in finished.stderr


def test_a_foreign_command_is_the_first_processs_alone(tmp_path):
    environment = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
    other = launch(["-m", "rankwise", "cut"], tmp_path, **environment)
    assert other.returncode == 0 and not other.stderr  # the first process says what is missing


FSDP = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
num_machines: 1
num_processes: 2
use_cpu: true
mixed_precision: 'no'
machine_rank: 0
main_process_ip: 127.0.0.1
main_process_port: 0
main_training_function: main
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: BertLayer
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: FULL_STATE_DICT
  fsdp_cpu_ram_efficient_loading: true
"""
DEEPSPEED = """
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
num_machines: 1
num_processes: 2
use_cpu: true
mixed_precision: 'no'
machine_rank: 0
main_process_port: 0
main_training_function: main
deepspeed_config:
  zero_stage: 3
  gradient_accumulation_steps: 1
  zero3_init_flag: false
"""


@pytest.mark.slow
def test_fsdp_of_accelerates_config_file_finds_what_one_process_finds(model, tmp_path):
    """Each of two processes holds half of every parameter, while it trains, orders and measures."""
    (tmp_path / "fsdp.yaml").write_text(FSDP)
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "fsdp.yaml"]
    driver = str(Path(__file__).with_name("fsdp_on_cpu.py"))
    given = [*flags(model, tmp_path, 4, control="lora"), "--output_dir", "two", "--lora_r", "4"]
    found = launch([*launcher, driver, "run", *given], tmp_path)
    assert found.returncode == 0, found.stderr[-3000:]
    assert "DTensor in BertForSequenceClassification" in found.stderr
    given = [*flags(model, tmp_path, 8, control="lora"), "--output_dir", "one", "--r", "4"]
    alone = launch(["-m", "rankwise", "run", *given], tmp_path)
    assert alone.returncode == 0, alone.stderr[-3000:]
    records = check_alike(tmp_path / "one", tmp_path / "two")
    assert records[1]["curve"]["sizes"] == records[0]["curve"]["sizes"]
    assert len(records[0]["controls"]) == len(records[1]["controls"]) == 4
    for a, b in zip(*(record["controls"] for record in records), strict=True):
        assert b["metrics"] == pytest.approx(a["metrics"], abs=1e-4), a["name"]


@pytest.mark.slow
def test_an_order_of_a_sharded_model_is_that_of_the_whole(tmp_path):
    """Any PEFT model after torch's own fully_shard, factors and all, on two processes."""
    found = launch([*TWO, str(Path(__file__).with_name("sharded_order.py"))], tmp_path)
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.count("the same") == 4, found.stdout


@pytest.mark.parametrize(
    ("config", "flag", "said"),
    [
        (FSDP, ["--method", "autolora"], "FSDP 2 gives each process a part of every parameter"),
        (FSDP.replace("fsdp_version: 2", "fsdp_version: 1"), [], "set fsdp_version: 2"),
        (FSDP, ["--heal", "0.1"], "leave heal out"),
        (DEEPSPEED, [], "DeepSpeed gives each process a part of every parameter, and LoRA, cut by"),
    ],
    ids=["gates", "version-1", "heal", "deepspeed"],
)
def test_what_cannot_be_sharded_refuses_what_accelerates_config_file_asks_for(
    config, flag, said, model, tmp_path
):
    """The environment is the one that accelerate's launcher makes of the file."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    (tmp_path / "config.yaml").write_text(config)
    parser = launch_command_parser()
    given = parser.parse_args(["--config_file", str(tmp_path / "config.yaml"), "-m", "rankwise"])
    args = _validate_launch_command(given)[0]
    args.deepspeed_fields_from_accelerate_config = "zero_stage"  # as the launcher itself sets it
    env = prepare_deepspeed_cmd_env(args)[1] if config is DEEPSPEED else prepare_multi_gpu_env(args)
    asked = {k: v for k, v in env.items() if k.startswith(("FSDP_", "ACCELERATE_USE"))}
    assert asked, env
    environment = asked | {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    run = ["-m", "rankwise", "run", *flags(model, tmp_path, 4), *flag, "--output_dir", "o"]
    if "--heal" in flag:  # looked at with the rows, and so in a process of its own
        environment = asked
    found = launch(run, tmp_path, **environment)
    assert found.returncode == 2, found.stderr[-2000:]
    assert said in found.stderr
    assert "Traceback" not in found.stderr


def test_sharding_is_refused_wherever_it_was_asked_for(tmp_path, monkeypatch):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    refuse_sharded("it", args)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as accelerate launch does from its YAML
    with pytest.raises(RankwiseError, match=r"FSDP 1 gives each process a part.* take torchrun"):
        refuse_sharded("it", args)
    monkeypatch.setenv("FSDP_VERSION", "2")
    refuse_sharded("it", args, able=True)
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    args.deepspeed = {"zero_optimization": {"stage": 3}}
    with pytest.raises(RankwiseError, match="DeepSpeed gives each process a part"):
        refuse_sharded("it", args, able=True)


FIT = """
import os, sys, rankwise
from transformers import TrainingArguments

model, train, other, test, batch, out = sys.argv[1:]
args = TrainingArguments(
    output_dir=out, max_steps=12, learning_rate=1e-2, per_device_train_batch_size=int(batch),
    warmup_steps=0.06, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
    ddp_backend="gloo" if "LOCAL_RANK" in os.environ else None,
)
given = dict(model=model, output_dir=out, args=args, r=4)
given |= dict(train_file=train, validation_file=other, test_file=test)
fitted = rankwise.fit("cut", **given)
again = rankwise.fit("cut", **given, resume_from_checkpoint=True)  # is finished: nothing is trained
assert again.result.metrics == fitted.result.metrics
try:
    rankwise.fit("cut", **given)
    raise SystemExit("the results were replaced")
except rankwise.RankwiseError:  # in each process, or the others would wait for this one
    pass
size = sum(p.numel() for name, p in fitted.model.named_parameters() if "lora_" in name)
said = f"{size} of {fitted.plan.parameters}, {fitted.curve.sizes}"
open(f"{out}-{args.process_index}", "w").write(said)
"""


@pytest.mark.slow
def test_fit_in_python_gives_every_process_the_same(model, tmp_path):
    script = tmp_path / "fit.py"
    script.write_text(FIT)
    files = flags(model, tmp_path, 4)
    given = [files[files.index(f"--{name}") + 1] for name in ("train_file", "validation_file")]
    given += [files[files.index("--test_file") + 1]]
    found = launch([*TWO, str(script), model, *given, "4", "two"], tmp_path)
    assert found.returncode == 0, found.stderr[-3000:]
    alone = launch([str(script), model, *given, "8", "one"], tmp_path)
    assert alone.returncode == 0, alone.stderr[-3000:]
    said = {name: (tmp_path / name).read_text() for name in ("two-0", "two-1", "one-0")}
    assert len(set(said.values())) == 1, said  # each has the model that was handed over
    check_alike(tmp_path / "one", tmp_path / "two")
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["one", "two"]
