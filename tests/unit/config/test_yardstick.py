"""By what evaluations of a run are compared: its figure, and the samples or rows that it is measured on."""

from __future__ import annotations

import pytest

from conf.compose import compose, validate
from tests.unit.config.words import FINETUNE, pretrain_config
from train.config.finetune import FinetuneConfig

LABELS = ["task=classification", "task.columns=[text,label]"]


def finetune_config(*words: str) -> FinetuneConfig:
    return validate(FinetuneConfig, compose("finetune", [*FINETUNE, *words]))


def test_of_pretraining_it_is_the_loss() -> None:
    assert pretrain_config("evaluate.max_samples=64").yardstick == "loss with evaluate.max_samples=64"


@pytest.mark.parametrize(
    ("words", "metric", "rows", "yardstick"),
    [
        (["task=dialogue"], "loss", 200, "loss with evaluate.max_samples=null"),
        (["task=dialogue", "scoring.max_rows=9"], "loss", 9, "loss with evaluate.max_samples=null"),
        (["task=dialogue", "scoring.metric=rougeL"], "rougeL", 200, "rougeL with scoring.max_rows=200"),
        (["task=preference", "evaluate.max_samples=8"], "reward_accuracy", 200, "reward_accuracy with evaluate.max_samples=8"),
        (LABELS, "accuracy", None, "accuracy with scoring.max_rows=null"),
        ([*LABELS, "scoring.max_rows=50"], "accuracy", 50, "accuracy with scoring.max_rows=50"),
        ([*LABELS, "scoring.max_rows=0"], "loss", 0, "loss with evaluate.max_samples=null"),
    ],
)
def test_of_fine_tuning_it_follows_from_the_task(words: list[str], metric: str, rows: int | None, yardstick: str) -> None:
    config = finetune_config(*words)
    assert (config.metric, config.scored_rows, config.yardstick) == (metric, rows, yardstick)
