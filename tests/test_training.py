"""The search loop: against a plain reference, under Trainer's options, interrupted and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.func import functional_call
from transformers import LlamaConfig, TrainerCallback, default_data_collator

import rankwise
from families import StopAfter, arguments, family, rows, without_dropout
from rankwise import AutoLoRA, CheckpointError, DataError, DivergedError, RankwiseError
from rankwise.bilevel import SearchTrainer
from rankwise.gate import attach
from rankwise.lora import adapted, build, find_entries, uniform
from rankwise.plan import RankPlan
from rankwise.trainer import FiniteTrainer, last_checkpoint, seal

K = 4


@pytest.fixture
def of():
    return family("bert-classification")


def search(model, data, args, method=None, **more):
    # a look-ahead step of 1 makes the second term of the hypergradient matter
    method = method or AutoLoRA(gate_learning_rate=1e-2, lookahead=1.0)
    return rankwise.search(
        model, data, method=method, r=K, args=args, data_collator=default_data_collator, **more
    )


def gate_values(plan):
    return torch.tensor([list(entry.gate) for entry in plan.modules.values()])


# --- the method ---------------------------------------------------------------------------------


def reference_search(of, trainer, steps, eta, lr, beta_lr):
    """Algorithm 1 as it is written, on the trainer's own batches: the look-ahead is built as a
    function of β with torch.func and differentiated as a whole. Shares no code with rankwise."""
    model = trainer.model
    names = {n: p for n, p in model.named_parameters() if p.requires_grad}
    theta = {n: p.detach().clone().requires_grad_() for n, p in names.items() if "beta" not in n}
    beta = {n: p.detach().clone().requires_grad_() for n, p in names.items() if "beta" in n}
    weights = torch.optim.AdamW(theta.values(), lr=lr, weight_decay=0.0)
    meta = torch.optim.AdamW(beta.values(), lr=beta_lr, weight_decay=0.0)

    def loss(values, batch):
        return functional_call(model, values, kwargs=batch)["loss"]

    batches = iter(trainer.get_train_dataloader())
    for step in range(steps):
        train = next(batches)
        trainer.state.global_step = step
        (val,) = trainer._validation_batches(1)
        gradient = torch.autograd.grad(
            loss(theta | beta, train), list(theta.values()), create_graph=True
        )
        ahead = {n: p - eta * g for (n, p), g in zip(theta.items(), gradient, strict=True)}
        outer = torch.autograd.grad(loss(ahead | beta, val), list(beta.values()))
        for p, g in zip(theta.values(), gradient, strict=True):
            p.grad = g.detach()
        for p, g in zip(beta.values(), outer, strict=True):
            p.grad = g
        weights.step()
        meta.step()
    trainer.state.global_step = 0
    return {n: p.detach() for n, p in (theta | beta).items()}


@pytest.mark.parametrize(("estimator", "tolerance"), [("exact", 1e-5), ("finite_difference", 2e-3)])
def test_search_follows_algorithm_1(of, tmp_path, estimator, tolerance):
    of.config._attn_implementation = "eager"
    model = without_dropout(of)
    method = AutoLoRA(estimator=estimator, gate_learning_rate=1e-2, lookahead=0.5, radius=1e-3)
    plan = RankPlan(find_entries(model, None, K), r=K)
    torch.manual_seed(0)
    peft_model = build(model, plan, task_type="SEQ_CLS")
    gated = attach(peft_model, plan, method.activation)
    data = rows(of, 40)
    trainer = SearchTrainer(
        peft_model,
        arguments(tmp_path, max_grad_norm=0.0, max_steps=5),
        gated=gated,
        method=method,
        train_dataset=data.select(range(20)),
        validation_dataset=data.select(range(20, 40)),
        configuration={},
        data_collator=default_data_collator,
    )
    expected = reference_search(of, trainer, 5, eta=0.5, lr=1e-2, beta_lr=1e-2)
    trainer.train()
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad:
            error = (parameter.detach() - expected[name]).norm() / expected[name].norm()
            assert error < tolerance, name


def test_all_of_the_lower_level_moves_and_nothing_else(of, tmp_path):
    """Factors and the task head train during the search; the frozen weights do not."""
    model = of.model()
    plan = RankPlan(find_entries(model, None, K), r=K)
    with adapted(model, plan, task_type="SEQ_CLS") as peft_model:
        method = AutoLoRA()
        gated = attach(peft_model, plan, method.activation)
        before = {n: p.detach().clone() for n, p in peft_model.named_parameters()}
        SearchTrainer(
            peft_model,
            arguments(tmp_path),
            gated=gated,
            method=method,
            train_dataset=rows(of),
            validation_dataset=rows(of, seed=2),
            configuration={},
            data_collator=default_data_collator,
        ).train()
        moved = {n for n, p in peft_model.named_parameters() if not torch.equal(p, before[n])}
    expected = {n for n in before if "lora_" in n or "classifier.modules_to_save" in n}
    assert moved == expected


def test_the_model_comes_back_as_it_was(of, tmp_path):
    model = of.model().eval()
    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    names = [name for name, _ in model.named_modules()]
    before = {n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    search(model, rows(of), arguments(tmp_path))
    assert [name for name, _ in model.named_modules()] == names
    assert not model.training
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n][0]) and p.requires_grad == before[n][1], n


def test_the_model_comes_back_also_when_the_search_fails(of, tmp_path):
    model = of.model()
    names = [name for name, _ in model.named_modules()]

    class Stop(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        search(model, rows(of), arguments(tmp_path), callbacks=[Stop()])
    assert [name for name, _ in model.named_modules()] == names


def test_sets_are_disjoint_seeded_and_of_the_asked_size(of):
    from rankwise.rows import two_sets

    data = rows(of, 40).add_column("row", list(range(40)))
    sets = [two_sets(data, None, 0.3, seed) for seed in (0, 0, 1)]
    train, validation = set(sets[0].train["row"]), set(sets[0].validation["row"])
    assert len(train) == 28 and len(validation) == 12 and not train & validation
    assert sets[0].train["row"] == sets[1].train["row"]
    assert set(sets[2].train["row"]) != train


def trainer_of_positions(of, folder, count, **changes):
    """A search trainer whose batches are the positions of their rows in D_val."""
    data = rows(of, count).add_column("position", list(range(count)))
    model = of.model()
    plan = RankPlan(find_entries(model, None, K), r=K)
    peft_model = build(model, plan, task_type="SEQ_CLS")
    return SearchTrainer(
        peft_model,
        arguments(folder, remove_unused_columns=False, **changes),
        gated=attach(peft_model, plan, AutoLoRA().activation),
        method=AutoLoRA(),
        train_dataset=data,
        validation_dataset=data,
        configuration={},
        data_collator=lambda batch: {"position": torch.tensor([row["position"] for row in batch])},
    )


def test_validation_batches_cover_each_pass_once_and_differ_in_order(of, tmp_path):
    trainer = trainer_of_positions(of, tmp_path, 12)
    seen = []
    for step in range(6):
        trainer.state.global_step = step
        seen.append(trainer._validation_batches(1)[0]["position"].tolist())
    passes = [[p for batch in part for p in batch] for part in (seen[:3], seen[3:])]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(12))
    assert passes[0] != passes[1]


def test_a_short_last_accumulation_repeats_no_validation_rows(of, tmp_path):
    """5 batches in steps of 4: the second step of each epoch has one batch only."""
    trainer = trainer_of_positions(of, tmp_path, 20, gradient_accumulation_steps=4)
    seen = []
    for step, count in enumerate([4, 1]):
        trainer.state.global_step = step
        for part in trainer._validation_batches(count):
            seen += part["position"].tolist()
    assert sorted(seen) == list(range(20))


def test_gates_that_never_moved_are_no_plan(of, tmp_path):
    """Untouched gates are exactly 1/k, which the threshold would read as rank k everywhere."""
    with pytest.raises(RankwiseError, match="no gate moved in 1 steps"):
        search(
            of.model(),
            rows(of),
            arguments(tmp_path, max_steps=1, warmup_steps=1, lr_scheduler_type="linear"),
        )
    with pytest.raises(RankwiseError, match="takes an AdamW"):
        search(of.model(), rows(of), arguments(tmp_path, optim="sgd"))


class Rows(torch.utils.data.Dataset):
    """Any dataset with a length and an index, with a column that no model takes."""

    def __init__(self, table):
        self.table = table

    def __len__(self):
        return len(self.table)

    def __getitem__(self, index):
        return self.table[index] | {"text": "not for the model"}


def test_any_indexed_dataset_will_do(of, tmp_path):
    plain = search(of.model(), rows(of), arguments(tmp_path))
    wrapped = search(of.model(), Rows(rows(of)), arguments(tmp_path))
    assert torch.equal(gate_values(plain), gate_values(wrapped))


def test_the_cache_of_a_decoder_stays_on(tmp_path):
    model = family("llama-lm").model()
    assert model.config.use_cache
    search(model, rows(family("llama-lm")), arguments(tmp_path))
    assert model.config.use_cache


def test_the_number_of_gpus_that_was_set_stays_set(tmp_path):
    from rankwise.trainer import replaced

    args = arguments(tmp_path)
    args._n_gpu = 1  # on a machine with several, where one process must not use DataParallel
    assert replaced(args, label_names=["labels"]).n_gpu == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"lora_alpha": 0.0}, "lora_alpha is 0"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1"),
    ],
)
def test_lora_settings_out_of_range_are_refused_at_once(of, tmp_path, more, message):
    with pytest.raises(RankwiseError, match=message):
        search(of.model(), rows(of), arguments(tmp_path), **more)
    with pytest.raises(RankwiseError, match="float16"):
        search(of.model().half(), rows(of), arguments(tmp_path))


@pytest.mark.parametrize(
    ("method", "alpha", "kept"),
    [
        (AutoLoRA(), [0.25, 0.25, 0.2501, 0.2499], [0, 1, 2]),
        (AutoLoRA(), [0.7, 0.1, 0.1, 0.1], [0]),
        (AutoLoRA(gate="sigmoid"), [0.5, 0.49, 0.9, 0.1], [0, 2]),
        (AutoLoRA(gate="sigmoid"), [0.1, 0.4, 0.2, 0.3], [1]),  # at least one
        (AutoLoRA(gate="unconstrained"), [3.0, 1.0, 0.0, 0.0], [0, 1]),
        (AutoLoRA(gate="unconstrained"), [-1.0, -3.0, 2.0, 2.0], [2, 3]),
    ],
)
def test_thresholds_of_the_paper(method, alpha, kept):
    assert method.kept(alpha) == kept


# --- Trainer's options --------------------------------------------------------------------------


def test_accumulated_micro_batches_equal_one_batch(of, tmp_path):
    data = rows(of, 32)
    whole = search(
        without_dropout(of), data, arguments(tmp_path, per_device_train_batch_size=8, max_steps=4)
    )
    parts = search(
        without_dropout(of), data, arguments(tmp_path, gradient_accumulation_steps=2, max_steps=4)
    )
    torch.testing.assert_close(gate_values(parts), gate_values(whole), rtol=1e-4, atol=1e-6)
    assert gate_values(whole).std() > 1e-3


def test_accumulation_for_a_language_model_weighs_tokens(tmp_path):
    of = family("llama-lm")
    data = rows(of, 32)
    ragged = [row[: 3 + i % 6] + [-100] * (9 - 3 - i % 6) for i, row in enumerate(data["labels"])]
    data = data.remove_columns("labels").add_column("labels", ragged)
    whole = search(
        of.model(), data, arguments(tmp_path, per_device_train_batch_size=8, max_steps=3)
    )
    parts = search(
        of.model(), data, arguments(tmp_path, gradient_accumulation_steps=2, max_steps=3)
    )
    torch.testing.assert_close(gate_values(parts), gate_values(whole), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("estimator", ["finite_difference", "exact"])
def test_gradient_checkpointing_changes_nothing(of, tmp_path, estimator):
    """Dropout on: the recomputation has to draw the same masks."""
    method = AutoLoRA(estimator=estimator, gate_learning_rate=1e-2, lookahead=1.0)
    plain = search(of.model(), rows(of), arguments(tmp_path), method)
    saved = search(of.model(), rows(of), arguments(tmp_path, gradient_checkpointing=True), method)
    torch.testing.assert_close(gate_values(saved), gate_values(plain), rtol=1e-4, atol=1e-6)


def test_checkpointing_and_smoothing_leave_nothing_behind(of, tmp_path):
    model = of.model()
    args = arguments(tmp_path, gradient_checkpointing=True, label_smoothing_factor=0.1)
    args.label_names = ["labels"]
    smooth = search(model, rows(of), args)
    assert not model.is_gradient_checkpointing
    plain = search(of.model(), rows(of), arguments(tmp_path))
    assert not torch.allclose(gate_values(smooth), gate_values(plain), atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_finite_difference_and_exact_agree_with_dropout_on(of, tmp_path, attention):
    """Only if the perturbed pass draws the masks of the training pass."""
    of.config._attn_implementation = attention
    found = {}
    for estimator in ("finite_difference", "exact", "first_order"):
        method = AutoLoRA(estimator=estimator, gate_learning_rate=1e-2, lookahead=1.0)
        found[estimator] = gate_values(search(of.model(), rows(of), arguments(tmp_path), method))
    torch.testing.assert_close(found["finite_difference"], found["exact"], rtol=1e-2, atol=1e-4)
    assert (found["first_order"] - found["exact"]).abs().max() > 1e-3


def test_bf16_mixed_precision_stays_close(of, tmp_path):
    plain = search(of.model(), rows(of), arguments(tmp_path))
    mixed = search(of.model(), rows(of), arguments(tmp_path, bf16=True))
    torch.testing.assert_close(gate_values(mixed), gate_values(plain), rtol=0.0, atol=2e-2)


def test_two_processes_equal_one_with_their_batches(tmp_path):
    script = str(Path(__file__).with_name("two_processes.py"))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    for command, size in (([sys.executable], "8"), ([*torchrun, "--master_port=29517"], "4")):
        done = subprocess.run(
            [*command, script, size, str(tmp_path / size), "autolora"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (gate_values(RankPlan.load(tmp_path / size / "plan.json")) for size in ("8", "4"))
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-5)
    assert one.std() > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fp16": True, "use_cpu": False}, "fp16 scales losses"),
        ({"torch_compile": True}, "no double backward"),
    ],
)
def test_arguments_that_cannot_work_are_refused(of, tmp_path, changes, message, monkeypatch):
    args = arguments(tmp_path)
    for name, value in changes.items():
        setattr(args, name, value)
    with pytest.raises(RankwiseError, match=message):
        search(of.model(), rows(of), args, AutoLoRA(estimator="exact"))


# --- stopped, resumed, diverged -----------------------------------------------------------------


@pytest.mark.parametrize("stop", [3, 4, 7, 8])
def test_interrupted_and_resumed_equals_never_stopped(of, tmp_path, stop):
    """Bit for bit, dropout on, across the end of an epoch (6 steps), saved every second step."""
    data, steps = rows(of, 48), {"max_steps": 9, "save_strategy": "steps", "save_steps": 2}
    steps["lr_scheduler_type"] = "linear"
    never = search(of.model(), data, arguments(tmp_path / "never", **steps))
    args = arguments(tmp_path / "stopped", **steps)
    with pytest.raises(KeyboardInterrupt):
        search(of.model(), data, args, callbacks=[StopAfter(stop)])
    assert last_checkpoint(args.output_dir).name == f"checkpoint-{(stop - 1) // 2 * 2}"
    resumed = search(of.model(), data, args, resume_from_checkpoint=True)
    assert torch.equal(gate_values(resumed), gate_values(never))
    assert resumed.ranks == never.ranks


KILLED = """
import sys
sys.path.insert(0, {tests!r})
from test_training import arguments, family, rows, search
of = family("bert-classification")
args = arguments({folder!r}, max_steps=400, save_strategy="steps", save_steps=5, save_total_limit=2)
plan = search(of.model(), rows(of, 48), args, resume_from_checkpoint={resume!r} or None)
plan.save({folder!r} + "/plan.json")
"""


def test_killed_at_any_moment_and_resumed_equals_never_stopped(of, tmp_path):
    """SIGKILL from outside, wherever it lands (in a step, or half-way through a checkpoint)."""

    def start(folder, resume):
        code = KILLED.format(tests=str(Path(__file__).parent), folder=str(folder), resume=resume)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen([sys.executable, "-c", code], env=environment)

    folder = tmp_path / "killed"
    process = start(folder, False)
    deadline = time.monotonic() + 120
    while last_checkpoint(folder) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "plan.json").exists(), "finished before it could be killed"
    assert start(folder, True).wait(timeout=240) == 0
    args = arguments(tmp_path / "never", max_steps=400)
    never = search(of.model(), rows(of, 48), args)
    resumed = RankPlan.load(folder / "plan.json")
    assert resumed.ranks == never.ranks
    assert torch.equal(gate_values(resumed), gate_values(RankPlan.from_json(never.to_json())))


def test_half_a_checkpoint_is_passed_over(tmp_path):
    for step, text in ((5, '{"global_step": 5}'), (10, '{"global_st'), (15, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("optimizer.pt", "scheduler.pt"):
            (folder / name).write_text("of torch")
        if text is not None:
            (folder / "trainer_state.json").write_text(text)
        seal(folder)
    assert last_checkpoint(tmp_path).name == "checkpoint-5"
    assert last_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / "checkpoint-5" / "optimizer.pt").write_text("of torsh")
    assert last_checkpoint(tmp_path) is None


def test_checkpoint_of_another_configuration_is_refused(of, tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    search(of.model(), rows(of), args)
    with pytest.raises(CheckpointError, match=r"another run: method\.r was 4 and is now 3"):
        rankwise.search(
            of.model(),
            rows(of),
            method=AutoLoRA(gate_learning_rate=1e-2, lookahead=1.0),
            r=3,
            args=args,
            resume_from_checkpoint=True,
        )
    with pytest.raises(CheckpointError, match="train_sha256 was"):
        search(of.model(), rows(of, seed=5), args, resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        search(of.model(), rows(of), arguments(tmp_path / "no"), resume_from_checkpoint=True)


def test_other_targets_or_settings_are_not_resumed(of, tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    search(of.model(), rows(of), args, target_modules=["query"])
    with pytest.raises(CheckpointError, match="target_modules was"):
        search(of.model(), rows(of), args, target_modules=["value"], resume_from_checkpoint=True)
    args.label_smoothing_factor = 0.3
    with pytest.raises(CheckpointError, match=r"label_smoothing_factor was 0.0 and is now 0.3"):
        search(of.model(), rows(of), args, target_modules=["query"], resume_from_checkpoint=True)


def poisoned(model, at):
    """The model's loss becomes NaN at its at-th forward pass."""
    count = [0]

    def poison(module, inputs, output):
        count[0] += 1
        if count[0] >= at:
            output["loss"] = output["loss"] * float("nan")
        return output

    model.register_forward_hook(poison)
    return model


