"""DyLoRA: the function at each rank, what moves in a step, which ranks are drawn, the curve."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from scipy.stats import chisquare
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call
from transformers import TrainerCallback, default_data_collator

from families import FAMILIES, StopAfter, arguments, batch, family, rows, without_dropout
from rankwise import (
    Adapter,
    AdapterError,
    CheckpointError,
    Curve,
    DivergedError,
    DyLoRA,
    PlanError,
    RankPlan,
    RankwiseError,
    curve,
    load_nested,
    pick,
    search,
    train,
)
from rankwise.gate import NestedGate, attach_nested, gate_values, keep_first
from rankwise.lora import build, factors, uniform
from rankwise.methods import from_description
from rankwise.nested import NestedTrainer
from rankwise.trainer import last_checkpoint

K, ALPHA = 4, 8.0


@pytest.fixture
def of():
    return family("bert-classification")


def plan_of(model, r=K):
    return uniform(model, r, lora_alpha=ALPHA)


def trained(model, data, args, method="dylora", **more) -> NestedTrainer:
    collator = default_data_collator
    return train(
        model, plan_of(model), data, args=args, method=method, data_collator=collator, **more
    )


def tensors(trainer):
    """Every trained tensor, factors and head, by name."""
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


# --- the function -------------------------------------------------------------------------------


@pytest.mark.parametrize("b", range(1, K + 1))
def test_gated_model_is_stock_lora_of_rank_b_at_alpha_over_b(of, b):
    """The oracle is PEFT's own LoRA of rank b and the same lora_alpha, with the first b pieces."""
    gated_model = build(of.model(), plan_of(of.model()), task_type="SEQ_CLS").eval()
    gated = attach_nested(gated_model, plan_of(of.model()))
    config = LoraConfig(r=b, lora_alpha=ALPHA, target_modules=["query", "value"])
    stock = get_peft_model(of.model(), config).eval()
    modules = dict(stock.named_modules())
    with torch.no_grad():
        for name, (a, b_matrix) in factors(gated_model).items():
            b_matrix.normal_(std=10)  # of a size that shows in the logits
            layer = modules[f"base_model.model.{name}"]
            layer.lora_A["default"].weight.copy_(a[:b])
            layer.lora_B["default"].weight.copy_(b_matrix[:, :b])
        stock.base_model.model.classifier.load_state_dict(
            gated_model.base_model.model.classifier.modules_to_save["default"].state_dict()
        )
        keep_first(gated, b)
        expected = stock(**batch(of)).logits
        torch.testing.assert_close(gated_model(**batch(of)).logits, expected)
        keep_first(gated, b % K + 1)
        assert (gated_model(**batch(of)).logits - expected).abs().max() > 1e-3


