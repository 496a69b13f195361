"""The weight files of a Hugging Face folder: which tensors there are, and their values one by one.

safetensors by default; pickled files only when asked for, and then by torch's loader that builds nothing but tensors.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from conf.errors import UserError
from train.convert.shards import DTYPE_CODES, DTYPES, Entry

WeightFormat: TypeAlias = Literal["safetensors", "bin"]
OTHER_DTYPE = torch.bool  # stands for all that no weight has: masks and the like, which releases of old saved
STEMS: dict[WeightFormat, str] = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}


class WeightFiles:
    """The tensors of `folder` by their names in the files. Holds at most one pickled file open, and no value.

    Raises UserError for files that are missing, damaged, or hold what is no weight.
    """

    def __init__(self, folder: Path, format: WeightFormat) -> None:
        self.folder, self.format = folder, format
        self._opened: tuple[str, Mapping[str, Tensor]] | None = None
        self._place: dict[str, str] = {}
        self.entries: dict[str, Entry] = {}
        """Shape and dtype of every tensor."""
        names, indexed = _files_of(folder, format)
        self.files = [folder / name for name in names]
        for name in names:
            self._take_in(name)
        if indexed is not None and (wrong := {*indexed.items()} ^ {*self._place.items()}):
            example, file = min(wrong)
            raise UserError(f"{folder}: its index and its files differ, for {len(wrong)} tensors: {example} in {file}, as one")

    def read(self, name: str) -> Tensor:
        """The values, in the dtype of the file. Raises UserError when they cannot be read, or are not finite."""
        file = self._place[name]
        tensor = self.read_unchecked(name)
        if not torch.isfinite(tensor).all():
            raise UserError(f"{self.folder / file}: {name} holds values that are not finite; nothing was written")
        return tensor

    def read_unchecked(self, name: str) -> Tensor:
        """The values, in the dtype of the file, whatever they are. Raises UserError when they cannot be read."""
        file = self._place[name]
        if self.format == "bin":
            return self._unpickled(file)[name]
        with _opened(self.folder / file) as handle:
            return handle.get_tensor(name)

    def _take_in(self, file: str) -> None:
        if self.format == "bin":
            found = {name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in self._unpickled(file).items()}
            dtypes = {str(dtype): dtype for dtype in DTYPE_CODES}
        else:
            with _opened(self.folder / file) as handle:
                slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118  (it is no mapping)
                found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
            dtypes = DTYPES
        for name, (dtype, shape) in found.items():
            if name in self._place:
                raise UserError(f"{self.folder}: {self._place[name]} and {file} both hold {name}")
            self._place[name] = file
            self.entries[name] = Entry(shape=shape, dtype=dtypes.get(dtype, OTHER_DTYPE))

    def _unpickled(self, file: str) -> Mapping[str, Tensor]:
        if self._opened is None or self._opened[0] != file:
            path = self.folder / file
            try:
                content = torch.load(path, weights_only=True, mmap=zipfile.is_zipfile(path), map_location="cpu")
            except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
                words = " ".join(str(error).split())[:200]
                raise UserError(f"{path}: cannot be read as a file of nothing but tensors ({words})") from None
            if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
                raise UserError(f"{path}: holds something else than named tensors")
            self._opened = file, content
        return self._opened[1]


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", backend="pread")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: is no whole safetensors file ({error})") from None


def _files_of(folder: Path, format: WeightFormat) -> tuple[list[str], dict[str, str] | None]:
    """Names of the weight files; and which tensor lies in which by the index, None where there is none."""
    stem = STEMS[format]
    index = folder / f"{stem}.index.json"
    if index.is_file() and (folder / stem).is_file():
        raise UserError(f"{folder}: holds {stem} and {index.name}, which may be other weights; remove one of them")
    if not index.is_file():
        if (folder / stem).is_file():
            return [stem], None
        pickled = STEMS["bin"]
        way_out = ""
        if format == "safetensors" and any((folder / name).is_file() for name in (pickled, f"{pickled}.index.json")):
            way_out = f"; {pickled} is pickled: weights=bin reads it, with torch's loader that builds nothing but tensors"
        raise UserError(f"{folder}: holds no {stem} and no {index.name}{way_out}")
    try:
        place = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        names = sorted({str(name) for name in place.values()})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index}: is no index of weight files ({type(error).__name__}: {error})") from None
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{index}: names a file outside its folder: {name}")
        if not (folder / name).is_file():
            raise UserError(f"{index}: names {name}, which is not there; fetch it again")
    return names, place
