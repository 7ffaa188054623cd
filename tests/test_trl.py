"""TRL's trainers: rows as it takes them, its losses, an order of what it trained."""

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import rankwise
from rankwise import Adapter, DataError, RankwiseError

pytest.importorskip("trl", reason="trl is not installed: pip install 'rankwise[trl]'")
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from rankwise.batches import batches_of
from rankwise.trainers import CutAtEnd

WORDS = "red green blue one two three four five big small cat dog is a the what and not".split()
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<bot> {% generation %}"
    "{{ m['content'] }} </s>{% endgeneration %}{% else %}<you> {{ m['content'] }} {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<bot> {% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama of two layers, and a word tokenizer with a chat template, on disk."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<s>", "</s>", "<you>", "<bot>"]
    inner = Tokenizer(models.WordLevel({w: n for n, w in enumerate(special + WORDS)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=TEMPLATE,
    )
    where = tmp_path_factory.mktemp("chat") / "tiny"
    tokenizer.save_pretrained(where)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(special + WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    LlamaForCausalLM(config).save_pretrained(where)
    return str(where)


def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def words(n, count):
    return " ".join(WORDS[(n * 7 + i * 3) % len(WORDS)] for i in range(count))


def prompts(count=48):
    return Dataset.from_list(
        [{"prompt": words(n, 3) + " ", "completion": words(n + 1, 2 + n % 3)} for n in range(count)]
    )


def messages(count=48):
    return Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": words(n, 3)},
                    {"role": "assistant", "content": words(n + 1, 2 + n % 2)},
                ]
            }
            for n in range(count)
        ]
    )


def pairs(count=48):
    return Dataset.from_list(
        [
            {"prompt": words(n, 3) + " ", "chosen": words(n + 1, 2), "rejected": words(n + 2, 3)}
            for n in range(count)
        ]
    )


def arguments(kind, out, **changes):
    settings = {
        "output_dir": str(out),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "max_length": 24,
    }
    return kind(**(settings | changes))


def adapted(base, **lora):
    plan = rankwise.uniform(base, 4, target_modules="all-linear")
    return get_peft_model(base, plan.lora_config(**lora))