def test_training_follows_algorithm_1(of, tmp_path):
    """A plain loop on stock PEFT: slice, scale by α/b, AdamW; shares no code with the trainer."""
    method, steps, batches = DyLoRA(rank_distribution="geometric", geometric_p=0.3), 8, []

    def recorded(features):
        batches.append(default_data_collator(features))
        return {**batches[-1]}

    model = without_dropout(of)
    trainer = train(
        model,
        plan_of(model),
        rows(of, 40),
        args=arguments(tmp_path, max_grad_norm=0.0, max_steps=steps),
        method=method,
        data_collator=recorded,
    )
    model = without_dropout(of)
    plan = plan_of(model)
    torch.manual_seed(trainer.args.seed)
    stock = build(model, plan, task_type="SEQ_CLS")
    start = {n: p for n, p in stock.named_parameters() if p.requires_grad}
    theta = {n: p.detach().clone().requires_grad_() for n, p in start.items()}
    optimizer = torch.optim.AdamW(theta.values(), lr=1e-2, weight_decay=0.0)
    drawn = []
    for step in range(steps):
        b = method.draw(K, trainer.args.seed, step)
        drawn.append(b)
        used = {
            # PEFT multiplies by α/K; α/b is wanted
            n: torch.cat([p[:, :b] * (K / b), torch.zeros_like(p[:, b:])], 1)
            if "lora_B" in n
            else p
            for n, p in theta.items()
        }
        loss = functional_call(stock, used, kwargs=batches[step])["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert len(set(drawn)) > 1
    found = {
        n.replace("parametrizations.weight.original", "weight"): p
        for n, p in tensors(trainer).items()
    }
    assert found.keys() == theta.keys()
    for name, expected in theta.items():
        torch.testing.assert_close(found[name], expected.detach(), rtol=1e-4, atol=1e-6)


def test_one_compiled_graph_serves_every_rank(of):
    model = build(without_dropout(of), plan_of(of.model()), task_type="SEQ_CLS").eval()
    gated = attach_nested(model, plan_of(of.model()))
    with torch.no_grad():
        for _, b_matrix in factors(model).values():
            b_matrix.normal_()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    inputs = batch(of)
    for b in range(1, K + 1):
        keep_first(gated, b)
        logits = compiled(**inputs).logits
        if b == 1:
            frames = counter.frame_count
        torch.testing.assert_close(logits, model(**inputs).logits)
    assert counter.frame_count == frames > 0


# --- which rank a step draws --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (DyLoRA(), [1 / 8] * 8),
        (DyLoRA(r_min=5), [0] * 4 + [1 / 4] * 4),
        (
            DyLoRA(rank_weights=(0.5, 0.0, 0.2, 0.0, 0.0, 0.0, 0.1, 0.2)),
            [0.5, 0, 0.2, 0, 0, 0, 0.1, 0.2],
        ),
        (
            DyLoRA(rank_distribution="geometric", geometric_p=0.5),
            [128 / 255, 64 / 255, 32 / 255, 16 / 255, 8 / 255, 4 / 255, 2 / 255, 1 / 255],
        ),
    ],
    ids=["uniform", "from 5", "weights", "geometric"],
)
def test_ranks_are_drawn_from_the_distribution(method, expected):
    counts = Counter(method.draw(8, seed=1, step=step) for step in range(4000))
    used = [b for b in range(1, 9) if expected[b - 1] > 0]
    assert set(counts) == set(used)
    observed = [counts[b] for b in used]
    assert chisquare(observed, [4000 * expected[b - 1] for b in used]).pvalue > 1e-3
    again = [method.draw(8, seed=2, step=step) for step in range(50)]
    assert again != [method.draw(8, seed=1, step=step) for step in range(50)]


class Ranks(TrainerCallback):
    """Notes which rank each forward pass had."""

    def __init__(self):
        self.seen, self.step = {}, 0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        gate = next(m for m in model.modules() if isinstance(m, NestedGate))

        def note(*_):
            if torch.is_grad_enabled():
                self.seen.setdefault(state.global_step, []).append(int((gate.g > 0).sum()))

        gate.register_forward_hook(note)


def ranks_of(model, data, args, **more):
    ranks = Ranks()
    trained(model, data, args, callbacks=[ranks], **more)
    return ranks.seen


def test_one_rank_for_all_micro_batches_of_a_step(of, tmp_path):
    args = arguments(tmp_path, gradient_accumulation_steps=3, max_steps=12)
    seen = ranks_of(of.model(), rows(of, 48), args)
    assert list(seen) == list(range(12))
    assert all(len(passes) >= 3 and len(set(passes)) == 1 for passes in seen.values())
    assert len({passes[0] for passes in seen.values()}) == K


def test_recomputed_activations_see_the_rank_of_their_forward_pass(of, tmp_path):
    """Dropout on; the recomputation of gradient checkpointing draws nothing anew."""
    plain = trained(of.model(), rows(of), arguments(tmp_path))
    saved = trained(of.model(), rows(of), arguments(tmp_path, gradient_checkpointing=True))
    for name, tensor in tensors(plain).items():
        torch.testing.assert_close(tensors(saved)[name], tensor, rtol=1e-5, atol=1e-7)


def test_accumulated_micro_batches_equal_one_batch(of, tmp_path):
    data = rows(of, 32)
    whole = trained(
        without_dropout(of), data, arguments(tmp_path, per_device_train_batch_size=8, max_steps=4)
    )
    parts = trained(
        without_dropout(of), data, arguments(tmp_path, gradient_accumulation_steps=2, max_steps=4)
    )
    for name, tensor in tensors(whole).items():
        torch.testing.assert_close(tensors(parts)[name], tensor, rtol=1e-4, atol=1e-6)


