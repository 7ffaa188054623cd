"""The base model of an adapter: found by its config, loaded, or built without weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.adapter import Adapter
from rankwise.beside import TASK, read_object, text_of
from rankwise.errors import AdapterError, ModelError

AUTO = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}


@dataclass(frozen=True)
class Base:
    """Where the base model of an adapter is.

    Attributes:
        name_or_path: hub id or folder; nothing is downloaded while HF_HUB_OFFLINE is set.
        gguf_file: name of a GGUF file in it.
        revision: on the hub.
        task_type: PEFT's; None is a causal language model.
        labels: outputs of a classifier's head; None where there is none.
    """

    name_or_path: str
    gguf_file: str | None = None
    revision: str | None = None
    task_type: str | None = None
    labels: int | None = None

    @property
    def where(self) -> dict[str, Any]:
        given = {"gguf_file": self.gguf_file, "revision": self.revision}
        # said outright: without it, transformers would ask at a terminal whether code may run
        found: dict[str, Any] = {"trust_remote_code": False}
        return found | {key: value for key, value in given.items() if value is not None}

    @property
    def auto(self) -> Any:
        import transformers

        return getattr(transformers, AUTO.get(self.task_type or "", "AutoModelForCausalLM"))

    def config(self) -> Any:
        """transformers' config of the base. Raises ModelError where it cannot be read."""
        import transformers

        extra = {} if self.labels is None else {"num_labels": self.labels}
        try:
            return transformers.AutoConfig.from_pretrained(self.name_or_path, **self.where, **extra)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(
                f"cannot read the config of the base model {self.name_or_path!r}: "
                f"{str(error).splitlines()[0]}; give its folder or hub id by "
                "--model_name_or_path (and --gguf_file)"
            ) from error

    def architecture(self) -> str:
        """transformers' class of the model; "" where it has none. Raises ModelError as `config`."""
        from transformers.models.auto import modeling_auto

        kind = {"SEQ_CLS": "SEQUENCE_CLASSIFICATION", "TOKEN_CLS": "TOKEN_CLASSIFICATION"}
        names = f"MODEL_FOR_{kind.get(self.task_type or '', 'CAUSAL_LM')}_MAPPING_NAMES"
        found = getattr(modeling_auto, names).get(self.config().model_type, "")
        return found if isinstance(found, str) else found[0]

    def skeleton(self) -> Any:
        """The base model without its weights: names and shapes of its modules."""
        import torch

        with torch.device("meta"):
            return self.auto.from_config(self.config())

    def model(self, dtype: str | None = "float32") -> Any:
        """The base model with its weights; a head that the files lack is drawn with seed 0.

        Args:
            dtype: of the weights; None is that of the files.

        Raises:
            ModelError: it cannot be loaded.
        """
        import transformers

        options: dict[str, Any] = {"dtype": dtype or "auto", "config": self.config()}
        if self.gguf_file is not None:
            options["dtype"] = dtype or "float32"
            if hasattr(transformers, "GgufConfig"):
                options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        import torch

        try:
            with torch.random.fork_rng(devices=[]):  # so that figures are the same every time
                torch.manual_seed(0)
                return self.auto.from_pretrained(self.name_or_path, **self.where, **options).eval()
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ModelError(
                f"cannot load the base model {self.name_or_path!r}: {str(error).splitlines()[0]}"
            ) from error


def put_on(model: Any, folder: str | Path) -> Any:
    """A base model with the adapter in a folder, by PEFT.

    Raises:
        AdapterError: it does not go on that model.
    """
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(folder))
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise AdapterError(
            f"{folder} does not go on {type(model).__name__}: {said}; it is an adapter for another "
            "base, or damaged"
        ) from error


def base_of(
    adapter: Adapter,
    folder: str | Path | None = None,
    model_name_or_path: str | None = None,
    gguf_file: str | None = None,
) -> Base:
    """The base model of an adapter: the one given, or the one that its config names.

    Args:
        adapter: its config and weights.
        folder: where it lies; a `task.json` there may name the GGUF file.
        model_name_or_path, gguf_file: instead of what the config says.

    Raises:
        ModelError: neither names one.
    """
    config = adapter.config
    name = model_name_or_path or text_of(config, "base_model_name_or_path")
    kind = text_of(config, "task_type")
    if not name:
        raise ModelError("the adapter's config names no base model; give --model_name_or_path")
    if gguf_file is None and folder is not None:
        gguf_file = text_of(read_object(Path(folder) / TASK), "gguf_file")
    labels = [
        tensor.shape[0]
        for key, tensor in adapter.weights.items()
        if ".lora_" not in key and key.endswith(".weight") and kind in _HEADED
        if key.split(".")[-2] in ("classifier", "score", "out_proj", "qa_outputs")
    ]
    return Base(
        str(name),
        gguf_file,
        None if model_name_or_path else text_of(config, "revision"),
        kind,
        labels[-1] if labels else None,
    )


_HEADED = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
