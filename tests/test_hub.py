"""The hub's conventions, by huggingface_hub's own reader; an upload of one folder."""

from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from conftest import make_rows
from rankwise import RankwiseError, Result, fit
from rankwise.cli import main
from rankwise.hub import metadata
from rankwise.report import write_card
from test_predicting import arguments


@pytest.fixture(scope="module")
def run(tiny_bert, tmp_path_factory):
    out = tmp_path_factory.mktemp("hub") / "run"
    rows = make_rows(48, 0)
    args = arguments(out, max_steps=2)
    return fit("lora", rows, model=tiny_bert, output_dir=out, args=args)


def test_the_hub_reads_the_card(run, tmp_path):
    task = run.result.task | {"name": "glue/sst2"}
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    ranks = {name: 1 + n % 3 for n, name in enumerate(run.plan.modules)}
    choice = {"choice": "1,000 of 8,000 parameters are as good as all"}
    write_card(folder, replace(run.result, task=task, figures=choice), run.plan.with_ranks(ranks))
    card = ModelCard.load(folder / "README.md")
    data = card.data
    assert data.base_model == "org/base" and data.library_name == "peft"
    assert data.pipeline_tag == "text-classification" and data.datasets == ["glue"]
    assert data.tags == ["base_model:adapter:org/base", "lora", "rankwise"]
    first = data.eval_results[0]
    assert first.metric_type == run.result.task["metrics"][0]
    assert first.metric_value == pytest.approx(run.result.metrics[first.metric_type], abs=1e-6)
    assert (first.dataset_type, first.dataset_split) == ("glue", run.result.split)
    assert "as good as all" in card.text and "rankwise export" in card.text
    write_card(folder, run.result, run.plan)  # one rank: nothing to warn of
    assert "rankwise export" not in (folder / "README.md").read_text()


def test_peft_keeps_what_the_card_says(run, tmp_path):
    import shutil

    from rankwise import load

    shutil.copytree(run.folder / "adapter", tmp_path / "adapter")
    write_card(tmp_path / "adapter", run.result, run.plan)
    load(tmp_path / "adapter").model.save_pretrained(str(tmp_path / "adapter"))
    card = ModelCard.load(tmp_path / "adapter/README.md")
    assert card.data.pipeline_tag == "text-classification" and card.data.eval_results
    assert "## Ranks" in card.text  # of the tags PEFT keeps its own alone


def test_a_folders_name_and_a_foreign_product_are_left_out(run, tmp_path):
    found = metadata(run.result, str(tmp_path), "", lora=False)
    assert "base_model" not in found and "library_name" not in found
    assert found["tags"] == ["rankwise"]
    assert isinstance(run.result, Result)


def test_an_upload_is_the_adapters_folder_alone(tiny_bert, tmp_path, monkeypatch, capsys):
    from huggingface_hub import HfApi

    from conftest import write_jsonl

    seen = {}

    def upload(self, repo_id, folder_path):
        seen.update(repo=repo_id, folder=folder_path)
        return "https://hub/there"

    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, exist_ok: seen.update(made=name))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    train = write_jsonl(tmp_path / "train.jsonl", make_rows(48, 0))
    command = (
        f"train --model_name_or_path {tiny_bert} --train_file {train} --max_steps 2 --use_cpu "
        f"--output_dir {tmp_path}/out --push_to_hub me/small"
    )
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(SystemExit):
        main(command.split())
    assert "needs a token" in capsys.readouterr().err and not (tmp_path / "out").exists()
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "x")
    main(command.split())
    folder = str(tmp_path / "out/adapter")
    assert seen == {"made": "me/small", "repo": "me/small", "folder": folder}
    assert "uploaded to https://hub/there" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command.split()[:-1], "no//name"])
    assert "is no repository's name" in capsys.readouterr().err
    assert RankwiseError
