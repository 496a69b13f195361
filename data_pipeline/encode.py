"""Documents to tokens to shards in Megatron's .bin/.idx format. First one part for each unit of work, then all parts to shards.

Every document ends with end-of-document. Ids are checked against the vocabulary before they are made small: a cast to uint16
would wrap without a word.

Shape letters: N documents, T tokens.
"""

from __future__ import annotations

import hashlib
import itertools
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from conf.errors import UserError
from data_pipeline.document import Document
from data_pipeline.engines import Engine
from data_pipeline.io import CHUNK_BYTES, atomic_file, json_lines, read_json_lines, sha256_of, write_array
from data_pipeline.manifest import Shard, Split
from data_pipeline.verified import FileRecord

INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_VERSION = 1
DTYPE_CODES = {"uint16": 8, "int32": 4}
BATCH_BYTES = 2**20  # text handed to the engine at once
MAX_DOCUMENT_TOKENS = 2**31 - 1  # the index stores lengths as int32


@dataclass(frozen=True, kw_only=True)
class TokenFormat:
    """How tokens are stored."""

    dtype: Literal["uint16", "int32"]
    """Type in the .bin file."""
    eod_id: int
    """Id that closes every document."""
    vocab_size: int
    """Ids lie below it."""


def token_format(vocab_size: int, eod_id: int) -> TokenFormat:
    """The smallest type that holds every id."""
    return TokenFormat(dtype="uint16" if vocab_size <= 2**16 else "int32", eod_id=eod_id, vocab_size=vocab_size)


class PartWriter:
    """Encodes the documents of one unit and one split.

    Writes PREFIX.bin, PREFIX.npy (tokens and bytes of each) and PREFIX.ids.jsonl.
    """

    def __init__(self, prefix: Path, engine: Engine, form: TokenFormat) -> None:
        self._prefix, self._engine, self._form = prefix, engine, form
        self._stack = ExitStack()
        self._pending: list[str] = []
        self._pending_bytes = 0
        self._sizes: list[np.ndarray] = []

    def __enter__(self) -> PartWriter:
        self._file = self._stack.enter_context(atomic_file(_file(self._prefix, ".bin")))
        self._append_id = self._stack.enter_context(json_lines(_file(self._prefix, ".ids.jsonl")))
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> bool | None:
        if kind is None:
            self._flush()
            sizes_N2 = np.concatenate(self._sizes) if self._sizes else np.empty((0, 2), dtype=np.int64)
            write_array(_file(self._prefix, ".npy"), sizes_N2)
        return self._stack.__exit__(kind, *rest)  # type: ignore[arg-type]

    def add(self, document: Document) -> None:
        """Encode one document; the batch is written when it is full."""
        self._pending.append(document.text)
        self._pending_bytes += len(document.text)
        self._append_id(document.id)
        if self._pending_bytes >= BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        ids_T, counts_N = self._engine.encode(self._pending)
        if ids_T.size and int(ids_T.max()) >= self._form.vocab_size:
            raise UserError(
                f"the tokenizer gives id {int(ids_T.max())}, beyond its own vocabulary of {self._form.vocab_size}; "
                "its files do not belong together: check tokenizer.path"
            )
        if counts_N.max() >= MAX_DOCUMENT_TOKENS:
            raise UserError(
                f"a document of {counts_N.max()} tokens is longer than the format allows ({MAX_DOCUMENT_TOKENS}); split it"
            )
        with_ends_T = np.insert(ids_T, np.cumsum(counts_N), self._form.eod_id)
        self._file.write(with_ends_T.astype(self._form.dtype).tobytes())
        text_bytes_N = [len(text.encode()) for text in self._pending]
        self._sizes.append(np.stack([counts_N + 1, np.array(text_bytes_N, dtype=np.int64)], axis=1))
        self._pending, self._pending_bytes = [], 0


def part_sizes(prefix: Path) -> np.ndarray:
    """Tokens and text bytes of the documents in a part, int64 [N, 2]."""
    return np.load(_file(prefix, ".npy"), allow_pickle=False)


def part_bytes(prefix: Path) -> int:
    """Bytes of a part's tokens."""
    return _file(prefix, ".bin").stat().st_size