def test_two_processes_equal_one_with_their_batches(tmp_path):
    script = str(Path(__file__).with_name("two_processes.py"))
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29518"]
    for prefix, size in (([], "8"), (launcher, "4")):
        command = [sys.executable, *prefix, script, size, str(tmp_path / size), "dylora"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, env=environment, check=True, timeout=240)
    ours, theirs = (load_file(tmp_path / size / "adapter_model.safetensors") for size in ("8", "4"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["dylora", "dylora-frozen"])
@pytest.mark.parametrize("stop", [3, 4, 7])
def test_interrupted_and_resumed_equals_never_stopped(of, tmp_path, stop, method):
    """Bit for bit, and the same ranks drawn; dropout on, across the end of an epoch."""
    data, steps = rows(of, 24), {"max_steps": 9, "save_strategy": "steps", "save_steps": 2}
    never_ranks, ranks = Ranks(), Ranks()
    never = trained(
        of.model(), data, arguments(tmp_path / "never", **steps), method, callbacks=[never_ranks]
    )
    args = arguments(tmp_path / "stopped", **steps)
    with pytest.raises(KeyboardInterrupt):
        trained(of.model(), data, args, method, callbacks=[StopAfter(stop)])
    start = int(last_checkpoint(args.output_dir).name.removeprefix("checkpoint-"))
    assert 0 < start < stop
    resumed = trained(
        of.model(), data, args, method, callbacks=[ranks], resume_from_checkpoint=True
    )
    assert ranks.seen == {step: b for step, b in never_ranks.seen.items() if step >= start}
    assert same(tensors(resumed), tensors(never))


def test_a_checkpoint_of_another_method_is_refused(of, tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=2)
    trained(of.model(), rows(of), args)
    with pytest.raises(CheckpointError, match=r"method\.frozen was False and is now True"):
        trained(of.model(), rows(of), args, "dylora-frozen", resume_from_checkpoint=True)


# --- what moves in a step -----------------------------------------------------------------------


class Moved(TrainerCallback):
    """After each step: which pieces of which factor differ from the step before, bit for bit."""

    def __init__(self):
        self.steps = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before = {n: p.detach().clone() for n, p in model.named_parameters()}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        moved = {}
        for name, p in model.named_parameters():
            differs = p.detach() != self.before[name]
            if "lora_A" in name:
                moved[name] = set(differs.any(1).nonzero().flatten().tolist())
            elif "lora_B" in name:
                moved[name] = set(differs.any(0).nonzero().flatten().tolist())
            elif differs.any():
                moved[name] = {"whole"}
        self.steps.append(moved)


@pytest.mark.parametrize(
    "changes",
    [
        {"weight_decay": 0.3},
        {"optim": "sgd", "optim_args": "momentum=0.9", "weight_decay": 0.3},
        {"optim": "adamw_torch", "weight_decay": 0.3, "gradient_accumulation_steps": 2},
    ],
    ids=["adamw", "sgd with momentum", "accumulation"],
)
def test_frozen_moves_the_bth_piece_and_nothing_else(of, tmp_path, changes):
    moved, method = Moved(), DyLoRA(frozen=True)
    args = arguments(tmp_path, max_steps=16, **changes)
    trained(of.model(), rows(of), args, method, callbacks=[moved])
    drawn = [method.draw(K, args.seed, step) for step in range(16)]
    assert set(drawn) == set(range(1, K + 1))
    seen = Counter()
    for b, step in zip(drawn, moved.steps, strict=True):
        for name, pieces in step.items():
            if "lora_" in name:
                assert pieces <= {b - 1}, (name, b)
                seen[b] += len(pieces)
            else:
                assert "classifier.modules_to_save" in name  # the head moves in every step
    assert all(seen[b] > 0 for b in drawn)


def test_frozen_moves_one_piece_of_each_part_of_a_fused_projection(tmp_path):
    of, moved, method = family("gpt2-lm"), Moved(), DyLoRA(frozen=True)
    args = arguments(tmp_path, max_steps=10, weight_decay=0.1)
    trained(of.model(), rows(of), args, method, callbacks=[moved])
    for step, found in enumerate(moved.steps):
        b = method.draw(K, args.seed, step)
        for name, pieces in found.items():
            assert pieces <= {b - 1, K + b - 1}, (name, b)  # query's and value's
    assert any(len(pieces) == 2 for found in moved.steps for pieces in found.values())


def test_all_mode_moves_the_first_b_pieces_by_gradient(of, tmp_path):
    """Without momentum and decay what is past b stands still by itself."""
    moved, method = Moved(), DyLoRA()
    args = arguments(tmp_path, max_steps=12, optim="sgd")
    trained(of.model(), rows(of), args, method, callbacks=[moved])
    for step, found in enumerate(moved.steps):
        b = method.draw(K, args.seed, step)
        for name, pieces in found.items():
            if "lora_B" in name:
                assert pieces == set(range(b)), (name, b)


def test_clipping_counts_only_what_moves(of, tmp_path):
    """The norm that Trainer logs is that of the b-th pieces and the head."""
    norms, moving = [], []

    class Norm(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            moving.append(torch.stack([g.norm() for g in grads]).norm().item())
            b = DyLoRA(frozen=True).draw(K, args.seed, state.global_step)
            for name, p in model.named_parameters():
                if "lora_A" in name and p.grad is not None:
                    assert not p.grad[torch.arange(K) != b - 1].any()

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "grad_norm" in logs:
                norms.append(logs["grad_norm"])

    args = arguments(tmp_path, max_steps=4, logging_steps=1, max_grad_norm=1e6)
    trained(of.model(), rows(of), args, "dylora-frozen", callbacks=[Norm()])
    assert norms == pytest.approx(moving, rel=1e-4)


# --- the curve, and the pick --------------------------------------------------------------------


def accuracy(output):
    return {"accuracy": float((output.predictions.argmax(-1) == output.label_ids).mean())}


def test_curve_measures_each_rank_and_its_standard_error(of, tmp_path):
    trainer = trained(
        of.model(), rows(of, 64), arguments(tmp_path, max_steps=20), compute_metrics=accuracy
    )
    held = rows(of, 200, seed=5)
    found = curve(trainer, held, metric="accuracy")
    assert (found.sizes, found.rows, found.greater_is_better) == ((1, 2, 3, 4), 200, True)
    table = held.with_format("torch")
    inputs = {n: table[n][:] for n in ("input_ids", "attention_mask", "labels")}
    for b, metrics, error in zip(found.sizes, found.metrics, found.standard_errors, strict=True):
        trainer.set_ranks(b)
        with torch.no_grad():
            output = trainer.model.eval()(**inputs)
        p = float((output.logits.argmax(-1) == inputs["labels"]).float().mean())
        assert metrics["accuracy"] == pytest.approx(p)
        assert metrics["loss"] == pytest.approx(output.loss.item(), rel=1e-4)
        assert error == pytest.approx((p * (1 - p) / 200) ** 0.5, rel=0.25)  # of a proportion
    assert json.loads(json.dumps(found.to_dict()))["metric"] == "accuracy"


def test_curve_of_a_loss_needs_no_metric(of, tmp_path):
    args = arguments(tmp_path, per_device_eval_batch_size=4)
    trainer = trained(of.model(), rows(of), args)
    found = curve(trainer, rows(of, 40, seed=5), ranks=[3, 1])
    assert (found.metric, found.sizes, found.greater_is_better) == ("loss", (1, 3), False)
    trainer.set_ranks(3)
    table = rows(of, 40, seed=5).with_format("torch")
    losses = []
    for start in range(0, 40, 4):
        part = {n: table[n][start : start + 4] for n in table.column_names}
        with torch.no_grad():
            losses.append(trainer.model.eval()(**part).loss.item())
    assert found.values[1] == pytest.approx(np.mean(losses), rel=1e-5)
    assert found.standard_errors[1] == pytest.approx(np.std(losses, ddof=1) / 10**0.5, rel=1e-4)


@pytest.mark.parametrize(
    ("values", "errors", "greater", "tolerance", "expected"),
    [
        ((0.70, 0.78, 0.79, 0.80), (0.02, 0.02, 0.02, 0.02), True, None, 2),
        ((0.70, 0.78, 0.79, 0.80), (0.02, 0.02, 0.02, 0.005), True, None, 4),
        ((0.70, 0.78, 0.79, 0.80), (0.02, 0.02, 0.02, 0.02), True, 0.0, 4),
        ((0.70, 0.78, 0.79, 0.80), (0.02, 0.02, 0.02, 0.02), True, 0.105, 1),
        ((1.00, 0.60, 0.55, 0.58), (0.01, 0.01, 0.01, 0.01), False, None, 3),
        ((0.80, 0.70, 0.80, 0.60), (0.01, 0.01, 0.01, 0.01), True, 0.0, 1),
    ],
)
def test_pick_is_the_smallest_rank_within_the_tolerance(
    values, errors, greater, tolerance, expected
):
    metrics = tuple({"score": value} for value in values)
    found = Curve("score", greater, "rank", (1, 2, 3, 4), metrics, errors, (0.0,) * 4, rows=100)
    assert pick(found, tolerance) == expected


def test_search_gives_the_plan_of_the_picked_rank(of, tmp_path):
    model = of.model().eval()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    args = arguments(tmp_path, metric_for_best_model="accuracy")
    plan = search(
        model,
        rows(of, 60),
        method="dylora",
        r=K,
        args=args,
        data_collator=default_data_collator,
        compute_metrics=accuracy,
    )
    found = plan.provenance["curve"]
    assert (plan.provenance["train_rows"], plan.provenance["validation_rows"]) == (54, 6)
    assert (found["metric"], found["rows"], found["sizes"]) == ("accuracy", 6, [1, 2, 3, 4])
    best = max(m["accuracy"] for m in found["metrics"])
    allowed = found["standard_errors"][[m["accuracy"] for m in found["metrics"]].index(best)]
    within = [
        b
        for b, m in zip(found["sizes"], found["metrics"], strict=True)
        if m["accuracy"] >= best - allowed
    ]
    assert set(plan.ranks.values()) == {within[0]}
    assert RankPlan.from_json(plan.to_json()) == plan
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_saving_leaves_the_trainer_as_it_was(of, tmp_path):
    trainer = trained(of.model(), rows(of), arguments(tmp_path))
    before = curve(trainer, rows(of, seed=5)).values
    trainer.save_nested(tmp_path / "nested")
    assert curve(trainer, rows(of, seed=5)).values == pytest.approx(before, rel=1e-6)
    files = sorted(path.name for path in (tmp_path / "nested").iterdir())
    assert files == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "nested_plan.json",
    ]
    plan = RankPlan.load(tmp_path / "nested" / "nested_plan.json")
    assert plan.provenance["method"]["name"] == "DyLoRA"


def test_a_push_to_the_hub_sends_an_adapter(of, tmp_path):
    """Trainer's push saves into output_dir, by the same call as a checkpoint but for the folder."""
    trainer = trained(of.model(), rows(of), arguments(tmp_path / "out", max_steps=1))
    trainer.save_model(_internal_call=True)
    assert Adapter.load(tmp_path / "out").trained_ranks == [1, 2, 3, 4]


def test_a_metric_keeps_its_own_direction(of, tmp_path):
    """`greater_is_better` of the arguments is that of their metric, not of every one."""
    args = arguments(tmp_path, metric_for_best_model="loss", greater_is_better=False)
    trainer = trained(of.model(), rows(of), args, compute_metrics=accuracy)
    assert curve(trainer, rows(of, seed=5), metric="accuracy").greater_is_better is True
    assert curve(trainer, rows(of, seed=5)).greater_is_better is False


def test_names_with_and_without_eval_are_the_same_metric(of, tmp_path):
    def prefixed(output):
        return {f"eval_{name}": value for name, value in accuracy(output).items()}

    trainer = trained(of.model(), rows(of), arguments(tmp_path), compute_metrics=accuracy)
    plain = curve(trainer, rows(of, 50, seed=5), metric="accuracy")
    trainer.compute_metrics = prefixed
    assert curve(trainer, rows(of, 50, seed=5), metric="accuracy") == plain


def test_evaluation_during_training_is_of_the_largest_rank(of, tmp_path):
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=2, max_steps=4, learning_rate=0.0)
    trainer = trained(of.model(), rows(of), args, eval_dataset=rows(of, seed=5))
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert len(losses) == 2
    trainer.set_ranks(K)
    assert losses == pytest.approx([trainer.evaluate()["eval_loss"]] * 2)


