"""Bad calls of the library: what a notebook would give by mistake, and the error that says so."""

from case import Case

HEAD = """
import warnings; warnings.simplefilter("ignore")
import rankwise, torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments
args = TrainingArguments(
    "scratch", max_steps=2, per_device_train_batch_size=8, use_cpu=True, report_to="none",
    save_strategy="no", disable_tqdm=True, label_names=["labels"],
)
def model():
    return AutoModelForSequenceClassification.from_pretrained("{model}", num_labels=2)
rows = [{"text": f"{w} film", "label": n % 2} for n, w in enumerate(["fine", "awful"] * 12)]
def encoded():
    tokenizer = AutoTokenizer.from_pretrained("{model}")
    made = Dataset.from_list(rows).map(lambda r: tokenizer(r["text"]) | {"labels": r["label"]})
    return made.remove_columns(["text", "label"])
def fit(data=rows, method="lora", **more):
    given = {"model": "{model}", "output_dir": "out", "args": args, "r": 2} | more
    return rankwise.fit(method, data, **given)
def tokens(n=40):
    return {"input_ids": torch.ones(n, 3, dtype=torch.long), "labels": torch.arange(n) % 2}
"""


def fits() -> list[Case]:
    """rankwise.fit."""
    table = {
        "no rows": ("fit(None)", "no data"),
        "no rows in a list": ("fit([])", "no rows"),
        "a number for rows": ("fit(5)", "int"),
        "a list of numbers": ("fit([1, 2])", "list"),
        "a list of texts": ("fit(['a', 'b'])", "list"),
        "a list of None": ("fit([None, None])", "list"),
        "rows of other columns": ("fit([{'a': 1}, {'b': 2}])", ""),
        "rows with a column that is no text": ("fit([{'text': 'a', 5: 1}] * 9)", ""),
        "a DataFrame without labels": (
            "import pandas; fit(pandas.DataFrame({'text': ['a'] * 9, 'x': ['b'] * 9}))",
            "label",
        ),
        "an empty DataFrame": ("import pandas; fit(pandas.DataFrame())", "no rows"),
        "a DataFrame of a column twice": (
            "import pandas; fit(pandas.DataFrame([['a', 'b']] * 9, columns=['text', 'text']))",
            "twice",
        ),
        "a DataFrame of numbered columns": (
            "import pandas; fit(pandas.DataFrame([['a', 'b']] * 9))",
            "",
        ),
        "a Series": ("import pandas; fit(pandas.Series(['a'] * 9))", ""),
        "an empty Dataset": ("fit(Dataset.from_list([]))", "no rows"),
        "encoded rows": ("fit(encoded())", ""),
        "a generator": ("fit(row for row in rows)", "generator"),
        "an array": ("import numpy; fit(numpy.ones((3, 3)))", "ndarray"),
        "a tensor": ("fit(torch.ones(3))", "Tensor"),
        "splits of other names": ("fit({'a': rows})", "train"),
        "no splits": ("fit({})", ""),
        "a split that is None": ("fit({'train': None})", ""),
        "a file that is not there": ("fit('none.csv')", "none.csv"),
        "a folder that is not there": ("fit('./none/')", ""),
        "a task that nobody knows": ("fit('mrcp')", "mrpc"),
        "a model for the name": ("fit(model=model())", "BertForSequenceClassification"),
        "None for a model": ("fit(model=None)", "None"),
        "a number for a model": ("fit(model=5)", ""),
        "a model that is not there": ("fit(model='nowhere/none')", "nowhere/none"),
        "None for a folder": ("fit(output_dir=None)", "output_dir"),
        "a number for a folder": ("fit(output_dir=5)", "output_dir"),
        "a dict for arguments": ("fit(args={'max_steps': 2})", "TrainingArguments"),
        "a text for arguments": ("fit(args='x')", "TrainingArguments"),
        "no method": ("fit(method='autolroa')", "autolora"),
        "None for a method": ("fit(method=None)", "None"),
        "a class for a method": ("fit(method=rankwise.LoRA)", "LoRA"),
        "rows for a method": ("rankwise.fit(rows, model='{model}', output_dir='out')", "list"),
        "an option that nobody has": ("fit(lerning_rate=1)", "lerning_rate"),
        "an argument of transformers": ("fit(learning_rate=1)", "TrainingArguments"),
        "a text for a rank": ("fit(r='x')", "r is 'x'"),
        "half a rank": ("fit(r=1.5)", "r is 1.5"),
        "NaN for alpha": ("fit(lora_alpha=float('nan'))", "lora_alpha"),
        "a number for modules": ("fit(target_modules=5)", "target_modules"),
        "a text for modules": ("fit(target_modules='none')", "none"),
        "a text for a length": ("fit(max_length='x')", "max_length"),
        "no length": ("fit(max_length=0)", "max_length"),
        "a split that nobody has": ("fit(eval_split='x')", "'x'"),
        "a number for a column": ("fit(text_column=5)", "5"),
        "a kind that nobody knows": ("fit(kind='riddle')", "riddle"),
        "a number for a kind": ("fit(kind=5)", "5"),
        "a text for a seed's share": ("fit(test_size='x')", "test_size"),
        "NaN for a share": ("fit(test_size=float('nan'))", "test_size"),
        "a text for a count": ("fit(max_train_samples='x')", "max_train_samples"),
        "one class alone": ("fit([{'text': 'a', 'label': 1}] * 9)", ""),
    }
    return _cases("fit", table)


