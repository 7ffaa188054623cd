"""The tiny models and the rows of the tests, for drives that pytest does not run."""

import importlib.util
from pathlib import Path

from case import ROWS, Given, named, train
from forks import Forks

WORDS = "red green blue one two three four five big small cat dog is a the what and not".split()
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<bot> {{ m['content'] }} </s>"
    "{% else %}<you> {{ m['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<bot> {% endif %}"
)

_FIXTURES = Path(__file__).parents[1] / "conftest.py"


class _Folders:
    """What pytest's `tmp_path_factory` is, of a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def mktemp(self, name: str) -> Path:
        (self.folder / name).mkdir(parents=True)
        return self.folder / name


def model_and_rows(folder: Path) -> tuple[str, str, str]:
    """Folders of a random BERT, of few rows, and of more, made as the fixtures make them."""
    spec = importlib.util.spec_from_file_location("fixtures", _FIXTURES)
    fixtures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fixtures)
    make = fixtures.tiny_bert.__wrapped__ if hasattr(fixtures.tiny_bert, "__wrapped__") else None
    make = make or fixtures.tiny_bert._get_wrapped_function()
    few, many = folder / "few", folder / "many"
    few.mkdir(parents=True)
    many.mkdir()
    fixtures.write_splits(few, train=36, validation=12, test=12)
    fixtures.write_splits(many, train=36, validation=80, test=12)
    return make(_Folders(folder)), str(few), str(many)


def chat_model(folder: Path) -> str:
    """A random Llama of two layers and a word tokenizer with a chat template."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<s>", "</s>", "<you>", "<bot>"]
    inner = Tokenizer(models.WordLevel({w: n for n, w in enumerate(special + WORDS)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
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
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def spoken_adapter(base: str, folder: Path) -> str:
    """An adapter of that Llama, with factors that are not zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    targets = ["q_proj", "v_proj"]
    config = LoraConfig(r=2, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape))
    model.save_pretrained(folder)
    return str(folder)


def given(forks: Forks, model: str, folder: Path) -> Given:
    """What cases of bad input stand on; the result is made by `rankwise train`."""
    place = folder / "run"
    place.mkdir(parents=True)
    (place / "rows.jsonl").write_text(ROWS)
    chat = chat_model(folder / "chat")
    found = Given(model, str(place / "out"), chat, spoken_adapter(chat, folder / "spoken"))
    done = forks.run([named(word, found) for word in train()], place)
    assert done.code == 0, done.err
    return found
