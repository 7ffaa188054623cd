"""`rankwise score`: every way to give references, and what is said of files that do not fit."""

import json
from pathlib import Path

import pytest

from rankwise.cli import main

for package in ("sacrebleu", "nltk", "snowballstemmer", "pycocoevalcap", "anyascii"):
    pytest.importorskip(package)

HYPS = ["the cat sat on the mat .", "a dog barks ."]
REFS = [["the cat sat on the mat .", "there is a cat ."], ["the dog barked ."]]


@pytest.fixture(autouse=True)
def no_tables(monkeypatch):
    """Reading METEOR's tables takes seconds."""
    monkeypatch.setattr("rankwise.metrics.meteor.tables_folder", lambda: None)


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "h.txt").write_text("\n".join(HYPS) + "\n")
    (tmp_path / "groups.txt").write_text("\n\n".join("\n".join(row) for row in REFS))
    rows = [json.dumps({"mr": "x", "references": row}) for row in REFS]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    for n in range(2):
        lines = [row[n] if n < len(row) else "" for row in REFS]
        (tmp_path / f"r{n}.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def scored(capsys, folder: Path, task: str, *references: str) -> dict:
    capsys.readouterr()
    paths = [str(folder / name) for name in references]
    files = ["--hypotheses", str(folder / "h.txt"), "--references", *paths]
    main(["score", "--task", task, *files, "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("task", ["e2e", "webnlg", "dart"])
def test_references_can_be_given_in_three_ways(capsys, folder, task):
    found = scored(capsys, folder, task, "groups.txt")
    assert found == scored(capsys, folder, task, "rows.jsonl")
    assert found == scored(capsys, folder, task, "r0.txt", "r1.txt")
    assert 0.4 < found["bleu"]["value"] < 1
    assert "version:" in found["bleu"]["signature"]


def test_without_json_a_line_a_figure(capsys, folder):
    files = ["--hypotheses", str(folder / "h.txt"), "--references", str(folder / "groups.txt")]
    main(["score", "--task", "dart", *files])
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()[1:]]
    assert [line[0] for line in lines] == [
        *("bleu", "bleu_given_references", "meteor_without_paraphrases", "ter")
    ]
    assert "|not_comparable:yes" in lines[2][2]  # at the end of a long signature


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"h.txt": "one\n"}, "has 1 texts and {0}/groups.txt references for 2 inputs"),
        ({"h.txt": ""}, "h.txt has no text in it"),
        ({"groups.txt": None}, "cannot read"),
        ({"groups.txt": '{"references": ["a"]}\n{"a"\n'}, "groups.txt:2: not JSON"),
        ({"groups.txt": '{"refs": ["a"]}\n'}, 'groups.txt:1: "references" is None; give a text'),
        ({"groups.txt": '{"references": ["a"]}\n{"references": []}\n'}, "input 2 has no reference"),
    ],
)
def test_files_that_do_not_fit_are_one_line(capsys, folder, change, said):
    for name, text in change.items():
        (folder / name).unlink()
        if text is not None:
            (folder / name).write_text(text)
    refused(capsys, folder, ["groups.txt"], said.format(folder))


def test_files_of_references_with_different_numbers_of_lines(capsys, folder):
    (folder / "r1.txt").write_text("only one\n")
    refused(capsys, folder, ["r0.txt", "r1.txt"], "different numbers of lines")


@pytest.mark.parametrize("lacks", ["task", "hypotheses", "references"])
def test_what_is_not_given_is_named(capsys, folder, lacks):
    given = {"task": "e2e", "hypotheses": str(folder / "h.txt"), "references": str(folder)}
    argv = [part for name, value in given.items() if name != lacks for part in (f"--{name}", value)]
    with pytest.raises(SystemExit):
        main(["score", *argv])
    assert f"needs --{lacks}" in capsys.readouterr().err


def refused(capsys, folder: Path, references: list[str], said: str) -> None:
    paths = [str(folder / name) for name in references]
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "score",
                "--task",
                "e2e",
                "--hypotheses",
                str(folder / "h.txt"),
                "--references",
                *paths,
            ]
        )
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.startswith("rankwise: ") and err.count("\n") == 1
    assert said in err, err
