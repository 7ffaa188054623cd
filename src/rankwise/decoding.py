"""Texts out of a language model: beam search in left-padded batches, kept in a file as it goes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.errors import DataError, RankwiseError
from rankwise.files import write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def _flag(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Decoding:
    """Text generation.

    Beams and length penalty are the LoRA paper's (arXiv 2106.09685). In transformers a beam's
    log-probability is divided by its length to the power of length_penalty.

    Raises:
        RankwiseError: a number is out of its range.
    """

    num_beams: int = _flag(10, "beams of the search; 1 is greedy")
    length_penalty: float = _flag(0.8, "above 0 favours long texts, below 0 short ones")
    no_repeat_ngram_size: int = _flag(4, "n-grams of so many tokens come once; 0 for no limit")
    max_new_tokens: int = _flag(64, "longest text that is generated")
    generation_batch_size: int = _flag(16, "prompts that are continued at once")

    def __post_init__(self) -> None:
        for name in ("num_beams", "max_new_tokens", "generation_batch_size"):
            if getattr(self, name) < 1:
                raise RankwiseError(f"--{name} is {getattr(self, name)}; it has to be at least 1")
        if self.no_repeat_ngram_size < 0:
            raise RankwiseError(
                f"--no_repeat_ngram_size is {self.no_repeat_ngram_size}; it has to be at least 0"
            )

    def options(self) -> dict[str, Any]:
        """As `generate` of transformers takes them."""
        return {
            "do_sample": False,
            "num_beams": self.num_beams,
            # a single beam has no use for it, and transformers warns
            **({"length_penalty": self.length_penalty} if self.num_beams > 1 else {}),
            "no_repeat_ngram_size": self.no_repeat_ngram_size,
            "max_new_tokens": self.max_new_tokens,
        }


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding | None = None,
) -> Iterator[tuple[list[int], list[str]]]:
    """Continues every prompt, a batch at a time, the longest ones first.

    Args:
        model: causal language model, or a PeftModel of one; left in evaluation mode.
        tokenizer: the model's, with a padding token.
        prompts: token ids.
        decoding: None is the LoRA paper's.

    Yields:
        Places of a batch in `prompts`, and its texts without special tokens, white space cut at
        both ends.

    Raises:
        DataError: a prompt has no token.

    Example:
        >>> for places, texts in generate(model, tokenizer, tokenizer(["A is"])["input_ids"]):
        ...     print(places, texts)
    """
    import torch

    decoding = decoding or Decoding()
    empty = next((n for n, ids in enumerate(prompts) if not ids), None)
    if empty is not None:
        raise DataError(f"prompt {empty + 1} has no token, so there is nothing to continue")
    model.eval()
    order = sorted(range(len(prompts)), key=lambda n: -len(prompts[n]))
    for start in range(0, len(order), decoding.generation_batch_size):
        places = order[start : start + decoding.generation_batch_size]
        ids, mask = left_padded([prompts[n] for n in places], tokenizer.pad_token_id or 0)
        with torch.no_grad():
            found = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                use_cache=True,
                **decoding.options(),
            )
        texts = tokenizer.batch_decode(found[:, ids.shape[1] :], skip_special_tokens=True)
        yield places, [text.strip() for text in texts]


def left_padded(prompts: Sequence[Sequence[int]], padding: int) -> tuple[Any, Any]:
    """Token ids and attention mask, (batch, longest); every prompt ends where its text starts."""
    import torch

    longest = max(map(len, prompts))
    ids = [[padding] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def generate_rows(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: Any,
    rows: Any,
    decoding: Decoding,
    file: Path,
    resume: bool = False,
) -> list[str]:
    """The texts for a split, written to a file of JSON lines beside their sources and references.

    They stand in `<file>.partial`, too, from which a resumed run goes on; whoever has scored the
    texts drops it (`drop_partial`).

    Args:
        model, tokenizer, decoding: as `generate`.
        task: of a kind that generates.
        rows: train, validation or test of the task.
        file: where the texts go.
        resume: keep what is in the partial file, if it is of this model, rows and decoding.
    """
    from tqdm import tqdm

    prompts = task.prompts(tokenizer, rows)
    partial = _partial(file)
    about = json.dumps(
        {"decoding": asdict(decoding), "prompts": fingerprint(prompts), "model": weights(model)}
    )
    found = _unfinished(partial, about) if resume else {}
    partial.parent.mkdir(parents=True, exist_ok=True)
    left = [n for n in range(len(prompts)) if n not in found]
    with partial.open("w", encoding="utf-8") as kept:
        kept.write(about + "\n")
        for n, text in found.items():
            kept.write(json.dumps([n, text]) + "\n")
        with tqdm(total=len(prompts), initial=len(found), desc="generating", unit="text") as bar:
            for places, texts in generate(model, tokenizer, [prompts[n] for n in left], decoding):
                for place, text in zip(places, texts, strict=True):
                    found[left[place]] = text
                    kept.write(json.dumps([left[place], text]) + "\n")
                kept.flush()
                bar.update(len(places))
    texts = [found[n] for n in range(len(prompts))]
    lines = (
        json.dumps(row | {"generated": text}, ensure_ascii=False)
        for row, text in zip(task.shown(rows), texts, strict=True)
    )
    write_text(file, "".join(line + "\n" for line in lines))
    return texts


def drop_partial(file: Path) -> None:
    """Removes what a resumed run would go on from."""
    _partial(file).unlink(missing_ok=True)


def _partial(file: Path) -> Path:
    return file.with_name(file.name + ".partial")


def fingerprint(prompts: Sequence[Sequence[int]]) -> str:
    """sha256 of token ids."""
    return sha256(json.dumps([list(ids) for ids in prompts]).encode()).hexdigest()


def weights(model: Any) -> str:
    """sha256 of all parameters, bit for bit."""
    import torch

    digest = sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _unfinished(partial: Path, about: str) -> dict[int, str]:
    """What an earlier run had generated; nothing where it was of something else."""
    if not partial.is_file():
        return {}
    first, *lines = partial.read_text(encoding="utf-8").split("\n")
    if first != about:
        return {}
    found = {}
    for line in lines:
        try:
            place, text = json.loads(line)
        except ValueError:  # the line that it was killed in
            continue
        found[int(place)] = str(text)
    return found
