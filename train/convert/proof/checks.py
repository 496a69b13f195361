"""All checks of the proof, in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from data_pipeline.loader import Loader
from train.checkpoint.reader import CheckpointReader
from train.config.model import ModelConfig
from train.convert.proof.files import prove_config, prove_tokenizer, prove_weights
from train.convert.proof.finding import Finding
from train.convert.proof.labels import prove_rows
from train.convert.proof.losses import prove_loss, prove_perplexity
from train.convert.proof.ours import OurModel
from train.convert.proof.outputs import prove_generation, prove_logits
from train.convert.proof.theirs import open_theirs
from train.convert.weights import WeightFormat


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The Hugging Face folder that is held against a checkpoint."""

    folder: Path
    tokenizer: Path
    """Folder of its tokenizer; for an export the same."""
    weights: WeightFormat = "safetensors"


def prove(
    reader: CheckpointReader,
    subject: Subject,
    *,
    rounding: torch.dtype | None,
    held_out: Loader | Finding,
    limit: int | None,
    read_back: Callable[[Path], ModelConfig] | None = None,
) -> list[Finding]:
    """All checks, in order; those that need the model of transformers are left out when it does not load.

    `rounding` is the dtype to which the checkpoint's weights were rounded when the folder was written; None: they are the
    folder's own. `held_out` is the held-out text, of which `limit` sequences are read, or a finding that says why there is
    none. `read_back` reads the model's settings from a folder's config.json; None: they are not compared as such.
    """
    model, folder = reader.model, subject.folder
    theirs, keys = open_theirs(folder, model, subject.weights)
    findings = [keys, prove_weights(reader, folder, rounding=rounding, format=subject.weights)]
    if read_back is not None:
        findings.append(prove_config(model, folder, read_back))
    findings.append(prove_tokenizer(reader.tokenizer_folder, subject.tokenizer))
    if theirs is None:
        return findings
    ours = OurModel(reader, model, rounding)
    findings.append(prove_logits(ours, theirs, model))
    if model.labels:
        rows = prove_rows(ours, theirs, model, tokenizer_folder=subject.tokenizer, is_foreign=rounding is None)
        return [*findings, rows, held_out]
    findings += [
        prove_generation(ours, theirs, model),
        prove_perplexity(ours, theirs, model, tokenizer_folder=reader.tokenizer_folder),
    ]
    findings.append(held_out if isinstance(held_out, Finding) else prove_loss(ours, theirs, held_out, limit=limit))
    return findings