def test_a_nan_loss_stops_the_search_and_keeps_the_last_good_checkpoint(of, tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=9)
    # three forward passes a step: training, validation, perturbed
    with pytest.raises(DivergedError, match=r"loss is nan at step 6; .*checkpoint-4") as found:
        search(poisoned(of.model(), at=16), rows(of, 48), args)
    assert "\n" not in str(found.value)
    never = search(of.model(), rows(of, 48), arguments(tmp_path / "n", max_steps=9))
    resumed = search(of.model(), rows(of, 48), args, resume_from_checkpoint=True)
    assert torch.equal(gate_values(resumed), gate_values(never))


def test_a_nan_that_only_the_last_gates_saw_gives_no_plan(of, tmp_path):
    """The last validation pass is followed by no training loss and by no checkpoint."""
    with pytest.raises(DivergedError, match="beta is not finite after step 6"):
        search(poisoned(of.model(), at=17), rows(of), arguments(tmp_path))


def test_a_nan_loss_stops_training(of, tmp_path):
    plan = uniform(of.model(), 2)
    with pytest.raises(DivergedError, match=r"loss is nan at step 3; no checkpoint"):
        rankwise.train(poisoned(of.model(), at=3), plan, rows(of), args=arguments(tmp_path))


def test_parameters_that_are_not_finite_are_never_saved(of, tmp_path):
    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 4:
                next(p for p in model.parameters() if p.requires_grad).data.fill_(float("inf"))

    args = arguments(tmp_path, save_strategy="steps", save_steps=2)
    with pytest.raises(DivergedError, match=r"not finite after step 4; .*checkpoint-2"):
        search(of.model(), rows(of), args, callbacks=[Poison()])
    assert last_checkpoint(tmp_path).name == "checkpoint-2"