def test_save_model_writes_what_peft_reads(of, tmp_path):
    trainer = trained(of.model(), rows(of), arguments(tmp_path))
    trainer.save_model(str(tmp_path / "saved"))
    names = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert not [name for name in names if "parametrizations" in name]
    trainer.model.save_pretrained(tmp_path / "gated")  # the way that cannot work is recognised
    with pytest.raises(AdapterError, match="saved with its gates on"):
        Adapter.load(tmp_path / "gated")


# --- refused before any work --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r_min": 0}, "r_min is 0; a rank is an integer of at least 1"),
        ({"r_min": 5}, "r_min is 5, above the largest rank 4"),
        ({"rank_weights": (0.5, 0.5)}, "2 rank_weights for the 4 ranks 1 to 4"),
        ({"rank_weights": (0.5, 0.5, 0.5, 0.5)}, "rank_weights sum to 2; they have to sum to 1"),
        ({"rank_weights": (0.5, 0.5, 0.0, 0.0)}, "the last of rank_weights is 0"),
        ({"rank_weights": (1.5, -0.5, 0.0, 0.0)}, "each has to lie from 0 to 1"),
        ({"rank_weights": (float("nan"), 0.5, 0.5, 0.0)}, "each has to lie from 0 to 1"),
        ({"rank_distribution": "normal"}, "it has to be 'uniform' or 'geometric'"),
        (
            {"rank_distribution": "geometric", "rank_weights": (0.0, 0.0, 0.0, 1.0)},
            "leave the other out",
        ),
        (
            {"rank_distribution": "geometric", "geometric_p": 1.0},
            "geometric_p is 1.0; it has to lie between 0 and 1",
        ),
    ],
)
def test_ranges_and_weights_that_make_no_sense(of, tmp_path, settings, message):
    with pytest.raises(RankwiseError, match=message.replace("(", r"\(")):
        trained(of.model(), rows(of), arguments(tmp_path), DyLoRA(**settings))


