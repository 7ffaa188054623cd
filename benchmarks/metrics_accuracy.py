"""Every figure of generated texts against the official scorers', and the seconds it takes.

    python benchmarks/metrics_accuracy.py FOLDER

FOLDER holds outputs of systems, their references, and `scores.json` with what the official scorers
say of them. Writes benchmarks/results/metrics_accuracy.json.
"""

import csv
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

from rankwise.files import write_json
from rankwise.metrics import score

RESULT = Path(__file__).parent / "results" / "metrics_accuracy.json"
PERL, PYTHON = "measure_scores.py (perl)", "measure_scores.py -p (python)"


def lines(path: Path) -> list[str]:
    """The lines of a file, blank ones too."""
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")


def e2e_official(perl: dict, python: dict) -> dict[str, float]:
    """The E2E scorer's figures by our names."""
    names = {"BLEU": "bleu", "METEOR": "meteor", "ROUGE_L": "rouge_l", "CIDEr": "cider"}
    found = {ours: perl[theirs] for theirs, ours in names.items()}
    return found | {"nist": perl["NIST"], "nist_python": python["NIST"]}


def triples_official(block: dict) -> dict[str, float]:
    """The figures of the WebNLG scripts by our names; BLEU as a share, as it is printed."""
    found = {"bleu": round(block["BLEU"] / 100, 4), "meteor": block["METEOR"], "ter": block["TER"]}
    return found


def cases(folder: Path) -> dict[str, tuple]:
    """Name -> benchmark, hypotheses, references, official figures."""
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    with (folder / "e2e" / "testset_w_refs.csv").open(encoding="utf-8", newline="") as file:
        refs: dict[str, list[str]] = {}
        for row in csv.DictReader(file):
            refs.setdefault(row["mr"], []).append(row["ref"])
    found: dict[str, tuple] = {}
    for system in ("tgen", "tuda"):
        with (folder / "e2e" / f"{system}.tsv").open(encoding="utf-8", newline="") as file:
            outputs = {row["MR"]: row["output"] for row in csv.DictReader(file, delimiter="\t")}
        block = scores["e2e"][system]
        official = e2e_official(block[PERL], block[PYTHON])
        found[f"e2e {system}"] = "e2e", [outputs[mr] for mr in refs], list(refs.values()), official
    example = folder / "e2e_example10"
    groups = (example / "devel-conc.txt").read_text(encoding="utf-8").strip("\n").split("\n\n")
    official = e2e_official(scores["e2e_example10"]["perl"], scores["e2e_example10"]["python"])
    found["e2e example of the scorer"] = (
        "e2e",
        lines(example / "baseline-output.txt"),
        [group.split("\n") for group in groups],
        official,
    )
    files = {"dart": ("dart", "bart-large_dart.txt", "all-delex", scores["dart"]["official"])}
    for part, block in scores["webnlg2017"]["official"].items():
        name = part.partition("(")[0]
        gold = f"gold-{name}-cat"
        files[f"webnlg {part}"] = "webnlg2017", f"bart_{name}-cat.txt", gold, block
    for case, (where, system, gold, block) in files.items():
        columns = [lines(folder / where / f"{gold}-reference{n}.lex") for n in range(3)]
        references = [list(texts) for texts in zip(*columns, strict=True)]
        suite = "dart" if where == "dart" else "webnlg"
        hypotheses = lines(folder / where / system)
        found[case] = suite, hypotheses, references, triples_official(block)
    return found


def main(folder: Path) -> None:
    """Scores every case and writes the result."""
    result: dict = {
        "versions": {
            p: version(p) for p in ("sacrebleu", "nltk", "snowballstemmer", "pycocoevalcap")
        }
    }
    for case, (suite, hypotheses, references, official) in cases(folder).items():
        started = time.perf_counter()
        figures = {f.name: f for f in score(suite, hypotheses, references)}
        seconds = round(time.perf_counter() - started, 1)
        rows = {
            name: {
                "ours": round(figures[name].value, 6),
                "official": round(value, 6),
                "difference": round(figures[name].value - value, 6),
                "signature": figures[name].signature,
            }
            for name, value in official.items()
        }
        result[case] = {"texts": len(hypotheses), "seconds": seconds, "figures": rows}
        said = ", ".join(f"{n} {r['ours']:.4f} ({r['official']:.4f})" for n, r in rows.items())
        print(f"{case}: {said}; {seconds} s", flush=True)
    write_json(RESULT, result)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