def test_train_gives_the_stock_trainer_its_result(of, tmp_path):
    """rankwise.train adds nothing to what PEFT and Trainer do with the plan's LoraConfig."""
    from peft import get_peft_model
    from transformers import Trainer, set_seed

    model = of.model()
    plan = uniform(model, 2).with_ranks({n: 1 + i for i, n in enumerate(_names(model))})
    ours = rankwise.train(model, plan, rows(of), args=arguments(tmp_path)).model
    base = of.model()
    set_seed(42)
    stock = get_peft_model(base, plan.lora_config(task_type="SEQ_CLS"))
    Trainer(stock, arguments(tmp_path), train_dataset=rows(of)).train()
    theirs = dict(stock.named_parameters())
    assert all(torch.equal(p, theirs[n]) for n, p in ours.named_parameters())


def _names(model):
    return list(find_entries(model, None, 1))


@pytest.mark.parametrize(
    ("data", "more", "message"),
    [
        ([], {}, "no rows"),
        (range(1), {}, "the training split would be empty: 1 rows"),
        (range(2), {"validation_fraction": 0.1}, "the validation split would be empty: 2 rows"),
        (range(9), {"validation_fraction": 1.0}, "between 0 and 1"),
        (range(9), {"validation_dataset": []}, "validation_dataset has no rows"),
        (iter(range(9)), {}, "no length or index"),
    ],
)
def test_rows_that_cannot_be_split_are_refused(of, tmp_path, data, more, message):
    with pytest.raises(DataError, match=message):
        search(of.model(), data, arguments(tmp_path), **more)