def test_a_plan_of_several_ranks_is_refused(of, tmp_path):
    model = of.model()
    plan = plan_of(model)
    plan = plan.with_ranks({name: 2 + i % 2 for i, name in enumerate(plan.modules)})
    with pytest.raises(PlanError, match=r"has ranks 2 to 3; give rankwise\.uniform"):
        train(model, plan, rows(of), args=arguments(tmp_path), method="dylora")
    with pytest.raises(
        RankwiseError, match="AutoLoRA chooses ranks, which are then trained as plain LoRA"
    ):
        train(model, plan_of(model), rows(of), args=arguments(tmp_path), method="autolora")


def test_ranks_and_metrics_that_are_not_there(of, tmp_path):
    trainer = trained(of.model(), rows(of), arguments(tmp_path, max_steps=1), DyLoRA(r_min=2))
    with pytest.raises(RankwiseError, match=r"rank 1 was not trained; there are \[2, 3, 4\]"):
        curve(trainer, rows(of), ranks=[1, 2])
    with pytest.raises(RankwiseError, match="metric is 'f1', but compute_metrics gives loss"):
        curve(trainer, rows(of), metric="f1")
    found = curve(trainer, rows(of))
    with pytest.raises(RankwiseError, match="tolerance is -1; it has to be >= 0"):
        pick(found, -1)
    with pytest.raises(PlanError, match="ranks 1 to 4; 5 is none of them"):
        trainer.set_ranks(5)
    with pytest.raises(PlanError, match=r"ranks 1 to 4; 2\.0 is none of them"):
        trainer.set_ranks(2.0)
    before = gate_values(trainer.gated)
    with pytest.raises(PlanError, match="differ in the entry"):
        trainer.set_ranks({next(iter(before)): 2})
    assert gate_values(trainer.gated) == before  # no gate moved
    plain = train(of.model(), plan_of(of.model()), rows(of), args=arguments(tmp_path, max_steps=1))
    with pytest.raises(RankwiseError, match="FiniteTrainer trained one rank"):
        curve(plain, rows(of))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"},
            "load_best_model_at_end knows one rank",
        ),
        ({"batch_eval_metrics": True}, "leave batch_eval_metrics and include_for_metrics out"),
        ({"bf16_full_eval": True}, "round the factors themselves"),
        ({"optim": "galore_adamw_layerwise", "optim_target_modules": "q"}, "inside the backward"),
        ({"optim": "lomo"}, "inside the backward"),
    ],
)
def test_arguments_that_break_dylora_are_refused(of, tmp_path, changes, message):
    with pytest.raises(RankwiseError, match=message):
        trained(of.model(), rows(of), arguments(tmp_path, **changes), "dylora-frozen")


