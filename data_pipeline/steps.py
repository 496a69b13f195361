"""What is done to one unit of work, in whichever process: read its documents, later encode those that were chosen.

Each step leaves its files in the workspace and, last of all, a marker; a unit with its marker is done and is not done again.
Step functions take a task and a callable that advances the progress bar.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.config import CorpusConfig
from data_pipeline.dedup import content_hash, hash_array
from data_pipeline.document import Document, Rejection, Rule
from data_pipeline.encode import PartWriter, TokenFormat
from data_pipeline.engines import EngineName, cached_engine
from data_pipeline.inputs import Unit
from data_pipeline.io import json_lines, read_json, read_json_lines, write_array, write_json
from data_pipeline.manifest import SPLITS, TOKENIZER_FOLDER, Split
from data_pipeline.readers import read_unit

# What becomes of a document, as the encode step is told.
TO_TRAIN, TO_VALIDATION, TO_NOBODY = 0, 1, 2


@dataclass(frozen=True)
class Workspace:
    """Where the steps leave their files: beside the output, so that publishing is one rename."""

    folder: Path

    @property
    def corpus(self) -> Path:
        """What will be published."""
        return self.folder / "corpus"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's folder within it."""
        return self.corpus / TOKENIZER_FOLDER

    @property
    def tokenizer_marker(self) -> Path:
        """Exists when the tokenizer is there and the engine is proven; holds what was found out."""
        return self.folder / "tokenizer.json"

    def documents(self, unit: int) -> Path:
        """The documents of a unit, as they were read."""
        return self.folder / "documents" / f"{unit:05d}.jsonl.zst"

    def ids(self, unit: int) -> Path:
        """Their ids, for who needs no more of them."""
        return self.folder / "documents" / f"{unit:05d}.ids.jsonl"

    def sizes(self, unit: int) -> Path:
        """Their hashes and sizes: uint64 [N, 3]."""
        return self.folder / "documents" / f"{unit:05d}.npy"

    def rejected(self, unit: int) -> Path:
        """What was set aside while reading."""
        return self.folder / "documents" / f"{unit:05d}.rejected.jsonl"

    def read_marker(self, unit: int) -> Path:
        """Holds the counts of a unit that has been read."""
        return self.folder / "documents" / f"{unit:05d}.json"

    def is_read(self, unit: int) -> bool:
        """Whether a unit has been read."""
        return self.read_marker(unit).exists()

    def part(self, unit: int, split: Split) -> Path:
        """Prefix of the encoded documents of a unit and a split."""
        return self.folder / "tokens" / f"{unit:05d}.{split}"

    def encode_marker(self, unit: int) -> Path:
        """Exists when a unit has been encoded."""
        return self.folder / "tokens" / f"{unit:05d}.json"


@dataclass(frozen=True, kw_only=True)
class ReadTask:
    """Read one unit."""

    workspace: Workspace
    corpus: CorpusConfig
    unit: Unit
    min_document_bytes: int


@dataclass(frozen=True, kw_only=True)
class EncodeTask:
    """Encode the chosen documents of one unit."""

    workspace: Workspace
    unit: int
    fate_N: np.ndarray
    """TO_TRAIN, TO_VALIDATION or TO_NOBODY for every document of the unit, uint8 [N]."""
    engine: EngineName
    form: TokenFormat


def read_step(task: ReadTask, advance: Callable[[int], None]) -> None:
    """Read a unit: its documents, their hashes, and what was set aside. Progress is in bytes of input."""
    place, number = task.workspace, task.unit.number
    hashes: list[bytes] = []
    sizes: list[int] = []
    rejected: Counter[str] = Counter()
    rejected_bytes: Counter[str] = Counter()
    with (
        json_lines(place.documents(number)) as keep,
        json_lines(place.ids(number)) as keep_id,
        json_lines(place.rejected(number)) as set_aside,
    ):
        for item in read_unit(task.corpus, task.unit, advance):
            checked = _check(item, task.min_document_bytes)
            if isinstance(checked, Rejection):
                set_aside(checked.as_record())
                rejected[str(checked.rule)] += 1
                rejected_bytes[str(checked.rule)] += checked.text_bytes
                continue
            document, text_utf8 = checked
            keep({"id": document.id, "source": document.source, "metadata": document.metadata, "text": document.text})
            keep_id(document.id)
            hashes.append(content_hash(text_utf8))
            sizes.append(len(text_utf8))
    table_N3 = np.concatenate([hash_array(hashes), np.array(sizes, dtype=np.uint64)[:, None]], axis=1)
    write_array(place.sizes(number), table_N3)
    counts = {rule: {"documents": count, "text_bytes": rejected_bytes[rule]} for rule, count in rejected.items()}
    write_json(place.read_marker(number), {"documents": len(sizes), "text_bytes": sum(sizes), "rejected": counts})


def encode_step(task: EncodeTask, advance: Callable[[int], None]) -> None:
    """Encode a unit into one part for each split. Progress is in bytes of text."""
    place, number = task.workspace, task.unit
    engine = cached_engine(task.engine, place.tokenizer)
    with ExitStack() as stack:
        writers = [stack.enter_context(PartWriter(place.part(number, split), engine, task.form)) for split in SPLITS]
        for document, fate in zip(read_documents(place, number), task.fate_N.tolist(), strict=True):
            if fate != TO_NOBODY:
                writers[fate].add(document)
                advance(len(document.text.encode()))
    write_json(place.encode_marker(number), {"done": True})


def read_documents(workspace: Workspace, unit: int) -> Iterator[Document]:
    """The documents that the read step kept, in order."""
    for record in read_json_lines(workspace.documents(unit)):
        yield Document(**record)


def read_counts(workspace: Workspace, unit: int) -> dict[str, Any]:
    """What the read step counted."""
    return read_json(workspace.read_marker(unit))


def _check(item: Document | Rejection, min_document_bytes: int) -> tuple[Document, bytes] | Rejection:
    """The document with its text as UTF-8, or why it is not kept."""
    if isinstance(item, Rejection):
        return item
    try:
        text_utf8 = item.text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which is no character
        return Rejection(id=item.id, rule=Rule.UNDECODABLE, reason=f"half a surrogate pair at character {error.start}")
    size = len(text_utf8)
    if size < min_document_bytes:
        reason = f"{size} bytes, min_document_bytes={min_document_bytes}"
        return Rejection(id=item.id, rule=Rule.TOO_SHORT, reason=reason, text_bytes=size)
    return item, text_utf8