def test_provenance_says_what_decided_the_plan(of, tmp_path):
    data = rows(of)
    plan = search(of.model(), data, arguments(tmp_path))
    read = json.loads(plan.to_json())["provenance"]
    assert read["seed"] == 42 and read["train_rows"] == read["validation_rows"] == 12
    assert read["method"]["estimator"] == "finite_difference"
    other = search(of.model(), rows(of, seed=3), arguments(tmp_path)).provenance
    assert read["train_sha256"] != other["train_sha256"]


def test_finite_trainer_is_what_train_returns(of, tmp_path):
    trainer = rankwise.train(of.model(), uniform(of.model(), 1), rows(of), args=arguments(tmp_path))
    assert isinstance(trainer, FiniteTrainer) and trainer.state.global_step == 6


def test_the_rate_where_none_is_given_is_the_methods_and_falls_with_the_width():
    by = rankwise.methods.by_name
    assert by("lora").rate_for(None) == by("cut").rate_for(None) == 1e-3
    assert by("full").rate_for(None) == 1e-4  # "LoRA Without Regret": a tenth of LoRA's
    rates = {width: by("lora").rate_for(LlamaConfig(hidden_size=width)) for width in (384, 4096)}
    # its fit for Llama, 5e-4 (2000 / width)^0.781, gives 2.9e-4 at 4,096
    assert rates[384] == 1e-3 and rates[4096] == pytest.approx(2.9e-4, rel=0.2)
