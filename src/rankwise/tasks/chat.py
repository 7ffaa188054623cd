"""Conversations: learn what the assistant says, in the words of the model's own chat template."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from rankwise.errors import DataError, ModelError
from rankwise.tasks.base import IGNORED
from rankwise.tasks.causal_lm import CausalLM
from rankwise.tasks.checks import Rows

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from transformers import PreTrainedTokenizerBase

FORMS = (
    '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}, '
    '{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}, '
    '{"prompt": "...", "completion": "..."}, {"instruction": "...", "output": "..."}'
)
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}


class Chat(CausalLM):
    """Rows of messages; every turn of the assistant is learned, and nothing else."""

    kind = "chat"
    most_texts = 1

    def check_texts(self, rows: dict[str, Rows]) -> None:
        """Raises DataError, with the first row and the forms that are known, at any other row."""
        for split, there in rows.items():
            messages_of(there, split)

    def number(self, rows: dict[str, Rows]) -> tuple[dict[str, Rows], None]:
        """The splits as messages, whatever form they had."""
        name = self.text_columns[0]
        return {split: {name: messages_of(there, split)} for split, there in rows.items()}, None

    def features(self) -> Features:
        from datasets import Features, List, Value

        turn = {"role": Value("string"), "content": Value("string")}
        return Features({self.text_columns[0]: List(turn)})

    def tokenize(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> Dataset:
        """Token ids by the tokenizer's chat template; labels are the assistant's turns.

        Raises:
            ModelError: no chat template. DataError: one in which a turn cannot be found, or no row
                that has something to learn.
        """
        _check_template(tokenizer)
        name = self.text_columns[0]

        def row_features(row: dict[str, Any]) -> dict[str, Any]:
            ids, labels = learned(tokenizer, row[name])
            return {
                "input_ids": ids[:max_length],
                "attention_mask": [1] * len(ids[:max_length]),
                "labels": labels[:max_length],
            }

        encoded = rows.map(row_features, remove_columns=rows.column_names)
        kept = encoded.filter(lambda row: any(label != IGNORED for label in row["labels"][1:]))
        self._report(len(rows), len(kept), max_length)
        return kept

    def prompts(self, tokenizer: PreTrainedTokenizerBase, rows: Rows) -> list[list[int]]:
        """Each conversation up to where the assistant has the word."""
        _check_template(tokenizer)
        found = []
        for messages in messages_of(rows, "input", answered=False):
            while messages and messages[-1]["role"] == "assistant":
                messages = messages[:-1]
            found.append(_ids(tokenizer, messages, prompt=True))
        return found


def messages_of(rows: Rows, split: str, answered: bool = True) -> list[list[dict[str, str]]]:
    """Rows of any known form as lists of messages.

    Args:
        rows: columns.
        split: for the message.
        answered: whether each has to hold a turn of the assistant.

    Raises:
        DataError: another form, or a message without a role or a text.
    """
    count = len(next(iter(rows.values()), []))
    found = []
    for number in range(count):
        row = {name: column[number] for name, column in rows.items()}
        messages = _messages(row)
        if not messages or (answered and all(m["role"] != "assistant" for m in messages)):
            shown = json.dumps(row, ensure_ascii=False, default=str)
            shown = shown if len(shown) <= 200 else shown[:200] + " ..."
            raise DataError(
                f"{split} row {number + 1} is no conversation with an answer: {shown}; write rows "
                f"such as {FORMS}"
            )
        found.append(messages)
    return found


def _messages(row: dict[str, Any]) -> list[dict[str, str]] | None:
    """A row as messages; None where it has none of the forms."""
    turns = row.get("messages") or row.get("conversations")
    if turns is None and isinstance(row.get("prompt"), list):
        turns = [*row["prompt"], *(row.get("completion") or [])]
    if turns is None:
        asked, answer = row.get("prompt"), row.get("completion")
        if isinstance(row.get("instruction"), str):
            more = row.get("input")
            asked = row["instruction"] + (f"\n\n{more}" if more else "")
            answer = row.get("output")
        if not isinstance(asked, str):
            return None
        said = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else []
        return [{"role": "user", "content": asked}, *said]
    found = []
    for turn in turns if isinstance(turns, list) else [None]:
        if not isinstance(turn, dict):
            return None
        role, text = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or not isinstance(text, str):
            return None
        found.append({"role": _ROLES.get(role, role), "content": text})
    return found


def learned(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]
) -> tuple[list[int], list[int]]:
    """Ids of a conversation, and labels: the assistant's turns, -100 elsewhere.

    By the template's own marks ({% generation %}) where it has some; else each turn is what the
    template adds to the conversation before it.

    Raises:
        DataError: a template that rewrites what came before, and has no marks.
    """
    ids = _ids(tokenizer, messages)
    labels = [IGNORED] * len(ids)
    if "{% generation" in (tokenizer.chat_template or "").replace("{%-", "{%"):
        marked = _applied(tokenizer, messages, return_assistant_tokens_mask=True)
        mask = marked["assistant_masks"]
        return ids, [i if on else IGNORED for i, on in zip(ids, mask, strict=True)]
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _ids(tokenizer, messages[:number], prompt=True)
        after = _ids(tokenizer, messages[: number + 1])
        if ids[: len(after)] != after or after[: len(before)] != before:
            raise DataError(
                "the chat template has no {% generation %} marks, and rewrites earlier turns, so "
                "the assistant's tokens cannot be told; give the tokenizer a template with marks"
            )
        labels[len(before) : len(after)] = after[len(before) :]
    return ids, labels


def _ids(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], prompt: bool = False
) -> list[int]:
    found: Any = _applied(tokenizer, messages, add_generation_prompt=prompt)
    return list(found["input_ids"])


def _applied(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **how: Any) -> Any:
    """The template on a conversation. Raises DataError where it refuses that, or cannot work."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **how)
    except (TemplateError, TypeError, ValueError) as error:
        shown = json.dumps(messages, ensure_ascii=False)
        shown = shown if len(shown) <= 200 else shown[:200] + " ..."
        raise DataError(
            f"the model's chat template cannot write {shown}: {' '.join(str(error).split())}; mend "
            "such rows, or give the tokenizer another template"
        ) from error


def _check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise ModelError(
            "the tokenizer has no chat template; take a chat model, or --kind causal_lm on rows of "
            "prompt and completion"
        )
