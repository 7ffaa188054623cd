"""What every kind of task has, what the tables say, and a kind made up by a user."""

import subprocess
import sys
from pathlib import Path

import pytest

import rankwise
from rankwise.errors import RankwiseError
from rankwise.tasks import KINDS, KNOWN, METRICS, Classification, from_description

HEAVY = {"torch", "transformers", "datasets", "peft", "numpy", "sklearn", "scipy", "pandas"}


def task_of(kind: str, *metrics: str):
    return KINDS[kind]("t", ("text",), "label", ("a", "b"), metrics)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_reads_back_as_itself_and_knows_its_metrics(kind):
    task = task_of(kind, "loss")
    assert type(from_description(task.describe())) is KINDS[kind]
    assert set(task.default_metrics()) <= METRICS.keys()


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_task_names_what_there_is(name):
    known = KNOWN[name]
    assert known.kind in KINDS
    assert set(known.metrics) <= METRICS.keys()
    assert len(known.text_columns) <= KINDS[known.kind].most_texts


def test_glue_is_judged_as_the_benchmark_judges_it():
    glue = {name.removeprefix("glue/"): known.metrics for name, known in KNOWN.items()}
    assert glue["cola"] == ("matthews_correlation",)
    assert glue["mrpc"] == glue["qqp"] == ("accuracy", "f1")
    assert glue["stsb"] == ("spearman", "pearson")
    others = ("sst2", "mnli", "mnli_mismatched", "qnli", "rte", "wnli")
    assert {glue[name] for name in others} == {("accuracy",)}


def test_a_metric_carries_its_direction():
    falling = {name for name in METRICS if not task_of("classification", name).greater_is_better}
    assert falling == {"perplexity", "loss", "ter", "ter_seen", "ter_unseen"}
    with pytest.raises(RankwiseError, match="unknown metric 'bleurt'; choose one of accuracy, f1"):
        assert task_of("classification", "bleurt").greater_is_better


def test_the_tables_are_read_without_anything_heavy():
    """As a command's help reads them: the package itself may load what it likes."""
    folder = Path(rankwise.__file__).parent
    code = f"""
import sys, types
sys.modules["rankwise"] = package = types.ModuleType("rankwise")
package.__path__ = [{str(folder)!r}]
from rankwise.tasks import KINDS, KNOWN, METRICS, load_task, load_model
print(*sorted({HEAVY!r} & set(sys.modules)))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_a_kind_is_one_class(tmp_path, monkeypatch):
    """A kind of one's own, with labels that grow: only what differs is written down."""
    from rankwise.tasks import load_task

    class Ordered(Classification):
        kind = "ordered"

        def default_metrics(self):
            return ("accuracy",)

    monkeypatch.setitem(KINDS, "ordered", Ordered)
    path = tmp_path / "rows.csv"
    path.write_text("text,label\na,low\nb,high\n", encoding="utf-8")
    task = load_task(train_file=path, validation_file=path, kind="ordered")
    assert (type(task), task.metrics) == (Ordered, ("accuracy",))
    assert task.train["label"][:] == [1, 0]
    assert type(from_description(task.describe())) is Ordered
