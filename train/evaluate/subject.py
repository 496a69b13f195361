"""The model that is evaluated: a checkpoint, or a Hugging Face folder; its tokenizer, and what tells it from others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conf.errors import UserError
from data_pipeline.task_config import TaskSource
from data_pipeline.tokenizer import Tokenizer
from train.checkpoint.manifest import MANIFEST, file_facts, resolve_checkpoint
from train.checkpoint.reader import CheckpointReader
from train.config.imported import ImportedConfig
from train.config.model import ModelConfig
from train.config.pretrain import PretrainConfig
from train.convert.hf_import import fetch
from train.convert.hf_reader import HuggingFaceReader
from train.inference.batched import BatchGenerator
from train.inference.likelihood import LikelihoodScorer
from train.inference.load import load_decoder, resolve_dtype
from train.inference.special import special_id
from train.model.cost import num_parameters
from train.parallel import ParallelContext

BATCH_TOKENS = {"cpu": 1024, "cuda": 65_536}
"""A CPU is quickest while the activations of a batch stay in its cache (EXPERIMENTS.md)."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """All that is known of a model before its weights are read."""

    reader: CheckpointReader | HuggingFaceReader
    tokenizer: Tokenizer
    opening: tuple[int, ...]
    """Ids that the model has learned to find before a text; none for our own runs."""
    identity: dict[str, Any]
    """See `train.scores.record.Evaluation.model`."""
    folder: Path
    """Below it lie its evaluations."""

    @property
    def model(self) -> ModelConfig:
        """Shape of the model."""
        return self.reader.model

    @property
    def run(self) -> PretrainConfig | None:
        """Settings of the run that made it; None for one from elsewhere."""
        settings = getattr(self.reader, "settings", None)
        return settings if isinstance(settings, PretrainConfig) else None

    @property
    def label(self) -> str:
        """What the folders of its evaluations begin with."""
        if "step" in self.identity:
            return f"step-{self.identity['step']:08d}"
        return Path(str(self.identity["path"])).resolve().name

    @property
    def end_of_document(self) -> int | None:
        """Id of the token that closes a document; None where the tokenizer names none."""
        return special_id(self.tokenizer, "eos_token")

    @property
    def first(self) -> tuple[int, ...]:
        """What stands before a text that has nothing before it: the opening, or else the end of another document."""
        if self.opening:
            return self.opening
        end = self.end_of_document
        if end is None:
            raise UserError(
                f"{self.tokenizer.folder}: names neither a beginning nor an end of texts, so nothing can stand first"
            )
        return (end,)

    @property
    def known_ids(self) -> int:
        """Ids that both the model and the tokenizer know."""
        return min(self.tokenizer.vocab_size, self.model.vocab_size)

    def bytes_of_ids(self) -> np.ndarray:
        """UTF-8 bytes of every id of the model, int64 [V]; 0 for those that the tokenizer does not know.

        Raises UserError for a tokenizer whose tokens are not bytes of the text.
        """
        known = self.tokenizer.token_bytes()[: self.model.vocab_size]
        return np.pad(known, (0, self.model.vocab_size - len(known))).astype(np.int64)

    def own_sources(self) -> tuple[TaskSource, ...]:
        """The corpora that its run was trained on; none for a model from elsewhere."""
        if self.run is None:
            return ()
        return tuple(TaskSource(path=source.path, name=source.label) for source in self.run.data.sources)


def open_subject(checkpoint: str | None, hf: str | None, *, verify: bool, hashed: bool = True) -> Subject:
    """Find the model. `verify`: compare a checkpoint's files with their hashes. `hashed`: read the files of a Hugging Face
    folder for their hash, which one rank alone needs.

    Raises UserError for one that is not there, cannot be trusted, or that our decoder cannot take.
    """
    if checkpoint is not None:
        reader = CheckpointReader(resolve_checkpoint(checkpoint))
        if verify:
            reader.verify()
        return _of_checkpoint(reader)
    assert hf is not None, "the settings ask for one of the two"
    folder, commit = fetch(hf, revision=None, format="safetensors")
    foreign = HuggingFaceReader(folder)
    tokenizer = Tokenizer(folder)
    identity = {
        "path": hf,
        "hash": foreign.hash if hashed else "",
        "parameters": num_parameters(foreign.model),
        "revision": commit,
    }
    identity |= {"tokenizer": tokenizer.sha256, "family": foreign.model.family}
    return Subject(reader=foreign, tokenizer=tokenizer, opening=tuple(tokenizer.opening()), identity=identity, folder=Path())


def _of_checkpoint(reader: CheckpointReader) -> Subject:
    tokenizer = Tokenizer(reader.tokenizer_folder)
    identity: dict[str, Any] = {
        "path": str(reader.path),
        "hash": file_facts(reader.path / MANIFEST).sha256,
        "parameters": num_parameters(reader.model),
        "step": reader.step,
        "tokens": reader.tokens,
        "tokenizer": tokenizer.sha256,
        "family": reader.model.family,
    }
    if isinstance(reader.settings, ImportedConfig):
        return Subject(
            reader=reader, tokenizer=tokenizer, opening=tuple(tokenizer.opening()), identity=identity, folder=reader.path
        )
    identity["run"] = reader.settings.run.name
    at_home = reader.path.parent.name == "checkpoints"
    home = reader.path.parent.parent if at_home else reader.path
    return Subject(reader=reader, tokenizer=tokenizer, opening=(), identity=identity, folder=home)


@dataclass(frozen=True, kw_only=True)
class Engines:
    """The model in memory, ready to score and to write."""

    scorer: LikelihoodScorer
    generator: BatchGenerator


def load_engines(subject: Subject, context: ParallelContext, *, dtype: str, batch_tokens: int | None) -> Engines:
    """Read the weights onto this rank's device; of them, this tensor rank's part."""
    device, model = context.device, subject.model
    decoder = load_decoder(subject.reader, resolve_dtype(dtype, device), device=device, tensor=context.tensor)
    tokens = batch_tokens or BATCH_TOKENS[device.type]
    return Engines(
        scorer=LikelihoodScorer(decoder, model, context=context, batch_tokens=tokens),
        generator=BatchGenerator(decoder, model, context=context, batch_tokens=tokens, num_known_ids=subject.known_ids),
    )
