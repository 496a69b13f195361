"""Reads weights of a checkpoint, and of a folder's weight files, tensor by tensor.

Files are let go of after every chunk: what a process has mapped and touched counts as its memory until it is unmapped.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from train.checkpoint.reader import CheckpointReader
from train.model.logical import LogicalTensor

CHUNK_ELEMENTS = 1 << 23


def read_logical(reader: CheckpointReader, name: str, *, rounding: torch.dtype | None, dtype: torch.dtype) -> Tensor:
    """A logical tensor of the checkpoint in `dtype`, its values rounded to `rounding` first; None: as they are stored."""
    shape = reader.shape(name)
    if reader.lies_apart(name):
        whole = _rounded(reader.read(name), rounding).to(dtype)
        reader.release()
        return whole
    logical = LogicalTensor(name=name, shape=shape)
    whole = torch.empty(prod(shape), dtype=dtype)
    for start in range(0, whole.numel(), CHUNK_ELEMENTS):
        length = min(CHUNK_ELEMENTS, whole.numel() - start)
        whole[start : start + length] = _rounded(reader.read_range(logical, "weight", start, length), rounding)
        reader.release()
    return whole.view(shape)


def read_foreign(path: Path, key: str, *, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of a weight file, in `dtype`; None: in its own. Raises SafetensorError when it cannot be read."""
    with safe_open(path, framework="pt") as handle:
        part = handle.get_slice(key)
        shape = part.get_shape()
        if prod(shape) <= CHUNK_ELEMENTS or len(shape) == 0:
            return part[...].to(dtype=dtype, copy=True)
        first = part[:1]
    whole = torch.empty(shape, dtype=first.dtype if dtype is None else dtype)
    rows = max(1, CHUNK_ELEMENTS // prod(shape[1:]))
    for start in range(0, shape[0], rows):
        with safe_open(path, framework="pt") as handle:
            whole[start : start + rows] = handle.get_slice(key)[start : start + rows]
    return whole


class Promise:
    """A weight of a file that is not read yet, in the place of safetensors' slice: it becomes a parameter on meta.

    The parameter's `promise` says where its values are.
    """

    def __init__(self, path: Path, key: str, shape: tuple[int, ...], stored: str) -> None:
        self.path, self.key, self._shape, self._stored = path, key, shape, stored

    def get_shape(self) -> list[int]:
        """Shape in the file."""
        return list(self._shape)

    def get_dtype(self) -> str:
        """Dtype in the file, in safetensors' words."""
        return self._stored

    def __getitem__(self, index: Any) -> Promise:
        assert index is ..., "only a whole tensor is promised"
        return self

    def to(self, *, device: Any = None, dtype: torch.dtype | None = None) -> torch.nn.Parameter:
        """The parameter, without values; they are for the CPU whatever `device` says."""
        parameter = torch.nn.Parameter(torch.empty(self._shape, dtype=dtype, device="meta"), requires_grad=False)
        parameter.promise = self  # type: ignore[attr-defined]
        return parameter


class PromisingFile:
    """Stands in for safetensors' `safe_open`: the same keys and shapes, and no values."""

    def __init__(self, path: str | Path, **_: object) -> None:
        with safe_open(path, framework="pt") as handle:
            slices = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118  it is no mapping
            self._promises = {
                key: Promise(Path(path), key, tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()
            }
            self._metadata = handle.metadata()

    def keys(self) -> list[str]:
        """Names of the tensors."""
        return list(self._promises)

    def metadata(self) -> dict[str, str] | None:
        """The file's own remarks."""
        return self._metadata

    def get_slice(self, key: str) -> Promise:
        """The promise of a tensor."""
        return self._promises[key]

    def __enter__(self) -> PromisingFile:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def _rounded(values: Tensor, rounding: torch.dtype | None) -> Tensor:
    return values if rounding is None else values.to(rounding)
