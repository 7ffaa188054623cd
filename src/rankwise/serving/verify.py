"""`verify`: whether an export computes what its adapter does: by rules, in PEFT, in llama.cpp."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from rankwise.adapter import Adapter, Factors, adapter_folder
from rankwise.beside import read_object
from rankwise.errors import AdapterError, ExportError, ModelError
from rankwise.given import check_path
from rankwise.serving.base import Base, base_of, put_on
from rankwise.serving.engines import Engine
from rankwise.serving.engines import engine as engine_of
from rankwise.serving.export import GGUF, RECORD, load_exported
from rankwise.serving.reader import distance, read_as

ROWS, TOKENS = 2, 12
"""Fixed inputs: so many rows of so many tokens, drawn with seed 0."""

FACTORS = {torch.float32: 1e-5, torch.float64: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Tolerance of ‖ΔW - ΔW'‖ / ‖ΔW‖, by the type of the factors: what one rounding of B costs."""

LOGITS = 1e-3
"""Tolerance of logits, as a share of the largest change that the adapter makes to any of them."""


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        what: was compared.
        found: how far the two are apart; None where it could not be looked at.
        tolerance: the most that passes.
        says: what the figures are of, where the rules were read, or why nothing was compared.
    """

    what: str
    found: float | None
    tolerance: float
    says: str

    @property
    def passed(self) -> bool | None:
        """None where nothing was compared."""
        return None if self.found is None else self.found <= self.tolerance


def verify(
    folder: str | Path,
    against: str | Path,
    *,
    to: str | None = None,
    model_name_or_path: str | None = None,
    gguf_file: str | None = None,
) -> list[Check]:
    """Compares an export with the adapter that it was made of.

    1. The updates ΔW that the engine's rules read out of the files, against the adapter's own.
    2. The logits of both on fixed inputs, in PEFT on the base model, in float32.
    3. For GGUF, llama.cpp itself, where llama-cpp-python is installed and the base is a GGUF file.

    Args:
        folder: what `export` wrote, or any adapter, to see what an engine would make of it as it
            is.
        against: the adapter.
        to: the engine whose rules count; None is what `export` wrote down, else PEFT's.
        model_name_or_path, gguf_file: the base model, where it is not what the config says.

    Returns:
        The checks; one whose base model or engine is not here has `found` None and says why.

    Raises:
        ExportError: the engine would refuse the files, or drop a part of them. AdapterError: no
            adapter.

    Example:
        >>> [check.passed for check in rankwise.verify("served", "runs/first")]
        [True, True, None]
    """
    check_path("folder", folder, ExportError)
    folder = Path(folder)
    source = adapter_folder(against, "adapter")
    given = Adapter.load(source)
    engine = engine_of(to or _recorded(folder))
    base: Base | None
    try:
        base = base_of(given, source, model_name_or_path, gguf_file)
    except ModelError:
        base = None
    if engine.form == "merged":
        return [_merged(folder, source, given, base)]
    if not (folder / GGUF).is_file() and not (folder / RECORD).is_file():
        folder = adapter_folder(folder, "adapter")
    written = load_exported(folder, base, given)
    checks = [by_rules(engine, written, given), _in_peft(engine, written, given, base)]
    if (folder / GGUF).is_file():
        checks.append(_in_llama(folder / GGUF, given, base))
    return checks


def _recorded(folder: Path) -> str:
    about = read_object(folder / RECORD)
    if not about:
        return "peft"
    if not isinstance(about.get("to"), str):
        raise ExportError(f"{folder / RECORD} does not say for which engine; give --to")
    return str(about["to"])


def by_rules(engine: Engine, written: Adapter, given: Adapter) -> Check:
    """The updates that the engine would read, against the adapter's own.

    Raises:
        ExportError: the engine would refuse the adapter, or drop a part of it.
    """
    off, worst = distance(given.factors(), read_as(engine, written))
    kinds = {f.b.dtype for f in given.factors().values()}
    tolerance = max(FACTORS.get(kind, 1e-2) for kind in kinds)
    says = f"‖ΔW - ΔW'‖ / ‖ΔW‖ by the rules of {engine.source}"
    return Check(
        "updates", off, tolerance, says + (f"; worst in {worst}" if off > tolerance else "")
    )


def _in_peft(engine: Engine, written: Adapter, given: Adapter, base: Base | None) -> Check:
    """Logits of both adapters, as PEFT computes them."""
    if base is None:
        return Check("logits in PEFT", None, LOGITS, "no base model is named")
    try:
        model = base.model()
    except ModelError as error:
        return Check("logits in PEFT", None, LOGITS, str(error))
    inputs = fixed_inputs(model.config.vocab_size)
    plain = logits(model, inputs)
    # what the engine reads, not what PEFT would read, counts
    read = _with_scales(written, read_as(engine, written))
    first, model = _adapted(model, given, inputs)
    second, _ = _adapted(model, read, inputs)
    return _compared("logits in PEFT", plain, first, second)


def _compared(what: str, plain: Tensor, first: Tensor, second: Tensor) -> Check:
    effect = float((first - plain).abs().max())
    off = float((first - second).abs().max())
    tolerance = LOGITS * effect
    says = (
        f"largest |Δ| of {first.numel():,} logits; the adapter changes them by up to {effect:.3g}"
    )
    return Check(what, off, max(tolerance, 1e-5), says)


def fixed_inputs(vocabulary: int) -> Tensor:
    """(ROWS, TOKENS) token ids, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, vocabulary, (ROWS, TOKENS), generator=generator)


