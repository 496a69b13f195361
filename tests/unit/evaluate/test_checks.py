"""What is told before torch is imported: settings, the model's place, the folder to make, the data and its first row."""

from __future__ import annotations

from pathlib import Path

import pytest

from conf.compose import compose, validate
from conf.errors import UserError
from tests.unit.convert.checkpoints import LLAMA, write_checkpoint
from train.config.evaluation import EvaluationConfig
from train.evaluate.checks import check, score_settings

ROWS = ["task.prompt='{text}'", "task.data=[{path: rows.tsv}]"]
LABELS = ["task=classification", *ROWS, "task.labels=[a,b]"]
OUTPUTS = ["task=translation", *ROWS]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "run", LLAMA)
    (tmp_path / "rows.tsv").write_text("text\ttarget\nx\ta\ny\tnone of them\n")
    return tmp_path


def config(*words: str) -> EvaluationConfig:
    return validate(EvaluationConfig, compose("evaluate", ["checkpoint=run", *words]))


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["out=new/folder"],
        ["task.data=[{path: rows.tsv}]"],
        ["task.data=[{path: '*.tsv'}]"],
        ["task.data=[{path: .}]"],
        LABELS,  # what is wrong with the second row is told when all are read
        OUTPUTS,
        ["task=harness", "task.tasks=[any]"],
    ],
)
def test_what_fits(words: list[str]) -> None:
    check(config(*words))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["checkpoint=nowhere"], "checkpoint=nowhere: no such folder"),
        (["out=run"], "out=run: exists; an evaluation never replaces another"),
        (["task.data=[{path: gone.txt}]"], "task.data: gone.txt: no such corpus, file, folder or pattern"),
        (["task.data=[{path: '*.txt'}]"], "task.data: *.txt: no such corpus, file, folder or pattern"),
        ([*LABELS, "task.data=[{path: gone.tsv}]"], "gone.tsv: cannot be read (No such file"),
        ([*LABELS, "task.data=[{path: rows.tsv, targets: rows.tsv}]"], "targets=rows.tsv is for format=lines"),
        ([*LABELS, "task.prompt='{sentence}'"], "rows.tsv:2: task.prompt names 'sentence'"),
        ([*LABELS, "task.target=label"], "rows.tsv:2: task.target=label is no column"),
        ([*LABELS, "task.labels=[c,d]"], "rows.tsv:2: label 'a' is not among task.labels=[c, d]"),
        ([*LABELS, "task.positive=c"], "positive='c'"),
        ([*LABELS, "task.bins=0"], "bins=0: a reliability curve needs at least 1"),
        ([*OUTPUTS, "task.tokenize=spaces"], "spaces"),
        ([*OUTPUTS, "task.stem=true", "task.language=de"], "stem=true needs English, got language=de"),
        ([*OUTPUTS, "task.metrics=[bleu,bleu]"], "metrics=['bleu', 'bleu']: must differ"),
    ],
)
def test_what_does_not(words: list[str], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        check(config(*words))
    assert expected in str(caught.value)


def test_settings_follow_the_kind() -> None:
    settings = score_settings(config(*LABELS, "task.positive=a", "task.bins=7").task)
    assert (settings.labels, settings.positive, settings.bins) == (("a", "b"), "a", 7)
    settings = score_settings(config(*OUTPUTS, "task.language=zh").task)
    assert (settings.metrics, settings.language, settings.labels) == (("bleu", "chrf", "ter"), "zh", None)
    assert score_settings(config().task).metrics == ()
