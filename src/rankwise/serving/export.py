"""`export`: an adapter in the form that an engine takes, its function unchanged."""

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from rankwise.adapter import CONFIG, WEIGHTS, Adapter, Factors, adapter_folder, card_header
from rankwise.beside import TASK, read_object
from rankwise.errors import AdapterError, ExportError, ModelError, OutputError
from rankwise.files import check_new, replace_folder, write_json, write_text
from rankwise.given import check_count, check_path, fits, shown
from rankwise.plan import exact_targets
from rankwise.reading import read_json
from rankwise.serving.base import Base, base_of, put_on
from rankwise.serving.engines import Engine
from rankwise.serving.engines import engine as engine_of
from rankwise.serving.reader import kind_of, leaf, refuse

RECORD = "export.json"
GGUF, MLX = "adapter.gguf", "adapters.safetensors"
_CARRIED = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json chat_template.jinja vocab.json "
    "merges.txt tokenizer.model vocab.txt task.json plan.json"
).split()


@dataclass(frozen=True)
class Export:
    """What `export` wrote.

    Attributes:
        engine: by whose rules.
        folder: holds the files and `export.json`.
        rank: the one rank of every module; None for merged weights.
        bytes_before, bytes_after: of the adapter's weights, and of what was written for them.
        start: what the engine's command line needs.
        note: what may stand against it, in words; "" where nothing is known.
    """

    engine: str
    folder: Path
    rank: int | None
    bytes_before: int
    bytes_after: int
    start: str
    note: str = ""


def export(
    adapter: str | Path,
    to: str,
    output_dir: str | Path,
    *,
    rank: int | None = None,
    model_name_or_path: str | None = None,
    gguf_file: str | None = None,
    dtype: str | None = None,
    max_shard_size: str = "2GB",
) -> Export:
    """Writes an adapter in the form that an engine takes; the function stays as it is.

    The factors are padded with zeros to one rank R, the smallest that the engine takes and that
    holds every module's; each module's scale goes into its B, so that r = lora_alpha = R and no
    pattern and no rsLoRA is left. Modules that the engine cannot do without get factors of zeros.

    Args:
        adapter: folder of a PEFT LoRA adapter of any kind of ranks, or of a run that made one.
        to: a name from `rankwise.serving.engines.ENGINES`: peft, vllm, sglang, tgi, lorax,
            tensorrt-llm, llama.cpp, ollama, mlx, or merged for the whole model.
        output_dir: a new folder.
        rank: R is at least this; None is the adapter's largest.
        model_name_or_path, gguf_file: the base model, where it is not what the config says.
        dtype: of merged weights; None is that of the base model's files.
        max_shard_size: of merged weights, a file.

    Returns:
        Export, with the bytes before and after.

    Raises:
        ExportError: the engine cannot take this adapter; says what would help.
        AdapterError: no adapter, or one whose rank cannot be changed (DoRA and others).
        ModelError: the base model's config, or its weights for merged, cannot be loaded.
        OutputError: the folder exists.

    Example:
        >>> done = rankwise.export("runs/first", "llama.cpp", "served")
        >>> done.rank, done.bytes_before, done.bytes_after
        (8, 4812008, 9790112)
    """
    engine = engine_of(to)
    if rank is not None:
        check_count("rank", rank, ExportError)
    check_path("output_dir", output_dir, OutputError)
    source = adapter_folder(adapter, "adapter")
    given = Adapter.load(source)
    refuse(given, engine)
    if engine.form == "merged" and model_name_or_path is None:
        _refuse_4bit(source)
    target = Path(output_dir)
    check_new(target, "--output_dir")
    if not re.fullmatch(r"\d+(\.\d+)?\s*[TGMK]i?B", str(max_shard_size), re.IGNORECASE):
        raise ExportError(f"max_shard_size is {max_shard_size!r}; give one such as 2GB or 500MB")
    base = None
    if engine.form != "peft" or engine.every_layer:
        base = base_of(given, source, model_name_or_path, gguf_file)
    if engine.form == "merged":
        assert base is not None
        with _new_folder(target) as work:
            _merge(source, base, work, dtype, max_shard_size)
            size = sum(f.stat().st_size for f in work.glob("*.safetensors"))
            done = Export(to, target, None, (source / WEIGHTS).stat().st_size, size, engine.start)
            _describe(done, engine, given, source, work)
        return done
    flat = flattened(given, engine, rank, base)
    with _new_folder(target) as work:
        file = _WRITERS[engine.form](flat, base, work)
        if to == "ollama":
            write_text(work / "Modelfile", f"FROM {_modelfile_base(base)}\nADAPTER ./{GGUF}\n")
        r, before = flat.config["r"], (source / WEIGHTS).stat().st_size
        start = engine.how_to_start(r)
        note = _note(engine, given, source, model_name_or_path, gguf_file)
        done = Export(to, target, r, before, file.stat().st_size, start, note)
        _describe(done, engine, given, source, work)
    return done


