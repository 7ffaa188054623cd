"""Conversations: every known form is the same rows; the labels are the assistant's turns."""

import pytest
from transformers import AutoTokenizer

import rankwise
from conftest import write_jsonl
from rankwise import DataError, ModelError
from rankwise.cli import main
from rankwise.tasks import load_task
from rankwise.tasks.chat import learned
from test_predicting import arguments

trl = pytest.importorskip("trl", reason="trl is not installed: pip install 'rankwise[trl]'")
from test_trl import TEMPLATE, folder, messages, words  # noqa: E402, F401

PLAIN = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def pair(n: int) -> tuple[str, str]:
    return words(n, 3), words(n + 1, 2)


FORMS = {
    "messages": lambda q, a: {
        "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
    },
    "sharegpt": lambda q, a: {
        "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]
    },
    "prompt": lambda q, a: {"prompt": q, "completion": a},
    "split": lambda q, a: {
        "prompt": [{"role": "user", "content": q}],
        "completion": [{"role": "assistant", "content": a}],
    },
    "alpaca": lambda q, a: {"instruction": q, "input": "", "output": a},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows(form, folder, tmp_path):  # noqa: F811
    tokenizer = AutoTokenizer.from_pretrained(folder)
    file = write_jsonl(tmp_path / "chat.jsonl", [FORMS[form](*pair(n)) for n in range(20)])
    task = load_task("chat", train_file=file)
    found = task.encode(task.train, tokenizer, 32)
    want = [learned(tokenizer, FORMS["messages"](*pair(n))["messages"]) for n in range(20)]
    rows = sorted(zip(found["input_ids"], found["labels"], strict=True))
    assert len(rows) == 18 and all(row in sorted(want) for row in rows)


def test_labels_are_trls_with_marks_and_without(folder, tmp_path):  # noqa: F811
    """TRL's assistant-only loss, and the same labels from a template that has no marks."""
    from trl import SFTConfig, SFTTrainer

    from test_trl import arguments as of_trl
    from test_trl import model

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = messages(12)
    args = of_trl(SFTConfig, tmp_path, assistant_only_loss=True)
    trainer = SFTTrainer(model(folder), args, train_dataset=rows, processing_class=tokenizer)
    plain = AutoTokenizer.from_pretrained(folder)
    plain.chat_template = PLAIN
    for row, theirs in zip(rows, trainer.train_dataset, strict=True):
        ids, labels = learned(tokenizer, row["messages"])
        assert (ids, labels) == (theirs["input_ids"], theirs["labels"])
        assert learned(plain, row["messages"]) == (ids, labels)


def test_several_turns_are_learned_and_questions_are_not(folder):  # noqa: F811
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [FORMS["messages"](*pair(n))["messages"] for n in (0, 4)]
    ids, labels = learned(tokenizer, turns[0] + turns[1])
    kept = [i for i, label in zip(ids, labels, strict=True) if label != -100]
    assert tokenizer.decode(kept).replace("</s>", "").split() == [
        *pair(0)[1].split(),
        *pair(4)[1].split(),
    ]
    assert len(kept) == 6  # the two ends of a turn as well


def test_the_command_line_trains_on_chat_and_answers(folder, tmp_path):  # noqa: F811
    file = write_jsonl(tmp_path / "chat.jsonl", [FORMS["messages"](*pair(n)) for n in range(24)])
    main(
        f"train --task chat --train_file {file} --model_name_or_path {folder} --max_steps 2 "
        f"--use_cpu --output_dir {tmp_path}/out".split()
    )
    asked = [{"messages": [{"role": "user", "content": words(3, 3)}]}]
    (found,) = rankwise.predict(tmp_path / "out", asked, max_new_tokens=3)
    model, tokenizer = rankwise.load(tmp_path / "out")
    ids = tokenizer.apply_chat_template(
        asked[0]["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    out = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    want = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert found == {"completion": want}
    assert rankwise.predict(tmp_path / "out", [words(3, 3)], max_new_tokens=3) == [found]


def test_wrong_conversations_are_said_in_one_line(folder, tiny_bert, tmp_path):  # noqa: F811
    odd = write_jsonl(tmp_path / "odd.jsonl", [{"question": "who", "reply": "me"}] * 4)
    with pytest.raises(DataError, match=r'row 1 is no conversation .*"question": "who".*"from"'):
        load_task("chat", train_file=odd)
    asked = write_jsonl(tmp_path / "asked.jsonl", [FORMS["messages"]("a", "b")] * 3)
    task = load_task("chat", train_file=asked)
    with pytest.raises(ModelError, match="the tokenizer has no chat template"):
        task.encode(task.train, AutoTokenizer.from_pretrained(tiny_bert), 32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{{ 'red' if messages | length == 1 else 'blue' }} " + PLAIN
    )  # each turn changes the first word
    with pytest.raises(DataError, match=r"no \{% generation %\} marks"):
        learned(tokenizer, FORMS["messages"]("red", "green")["messages"])
    only = [{"messages": [{"role": "user", "content": "red"}]}] * 4
    with pytest.raises(DataError, match="no conversation with an answer"):
        rankwise.fit("lora", only, model=folder, output_dir=tmp_path / "x", args=arguments("x"))