def searches() -> list[Case]:
    """rankwise.search, order, load, predict, export, train, cut and plans in Python."""
    small = "Dataset.from_list([])"
    table = {
        "search: a name for a model": ("rankwise.search('{model}', encoded())", "in memory"),
        "search: None for a model": ("rankwise.search(None, encoded())", "None"),
        "search: None for rows": ("rankwise.search(model(), None)", "None"),
        "search: a text for rows": ("rankwise.search(model(), 'rows.jsonl')", "rankwise.fit"),
        "search: empty rows": (f"rankwise.search(model(), {small}, args=args)", "no rows"),
        "search: raw rows": (
            "rankwise.search(model(), Dataset.from_list(rows), args=args)",
            "tokenize",
        ),
        "search: raw rows in a list": ("rankwise.search(model(), rows, args=args)", "tokenize"),
        "search: a dict for arguments": (
            "rankwise.search(model(), encoded(), args={})",
            "TrainingArguments",
        ),
        "search: an adapter on the model": (
            "from peft import LoraConfig, get_peft_model\n"
            "m = get_peft_model(model(), LoraConfig(target_modules=['query']))\n"
            "rankwise.search(m, encoded(), args=args)",
            "",
        ),
        "search: a method without ranks": (
            "rankwise.search(model(), encoded(), args=args, method='full')",
            "",
        ),
        "search: a share of all": (
            "rankwise.search(model(), encoded(), args=args, validation_fraction=1.5)",
            "validation_fraction",
        ),
        "search: a text for a share": (
            "rankwise.search(model(), encoded(), args=args, validation_fraction='x')",
            "validation_fraction",
        ),
        "search: a type that PEFT has not": (
            "rankwise.search(model(), encoded(), args=args, task_type='x')",
            "task_type",
        ),
        "order: a name": ("rankwise.order('{model}', [tokens()])", "str"),
        "order: None": ("rankwise.order(None)", "None"),
        "order: no adapter": ("rankwise.order(model(), [tokens()])", "adapter"),
        "order: another kind of adapter": (
            "from peft import IA3Config, get_peft_model\n"
            "c = IA3Config(target_modules=['query'], feedforward_modules=[])\n"
            "rankwise.order(get_peft_model(model(), c), [tokens()])",
            "",
        ),
        "order: no rows": (_lora("rankwise.order(m)"), "no rows"),
        "order: empty rows": (_lora("rankwise.order(m, [])"), "too few"),
        "order: a text for rows": (_lora("rankwise.order(m, 'rows.jsonl')"), ""),
        "order: a number for rows": (_lora("rankwise.order(m, 5)"), "batches is 5"),
        "order: single rows": (_lora("rankwise.order(m, encoded())"), "single rows"),
        "order: rows without labels": (
            _lora("rankwise.order(m, [{'input_ids': torch.ones(40, 3, dtype=torch.long)}])"),
            "label",
        ),
        "order: a ladder that is none": (
            _lora("rankwise.order(m, [tokens()], ladder='x')"),
            "ladder",
        ),
        "order: a trust below 1": (
            _lora("rankwise.order(m, [tokens()], trust=0.5)"),
            "trust is 0.5",
        ),
        "order: an option that nobody has": (
            _lora("rankwise.order(m, [tokens()], rigde=1)"),
            "rigde",
        ),
        "cut: nothing said": (_lora("rankwise.order(m, [tokens()]).cut()"), ""),
        "cut: more than all": (_lora("rankwise.order(m, [tokens()]).cut(keep=2)"), "keep"),
        "load: None": ("rankwise.load(None)", "None"),
        "load: a number": ("rankwise.load(5)", "5"),
        "load: an empty folder": ("rankwise.load('.')", ""),
        "load: a base model": ("rankwise.load('{model}')", "adapter"),
        "load: another base": (
            "rankwise.load('{spoken}', model_name_or_path='{model}')",
            "",
        ),
        "load: a base that is not there": (
            "rankwise.load('{result}', model_name_or_path='nowhere/none')",
            "nowhere/none",
        ),
        "predict: None for rows": ("rankwise.predict('{result}', None)", "NoneType"),
        "predict: a number": ("rankwise.predict('{result}', 5)", "int"),
        "predict: nothing": ("rankwise.predict('{result}', [])", "no rows"),
        "predict: None for a text": ("rankwise.predict('{result}', [None])", "list"),
        "predict: a number for a text": ("rankwise.predict('{result}', [{'text': 5}])", "text"),
        "predict: no such file": ("rankwise.predict('{result}', 'none.csv')", "none.csv"),
        "predict: another column": ("rankwise.predict('{result}', [{'x': 'a'}])", "'text'"),
        "predict: no batches": ("rankwise.predict('{result}', ['a'], batch_size=0)", "batch_size"),
        "export: to nobody": ("rankwise.export('{spoken}', 'vlm', 'out')", "'vlm'"),
        "export: None": ("rankwise.export('{spoken}', None, 'out')", "None"),
        "export: a text for a rank": (
            "rankwise.export('{spoken}', 'vllm', 'out', rank='x')",
            "rank",
        ),
        "export: no rank": ("rankwise.export('{spoken}', 'vllm', 'out', rank=-3)", "rank"),
        "verify: None": ("rankwise.verify(None, None)", "None"),
        "train: a dict for a plan": (
            "rankwise.train(model(), {'query': 2}, encoded(), args=args)",
            "dict",
        ),
        "train: a path for a plan": (
            "rankwise.train(model(), '{result}/plan.json', encoded(), args=args)",
            "RankPlan.load",
        ),
        "a plan of no file": ("rankwise.RankPlan.load('none.json')", "none.json"),
        "a plan of None": ("rankwise.RankPlan.load(None)", "None"),
        "an adapter of None": ("rankwise.Adapter.load(None)", "None"),
        "a result of a folder": ("rankwise.Result.load('.')", ""),
        "uniform: a name": ("rankwise.uniform('{model}', 2)", "in memory"),
    }
    return _cases("Python", table)


def _lora(call: str) -> str:
    made = "from peft import LoraConfig, get_peft_model\n"
    made += (
        "m = get_peft_model(model(), LoraConfig(task_type='SEQ_CLS', target_modules=['query']))\n"
    )
    return made + call


def _cases(family: str, table: dict[str, tuple[str, str]]) -> list[Case]:
    return [
        Case(family, name, ["python", HEAD + call], {}, (word,))
        for name, (call, word) in table.items()
    ]


FAMILIES = (fits, searches)