def _note(engine: Engine, adapter: Adapter, *base: Any) -> str:
    """That the engine has no LoRA on this kind of model, as far as the base's config is at hand."""
    if not engine.bare:
        return ""
    try:
        kind = base_of(adapter, *base).architecture()
    except ModelError:
        return ""
    if kind not in engine.bare:
        return ""
    version = engine.source.partition(",")[0]
    return f"{version} runs {kind} without LoRA; see whether yours has it, or take --to merged"


def _refuse_4bit(source: Path) -> None:
    """Raises ExportError where an adapter was trained on a base whose weights were rounded."""
    if read_object(source / TASK).get("load_in_4bit") is True:
        raise ExportError(
            "the adapter was trained on a base in 4 bits, and merged into the weights before that "
            "rounding it is another function; serve it beside its base (--to vllm, peft), or merge "
            "it all the same by naming the base: --model_name_or_path"
        )


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder to write to, which takes its name only when all of it is there."""
    work = target.with_name(f".{target.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"cannot make {work}: {error.strerror}; give another folder") from error
    try:
        yield work
        replace_folder(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def flattened(
    adapter: Adapter, engine: Engine, rank: int | None = None, base: Base | None = None
) -> Adapter:
    """The same function at one rank, without patterns: r = lora_alpha = R.

    Args:
        adapter: of any ranks and scales.
        engine: whose ranks R is one of; it says whether gaps are filled with zeros.
        rank: R is at least this.
        base: needed where gaps are filled.

    Raises:
        ExportError: no such rank, or a scale that B's type cannot hold.
        ModelError: the adapter is for another base model.
    """
    factors = adapter.factors()
    r = engine.rank_for(max([rank or 1, *(f.rank for f in factors.values())]))
    new = {name: _padded(name, f, r) for name, f in factors.items()}
    if base is not None:
        shapes = _shapes(base)
        _check_base(factors, shapes, base)
        if engine.every_layer:
            new |= _zeros(factors, shapes, engine, r)
    known = set(shapes) if base is not None else set(new)
    names = [name for name in known if name in new] if engine.every_layer else list(new)
    targets: Any = exact_targets(sorted(names, key=list(new).index), known)
    if engine.every_layer:  # by the names of types: not every engine reads a longer one
        targets = sorted({leaf(name) for name in new})
    config = dict(adapter.config)
    config |= {"r": r, "lora_alpha": r, "rank_pattern": {}, "alpha_pattern": {}}
    config |= {"use_rslora": False, "target_modules": targets, "exclude_modules": None}
    config |= {"layers_to_transform": None, "layers_pattern": None, "init_lora_weights": True}
    config |= {"eva_config": None} if "eva_config" in config else {}
    weights = {key: tensor for key, tensor in adapter.weights.items() if ".lora_" not in key}
    for name, f in new.items():
        weights |= _named(adapter, name, f)
    return Adapter(config, weights)


def _named(adapter: Adapter, name: str, f: Factors) -> dict[str, torch.Tensor]:
    """The two tensors of a module under PEFT's names; an embedding's have none of their own."""
    stem = f"base_model.model.{name}"
    if f"{stem}.lora_embedding_A" in adapter.weights:
        return {f"{stem}.lora_embedding_A": f.a, f"{stem}.lora_embedding_B": f.b}
    return {f"{stem}.lora_A.weight": f.a, f"{stem}.lora_B.weight": f.b}


def _padded(name: str, f: Factors, r: int) -> Factors:
    """The factors at rank r, zeros behind them, the scaling in B."""
    a, b = f.a.new_zeros(r, *f.a.shape[1:]), f.b.new_zeros(f.b.shape[0], r, *f.b.shape[2:])
    a[: f.rank] = f.a
    b[:, : f.rank] = (f.b.double() * f.scaling).to(f.b.dtype)
    if not b.isfinite().all():
        raise ExportError(
            f"{name!r} times its scale {f.scaling:g} is too large for {f.b.dtype}; save the "
            "adapter in float32 first"
        )
    return Factors(a, b, 1.0)


def _shapes(base: Base) -> dict[str, tuple[int, int]]:
    """(in, out) of every module of the base model that takes LoRA."""
    from rankwise.lora import matrix_shape

    named = base.skeleton().named_modules()
    return {name: shape for name, module in named if (shape := matrix_shape(module)) is not None}


def _check_base(
    factors: Mapping[str, Factors], shapes: Mapping[str, tuple[int, int]], base: Base
) -> None:
    for name, f in factors.items():
        own = (f.a[0].numel(), f.b.shape[0])
        if name in shapes and shapes[name] not in (own, own[::-1]):
            raise ExportError(
                f"{name!r} is {own[1]} x {own[0]} in the adapter and {shapes[name][1]} x "
                f"{shapes[name][0]} in {base.name_or_path!r}; it is an adapter for another base"
            )
        if name not in shapes and f.a.dim() == 2:
            raise ExportError(
                f"{base.name_or_path!r} has no module {name!r}; it is an adapter for another base"
            )


def _zeros(
    factors: Mapping[str, Factors],
    shapes: Mapping[str, tuple[int, int]],
    engine: Engine,
    r: int,
) -> dict[str, Factors]:
    """Factors of zeros for modules that the adapter lacks and the engine cannot do without."""
    kinds = {kind_of(name) for name in factors}
    for before, rest in list(kinds):
        for kind, other in engine.needs:
            if leaf(rest) == kind:
                kinds.add((before, rest.removesuffix(kind) + other))
    like = next(iter(factors.values()))
    return {
        name: Factors(like.a.new_zeros(r, inputs), like.b.new_zeros(outputs, r), 1.0)
        for name, (inputs, outputs) in shapes.items()
        if name not in factors and kind_of(name) in kinds
    }


# The forms.


def _write_peft(flat: Adapter, base: Base | None, work: Path) -> Path:
    save_file(flat.weights, work / WEIGHTS, metadata={"format": "pt"})
    write_json(work / CONFIG, flat.config)
    return work / WEIGHTS


def _write_gguf(flat: Adapter, base: Base | None, work: Path) -> Path:
    from rankwise.serving.gguf_file import write_gguf

    assert base is not None
    if any(f.a.dim() != 2 for f in flat.factors().values()):
        raise ExportError("llama.cpp adapts no convolution; take --to merged")
    write_gguf(work / GGUF, flat.factors(), base.config(), float(flat.config["lora_alpha"]))
    return work / GGUF


def _write_mlx(flat: Adapter, base: Base | None, work: Path) -> Path:
    """mlx-lm's own two files: A and B transposed, one rank and one scale for all."""
    assert base is not None
    tensors = {}
    for name, f in flat.factors().items():
        tensors[f"{name}.lora_a"] = f.a.T.contiguous()
        tensors[f"{name}.lora_b"] = f.b.T.contiguous()
    save_file(tensors, work / MLX, metadata={"format": "mlx"})
    keys = sorted({kind_of(name)[1] for name in flat.factors()})
    about = {"rank": flat.config["r"], "scale": 1.0, "dropout": 0.0, "keys": keys}
    write_json(
        work / CONFIG,
        {
            "fine_tune_type": "lora",
            "model": base.name_or_path,
            "num_layers": base.config().num_hidden_layers,
            "lora_parameters": about,
        },
    )
    return work / MLX


