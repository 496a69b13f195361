"""Weight files in the safetensors format, written tensor by tensor: the sizes are known before the first value is.

A file is the length of its header (8 bytes, little-endian), the header (JSON: name -> dtype, shape, range of bytes), the data.
Source: the format's description in github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from train.checkpoint.manifest import sync_folder

DTYPE_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}
HEADER_ALIGNMENT = 8  # the data begins at a multiple of this, so that a reader may map it


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor of a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of its values."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One weight file: its name, and the tensors it will hold, in order."""

    file: str
    entries: Mapping[str, Entry]

    @property
    def bytes(self) -> int:
        """Size of the whole file."""
        return len(_header(self)) + sum(entry.bytes for entry in self.entries.values())


def plan_shards(entries: Mapping[str, Entry], *, shard_bytes: int, stem: str = "model") -> tuple[Shard, ...]:
    """Cut the tensors, in their order, into files of at most `shard_bytes`; a larger tensor has a file of its own."""
    groups: list[dict[str, Entry]] = [{}]
    filled = 0
    for name, entry in entries.items():
        if groups[-1] and filled + entry.bytes > shard_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = entry
        filled += entry.bytes
    if len(groups) == 1:
        return (Shard(file=f"{stem}.safetensors", entries=groups[0]),)
    return tuple(
        Shard(file=f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors", entries=group)
        for number, group in enumerate(groups, start=1)
    )


def write_index(folder: Path, plan: Sequence[Shard]) -> None:
    """Write what `from_pretrained` reads beside several files; nothing for one."""
    if len(plan) == 1:
        return
    place = {name: shard.file for shard in plan for name in shard.entries}
    size = sum(entry.bytes for shard in plan for entry in shard.entries.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(place.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def missing_bytes(folder: Path, plan: Sequence[Shard]) -> int:
    """Size of the files that are still to be written."""
    return sum(shard.bytes for shard in plan if not _is_whole(folder / shard.file, shard))


class ShardWriter:
    """Writes the tensors of `plan` in their order; a file has its name when it is full and durable. Use as a context.

    Files that are there already, of a conversion that was interrupted, are left as they are.
    """

    def __init__(self, folder: Path, plan: Sequence[Shard]) -> None:
        assert sys.byteorder == "little", "safetensors are little-endian, and are written as they lie in memory"
        self._folder = folder
        todo = [shard for shard in plan if not _is_whole(folder / shard.file, shard)]
        self._queue = [(shard, name) for shard in todo for name in shard.entries]
        self._wanted = {name for _, name in self._queue}
        self._next = 0
        self._open_shard: Shard | None = None
        self._stream: BinaryIO | None = None

    def wants(self, name: str) -> bool:
        """Whether the tensor is to be written: it lies in no file that is whole."""
        return name in self._wanted

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the tensor, which must be the next that is wanted, in the planned dtype; others are passed over."""
        if not self.wants(name):
            return
        shard, expected = self._queue[self._next]
        entry = shard.entries[expected]
        assert name == expected, f"{name} came where {expected} was planned"
        assert tuple(tensor.shape) == tuple(entry.shape), f"{name} has shape {list(tensor.shape)}"
        if shard is not self._open_shard:
            self._close()
            self._stream = (self._folder / _unfinished(shard)).open("wb")
            self._stream.write(_header(shard))
            self._open_shard = shard
        values = tensor.to(entry.dtype).contiguous()
        self._stream.write(values.view(-1).view(torch.uint8).numpy().data)
        self._next += 1
        if self._next == len(self._queue) or self._queue[self._next][0] is not shard:
            self._close()
            (self._folder / _unfinished(shard)).rename(self._folder / shard.file)
            sync_folder(self._folder)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._close()
        if kind is None:
            assert self._next == len(self._queue), f"{len(self._queue) - self._next} planned tensors were not written"

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            self._stream = None


def _unfinished(shard: Shard) -> str:
    return f"{shard.file}.part"


def _is_whole(path: Path, shard: Shard) -> bool:
    return path.is_file() and path.stat().st_size == shard.bytes


def _header(shard: Shard) -> bytes:
    # Without the "pt" mark, releases of transformers before 5 refuse the file.
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, entry in shard.entries.items():
        end = offset + entry.bytes
        entries[name] = {"dtype": DTYPE_CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % HEADER_ALIGNMENT)
    return struct.pack("<Q", len(text)) + text