def test_a_uniform_plan_below_the_largest_rank_is_trained_at_its_own(of, tmp_path):
    plan = RankPlan.uniform(plan_of(of.model()), 2)
    assert plan.r == K
    args = arguments(tmp_path, max_steps=1)
    trainer = train(of.model(), plan, rows(of), args=args, method="dylora")
    assert curve(trainer, rows(of, seed=5)).sizes == (1, 2)


def test_numbers_of_numpy_are_numbers(of, tmp_path):
    method = DyLoRA(rank_weights=np.array([0.25, 0.25, 0.25, 0.25]))
    assert hash(method) == hash(DyLoRA(rank_weights=(0.25, 0.25, 0.25, 0.25)))
    trainer = trained(of.model(), rows(of), arguments(tmp_path, max_steps=1), method)
    held = rows(of, seed=5)
    assert curve(trainer, held, ranks=np.arange(1, 5)) == curve(trainer, held)
    trainer.set_ranks(np.int64(2))
    trainer.save_nested(tmp_path / "nested")
    adapter = Adapter.load(tmp_path / "nested")
    assert from_description(adapter.plan.provenance["method"]) == method
    assert adapter.truncate(np.int64(2)).config["r"] == 2
    assert adapter.truncate_svd(np.int64(2)).config["r"] == 2
    with pytest.raises(AdapterError, match=r"rank 2\.0 of .* was not trained"):
        adapter.truncate(2.0)


