"""The scores in a model card: those of the checkpoint alone, as people and as the hub read them; no paths of a machine."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from conf.errors import UserError
from tests.unit.convert.checkpoints import LLAMA, write_checkpoint
from tests.unit.tools.comparable import evaluate, labelled, texts
from train.config.export import ExportConfig
from train.scores.settings import ScoreSettings
from train.stages.export import run


def card_of(tmp_path) -> str:
    """README.md of an export of the run's checkpoint."""
    run(ExportConfig(checkpoint=str(tmp_path / "run"), out=str(tmp_path / "hf"), proof=False))
    return (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")


def test_scores_stand_in_a_table_and_in_the_hubs_metadata(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "run", LLAMA)
    settings = ScoreSettings(labels=("负面", "正面<b>", "never|"))
    rows = [replace(row, probabilities=None) for row in labelled(0.8)]
    evaluate(checkpoint, texts(3.0), data="a" * 64)
    evaluate(checkpoint, rows, kind="classification", name="情感|sst2", settings=settings, confidence=0.9)
    card = card_of(tmp_path)
    assert str(tmp_path) not in card and "/somewhere" not in card
    table = card[card.index("## Scores") : card.index("## Proof")]
    assert "### language\n\n| figure | value | 95 % interval | data | examples |" in table
    value, interval = next(line for line in table.splitlines() if line.startswith("| loss ")).split(" | ")[1:3]
    low, high = map(float, interval.split(" to "))
    assert low < float(value) < high and "| held | 200 |" in table
    assert "### 情感\\|sst2" in table and "90 % interval" in table and "| accuracy | 0." in table
    assert "[" not in table, "figures of single labels are in evaluation.json"

    results = ModelCard(card).data.eval_results
    metrics = {(result.task_type, result.metric_type): result for result in results}
    assert metrics["text-classification", "matthews_correlation"].metric_name == "mcc"
    loss = metrics["text-generation", "loss"]
    assert (loss.task_name, loss.dataset_name, loss.dataset_type) == ("language", "held", "unknown")
    assert loss.dataset_revision == "a" * 64 and loss.metric_value == pytest.approx(float(value), abs=1e-4)
    assert ModelCard(card).data.tags == ["llama", "longhaul", "pretrained"]


def test_undefined_scores_have_their_reason_and_are_not_in_the_metadata(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "run", LLAMA)
    rows = [replace(row, probabilities=None, truths=("yes",), output="yes") for row in labelled(1.0)]
    evaluate(checkpoint, rows, kind="classification", name="easy", settings=ScoreSettings(labels=("yes", "no")))
    card = card_of(tmp_path)
    assert "| mcc | - | the truth is the same for all examples | held | 200 |" in card
    assert "matthews_correlation" not in card and "type: accuracy" in card


def test_sources_have_their_own_data_and_counts(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "run", LLAMA)
    folder = evaluate(checkpoint, [replace(one, source="ab"[place % 2]) for place, one in enumerate(texts(3.0))])
    values = json.loads((folder / "evaluation.json").read_text())
    values["data"] = [{"name": name, "path": "/x", "hash": name * 64, "examples": 100} for name in "ab"]
    (folder / "evaluation.json").write_text(json.dumps(values))
    card = card_of(tmp_path)
    rows = [line for line in card.splitlines() if line.startswith(("| loss ", "| a/loss ", "| b/loss "))]
    assert [row.rsplit(" | ", 2)[1:] for row in rows] == [["a, b", "200 |"], ["a", "100 |"], ["b", "100 |"]]
    of_data = {result.dataset_name: result for result in ModelCard(card).data.eval_results if result.metric_type == "loss"}
    assert of_data["a"].dataset_revision == "a" * 64 and set(of_data) == {"a, b", "a", "b"}


def test_of_several_the_newest_and_of_other_checkpoints_none(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "run", LLAMA)
    evaluate(checkpoint, texts(8.0), model={"hash": "0" * 64}, folder="of-this-step-before-it-was-trained-again")
    evaluate(checkpoint, texts(9.0), model={"step": 3, "hash": None}, folder="of-another-step")
    evaluate(checkpoint, texts(7.0), folder="z-older")
    evaluate(checkpoint, texts(3.0), folder="a-newer")
    evaluate(checkpoint, texts(3.0, number=5), data=f"{'a' * 64}:5", folder="a-quick-look", limit=5)
    card = card_of(tmp_path)
    assert "### language\n" in card and "### language, the first 5 of each source\n" in card
    line, _ = [line for line in card.splitlines() if line.startswith("| loss |")]
    assert line.startswith("| loss | 3.0")


def test_without_an_evaluation_the_card_says_so(tmp_path):
    write_checkpoint(tmp_path / "run", LLAMA)
    card = card_of(tmp_path)
    assert "## Scores\n\nIt was not evaluated.\n" in card and "model-index" not in card


def test_a_damaged_evaluation_is_told_before_anything_is_written(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "run", LLAMA)
    (evaluate(checkpoint, texts(3.0)) / "evaluation.json").write_text("{")
    with pytest.raises(UserError, match=r"evaluation\.json: damaged .*; remove .* and evaluate again"):
        card_of(tmp_path)
    assert not list(tmp_path.glob("hf*"))
