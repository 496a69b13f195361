"""The bytes of a rank's safetensors file, in memory that is shared with the process that writes them.

The memory is held from save to save: a copy into pages that exist takes a tenth of the time of one into new pages.
Format: https://huggingface.co/docs/safetensors (a length, a JSON header, the tensors one behind the other).
"""

from __future__ import annotations

import json
import math
import mmap
import os
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ELEMENTS = 1 << 20  # summed at a time: what was just copied is still in the cache
_ADDRESS_BYTES = 8


class FileImage:
    """A safetensors file of flat fp32 tensors, laid out once and filled at every save."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], *, pinned: bool) -> None:
        """shapes: the tensors in their order. pinned: page-locked, so that a GPU copies without the CPU waiting."""
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for name, shape in shapes.items():
            size = 4 * math.prod(shape)
            header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        begin = _ADDRESS_BYTES + len(text)
        self.size = begin + offset
        self.fd = _anonymous_file(self.size)
        self._memory = mmap.mmap(self.fd, self.size)
        self._memory[:begin] = len(text).to_bytes(_ADDRESS_BYTES, "little") + text
        whole = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._pinned = pinned
        if pinned:
            _check_cuda(torch.cuda.cudart().cudaHostRegister(whole.data_ptr(), self.size, 0))
        values = whole[begin:].view(torch.float32)
        self.places: dict[str, Tensor] = {}
        start = 0
        for name, shape in shapes.items():
            self.places[name] = values[start : start + math.prod(shape)]
            start += math.prod(shape)
        self._whole = whole

    def stage(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the values in; CUDA tensors without waiting, on the current stream."""
        for name, place in self.places.items():
            source = tensors[name].detach().reshape(-1)
            if source.is_cuda:
                place.copy_(source, non_blocking=True)
            else:
                np.copyto(place.numpy(), source.numpy())  # lets other threads run, and takes one core alone

    def not_finite(self) -> list[str]:
        """Names of the tensors that hold a NaN or an infinity."""
        return [name for name, place in self.places.items() if not _is_finite(place.numpy())]

    def close(self) -> None:
        """Give the memory back."""
        if self._pinned:
            _check_cuda(torch.cuda.cudart().cudaHostUnregister(self._whole.data_ptr()))
        self.places.clear()
        del self._whole
        os.close(self.fd)
        # The mapping goes with its last view.


def _is_finite(values: np.ndarray) -> bool:
    # A sum carries every NaN and infinity along, at the speed of the memory; one that overflows is none to keep either.
    with np.errstate(over="ignore", invalid="ignore"):
        return all(math.isfinite(float(values[at : at + _ELEMENTS].sum())) for at in range(0, len(values), _ELEMENTS))


def _anonymous_file(size: int) -> int:
    """A file of `size` bytes in memory, without a name; on a system without such, on disk."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("longhaul-checkpoint")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, size)
    return fd


def _check_cuda(result: Any) -> None:
    code = int(result)
    if code:
        raise RuntimeError(f"page-locking the memory of a checkpoint failed with CUDA error {code}; raise `ulimit -l`")