def index_bytes(tokens_N: np.ndarray, dtype: str) -> bytes:
    """The .idx file for documents of these lengths; each is one sequence."""
    pointers_N = np.zeros(len(tokens_N), dtype="<i8")
    np.cumsum(tokens_N[:-1], out=pointers_N[1:])
    pointers_N *= np.dtype(dtype).itemsize
    head = INDEX_MAGIC + struct.pack("<QBQQ", INDEX_VERSION, DTYPE_CODES[dtype], len(tokens_N), len(tokens_N) + 1)
    documents = np.arange(len(tokens_N) + 1, dtype="<i8")
    return head + tokens_N.astype("<i4").tobytes() + pointers_N.tobytes() + documents.tobytes()


def write_shards(
    prefixes: Sequence[Path],
    folder: Path,
    *,
    split: Split,
    form: TokenFormat,
    shard_tokens: int,
    progress: Callable[[int], None],
) -> tuple[tuple[Shard, ...], np.ndarray]:
    """Join the parts of one split into shards of at most `shard_tokens`, cut between documents.

    Returns the shards and the tokens of every document, int64 [N]. `progress` is told the bytes written.
    """
    sizes_N2 = np.concatenate([part_sizes(prefix) for prefix in prefixes])
    tokens_N, text_bytes_N = sizes_N2[:, 0], sizes_N2[:, 1]
    names = itertools.chain.from_iterable(read_json_lines(_file(prefix, ".ids.jsonl")) for prefix in prefixes)
    shards = []
    with ExitStack() as stack:
        tokens = stack.enter_context(_JoinedFiles([_file(prefix, ".bin") for prefix in prefixes]))
        for number, (first, last) in enumerate(_cuts(tokens_N, shard_tokens)):
            stem = f"{split}-{number:05d}"
            own_N = tokens_N[first:last]
            bin_record, max_id = _copy_tokens(
                tokens, folder / f"{stem}.bin", form.dtype, count=int(own_N.sum()), progress=progress
            )
            with atomic_file(folder / f"{stem}.idx") as file:
                file.write(index_bytes(own_N, form.dtype))
            with json_lines(_file(folder / stem, ".ids.jsonl")) as append:
                for name in itertools.islice(names, last - first):
                    append(name)
            shards.append(
                Shard(
                    stem=stem,
                    split=split,
                    num_tokens=int(own_N.sum()),
                    num_documents=last - first,
                    text_bytes=int(text_bytes_N[first:last].sum()),
                    max_token_id=max_id,
                    files=(bin_record, record_of(folder, f"{stem}.idx"), record_of(folder, f"{stem}.ids.jsonl")),
                )
            )
    return tuple(shards), tokens_N


def record_of(folder: Path, name: str) -> FileRecord:
    """The manifest's line for a file that is complete."""
    return FileRecord(name=name, size=(folder / name).stat().st_size, sha256=sha256_of(folder / name))


def _file(prefix: Path, ending: str) -> Path:
    return prefix.with_name(prefix.name + ending)


def _cuts(tokens_N: np.ndarray, shard_tokens: int) -> Iterator[tuple[int, int]]:
    """First and last + 1 document of every shard."""
    ends_N = np.cumsum(tokens_N)
    first, written = 0, 0
    while first < len(tokens_N):
        last = max(first + 1, int(np.searchsorted(ends_N, written + shard_tokens, side="right")))
        yield first, last
        first, written = last, int(ends_N[last - 1])


def _copy_tokens(
    source: _JoinedFiles, path: Path, dtype: str, *, count: int, progress: Callable[[int], None]
) -> tuple[FileRecord, int]:
    """Write the next `count` tokens to `path`; gives its record and the largest id."""
    digest, max_id = hashlib.sha256(), 0
    size = left = count * np.dtype(dtype).itemsize
    with atomic_file(path) as file:
        while left:
            piece = source.read(min(left, 4 * CHUNK_BYTES))  # a multiple of every item size, so no token is torn
            file.write(piece)
            digest.update(piece)
            max_id = max(max_id, int(np.frombuffer(piece, dtype=dtype).max()))
            left -= len(piece)
            progress(len(piece))
    return FileRecord(name=path.name, size=size, sha256=digest.hexdigest()), max_id


class _JoinedFiles:
    """Several files read as one."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = iter(paths)
        self._file: BinaryIO | None = None

    def __enter__(self) -> _JoinedFiles:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()

    def read(self, count: int) -> bytes:
        """Exactly `count` bytes."""
        pieces = []
        while count:
            piece = self._file.read(count) if self._file is not None else b""
            if not piece:
                if self._file is not None:
                    self._file.close()
                self._file = next(self._paths).open("rb")  # noqa: SIM115  (closed when the next one is opened)
                continue
            pieces.append(piece)
            count -= len(piece)
        return b"".join(pieces)
