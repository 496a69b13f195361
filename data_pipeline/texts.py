"""Token runs of whole documents, for measuring how likely a model finds them: of a prepared corpus, or of text files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from conf.errors import UserError
from data_pipeline.config import CorpusConfig
from data_pipeline.corpus import Corpus
from data_pipeline.document import Document, Rejection
from data_pipeline.inputs import list_inputs
from data_pipeline.io import bare_suffix, sha256_of, sha256_of_texts
from data_pipeline.manifest import MANIFEST_FILE, read_manifest
from data_pipeline.readers import read_unit
from data_pipeline.task_config import TaskConfig, TaskSource
from data_pipeline.tokenizer import TOKENIZER_FILE, Tokenizer

READERS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


@dataclass(frozen=True, kw_only=True)
class TokenRun:
    """One document as its tokens, its end mark included where it has one."""

    id: str
    """Where it came from: the same for every model."""
    source: str
    """Name of its data."""
    tokens: np.ndarray
    """int32 [tokens]."""


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """One source, opened."""

    name: str
    path: str
    hash: str
    """Of all that is read of it."""
    runs: Callable[[int | None], Iterator[TokenRun]]
    """The documents in order, at most so many."""


def open_texts(
    task: TaskConfig, source: TaskSource, *, tokenizer: Tokenizer, end_of_document: int | None, verify: bool = True
) -> TextSource:
    """Open a prepared corpus, whose tokens are taken as they are, or text files, which are encoded now. `verify`: compare
    the corpus with its hashes, where that was not done before.

    Raises UserError for a source that is missing, of another format, or of another tokenizer than the model's.
    """
    if (Path(source.path) / MANIFEST_FILE).is_file():
        return _open_corpus(task, source, tokenizer=tokenizer, verify=verify)
    return _open_files(task, source, tokenizer=tokenizer, end_of_document=end_of_document)


def _open_corpus(task: TaskConfig, source: TaskSource, *, tokenizer: Tokenizer, verify: bool) -> TextSource:
    manifest, split = read_manifest(source.path), task.split
    if manifest.tokenizer_sha256 != tokenizer.sha256:
        raise UserError(
            f"{source.path}: was encoded by another tokenizer than the model's, so its ids mean other words; give its text "
            f"files, or prepare it with tokenizer=hf tokenizer.path={tokenizer.folder}"
        )
    if not manifest.num_tokens(split):
        raise UserError(f"{source.path}: has no {split} text; prepare it with held_out_fraction above 0, or give split=train")
    if verify:
        manifest.verify("once", split=split)
    corpus = Corpus(source.path, split, manifest=manifest)

    def runs(limit: int | None) -> Iterator[TokenRun]:
        for number, (name, tokens) in enumerate(corpus.documents()):
            if limit is not None and number >= limit:
                return
            without_mark = not task.end_of_document and len(tokens) and tokens[-1] == manifest.eod_id
            kept = tokens[:-1] if without_mark else tokens
            yield TokenRun(id=name, source=source.label, tokens=kept.astype(np.int32))

    hash = sha256_of_texts([manifest.fingerprint, split, *_marks(task)])
    return TextSource(name=source.label, path=source.path, hash=hash, runs=runs)


def _open_files(task: TaskConfig, source: TaskSource, *, tokenizer: Tokenizer, end_of_document: int | None) -> TextSource:
    path = Path(source.path)
    suffix = bare_suffix(path)
    reader = READERS.get(suffix, "text")
    if suffix in (".bin", ".idx", ".safetensors", ".json", ".csv", ".tsv"):
        raise UserError(f"{path}: {suffix} holds no running text; give a prepared corpus, .txt, .md, .jsonl or .parquet files")
    if (path / TOKENIZER_FILE).is_file() or (path / "config.json").is_file():
        raise UserError(f"{path}: is the folder of a model or a tokenizer; give a prepared corpus or text files")
    suffixes = (suffix,) if suffix and reader != "text" else ()
    corpus = CorpusConfig(name=source.label, reader=reader, paths=(source.path,), suffixes=suffixes, text_field=task.text_field)
    try:
        inputs = list_inputs(corpus)
    except UserError as error:
        reason = str(error).partition(". Check ")[0]  # corpus.paths and others, which are no settings here
        raise UserError(
            f"task.data: {source.path}: no such corpus, file or pattern, or no text file in it ({reason}). .txt, .md, .jsonl "
            f"and .parquet are read, also as .gz and .zst; of a folder .txt and .md alone, others by a pattern: FOLDER/*.jsonl"
        ) from None

    def items() -> Iterator[Document | Rejection]:
        yield from inputs.rejected
        for unit in inputs.units:
            yield from read_unit(corpus, unit, lambda _: None)

    def runs(limit: int | None) -> Iterator[TokenRun]:
        for number, item in enumerate(items()):
            if isinstance(item, Rejection):
                raise UserError(f"{item.id}: {item.reason}; mend or leave out what cannot be read")
            if limit is not None and number >= limit:
                return
            ids = tokenizer.encode(item.text)
            ids += [end_of_document] if end_of_document is not None and task.end_of_document else []
            yield TokenRun(id=item.id, source=source.label, tokens=np.array(ids, dtype=np.int32))

    digests = [sha256_of(Path(file.path)) for unit in inputs.units for file in unit.files]
    hash = sha256_of_texts([*digests, *_marks(task)])
    return TextSource(name=source.label, path=source.path, hash=hash, runs=runs)


def _marks(task: TaskConfig) -> list[str]:
    """What else decides which targets there are, beside the text."""
    return [] if task.end_of_document else ["without end marks"]
