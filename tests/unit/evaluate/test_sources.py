"""The corpora of a run that an evaluation reads when none are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.task_config import TaskConfig, TaskSource
from tests.unit.data_pipeline.corpora import prepared, some_texts
from train.stages.evaluate import _with_text


def test_a_corpus_without_held_out_text_is_left_out_and_told_of(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run itself trained on it, and passed it over in its evaluations."""
    bare = prepared(tmp_path, some_texts(30), held_out_fraction=0.0).folder
    sources = (TaskSource(path=str(corpus), name="a"), TaskSource(path=str(bare), name="b"))
    assert _with_text(sources, TaskConfig()) == [sources[0]]
    assert "b: has no validation text, it is left out" in capsys.readouterr().err
    assert _with_text(sources, TaskConfig(split="train")) == list(sources)
