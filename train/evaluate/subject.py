"""The model that is evaluated: a checkpoint, or a Hugging Face folder; its tokenizer, and what tells it from others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.chat_files import end_ids
from data_pipeline.task_config import TaskSource
from data_pipeline.tokenizer import Tokenizer
from train.checkpoint.manifest import MANIFEST, file_facts, resolve_checkpoint
from train.checkpoint.reader import CheckpointReader
from train.config.finetune import FinetuneConfig
from train.config.imported import ImportedConfig
from train.config.pretrain import PretrainConfig
from train.convert.hf_import import fetch
from train.convert.hf_reader import HuggingFaceReader
from train.evaluate.engines import Engines
from train.inference.load import load_decoder, resolve_dtype
from train.inference.text_model import TextModel
from train.model.cost import num_parameters
from train.parallel import ParallelContext


@dataclass(frozen=True, kw_only=True)
class Subject(TextModel):
    """All that is known of a model before its weights are read."""

    reader: CheckpointReader | HuggingFaceReader
    identity: dict[str, Any]
    """See `train.scores.record.Evaluation.model`."""
    folder: Path
    """Below it lie its evaluations."""

    @property
    def run(self) -> PretrainConfig | None:
        """Settings of the run that made it; None for one from elsewhere."""
        settings = getattr(self.reader, "settings", None)
        return settings if isinstance(settings, PretrainConfig) else None

    @property
    def row_length(self) -> int:
        """Tokens that it reads of a labelled row: as many as its fine-tuning has cut them to."""
        settings = getattr(self.reader, "settings", None)
        return settings.data.sequence_length if isinstance(settings, FinetuneConfig) else self.model.max_positions

    @property
    def label(self) -> str:
        """What the folders of its evaluations begin with."""
        if "step" in self.identity:
            return f"step-{self.identity['step']:08d}"
        return Path(str(self.identity["path"])).resolve().name

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
    return Subject(
        model=foreign.model,
        reader=foreign,
        tokenizer=tokenizer,
        opening=tuple(tokenizer.opening()),
        endings=end_ids(tokenizer),
        identity=identity,
        folder=Path(),
    )


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
    settings = reader.settings
    opens = isinstance(settings, ImportedConfig) or bool(getattr(settings, "opening", False))
    home = reader.path
    if not isinstance(settings, ImportedConfig):
        identity["run"] = settings.run.name
        home = home.parent.parent if home.parent.name == "checkpoints" else home
    return Subject(
        model=reader.model,
        reader=reader,
        tokenizer=tokenizer,
        opening=tuple(tokenizer.opening()) if opens else (),
        endings=end_ids(tokenizer),
        identity=identity,
        folder=home,
    )


def load_engines(subject: Subject, context: ParallelContext, *, dtype: str, batch_tokens: int | None) -> Engines:
    """Read the weights onto this rank's device; of them, this tensor rank's part."""
    device = context.device
    decoder = load_decoder(subject.reader, resolve_dtype(dtype, device), device=device, tensor=context.tensor)
    return Engines(decoder, subject, context, batch_tokens=batch_tokens)
