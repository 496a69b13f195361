"""The model card of a model that was fine-tuned: its task, and how it is asked."""

from __future__ import annotations

import pytest

from conf.compose import write_config
from data_pipeline.rows_config import RowsConfig
from data_pipeline.task_config import TaskConfig, TaskSource
from tests.unit.convert.checkpoints import LLAMA, rewritten, write_checkpoint
from train.checkpoint.manifest import read_manifest
from train.checkpoint.reader import CheckpointReader
from train.config.finetune import FinetuneConfig
from train.config.training import BatchConfig, BudgetConfig, EvaluateConfig, RunConfig
from train.convert.card import model_card


@pytest.mark.parametrize(
    ("kind", "data", "told"),
    [
        ("dialogue", RowsConfig(sequence_length=64, system="Be\nkind."), "the system said first: Be kind."),
        ("generation", RowsConfig(sequence_length=64), "It writes what belongs behind a prompt"),
    ],
)
def test_the_card_tells_the_task(tmp_path, kind, data, told):
    folder = write_checkpoint(tmp_path / "run", LLAMA)
    prompt = {"prompt": "{text}"} if kind == "generation" else {}
    config = FinetuneConfig(
        run=RunConfig(name="tuned"),
        model=LLAMA,
        initial_checkpoint=str(tmp_path / "somewhere/first"),
        task=TaskConfig(kind=kind, name="lesson", data=(TaskSource(path=str(tmp_path / "rows.jsonl")),), **prompt),
        data=data,
        batch=BatchConfig(sequences=4, micro_batch=4),
        budget=BudgetConfig(steps=10),
        evaluate=EvaluateConfig(probes=()),
    )
    write_config(config, folder / "config.yaml")
    files = {name: vars(file) for name, file in read_manifest(folder).files.items() if name != "config.yaml"}
    rewritten(folder, written_by="finetune", files=files)
    card = model_card(CheckpointReader(folder), {"proof": {}, "not_proved": "not asked"})
    assert told in card and "fine-tuned to step 7" in card and "finetuned]" in card
    assert f"| task | lesson, a {kind} |" in card and "| data | rows of rows.jsonl |" in card
    assert ("apply_chat_template" in card) == (kind == "dialogue")
    assert str(tmp_path) not in card
