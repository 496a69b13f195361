"""What is wrong with an evaluation's settings and rows, told before seconds go into importing torch. Torch-free."""

from __future__ import annotations

import glob
import os
from dataclasses import replace
from pathlib import Path

from conf.errors import ConfigError, UserError
from data_pipeline.io import read_json
from data_pipeline.task_config import TaskConfig
from data_pipeline.tasks import labelled_rows, read_rows
from train.checkpoint.manifest import read_manifest, resolve_checkpoint
from train.checkpoint.settings import read_settings
from train.config.evaluation import EvaluationConfig
from train.scores.settings import ScoreSettings
from train.scores.sheet import check_libraries


def check(config: EvaluationConfig) -> None:
    """Raises UserError for settings that do not fit each other, a checkpoint that is not there, a folder that is, and data that
    is missing or whose first row cannot be read.
    """
    if config.checkpoint is not None:
        resolve_checkpoint(config.checkpoint)
    labels = labels_of(config) if config.task.kind == "classification" else ()
    if not labels and (problems := config.task.evaluation_problems()):
        raise ConfigError([f"task.{problem}" for problem in problems])
    score_settings(replace(config.task, labels=labels or config.task.labels))
    if config.out is not None and os.path.lexists(config.out):
        raise UserError(f"out={config.out}: exists; an evaluation never replaces another, give a folder that is not there")
    if labels:
        for source in config.task.data:
            next(iter(labelled_rows(replace(config.task, labels=labels, label_texts=()), source)), None)
        return
    if config.task.kind in ("classification", "generation"):
        read_rows(config.task, limit=1)
        return
    for source in config.task.data:
        if not Path(source.path).expanduser().exists() and not glob.glob(source.path, recursive=True):  # noqa: PTH207
            raise UserError(f"task.data: {source.path}: no such corpus, file, folder or pattern; check the path")


def labels_of(config: EvaluationConfig) -> tuple[str, ...]:
    """The labels that the model tells apart by a head of its own; none of a language model."""
    if config.checkpoint is not None:
        folder = resolve_checkpoint(config.checkpoint)
        return read_settings(folder, read_manifest(folder)).model.labels
    path = Path(str(config.hf)) / "config.json"
    fields = read_json(path) if path.is_file() else {}
    if not any(str(name).endswith("ForSequenceClassification") for name in fields.get("architectures") or ()):
        return ()
    return tuple(str(label) for label in fields.get("id2label", {}).values())


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
