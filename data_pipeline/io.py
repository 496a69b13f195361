"""Files: compressed input, atomic output, hashes, JSON lines, and what a full disk means. Knows nothing of documents."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import json
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from conf.errors import UserError

CHUNK_BYTES = 2**20
COMPRESSED_SUFFIXES = (".gz", ".zst")
FULL_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What a damaged .gz or .zst raises while it is read.
BROKEN_ARCHIVE_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error)


class ZstdReader(io.RawIOBase):
    """Reads a .zst file, frame after frame.

    zstandard's own reader takes the end of a truncated file for the end of its text; this one raises EOFError there.
    """

    def __init__(self, file: BinaryIO) -> None:
        import zstandard

        self._zstandard = zstandard
        self._file = file
        self._frame = None
        self._pending = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            if not self._decompress():
                return 0
        count = min(len(buffer), len(self._pending))
        buffer[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()

    def _decompress(self) -> bool:
        """Fill `_pending` from the next piece of the file; False at its end."""
        rest = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
        piece = rest or self._file.read(CHUNK_BYTES)
        if not piece:
            if self._frame is not None and not self._frame.eof:
                raise EOFError("the zstd frame ends before its end mark")
            return False
        if self._frame is None or self._frame.eof:
            self._frame = self._zstandard.ZstdDecompressor().decompressobj()
        try:
            self._pending = self._frame.decompress(piece)
        except self._zstandard.ZstdError as error:
            raise EOFError(f"broken zstd data: {error}") from None
        return True


class CountedFile(io.FileIO):
    """A file that tells how many bytes are read from it, for progress."""

    def __init__(self, path: Path, on_read: Callable[[int], None]) -> None:
        super().__init__(path, "rb")
        self._on_read = on_read

    def readinto(self, buffer: Any) -> int:
        count = super().readinto(buffer) or 0
        self._on_read(count)
        return count

    def readall(self) -> bytes:
        data = super().readall()
        self._on_read(len(data))
        return data


def open_input(path: Path, on_read: Callable[[int], None] | None = None) -> BinaryIO:
    """Open `path` for reading bytes; .gz and .zst are decompressed on the way. `on_read` is told the bytes taken from disk.

    Reading a damaged archive raises one of BROKEN_ARCHIVE_ERRORS.
    """
    raw = io.BufferedReader(CountedFile(path, on_read or (lambda count: None)), buffer_size=CHUNK_BYTES)
    if path.suffix == ".gz":
        return _OwningGzip(raw)  # type: ignore[return-value]
    if path.suffix == ".zst":
        return io.BufferedReader(ZstdReader(raw), buffer_size=CHUNK_BYTES)
    return raw


class _OwningGzip(gzip.GzipFile):
    """gzip over an open file, which it closes with itself."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(fileobj=file, mode="rb")
        self._owned = file

    def close(self) -> None:
        super().close()
        self._owned.close()


def bare_suffix(path: Path) -> str:
    """The ending that tells a file's format, in small letters: .jsonl of a.JSONL.gz; '' where there is none."""
    return next((part for part in reversed(path.suffixes) if part not in COMPRESSED_SUFFIXES), "").lower()


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: without this a renamed file may be gone after a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears under `path` complete and durable, or not at all, whoever else is writing it."""
    # Process ids are no name for a file that several machines write.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file atomically."""
    with atomic_file(path) as file:
        file.write(data)


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file atomically."""
    # By way of memory: numpy writes straight to the descriptor and reports a full disk without its error number.
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_bytes(path, buffer.getvalue())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises UserError, naming the file, when it is not JSON."""
    return read_hashed_json(path)[0]


def read_hashed_json(path: Path) -> tuple[Any, str]:
    """As `read_json`, and the SHA-256 of the file in hexadecimal."""
    data = path.read_bytes()
    try:
        return json.loads(data), hashlib.sha256(data).hexdigest()
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); the file is damaged") from None


@contextmanager
def json_lines(path: Path) -> Iterator[Callable[[Any], None]]:
    """Gives a function that appends one value; the file appears complete at the end. A .zst is compressed."""
    with ExitStack() as stack:
        stream: Any = stack.enter_context(atomic_file(path))
        if path.suffix == ".zst":
            import zstandard

            # Level 1: half a gigabyte a second, and source text still shrinks to about a third.
            compressor = zstandard.ZstdCompressor(level=1, write_checksum=True)
            stream = stack.enter_context(compressor.stream_writer(stream, closefd=False))

        def append(value: Any) -> None:
            stream.write(json.dumps(value, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")

        yield append


def read_json_lines(path: Path) -> Iterator[Any]:
    """The values of a JSON-lines file that `json_lines` wrote."""
    with open_input(path) as file:
        for line in file:
            yield json.loads(line)


def sha256_of(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file in hexadecimal; `progress` is told the bytes of each piece."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(8 * CHUNK_BYTES):
            digest.update(piece)
            if progress is not None:
                progress(len(piece))
    return digest.hexdigest()


def sha256_of_texts(texts: Iterable[str]) -> str:
    """SHA-256 over a sequence of texts; where one ends and the next begins is part of it."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode(errors="surrogateescape")  # names of files may hold bytes that are no text
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def readable_bytes(count: float) -> str:
    """Bytes for people: 31.5 MB."""
    for unit in ("bytes", "KB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def existing_parent(folder: Path) -> Path:
    """`folder`, or the nearest of its parents that exists."""
    folder = folder.resolve()
    while not folder.exists():
        folder = folder.parent
    return folder


def free_bytes(folder: Path) -> int:
    """Bytes that can still be written below `folder`, which need not exist yet."""
    return shutil.disk_usage(existing_parent(folder)).free


@contextmanager
def full_disk_is_users(folder: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Turn 'no space left' and 'quota exceeded' into a UserError that names the folder, what is free and what is needed."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK_ERRORS:
            raise
        needed = "" if needed_bytes is None else f", about {readable_bytes(needed_bytes)} are needed in all"
        raise UserError(
            f"{folder}: {os.strerror(error.errno).lower()}; {readable_bytes(free_bytes(folder))} are free{needed}. Make room "
            "or give another output=FOLDER, then start the same command again: it continues where it stopped"
        ) from None
