"""Small models to evaluate: a checkpoint of random weights, opened; and its engines."""

from __future__ import annotations

from pathlib import Path

from tests.unit.convert.checkpoints import LLAMA, write_checkpoint
from train.config.model import ModelConfig
from train.evaluate.engines import Engines
from train.evaluate.subject import Subject, load_engines, open_subject
from train.parallel import single_process


def subject_in(folder: Path, model: ModelConfig = LLAMA, *, corpus: Path | None = None) -> Subject:
    """The checkpoint that is written into `folder`."""
    return open_subject(str(write_checkpoint(folder / "run", model, corpus=corpus)), None, verify=True)


def engines_of(subject: Subject, *, batch_tokens: int = 512) -> Engines:
    """Its model in memory."""
    return load_engines(subject, single_process(), dtype="fp32", batch_tokens=batch_tokens)
