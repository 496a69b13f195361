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

DTYPE_CODES = {torch.float32: "F32", torch.bfloat16: "BF16"}
HEADER_ALIGNMENT = 8  # the data begins at a multiple of this, so that a reader may map it


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One weight file: its name, and the tensors it will hold, in order."""

    file: str
    shapes: Mapping[str, tuple[int, ...]]


def plan_shards(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, *, shard_bytes: int) -> tuple[Shard, ...]:
    """Cut the tensors, in their order, into files of at most `shard_bytes`; a larger tensor has a file of its own."""
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        size = prod(shape) * dtype.itemsize
        if groups[-1] and filled + size > shard_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = shape
        filled += size
    if len(groups) == 1:
        return (Shard(file="model.safetensors", shapes=groups[0]),)
    return tuple(
        Shard(file=f"model-{number:05d}-of-{len(groups):05d}.safetensors", shapes=group)
        for number, group in enumerate(groups, start=1)
    )


class ShardWriter:
    """Writes the tensors of `plan` in their order; each file is durable when it is full. Use as a context."""

    def __init__(self, folder: Path, plan: Sequence[Shard], dtype: torch.dtype) -> None:
        assert sys.byteorder == "little", "safetensors are little-endian, and are written as they lie in memory"
        self.dtype = dtype
        self._folder = folder
        self._queue = [(shard, name) for shard in plan for name in shard.shapes]
        self._next = 0
        self._open_shard: Shard | None = None
        self._stream: BinaryIO | None = None
        self._sharded = len(plan) > 1

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor, which must be the plan's next, converted to the writer's dtype."""
        shard, expected = self._queue[self._next]
        assert name == expected, f"{name} came where {expected} was planned"
        assert tuple(tensor.shape) == tuple(shard.shapes[name]), f"{name} has shape {list(tensor.shape)}"
        if shard is not self._open_shard:
            self._close()
            self._stream = (self._folder / shard.file).open("xb")
            self._stream.write(_header(shard, self.dtype))
            self._open_shard = shard
        values = tensor.to(self.dtype).contiguous()
        self._stream.write(values.view(-1).view(torch.uint8).numpy().data)
        self._next += 1

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._close()
        if kind is not None:
            return
        assert self._next == len(self._queue), f"{len(self._queue) - self._next} planned tensors were not written"
        if self._sharded:
            self._write_index()

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            self._stream = None

    def _write_index(self) -> None:
        size = sum(prod(shard.shapes[name]) for shard, name in self._queue) * self.dtype.itemsize
        index = {
            "metadata": {"total_size": size},
            "weight_map": {name: shard.file for shard, name in sorted(self._queue, key=lambda item: item[1])},
        }
        text = json.dumps(index, indent=2) + "\n"
        (self._folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _header(shard: Shard, dtype: torch.dtype) -> bytes:
    # Without the "pt" mark, releases of transformers before 5 refuse the file.
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shard.shapes.items():
        end = offset + prod(shape) * dtype.itemsize
        entries[name] = {"dtype": DTYPE_CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % HEADER_ALIGNMENT)
    return struct.pack("<Q", len(text)) + text
