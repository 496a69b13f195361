"""The settings of an evaluation, and what is wrong with them and its rows, told before seconds go into importing torch.
Torch-free."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from conf.compose import compose, to_plain, validate
from conf.errors import ConfigError, UserError
from data_pipeline.io import read_json
from data_pipeline.task_config import ROW_KINDS, TaskConfig
from train.checkpoint.manifest import read_manifest, resolve_checkpoint
from train.checkpoint.settings import read_settings
from train.config.evaluation import VERBATIM, EvaluationConfig
from train.config.finetune import FinetuneConfig
from train.evaluate.reading import held_out_by, rows_of
from train.scores import selection
from train.scores.settings import ScoreSettings
from train.scores.sheet import check_libraries


def configure(overrides: Sequence[str], config_dir: str | None = None) -> EvaluationConfig:
    """The configuration that the words of the verb make. Where they choose no task it is, of a fine-tuned run, the one that
    it has learned, and where they give no data, the rows that it held out.

    Raises ConfigError with all that is wrong, and UserError for a checkpoint that cannot be read or has no such rows.
    """
    composed = compose("evaluate", overrides, config_dir, verbatim=VERBATIM)
    given = composed.tree.get("task") or {}
    place = composed.tree.get("checkpoint")
    if isinstance(place, str) and isinstance(given, dict) and "kind" not in given:
        composed = replace(composed, tree=composed.tree | {"task": _learned_task(place, given) | given})
    return validate(EvaluationConfig, composed)


def _learned_task(checkpoint: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The task of a fine-tuned run as its settings say it, on its own held-out rows unless data are given; else nothing."""
    try:
        folder = resolve_checkpoint(checkpoint)
    except UserError:
        return {}  # `check` tells of it; a job that waits for its checkpoint is submitted without
    manifest = read_manifest(folder)
    settings = read_settings(folder, manifest)
    if not isinstance(settings, FinetuneConfig):
        return {}
    if settings.task.kind == "preference":
        raise UserError(
            f"checkpoint={checkpoint}: has learned preferences, whose figures its run has measured (`longhaul report`); give "
            "task=generation or task=language with task.data=[{path: FILE}] for what it writes"
        )
    learned = replace(settings.task_of(settings.model.labels), validation=())
    if "data" not in given:
        run_dir = selection.home_of(folder, imported=False)
        learned = replace(learned, data=(held_out_by(run_dir, fingerprint=manifest.data_fingerprint),))
    return to_plain(learned)


def check(config: EvaluationConfig) -> None:
    """Raises UserError for settings that do not fit each other, a checkpoint that is not there, a folder that is, and data that
    is missing or whose first row cannot be read.
    """
    if config.checkpoint is not None:
        resolve_checkpoint(config.checkpoint)
    task = config.task
    labels = labels_of(config) if task.kind == "classification" else ()
    if labels:
        task = replace(task, labels=labels, label_texts=())
    elif problems := task.evaluation_problems():
        raise ConfigError([f"task.{problem}" for problem in problems])
    score_settings(task)
    if config.out is not None and os.path.lexists(config.out):
        raise UserError(f"out={config.out}: exists; an evaluation never replaces another, give a folder that is not there")
    for source in task.data:
        if task.kind in ROW_KINDS:
            next(rows_of(task, source, limit=1))
        elif not Path(source.path).expanduser().exists() and not glob.glob(source.path, recursive=True):  # noqa: PTH207
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
    elif task.kind in ("generation", "dialogue"):
        # An answer in a dialogue has no one right wording: the words that both have in common.
        settings = ScoreSettings(
            metrics=("rouge",) if task.kind == "dialogue" else task.metrics,
            language=task.language,
            tokenize=task.tokenize,
            normalization=task.normalization,
            stem=task.stem,
        )
    check_libraries(settings)
    return settings
