"""Outputs of real systems against the figures that the official scorers gave them."""

import csv
import json
import os
from pathlib import Path

import pytest

from rankwise.metrics import score

FOLDER = os.environ.get("RANKWISE_SCORES")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(FOLDER is None, reason="RANKWISE_SCORES names no folder of outputs"),
]
for package in ("sacrebleu", "nltk", "snowballstemmer", "pycocoevalcap", "anyascii"):
    pytest.importorskip(package)

# The others agree to the printed digit. TER: sacrebleu's edits, not tercom's.
DIGITS = {"ter": 5e-4}


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")


def e2e(folder: Path, system: str) -> tuple[list[str], list[list[str]]]:
    with (folder / "testset_w_refs.csv").open(encoding="utf-8", newline="") as file:
        refs: dict[str, list[str]] = {}
        for row in csv.DictReader(file):
            refs.setdefault(row["mr"], []).append(row["ref"])
    with (folder / f"{system}.tsv").open(encoding="utf-8", newline="") as file:
        outputs = {row["MR"]: row["output"] for row in csv.DictReader(file, delimiter="\t")}
    return [outputs[mr] for mr in refs], list(refs.values())


def check(found, expected: dict[str, float]) -> None:
    values = {figure.name: figure.value for figure in found}
    for name, value in expected.items():
        printed = len(str(value).partition(".")[2])
        tolerance = DIGITS.get(name, max(1e-12, 0.5001 * 10.0**-printed))
        assert values[name] == pytest.approx(value, abs=tolerance), name


def of_e2e(block: dict, perl: str, python: str) -> dict[str, float]:
    names = {"BLEU": "bleu", "METEOR": "meteor", "ROUGE_L": "rouge_l", "CIDEr": "cider"}
    found = {ours: block[perl][theirs] for theirs, ours in names.items()}
    return found | {"nist": block[perl]["NIST"], "nist_python": block[python]["NIST"]}


@pytest.mark.parametrize("system", ["tgen", "tuda"])
def test_e2e(system):
    folder = Path(FOLDER)
    block = json.loads((folder / "scores.json").read_text())["e2e"][system]
    expected = of_e2e(block, "measure_scores.py (perl)", "measure_scores.py -p (python)")
    check(score("e2e", *e2e(folder / "e2e", system)), expected)


def test_the_scorers_own_example():
    folder = Path(FOLDER) / "e2e_example10"
    block = json.loads((folder.parent / "scores.json").read_text())["e2e_example10"]
    groups = (folder / "devel-conc.txt").read_text(encoding="utf-8").strip("\n").split("\n\n")
    found = score("e2e", lines(folder / "baseline-output.txt"), [g.split("\n") for g in groups])
    check(found, of_e2e(block, "perl", "python"))


WEBNLG = ("all", "old(seen)", "new(unseen)")


@pytest.mark.parametrize("part", ["dart", *WEBNLG])
def test_triples(part):
    folder = Path(FOLDER)
    scores = json.loads((folder / "scores.json").read_text())
    if part == "dart":
        folder, system, gold = folder / "dart", "bart-large_dart.txt", "all-delex"
        block = scores["dart"]["official"]
    else:
        name = part.partition("(")[0]
        folder, system, gold = folder / "webnlg2017", f"bart_{name}-cat.txt", f"gold-{name}-cat"
        block = scores["webnlg2017"]["official"][part]
    files = [lines(folder / f"{gold}-reference{n}.lex") for n in range(3)]
    found = score(
        "dart" if part == "dart" else "webnlg",
        lines(folder / system),
        [list(texts) for texts in zip(*files, strict=True)],
    )
    expected = {
        "bleu": round(block["BLEU"] / 100, 4),
        "meteor": block["METEOR"],
        "ter": block["TER"],
    }
    check(found, expected)


def test_ptb_tokens_of_every_text():
    from rankwise.metrics.captions import ptb_tokens

    rows = map(json.loads, lines(Path(FOLDER) / "e2e" / "ptb_tokenised.jsonl"))
    assert [r["text"] for r in rows if " ".join(ptb_tokens(r["text"])) != r["ptb"]] == []
