"""The choice of a learning rate: found, shared between workers, gone on with after a kill, and made
on training rows alone. Trainings are stand-ins with a known optimum, but for the last test's."""

import json
import math
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from rankwise import tasks
from rankwise import tune as tuning
from rankwise.cli import main
from rankwise.errors import DivergedError, OutputError, RankwiseError
from rankwise.job import Source, load_job
from rankwise.methods import by_name
from rankwise.result import Result
from rankwise.rows import fingerprint
from rankwise.trainer import default_arguments, labelled

optuna = pytest.importorskip("optuna")
BEST = -2.5  # log10 of the rate that the stand-in likes best


def quality(rate):
    return 1 - abs(math.log10(rate) - BEST) / 5


@pytest.fixture(scope="module")
def job(tiny_bert, rows_dir, tmp_path_factory):
    task = tasks.load_task(data_dir=rows_dir)
    args = labelled(default_arguments(str(tmp_path_factory.mktemp("args")), 3e-4))
    return load_job(task, Source(tiny_bert), args)


@pytest.fixture
def trained(monkeypatch):
    """The rates of trainings, which are stand-ins: `then(job)` may raise."""
    rates, rule = [], SimpleNamespace(then=lambda job: None)

    def stand_in(method, job, folder, **more):
        rates.append(job.args.learning_rate)
        rule.then(job)
        value = quality(job.args.learning_rate)
        return SimpleNamespace(metrics={"accuracy": value, "loss": 1 - value})

    monkeypatch.setattr(tuning, "run_method", stand_in)
    return rates, rule


def test_it_comes_near_the_best_rate(job, trained, tmp_path):
    found = tuning.tune(by_name("lora"), job, tmp_path, 14)
    rates, _ = trained
    assert rates[:4] == pytest.approx([3e-4, 9e-4, 1e-4, 3e-3])  # the given one, and about it
    assert len(found.trials) == len(rates) == 14
    assert found.learning_rate == max(rates, key=quality)
    assert abs(math.log10(found.learning_rate) - BEST) < 0.15
    assert all(1e-5 <= rate <= 3e-2 for rate in rates)


def test_the_same_search_twice_finds_the_same(job, trained, tmp_path):
    found = [tuning.tune(by_name("lora"), job, tmp_path / n, 7) for n in "ab"]
    assert found[0] == found[1]


def test_only_training_rows_choose(job, trained, tmp_path):
    _, rule = trained
    seen = []
    rule.then = seen.append
    tuning.tune(by_name("lora"), job, tmp_path, 1)
    (inner,) = seen
    rows = [str(row) for part in (inner.train, inner.evaluation) for row in part]
    assert sorted(rows) == sorted(str(row) for row in job.train)
    assert inner.validation is None and inner.trainer["eval_dataset"] is inner.evaluation
    assert fingerprint(inner.evaluation) != fingerprint(job.evaluation)


def test_a_rate_that_diverges_loses(job, trained, tmp_path):
    _, rule = trained

    def then(job):
        if job.args.learning_rate > 5e-4:
            raise DivergedError("the loss is nan")

    rule.then = then
    found = tuning.tune(by_name("lora"), job, tmp_path, 4)
    assert [t["state"] for t in found.trials] == ["complete", "failed", "complete", "failed"]
    assert found.learning_rate == pytest.approx(3e-4)
    rule.then = lambda job: (_ for _ in ()).throw(DivergedError("nan"))
    with pytest.raises(RankwiseError, match="no learning rate worked; the first: nan"):
        tuning.tune(by_name("lora"), job, tmp_path / "other", 3)


def test_what_falls_behind_is_stopped_early(job, trained, tmp_path):
    _, rule = trained
    ended = []

    def then(job):
        (watch,) = job.trainer["callbacks"]
        value = quality(job.args.learning_rate)
        for step in (2, 4, 6, 8):
            state = SimpleNamespace(global_step=step, max_steps=8)
            watch.on_evaluate(None, state, None, {"eval_accuracy": value})
        ended.append(job.args.learning_rate)

    rule.then = then
    found = tuning.tune(by_name("lora"), job, tmp_path, 12)
    states = [t["state"] for t in found.trials]
    assert states.count("pruned") >= 1 and len(ended) == states.count("complete")
    median = sorted(map(quality, ended))[len(ended) // 2]
    stopped = [t for t in found.trials if t["state"] == "pruned"]
    assert all(quality(t["learning_rate"]) <= median for t in stopped)


def test_workers_share_the_trials(job, trained, tmp_path):
    rates, rule = trained
    at_once, most = [0], [0]
    lock = threading.Lock()

    def then(job):
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        time.sleep(0.15)
        with lock:
            at_once[0] -= 1

    rule.then = then
    found = []
    workers = [
        threading.Thread(
            target=lambda: found.append(tuning.tune(by_name("lora"), job, tmp_path, 8))
        )
        for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(rates) == 8 and most[0] == 2
    assert found[0] == found[1]


def test_a_trial_that_was_killed_is_done_again(job, trained, tmp_path):
    rates, rule = trained

    class Killed(BaseException):
        """What no handler sees, as a signal."""

    def die(job):
        if len(rates) == 2:
            raise Killed

    rule.then = die
    with pytest.raises(Killed):
        tuning.tune(by_name("lora"), job, tmp_path, 5)
    found = tuning.tune(by_name("lora"), job, tmp_path, 5)
    assert len(found.trials) == 5 and len(rates) == 6
    assert rates.count(rates[1]) == 2
    again = tuning.tune(by_name("lora"), job, tmp_path, 5)  # all are there
    assert again == found and len(rates) == 6


def test_a_search_of_something_else_is_not_gone_on_with(job, trained, tmp_path):
    tuning.tune(by_name("lora"), job, tmp_path, 1)
    with pytest.raises(OutputError, match="had another method"):
        tuning.tune(by_name("lora", r=3), job, tmp_path, 1)
    other = replace(job, train=job.train.select(range(20)))
    with pytest.raises(OutputError, match="had another rows"):
        tuning.tune(by_name("lora"), other, tmp_path, 1)


@pytest.mark.parametrize("wrong", [(0, (1e-4, 1e-2)), (3, (1e-2, 1e-4)), (3, (0.0, 1e-2))])
def test_a_range_that_is_none(wrong, job, tmp_path):
    with pytest.raises(RankwiseError, match="give at least one trial and a range"):
        tuning.tune(by_name("lora"), job, tmp_path, *wrong)


def test_run_with_tune(tiny_bert, rows_dir, tmp_path, capsys):
    """Method and control are tuned alike, each at its own rate, and the record says how."""
    out = tmp_path / "out"
    line = ["run", "--method=lora", "--r=2", "--model_name_or_path", tiny_bert, "--data_dir"]
    line += [rows_dir, "--max_steps=4", "--per_device_train_batch_size=8", "--use_cpu"]
    main([*line, "--control=svd", "--tune=2", "--output_dir", str(out)])
    result = Result.load(out / "metrics.json")
    for found in (result, *result.controls):
        tuned = found.about["tuned"]
        assert len(tuned["trials"]) == 2 and tuned["metric"] == "accuracy" and tuned["rows"] == 4
        assert found.training["learning_rate"] == tuned["learning_rate"]
    assert not (tmp_path / "out.tune").exists()
    with pytest.raises(SystemExit):  # said before anything is tuned
        main([*line, "--tune=2", "--output_dir", str(out)])
    assert "not empty" in capsys.readouterr().err
    assert json.loads((out / "metrics.json").read_text())["about"]["tuned"]["trials"]
