"""Which of the held-out rows a fine-tuning run measures its task by, and what it holds of them."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from conf.errors import UserError
from data_pipeline.encoded_rows import EncodedRows
from data_pipeline.rows_config import RowsConfig
from data_pipeline.tokenizer import Tokenizer
from tests.unit.convert.checkpoints import LLAMA
from tests.unit.data_pipeline.labelled import json_lines, prepared, task_of, tokenizer_in
from train.config.finetune import FinetuneConfig, ScoringConfig
from train.config.training import EvaluateConfig, RunConfig
from train.evaluate import examiner
from train.evaluate.engines import BATCH_TOKENS
from train.evaluate.examiner import TaskExaminer
from train.parallel import single_process

HELD_OUT = 7
LABELS = ("animal", "tool")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tokenizer_in(tmp_path_factory.mktemp("tokenizer"))


def examiner_of(folder: Path, tokenizer: Tokenizer, kind: str, *, rows: int = HELD_OUT, **scoring: Any) -> TaskExaminer:
    """Of a run that holds out so many rows."""
    names = ("sentence", "label") if kind == "classification" else ("prompt", "completion")
    lines = [dict(zip(names, (f"word {number}", LABELS[number % 2]), strict=True)) for number in range(rows)]
    files = [json_lines(folder / "train.jsonl", *lines[:3]), json_lines(folder / "dev.jsonl", *lines)]
    task = task_of(kind, files[0], validation=(files[1],), **({"metrics": ("rouge",)} if kind == "generation" else {}))
    found = prepared(task, tokenizer, folder / "rows")
    config = FinetuneConfig(
        run=RunConfig(name="tuned"),
        model=replace(LLAMA, vocab_size=tokenizer.vocab_size, labels=found.labels),
        initial_checkpoint="base",
        task=task,
        data=RowsConfig(sequence_length=64),
        evaluate=EvaluateConfig(probes=()),
        scoring=ScoringConfig(**scoring),
    )
    engine = SimpleNamespace(whole=lambda: nullcontext(None))
    held_out = SimpleNamespace(run=lambda before_batch: [{"loss": 1.5}])
    context = single_process("cpu")
    return TaskExaminer(config, context=context, engine=engine, held_out=held_out, rows=found)  # type: ignore[arg-type]


@pytest.mark.parametrize(("max_rows", "expected"), [(None, HELD_OUT), (3, 3), (100, HELD_OUT), (0, 0)])
def test_as_many_rows_are_labelled_as_are_asked_for(
    tmp_path: Path, tokenizer: Tokenizer, max_rows: int | None, expected: int
) -> None:
    one = examiner_of(tmp_path, tokenizer, "classification", max_rows=max_rows)
    assert len(one.rows) == len(one._inputs) == expected
    assert [row.id for row in one.rows] == [f"dev.jsonl:{number + 1}" for number in range(expected)]
    assert [ids.tolist() for ids in one._inputs] == [tokenizer.encode(row.prompt) for row in one.rows]
    assert one.metric == ("accuracy" if expected else "loss")


def test_no_more_rows_are_read_than_are_used(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    limits, whole = [], EncodedRows.validation_rows

    def noted(rows: EncodedRows, limit: int | None = None) -> Any:
        limits.append(limit)
        return whole(rows, limit)

    monkeypatch.setattr(EncodedRows, "validation_rows", noted)
    for number, (kind, max_rows) in enumerate([("classification", 3), ("generation", 2), ("generation", None)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        one = examiner_of(folder, tokenizer, kind, rows=202, max_rows=max_rows)
        assert len(one.rows) == limits[-1]
        held = [getattr(ids, "base", None) for ids in one._inputs]
        assert all(isinstance(base, np.memmap) for base in held), "what the model reads stays in its file"
    assert limits == [3, 2, 200]


@pytest.mark.parametrize("kind", ["classification", "generation"])
def test_without_rows_the_loss_is_measured_alone(tmp_path: Path, tokenizer: Tokenizer, kind: str) -> None:
    one = examiner_of(tmp_path, tokenizer, kind, max_rows=0)
    assert one.run(lambda _: None) == [{"loss": 1.5}] and one.criterion([{"loss": 1.5}]) == 1.5
    with pytest.raises(UserError, match=r"scoring.metric=accuracy: is no figure of this task, as scoring.max_rows=0 measures"):
        examiner_of(tmp_path, tokenizer, kind, max_rows=0, metric="accuracy")


@pytest.mark.parametrize(("given", "expected"), [(None, BATCH_TOKENS["cpu"]), (96, 96)])
@pytest.mark.parametrize(("kind", "asked"), [("classification", "tell_labels"), ("generation", "write_rows")])
def test_tokens_that_run_together(
    tmp_path: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    asked: str,
    given: int | None,
    expected: int,
) -> None:
    seen = []

    def note(*arguments: Any, engines: Any = None, progress: Any) -> Any:
        seen.append((engines or arguments[-1]).batch_tokens)
        raise InterruptedError

    monkeypatch.setattr(examiner, asked, note)
    with pytest.raises(InterruptedError):
        examiner_of(tmp_path, tokenizer, kind, batch_tokens=given).run(lambda _: None)
    assert seen == [expected]