@pytest.mark.parametrize(
    ("rows", "changes"),
    [
        (prompts, {}),
        (messages, {"assistant_only_loss": True}),
        (messages, {"packing": True, "max_length": 32}),
    ],
)
@pytest.mark.parametrize("method", ["autolora", "cut"])
def test_a_search_takes_rows_as_trl_does(method, rows, changes, folder, tmp_path):
    base = model(folder)
    before = {name: p.clone() for name, p in base.named_parameters()}
    forward = type(base).forward
    plan = rankwise.search(
        base,
        rows(160),
        method=method,
        r=4,
        validation_fraction=0.5,
        trainer_class=SFTTrainer,
        args=arguments(SFTConfig, tmp_path, **changes),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    assert plan.parameters > 0 and plan.provenance["train_rows"] == 80
    after = dict(base.named_parameters())
    assert before.keys() == after.keys() and type(base).forward is forward
    assert all(torch.equal(p, after[name]) for name, p in before.items())
    peft = get_peft_model(base, plan.lora_config(task_type="CAUSAL_LM"))
    trainer = SFTTrainer(
        peft,
        arguments(SFTConfig, tmp_path, **changes),
        train_dataset=rows(),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    trainer.train()
    rankwise.check(peft, plan)


def test_a_search_trains_what_trl_trains(folder, tmp_path):
    """The losses of LoRA in a search are those of a plain SFTTrainer on the same rows."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    args = arguments(SFTConfig, tmp_path, logging_steps=1, packing=True, max_length=32)

    def losses(trainer):
        return [log["loss"] for log in trainer.state.log_history if "loss" in log]

    plan = rankwise.uniform(model(folder), 4)
    ours = rankwise.train(
        model(folder),
        plan,
        messages(),
        args=args,
        trainer_class=SFTTrainer,
        processing_class=tokenizer,
    )
    torch.manual_seed(args.seed)
    from transformers import set_seed

    set_seed(args.seed)
    theirs = SFTTrainer(
        rankwise.build(model(folder), plan, task_type="CAUSAL_LM"),
        args,
        train_dataset=messages(),
        processing_class=tokenizer,
    )
    theirs.train()
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-5)


def test_packed_rows_are_refused_where_their_lengths_would_be_lost(folder, tmp_path):
    packed = Dataset.from_list([{"input_ids": [6, 7, 8], "labels": [6, 7, 8], "seq_lengths": [3]}])
    for call in (
        lambda: rankwise.search(model(folder), packed, args=arguments(SFTConfig, tmp_path)),
        lambda: rankwise.train(
            model(folder),
            rankwise.uniform(model(folder), 2),
            packed,
            args=arguments(SFTConfig, tmp_path),
        ),
    ):
        with pytest.raises(DataError, match=r"packed rows \(seq_lengths\).*trainer_class=SFTTrai"):
            call()


def trained(kind, folder, tmp_path):
    """A trainer of TRL's that has trained an adapter, with held-out rows."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if kind == "reward":
        base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
        peft = adapted(base, task_type="SEQ_CLS")
        rows = pairs().map(lambda r: {k: r["prompt"] + r[k] for k in ("chosen", "rejected")})
        rows = rows.remove_columns("prompt")
        make, config = RewardTrainer, arguments(RewardConfig, tmp_path)
    elif kind == "dpo":
        peft, rows = adapted(model(folder), task_type="CAUSAL_LM"), pairs()
        make, config = DPOTrainer, arguments(DPOConfig, tmp_path)
    else:
        peft, rows = adapted(model(folder), task_type="CAUSAL_LM"), messages()
        make = SFTTrainer
        changes = {"packing": True, "max_length": 32} if kind == "packed" else {}
        config = arguments(SFTConfig, tmp_path, **changes)
    trainer = make(
        peft, args=config, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", ["sft", "packed", "dpo", "reward"])
def test_what_trl_trained_is_ordered_and_cut(kind, folder, tmp_path):
    trainer = trained(kind, folder, tmp_path)
    ordered = rankwise.order(trainer)
    small = ordered.cut(keep=0.25)
    small.save(tmp_path / "small")
    assert 0 < small.parameters <= ordered.adapter.parameters / 4
    auto = AutoModelForSequenceClassification if kind == "reward" else AutoModelForCausalLM
    extra = {"num_labels": 1} if kind == "reward" else {}
    again = PeftModel.from_pretrained(auto.from_pretrained(folder, **extra), tmp_path / "small")
    assert again(input_ids=torch.tensor([[6, 7, 8]])).logits.isfinite().all()


def test_batches_are_the_rows_that_the_trainer_evaluates(folder, tmp_path):
    """The mean loss over them is the trainer's own, packed or not."""
    for kind in ("sft", "packed"):
        trainer = trained(kind, folder, tmp_path / kind)
        batches = batches_of(trainer)
        assert sum(len(batch["input_ids"]) for batch in batches) == 48
        total, count = 0.0, 0
        peft = trainer.model.eval()
        for batch in batches:
            logits = peft(**{k: v for k, v in batch.items() if k != "labels"}).logits
            each = torch.nn.functional.cross_entropy(
                logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none"
            )
            total += float(each.sum())
            count += int((batch["labels"][:, 1:] != -100).sum())
        trainer.args.per_device_eval_batch_size = 48  # one batch, so its mean is one over tokens
        assert trainer.evaluate()["eval_loss"] == pytest.approx(total / count, rel=1e-4)


def test_labels_of_a_preference_batch_are_its_completions(folder, tmp_path):
    trainer = trained("dpo", folder, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = batches_of(trainer)[0]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    row = batch["labels"][0]
    assert tokenizer.decode(row[row != -100]).startswith(pairs()[0]["chosen"])
    prompt = batch["input_ids"][0][(row == -100) & (batch["attention_mask"][0] == 1)]
    assert tokenizer.decode(prompt).strip() == pairs()[0]["prompt"].strip()


def test_a_method_with_gates_is_refused_where_the_adapter_is_copied(folder, tmp_path):
    with pytest.raises(RankwiseError, match=r"DPOTrainer copies .* take method='cut'"):
        rankwise.search(
            model(folder),
            pairs(80),
            method="autolora",
            trainer_class=DPOTrainer,
            args=arguments(DPOConfig, tmp_path),
            processing_class=AutoTokenizer.from_pretrained(folder),
        )
    with pytest.raises(RankwiseError, match=r"give a subclass of transformers\.Trainer"):
        rankwise.search(
            model(folder), prompts(), trainer_class=dict, args=arguments(SFTConfig, tmp_path)
        )


def test_the_cut_works_under_a_preference_loss(folder, tmp_path):
    plan = rankwise.search(
        model(folder),
        pairs(160),
        method="cut",
        r=4,
        validation_fraction=0.5,
        trainer_class=DPOTrainer,
        args=arguments(DPOConfig, tmp_path),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    assert plan.parameters > 0


def test_a_callback_cuts_at_the_end_of_a_training(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for number, with_trainer in enumerate((True, False)):
        out = tmp_path / str(number)
        trainer = SFTTrainer(
            adapted(model(folder), task_type="CAUSAL_LM"),
            arguments(SFTConfig, out, eval_strategy="steps", eval_steps=3),
            train_dataset=prompts(),
            eval_dataset=prompts(),
            processing_class=tokenizer,
        )
        trainer.add_callback(CutAtEnd(trainer if with_trainer else None, keep=0.1))
        trainer.train()
        whole = Adapter.of(trainer.model).parameters
        assert 0 < Adapter.load(out / "cut").parameters <= whole / 10
        assert rankwise.Ordered.load(out / "ordered").adapter.parameters == whole
    trainer = SFTTrainer(
        adapted(model(folder), task_type="CAUSAL_LM"),
        arguments(SFTConfig, tmp_path / "none"),
        train_dataset=prompts(),
        processing_class=tokenizer,
    )
    trainer.add_callback(CutAtEnd())
    with pytest.raises(DataError, match="set eval_dataset and eval_strategy"):
        trainer.train()


def test_what_cannot_be_ordered_is_said_in_one_line(folder, tmp_path):
    trainer = trained("sft", folder, tmp_path)
    rows = trainer.eval_dataset
    trainer.eval_dataset = None
    with pytest.raises(DataError, match="SFTTrainer has no eval_dataset"):
        rankwise.order(trainer)
    trainer.eval_dataset = {"a": rows, "b": rows}
    with pytest.raises(DataError, match="holds the sets a, b"):
        rankwise.order(trainer)
    trainer.eval_dataset, trainer.reward_funcs = rows, []
    with pytest.raises(DataError, match="makes its rows while it trains"):
        rankwise.order(trainer)
    assert GRPOTrainer.__init__


def test_axolotl_reads_a_plan(folder):
    """Its loader hands these keys to PEFT's LoraConfig under PEFT's names."""
    import yaml
    from peft import LoraConfig

    base = model(folder)
    plan = rankwise.uniform(base, 4, target_modules="all-linear")
    ranks = {name: n % 4 for n, name in enumerate(plan.modules)}
    plan = plan.with_ranks(ranks)
    read = yaml.safe_load(plan.to_axolotl())
    assert read.pop("adapter") == "lora"
    peft = get_peft_model(
        base,
        LoraConfig(
            r=read["lora_r"],
            lora_alpha=read["lora_alpha"],
            target_modules=read["lora_target_modules"],
            rank_pattern=read["lora_rank_pattern"],
            alpha_pattern=read["lora_alpha_pattern"],
        ),
    )
    rankwise.check(peft, plan)
    odd = rankwise.uniform(model(folder), 4, lora_alpha=5)
    with pytest.raises(rankwise.PlanError, match="Axolotl takes whole numbers"):
        odd.with_ranks(dict.fromkeys(odd.modules, 3)).to_axolotl()
