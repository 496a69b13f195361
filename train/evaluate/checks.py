"""What is wrong with an evaluation's settings and rows, told before seconds go into importing torch. Torch-free."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from conf.errors import UserError
from data_pipeline.task_config import TaskConfig
from data_pipeline.tasks import read_rows
from train.checkpoint.manifest import resolve_checkpoint
from train.config.evaluation import EvaluationConfig
from train.scores.settings import ScoreSettings
from train.scores.sheet import check_libraries


def check(config: EvaluationConfig) -> None:
    """Raises UserError for settings that do not fit each other, a checkpoint that is not there, a folder that is, and data that
    is missing or whose first row cannot be read.
    """
    if config.checkpoint is not None:
        resolve_checkpoint(config.checkpoint)
    score_settings(config.task)
    if config.out is not None and os.path.lexists(config.out):
        raise UserError(f"out={config.out}: exists; an evaluation never replaces another, give a folder that is not there")
    if config.task.kind in ("classification", "generation"):
        read_rows(config.task, limit=1)
        return
    for source in config.task.data:
        if not Path(source.path).expanduser().exists() and not glob.glob(source.path, recursive=True):  # noqa: PTH207
            raise UserError(f"task.data: {source.path}: no such corpus, file, folder or pattern; check the path")


def score_settings(task: TaskConfig) -> ScoreSettings:
    """How the task's examples are scored. Raises UserError for settings that do not fit, or a library that is missing."""
    settings = ScoreSettings()
    if task.kind == "classification":
        settings = ScoreSettings(labels=task.labels, positive=task.positive, bins=task.bins)
    elif task.kind == "generation":
        settings = ScoreSettings(
            metrics=task.metrics,
            language=task.language,
            tokenize=task.tokenize,
            normalization=task.normalization,
            stem=task.stem,
        )
    check_libraries(settings)
    return settings
