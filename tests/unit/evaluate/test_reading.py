"""Rows that a run has kept are checked before they are read: those that it has held out."""

from __future__ import annotations

from pathlib import Path

import pytest

from conf.errors import UserError
from data_pipeline.task_config import TaskSource
from tests.unit.data_pipeline.labelled import json_lines, prepared, task_of, tokenizer_in
from train.evaluate.reading import rows_of


def damage(path: Path) -> None:
    """Change a byte, and not the size."""
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def test_of_kept_rows_those_held_out_are_checked(tmp_path: Path) -> None:
    files = [
        json_lines(tmp_path / f"{name}.jsonl", {"sentence": name, "label": label})
        for name, label in (("one", "animal"), ("two", "tool"))
    ]
    task = task_of("classification", files[0], validation=(files[1],), labels=("animal", "tool"))
    folder = prepared(task, tokenizer_in(tmp_path / "tokenizer"), tmp_path / "rows").folder
    source = TaskSource(path=str(folder), split="validation")
    damage(folder / "train-tokens.npy")
    assert [row.id for row in rows_of(task, source)] == ["two.jsonl:1"], "what is not read need not be whole"
    damage(folder / "validation-tokens.npy")
    with pytest.raises(UserError, match=r"validation-tokens.npy: its content has changed: SHA-256 .* of rows.json"):
        list(rows_of(task, source))