_WRITERS = {"peft": _write_peft, "gguf": _write_gguf, "mlx": _write_mlx}


def _merge(source: Path, base: Base, work: Path, dtype: str | None, max_shard_size: str) -> None:
    """Merges in place, layer by layer: in memory are the model, once, and one layer's update."""
    config = base.config()
    given = Adapter.load(source)
    tied = {"lm_head", "embed_tokens", "wte"} & {leaf(name) for name in given.factors()}
    if tied and config.tie_word_embeddings:
        raise ExportError(
            f"the adapter changes {min(tied)!r}, whose weights the model shares between its first "
            "and last layer; merging would change both"
        )
    if base.gguf_file is None and hasattr(config, "quantization_config"):
        raise ExportError(
            f"the weights of {base.name_or_path!r} are quantised, and merging would round the "
            "adapter as well; give the unquantised base by --model_name_or_path, or serve the "
            "adapter beside it (--to vllm, peft)"
        )
    model = base.model(dtype)
    _check_base(given.factors(), _shapes(base), base)
    merged = put_on(model, source).merge_and_unload(safe_merge=False)
    if hasattr(merged.config, "quantization_config"):  # of a GGUF file, whose weights are plain now
        del merged.config.quantization_config
    merged.save_pretrained(work, max_shard_size=max_shard_size)
    _save_tokenizer(base, work)


