"""The manifest of a prepared corpus: what its shards hold, and the proof that they still hold it.

A folder without a valid manifest is no corpus: the manifest is written last, atomically. Torch-free and quick to read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from conf.errors import UserError
from data_pipeline.config import Verify
from data_pipeline.io import read_hashed_json, sha256_of_texts, write_json
from data_pipeline.verified import FileList, FileRecord

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
TOKEN_BYTES_FILE = "token_bytes.npy"
SPLITS: tuple[Split, ...] = ("train", "validation")
# Window lengths, in tokens, for which the manifest knows how many documents a window can touch.
DENSEST_WINDOWS = tuple(2**power for power in range(5, 18))

Split = Literal["train", "validation"]


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Some documents of one split, as Megatron's .bin (tokens) and .idx (lengths), and .ids.jsonl (where each came from)."""

    stem: str
    """File name without its ending, such as train-00000."""
    split: Split
    """Split it belongs to."""
    num_tokens: int
    """Tokens, ends of documents included."""
    num_documents: int
    """Documents."""
    text_bytes: int
    """UTF-8 bytes of the documents' text."""
    max_token_id: int
    """Largest id that occurs."""
    files: tuple[FileRecord, ...]
    """The shard's files."""


@dataclass(frozen=True, kw_only=True)
class FunnelRow:
    """How many documents one step took out or let through."""

    step: str
    """What happened to them."""
    documents: int
    """Documents."""
    text_bytes: int
    """UTF-8 bytes of their text; 0 where it could not be read."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A prepared corpus."""

    folder: Path
    """Where it lies; not stored."""
    sha256: str = ""
    """Hash of manifest.json; not stored, and empty before that is written."""
    name: str
    """Name of the corpus."""
    dtype: Literal["uint16", "int32"]
    """Type of the tokens in the .bin files."""
    vocab_size: int
    """Ids that the tokenizer can produce: its largest id + 1."""
    eod_id: int
    """Id of end-of-document, which closes every document."""
    eod_token: str
    """The same as text."""
    tokenizer_sha256: str
    """Hash of the tokenizer's tokenizer.json."""
    tokenizer_files: tuple[FileRecord, ...]
    """The tokenizer's files and token_bytes.npy."""
    engine: str
    """Program that encoded: gigatoken or hf."""
    shards: tuple[Shard, ...]
    """All shards, in the order of their documents."""
    funnel: tuple[FunnelRow, ...]
    """What became of the documents, step by step."""
    densest: dict[str, dict[int, int]]
    """For each split: window length in tokens -> most documents that a window of that length touches."""
    config: dict[str, Any]
    """The settings that made it."""

    @property
    def fingerprint(self) -> str:
        """Identity of the token streams: tokenizer, end-of-document and every shard's content, in order."""
        parts = [str(FORMAT_VERSION), self.tokenizer_sha256, self.dtype, str(self.eod_id)]
        for shard in self.shards:
            parts += [shard.split, *(file.sha256 for file in shard.files if file.name.endswith((".bin", ".idx")))]
        return sha256_of_texts(parts)

    @property
    def path(self) -> Path:
        """The manifest's own file."""
        return self.folder / MANIFEST_FILE

    @property
    def tokenizer_path(self) -> Path:
        """Folder of the tokenizer in Hugging Face's format."""
        return self.folder / TOKENIZER_FOLDER

    @property
    def files(self) -> tuple[FileRecord, ...]:
        """All files but the manifest."""
        return (*self.tokenizer_files, *(file for shard in self.shards for file in shard.files))

    def shards_of(self, split: Split) -> tuple[Shard, ...]:
        """The shards of one split, in order."""
        return tuple(shard for shard in self.shards if shard.split == split)

    def num_tokens(self, split: Split) -> int:
        """Tokens of a split."""
        return sum(shard.num_tokens for shard in self.shards_of(split))

    def num_documents(self, split: Split) -> int:
        """Documents of a split."""
        return sum(shard.num_documents for shard in self.shards_of(split))

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text for each token, over both splits; ends of documents count as tokens."""
        return sum(shard.text_bytes for shard in self.shards) / max(1, sum(shard.num_tokens for shard in self.shards))

    def max_documents(self, window_tokens: int) -> int:
        """Most documents that any window of so many tokens touches, in either split.

        Exact where `window_tokens` is one of DENSEST_WINDOWS. Otherwise a bound: the window is laid out in pieces of those
        lengths, and it touches no more documents than its pieces together.
        """
        return max((self._max_documents(densest, window_tokens) for densest in self.densest.values()), default=1)

    def _max_documents(self, densest: dict[int, int], window_tokens: int) -> int:
        longer = [count for length, count in densest.items() if length >= window_tokens]
        pieces, rest = 0, window_tokens
        for length in sorted(densest, reverse=True):
            taken, rest = divmod(rest, length)
            pieces += taken * densest[length]
        pieces += min(rest, densest[min(densest)]) if rest else 0
        return max(1, min(window_tokens, pieces, *longer))

    def write(self) -> None:
        """Write manifest.json atomically: from then on the corpus exists."""
        content = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self), "fingerprint": self.fingerprint}
        del content["folder"], content["sha256"]
        write_json(self.path, content)

    def verify(self, how: Verify, *, split: Split | None = None, fallback: Path | None = None) -> None:
        """Check every file, or those of one split, and remember what was hashed; see `verified.FileList.faults`.

        Raises UserError naming all files that fail.
        """
        files = self.files if split is None else [file for shard in self.shards_of(split) for file in shard.files]
        faults = FileList(path=self.path, sha256=self.sha256).faults(files, verify=how, remember=True, fallback=fallback)
        if faults:
            raise UserError("; ".join(faults) + f". {remedy(self.folder)}")


def remedy(folder: Path) -> str:
    """The way out of a missing or damaged corpus."""
    return f"Prepare it again: remove {folder} if it exists, then longhaul prepare corpus=NAME output={folder}"


def read_manifest(folder: str | Path) -> Manifest:
    """Open the manifest of a prepared corpus and check that all its files are there with the right size.

    Raises UserError when the folder or the manifest is missing, of another version or damaged, or a file is missing or cut.
    """
    folder = Path(folder)
    path = folder / MANIFEST_FILE
    if not folder.is_dir():
        raise UserError(f"{folder}: no such prepared corpus. {remedy(folder)}")
    if not path.is_file():
        raise UserError(f"{folder}: holds no {MANIFEST_FILE}, so it is no finished corpus. {remedy(folder)}")
    content, digest = read_hashed_json(path)
    version = content.pop("format_version", None) if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: format_version={version}, this Longhaul reads {FORMAT_VERSION}. {remedy(folder)}")
    try:
        fingerprint = content.pop("fingerprint")
        manifest = _from_json(folder, digest, content)
        consistent = fingerprint == manifest.fingerprint
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}). {remedy(folder)}") from None
    outside = [file.name for file in manifest.files if Path(file.name).is_absolute() or ".." in Path(file.name).parts]
    if outside or not consistent:
        what = f"lists a file outside its folder: {outside[0]}" if outside else "its fingerprint does not fit what it lists"
        raise UserError(f"{path}: {what}; it was changed by hand. {remedy(folder)}")
    manifest.verify("sizes")
    return manifest


def _from_json(folder: Path, digest: str, content: dict[str, Any]) -> Manifest:
    shards = tuple(Shard(**{**shard, "files": _records(shard["files"])}) for shard in content.pop("shards"))
    densest = {
        split: {int(length): count for length, count in table.items()} for split, table in content.pop("densest").items()
    }
    return Manifest(
        folder=folder,
        sha256=digest,
        shards=shards,
        densest=densest,
        tokenizer_files=_records(content.pop("tokenizer_files")),
        funnel=tuple(FunnelRow(**row) for row in content.pop("funnel")),
        **content,
    )


def _records(items: Iterable[dict[str, Any]]) -> tuple[FileRecord, ...]:
    return tuple(FileRecord(**item) for item in items)


def densest_windows(document_tokens_N: np.ndarray) -> dict[int, int]:
    """Window length -> most of the N consecutive documents, of these lengths in tokens, that a window of that length touches.

    A window that touches most can be moved right until it begins with a document's last token; so only those are tried.
    """
    ends_N = np.cumsum(document_tokens_N, dtype=np.int64)
    starts_N = ends_N - document_tokens_N
    first_N = np.arange(len(ends_N))
    touched = {}
    for length in DENSEST_WINDOWS:
        beyond_N = np.searchsorted(starts_N, ends_N - 1 + length, side="left")
        touched[length] = int((beyond_N - first_N).max(initial=0))
    return touched