def test_a_metric_that_is_no_number_is_left_out(of, tmp_path):
    def by_class(output):
        return accuracy(output) | {"per_class": [0.5, 0.5], "none": None}

    args = arguments(tmp_path, max_steps=1)
    trainer = trained(of.model(), rows(of), args, compute_metrics=by_class)
    found = curve(trainer, rows(of, seed=5), metric="accuracy")
    assert all(set(metrics) == {"loss", "accuracy"} for metrics in found.metrics)


@pytest.mark.parametrize("name", [f.name for f in FAMILIES])
def test_a_nested_adapter_from_disk_is_what_was_trained(name, tmp_path):
    of = family(name)
    trainer = trained(of.model(), rows(of), arguments(tmp_path), DyLoRA(r_min=2, frozen=True))
    held = rows(of, seed=5)
    expected = curve(trainer, held)
    trainer.save_nested(tmp_path / "nested")
    again = load_nested(
        of.model(),
        tmp_path / "nested",
        args=arguments(tmp_path),
        data_collator=default_data_collator,
    )
    found = curve(again, held)
    assert found.sizes == expected.sizes == (2, 3, 4)
    assert found.values == pytest.approx(expected.values, rel=1e-5)
    assert (again.method, again.plan) == (trainer.method, trainer.plan)


def test_what_load_nested_refuses(of, tmp_path):
    args = arguments(tmp_path, max_steps=1)
    trainer = trained(of.model(), rows(of), args)
    trainer.save_nested(tmp_path / "nested")
    Adapter.load(tmp_path / "nested").truncate(1).save(tmp_path / "one")
    with pytest.raises(AdapterError, match="an adapter of one rank; give nested/ of a run"):
        load_nested(of.model(), tmp_path / "one", args=args)
    with pytest.raises(PlanError, match="the plan is for another model"):
        load_nested(family("gpt2-classification").model(), tmp_path / "nested", args=args)


def test_search_wants_its_metric_computed(of, tmp_path):
    args = arguments(tmp_path, metric_for_best_model="accuracy")
    with pytest.raises(RankwiseError, match="'accuracy', but there is no compute_metrics"):
        search(of.model(), rows(of), method="dylora", r=K, args=args)


def test_a_nan_loss_stops_the_run_and_names_the_checkpoint(of, tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=2)

    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                next(iter(factors(model).values()))[0].data[0, 0] = float("nan")

    with pytest.raises(DivergedError, match=r"step 4.*checkpoint-2"):
        trained(of.model(), rows(of), args, callbacks=[Poison()])


@pytest.mark.parametrize("name", [f.name for f in FAMILIES])
def test_ranks_of_a_part_are_counted_within_it(name):
    """A fused projection's query and value each keep their own first pieces."""
    of = family(name)
    plan = plan_of(of.model())
    model = build(of.model(), plan)
    gated = attach_nested(model, plan)
    ranks = {entry: 1 + i % K for i, entry in enumerate(plan.modules)}
    keep_first(gated, ranks)
    for entry, g in gate_values(gated).items():
        b = ranks[entry]
        assert g == pytest.approx([K / b] * b + [0.0] * (K - b))