def _save_tokenizer(base: Base, work: Path) -> None:
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(base.name_or_path, **base.where).save_pretrained(work)
    except (OSError, ValueError, KeyError, AttributeError):
        return  # a base without one has none to hand on


def _modelfile_base(base: Base | None) -> str:
    assert base is not None
    if base.gguf_file is not None:
        return str(Path(base.name_or_path) / base.gguf_file)
    return base.name_or_path


def _describe(done: Export, engine: Engine, adapter: Adapter, source: Path, work: Path) -> None:
    """export.json, the card, and what of the adapter's folder is no weights."""
    for name in _CARRIED:
        if _is_its_own(source / name) and not (work / name).exists():
            shutil.copy(source / name, work / name)
    about = {
        "format": "rankwise-export/1",
        "to": done.engine,
        "rank": done.rank,
        "rules": engine.source,
        "bytes_before": done.bytes_before,
        "bytes_after": done.bytes_after,
        "start": done.start,
    }
    about |= {"note": done.note} if done.note else {}
    write_json(work / RECORD, about)
    ranks = sorted({f.rank for f in adapter.factors().values()})
    span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    what = (
        "The base model with the adapter merged into its weights."
        if done.rank is None
        else f"Rank {done.rank} in every module, padded with zeros, the scale in B."
    )
    library = {"peft": "peft", "merged": "transformers", "mlx": "mlx"}.get(engine.form, "")
    text = (
        f"# LoRA adapter for {engine.name}\n\n{what} Exported by rankwise out of an adapter of "
        f"rank {span}; its function is the same. `{RECORD}` has the sizes.\n"
    )
    named = adapter.config.get("base_model_name_or_path")
    write_text(work / "README.md", card_header(named, library, engine.form != "merged") + text)


def _is_its_own(file: Path) -> bool:
    """Whether a file of an adapter is there, and no link to a file of the user's: what is exported
    may be published. The hub's cache links into the `blobs` beside its snapshots."""
    if not file.is_file():
        return False
    home, target = file.parent.resolve(), file.resolve()
    return home in target.parents or target.parent == home.parent.parent / "blobs"


def load_exported(folder: Path, base: Base | None, like: Adapter) -> Adapter:
    """What an export holds, as the stock PEFT adapter that it stands for.

    Args:
        folder: of an export in a file form, or of any adapter.
        base: needed for GGUF.
        like: the adapter that it was made of, for the names and what a file does not say.

    Raises:
        ExportError: files that are damaged, or of another adapter. AdapterError: no adapter.
    """
    if (folder / GGUF).is_file():
        from rankwise.serving.gguf_file import read_gguf

        assert base is not None
        factors = read_gguf(folder / GGUF, base.config(), list(like.factors()))
    elif (folder / MLX).is_file():
        factors = _read_mlx(folder)
    else:
        return Adapter.load(folder)
    if not factors:
        raise ExportError(f"{folder} has no module of the adapter")
    r = next(iter(factors.values())).rank
    scaling = next(iter(factors.values())).scaling
    config = like.config | {
        "r": r,
        "lora_alpha": scaling * r,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "target_modules": exact_targets(list(factors), set(factors)),
    }
    weights: dict[str, Any] = {}
    for name, f in factors.items():
        weights |= _named(like, name, f)
    return Adapter(config, weights)


def _read_mlx(folder: Path) -> dict[str, Factors]:
    from safetensors.torch import load_file

    config = read_json(folder / CONFIG, AdapterError)
    about = config.get("lora_parameters") if isinstance(config, dict) else None
    if not isinstance(about, dict) or not fits(about.get("rank"), int):
        raise AdapterError(f"{folder / CONFIG} has no rank and scale of mlx-lm; export it again")
    if not fits(about.get("scale"), float):
        raise AdapterError(f"{folder / CONFIG} has the scale {shown(about.get('scale'))}")
    try:
        there = load_file(folder / MLX)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{folder / MLX} is damaged: {error}; export it again") from error
    names = [key.removesuffix(".lora_a") for key in there if key.endswith(".lora_a")]
    found = {}
    for name in names:
        if f"{name}.lora_b" not in there:
            raise AdapterError(f"{folder / MLX} has no lora_b of {name!r}; export it again")
        a, b = there[f"{name}.lora_a"].T.contiguous(), there[f"{name}.lora_b"].T.contiguous()
        if len(a) != about["rank"]:
            raise AdapterError(f"{name!r} has rank {len(a)}, and {CONFIG} says {about['rank']}")
        found[name] = Factors(a, b, float(about["scale"]))
    return found
