"""What each serving engine makes of a LoRA adapter, as plain data read from its source."""

from dataclasses import dataclass
from typing import Literal

from rankwise.errors import ExportError

LLAMA_LIKE = tuple("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split())


@dataclass(frozen=True)
class Engine:
    """The rules of one engine, and the form in which it takes an adapter.

    Attributes:
        name: as `--to` takes it.
        source: the file and version in which the rules were read.
        form: what is written: a stock PEFT folder of one rank, a GGUF file, mlx-lm's own files, or
            the whole model with the adapter merged into it.
        scale: by what B A is multiplied. "patterns": each module's own alpha over its own rank, as
            PEFT does. "alpha/r": both from the config's two numbers, in every module.
            "alpha/shape": the config's alpha over the rank that the tensor has.
        ranks_by_layer: whether the ranks may differ; "type" is that the modules of one type share
            one (padded) rank.
        rslora: whether `use_rslora` is read.
        every_layer: whether a type of module (q_proj, ...) has to be there in all layers or in
            none; a gap would drop the whole type, or fail.
        needs: types that another one cannot do without: {"v_proj": "q_proj"}.
        targets: the only types that it adapts; None is any that it finds.
        heads: modules of `modules_to_save` that it loads.
        ranks: those that it takes, in ascending order; None is every rank up to `most`.
        most: the largest rank.
        pads: whether it pads a rank to the next of `ranks` and then divides by the padded one in
            all types but the first.
        start: what its command line needs, with {r} for the adapter's rank and {limit} for the
            least of `limits` that holds it.
        limits: values that its limit on the rank may have.
        bare: transformers' classes of models that it runs, but without LoRA.
    """

    name: str
    source: str
    form: Literal["peft", "gguf", "mlx", "merged"] = "peft"
    scale: Literal["patterns", "alpha/r", "alpha/shape"] = "patterns"
    ranks_by_layer: Literal["any", "type", "one"] = "any"
    rslora: bool = True
    every_layer: bool = False
    needs: tuple[tuple[str, str], ...] = ()
    targets: tuple[str, ...] | None = None
    heads: tuple[str, ...] | None = ()
    ranks: tuple[int, ...] | None = None
    most: int | None = None
    pads: bool = False
    start: str = ""
    limits: tuple[int, ...] = ()
    bare: tuple[str, ...] = ()

    def rank_for(self, least: int) -> int:
        """The smallest rank that it takes and that holds `least`.

        Raises:
            ExportError: none does.
        """
        if self.ranks is None and (self.most is None or least <= self.most):
            return least
        for rank in self.ranks or ():
            if rank >= least:
                return rank
        most = self.most if self.ranks is None else self.ranks[-1]
        raise ExportError(
            f"the adapter needs rank {least} and {self.name} takes at most {most}; cut it first "
            f"(rankwise cut --rank {most}), or take --to merged"
        )

    def how_to_start(self, rank: int) -> str:
        """What its command line needs for an adapter of this rank; "" for nothing."""
        limit = next((limit for limit in self.limits if limit >= rank), rank)
        return self.start.format(r=rank, limit=limit)


_QKV = (("k_proj", "q_proj"), ("v_proj", "q_proj"), ("up_proj", "gate_proj"))
_PUNICA = (8, 16, 32, 64, 128)

# Named in vLLM's model_executor/models/registry.py, by a class there that is no SupportsLoRA.
_NO_LORA_IN_VLLM = tuple(
    "BertForSequenceClassification BertForTokenClassification BloomForCausalLM "
    "Cohere2MoeForCausalLM DbrxForCausalLM DeepseekV32ForCausalLM DeepseekV4ForCausalLM "
    "FalconForCausalLM FalconMambaForCausalLM GPT2ForSequenceClassification GPT2LMHeadModel "
    "GPTJForCausalLM Gemma3nForCausalLM GlmMoeDsaForCausalLM HYV4ForCausalLM HrmTextForCausalLM "
    "InklingForCausalLM KimiLinearForCausalLM Mamba2ForCausalLM MambaForCausalLM "
    "MiMoV2FlashForCausalLM ModernBertForSequenceClassification ModernBertForTokenClassification "
    "OpenAIPrivacyFilterForTokenClassification Qwen4ExpForCausalLM RobertaForTokenClassification "
    "StableLmForCausalLM XLMRobertaForTokenClassification Zamba2ForCausalLM".split()
)

ENGINES = {
    engine.name: engine
    for engine in (
        Engine("peft", "peft 0.21.2, tuners/lora/layer.py", heads=None),
        Engine(
            "vllm",
            "vllm 0.32.0, vllm/lora/peft_helper.py, lora_model.py, config/lora.py",
            bare=_NO_LORA_IN_VLLM,
            heads=("classifier", "score"),
            most=512,
            start="--enable-lora --max-lora-rank {limit}",
            limits=(8, 16, 32, 64, 128, 256, 320, 512),
        ),
        Engine(
            "sglang",
            "sglang 0.5.23, srt/lora/lora.py, lora_manager.py, utils.py",
            scale="alpha/r",
            ranks_by_layer="one",
            rslora=False,
            every_layer=True,
            needs=_QKV,
            targets=(
                *LLAMA_LIKE,
                "out_proj",
                "embed_tokens",
                "lm_head",
                "qkv_proj",
                "gate_up_proj",
            ),
            start="--enable-lora --max-lora-rank {r}",
        ),
        Engine(
            "tgi",
            "text-generation-inference db931fcf, server/text_generation_server/adapters/lora.py",
            scale="alpha/r",
            ranks_by_layer="type",
            every_layer=True,
            targets=LLAMA_LIKE,
            ranks=_PUNICA,
            pads=True,
            start="LORA_ADAPTERS=name=FOLDER",
        ),
        Engine(
            "lorax",
            "lorax a7394ba3, server/lorax_server/adapters/lora.py, utils/punica.py",
            scale="alpha/r",
            ranks_by_layer="type",
            every_layer=True,
            targets=(*LLAMA_LIKE, "lm_head"),
            ranks=_PUNICA,
            pads=True,
            start="--adapter-source local",
        ),
        Engine(
            "tensorrt-llm",
            "TensorRT-LLM 007e181b, tensorrt_llm/lora_manager.py",
            scale="alpha/shape",
            start="max_lora_rank={r} in its LoraConfig, or trtllm-build --max_lora_rank {r}",
        ),
        Engine(
            "llama.cpp",
            "llama.cpp 215841fc, src/llama-adapter.h; 0b03adaa, convert_lora_to_gguf.py",
            form="gguf",
            scale="alpha/shape",
            rslora=False,
            start="--lora adapter.gguf",
        ),
        Engine(
            "ollama",
            "ollama fb307609, convert/convert.go, llm/llama_server.go",
            form="gguf",
            scale="alpha/shape",
            rslora=False,
            start="ollama create NAME -f Modelfile",
        ),
        Engine(
            "mlx",
            "mlx-lm d78bf58e, mlx_lm/tuner/utils.py, lora.py",
            form="mlx",
            scale="alpha/r",
            ranks_by_layer="one",
            rslora=False,
            every_layer=True,
            start="mlx_lm.generate --adapter-path FOLDER",
        ),
        Engine("merged", "any that loads the base model", form="merged", heads=None),
    )
}


def engine(name: str) -> Engine:
    """The engine of this name.

    Raises:
        ExportError: none is called so; the message lists those that are known.
    """
    if not isinstance(name, str) or name not in ENGINES:
        raise ExportError(f"no engine {name!r} is known; take one of {', '.join(ENGINES)}")
    return ENGINES[name]
