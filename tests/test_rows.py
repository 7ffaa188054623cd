"""Rows in two parts: the draws that the result files rest on, and their fingerprint."""

import pytest
from datasets import Dataset

from rankwise.errors import DataError
from rankwise.rows import fingerprint, hold_out, two_sets
from rankwise.tasks import load_task

TEN = {"row": list(range(10)), "text": [f"t{n}" for n in range(10)]}


@pytest.mark.parametrize(
    ("seed", "train", "validation"),
    [(0, [4, 6, 2, 7, 3, 5, 9], [0, 8, 1]), (7, [8, 0, 7, 1, 3, 6, 2], [4, 5, 9])],
)
def test_the_draws_are_those_of_the_result_files(seed, train, validation):
    """Another draw would put other rows behind every result in experiments/results."""
    found = two_sets(Dataset.from_dict(TEN), None, 0.3, seed)
    assert (found.train["row"][:], found.validation["row"][:]) == (train, validation)
    plain = two_sets(list(range(10)), None, 0.3, seed)  # any dataset with a length and an index
    assert (list(plain.train), list(plain.validation)) == (train, validation)


def test_a_task_and_a_method_hold_out_the_same_rows(tmp_path):
    rows = Dataset.from_dict({"text": [f"t{n}" for n in range(40)], "label": [0, 1] * 20})
    rows.to_json(tmp_path / "train.jsonl")
    task = load_task(train_file=tmp_path / "train.jsonl", seed=3)
    expected = two_sets(rows, None, 0.1, 3)
    assert task.train["text"][:] == expected.train["text"][:]
    assert task.validation["text"][:] == expected.validation["text"][:]


def test_the_held_out_rows_are_as_many_as_asked():
    found = hold_out(range(10), 1, seed=0)
    assert sorted([*found.train, *found.validation]) == list(range(10))
    assert len(found.validation) == 1


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_an_empty_part_is_refused(fraction):
    with pytest.raises(DataError, match=f"10 rows at validation_fraction {fraction}"):
        two_sets(list(range(10)), None, fraction, 0)


def test_fingerprint_is_that_of_rows_and_order():
    rows = Dataset.from_dict(TEN)
    assert fingerprint(two_sets(rows, None, 0.3, 0).train) == (
        "be293b9b50a6dfb7e6a6b755474d61628e0f4dc421a4885cafd301b809773061"
    )
    assert fingerprint(rows) == fingerprint(rows.with_format("torch"))
    assert fingerprint(rows) != fingerprint(rows.select(range(9, -1, -1)))
    assert fingerprint(list(range(10))) is None