@torch.no_grad()
def logits(model: Any, inputs: Tensor) -> Tensor:
    """A model's logits in float32, in eval mode."""
    return model.eval()(input_ids=inputs, attention_mask=torch.ones_like(inputs)).logits.float()


def _adapted(model: Any, adapter: Adapter, inputs: Tensor) -> tuple[Tensor, Any]:
    """The logits with an adapter, and the base model without it again."""
    with TemporaryDirectory() as scratch:
        adapter.save(Path(scratch) / "adapter")
        peft = put_on(model, Path(scratch) / "adapter")
        found = logits(peft, inputs)
    return found, peft.unload()


def _with_scales(adapter: Adapter, factors: Mapping[str, Factors]) -> Adapter:
    """The adapter with these factors, in a config of PEFT's own."""
    return adapter._with(factors, {}, "")


def _merged(folder: Path, source: Path, given: Adapter, base: Base | None) -> Check:
    if base is None:
        raise ExportError("no base model is named; give --model_name_or_path")
    model = base.model()
    inputs = fixed_inputs(model.config.vocab_size)
    plain = logits(model, inputs)
    first = logits(put_on(model, source), inputs)
    try:
        whole = base.auto.from_pretrained(str(folder), dtype="float32", trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise AdapterError(f"cannot load {folder}: {str(error).splitlines()[0]}") from error
    return _compared("logits", plain, first, logits(whole, inputs))


# llama.cpp itself.


def _in_llama(file: Path, given: Adapter, base: Base | None) -> Check:
    """Logits in llama.cpp with the file, against PEFT's, on the base that both read.

    The two differ without any adapter already, since llama.cpp rounds activations to 8 bits: that
    difference is the noise, and the adapter may double it.
    """
    what = "logits in llama.cpp"
    try:
        importlib.import_module("llama_cpp")
    except ImportError:
        return Check(what, None, 0.0, "llama-cpp-python is not installed")
    if base is None or base.gguf_file is None:
        return Check(what, None, 0.0, "the base is no GGUF file; give --gguf_file")
    weights = Path(base.name_or_path) / base.gguf_file
    model = base.model()
    inputs = fixed_inputs(model.config.vocab_size)[:1]
    plain = logits(model, inputs)[0]
    first = _adapted(model, given, inputs)[0][0]
    there = llama_logits(weights, None, inputs[0].tolist())
    second = llama_logits(weights, file, inputs[0].tolist())
    noise = float((there - plain).abs().max())
    effect = float((first - plain).abs().max())
    off = float((second - first).abs().max())
    says = (
        f"largest |Δ| of {first.numel():,} logits; without an adapter the two differ by "
        f"{noise:.3g}, and the adapter changes them by up to {effect:.3g}"
    )
    return Check(what, off, 2 * noise + LOGITS * effect, says)


def llama_logits(weights: Path, lora: Path | None, tokens: list[int]) -> Tensor:
    """(tokens, vocabulary) of a GGUF model, with a GGUF adapter or without."""
    import numpy as np

    llama: Callable[..., Any] = importlib.import_module("llama_cpp").Llama
    model = llama(
        str(weights),
        lora_path=None if lora is None else str(lora),
        n_ctx=max(64, len(tokens)),
        logits_all=True,
        verbose=False,
        n_threads=1,
    )
    try:
        model.eval(tokens)
        return torch.from_numpy(np.array(model.scores[: len(tokens)], dtype=np.float32))
    finally:
        model.close()
