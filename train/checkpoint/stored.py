"""What lies in the files of one checkpoint: whole logical tensors, or the ranges that a rank of any layout needs."""

from __future__ import annotations

import json
from functools import cache, cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from train.checkpoint.manifest import CheckpointError, StoredTensor, check_files, read_manifest
from train.checkpoint.settings import read_settings
from train.config.imported import ImportedConfig
from train.config.model import ModelConfig
from train.config.settings import RunSettings
from train.model.logical import LogicalTensor

PROBE = "probe/logits"


class StoredCheckpoint:
    """One checkpoint folder, by itself. Only safetensors, JSON and YAML are read; nothing is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = read_manifest(path)
        self._open = cache(self._open_file)

    @cached_property
    def settings(self) -> RunSettings | ImportedConfig:
        """The resolved configuration of the run, or of the import, that wrote it."""
        return read_settings(self.path, self.manifest)

    @property
    def model(self) -> ModelConfig:
        """Shape of its model."""
        return self.settings.model

    @property
    def config(self) -> RunSettings:
        """The resolved configuration of the run that wrote it. Raises CheckpointError for an imported checkpoint."""
        if isinstance(self.settings, ImportedConfig):
            raise CheckpointError(
                f"{self.path}: was imported from {self.settings.origin.source}, so there is no run to go on with; start one "
                f"from its weights with initial_checkpoint={self.path}"
            )
        return self.settings

    @property
    def state(self) -> dict[str, Any]:
        """What the loop kept: see `train.state.TrainState`."""
        return json.loads((self.path / "state.json").read_text(encoding="utf-8"))

    @property
    def probe(self) -> Tensor | None:
        """Logits of the fixed batch when it was written, fp32 [positions, V]; None where it has none."""
        file = self.manifest.probe
        return None if file is None else self._slice(file, PROBE, 0, None, whole=True)

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.manifest.step

    @property
    def tokens(self) -> int:
        """Tokens read."""
        return self.manifest.tokens

    @property
    def names(self) -> tuple[str, ...]:
        """Logical names, in layer order."""
        return tuple(self.manifest.tensors)

    @property
    def tokenizer_folder(self) -> Path:
        """Hugging Face tokenizer folder that the model was trained with."""
        return self.path / "tokenizer"

    def shape(self, name: str) -> tuple[int, ...]:
        """Logical shape of a tensor."""
        return self._stored(name).shape

    def kinds(self, name: str) -> tuple[str, ...]:
        """What is stored of a tensor: its weight, and what its optimizer keeps."""
        return self._stored(name).kinds

    def lies_apart(self, name: str) -> bool:
        """Whether a range of a tensor can be read only by way of all of it."""
        return any(piece.parts > 1 for piece in self._stored(name).fragments)

    def verify(self) -> None:
        """Compare every file with the manifest; raises CheckpointError at the first that differs."""
        check_files(self.path, self.manifest, self.manifest.files)

    def read(self, name: str, kind: str = "weight") -> Tensor:
        """A whole logical tensor, fp32: its weight or another of its `kinds`. Raises CheckpointError when a part is missing."""
        stored = self._stored(name)
        layouts = {(piece.dim, piece.index, piece.parts) for piece in stored.fragments}
        if all(parts == 1 for _, _, parts in layouts):
            logical = LogicalTensor(name=name, shape=stored.shape)
            return self.read_range(logical, kind, 0, logical.local_numel).view(stored.shape)
        whole = torch.empty(stored.shape, dtype=torch.float32)
        covered = 0
        for dim, index, parts in layouts:
            logical = LogicalTensor(name=name, shape=stored.shape, dim=dim, index=index, parts=parts)
            logical.cut(whole).copy_(self.read_range(logical, kind, 0, logical.local_numel).view(logical.local_shape))
            covered += logical.local_numel
        if covered != prod(stored.shape):
            raise CheckpointError(f"{self.path}: {name} is not complete: {covered} of {prod(stored.shape)} elements")
        return whole

    def read_range(self, logical: LogicalTensor, kind: str, start: int, length: int) -> Tensor:
        """Elements [start, start + length) of the flattened slice that `logical` describes, fp32.

        A slice that was stored as it is asked for is read piece by piece; another cut goes through the whole tensor.
        """
        stored = self._stored(logical.name)
        if kind not in stored.kinds:
            raise CheckpointError(
                f"{self.path}: holds no {kind} of {logical.name}, only {', '.join(stored.kinds)}; another optimizer wrote it"
            )
        self.check_shape(logical)
        cut = (logical.dim if logical.parts > 1 else 0, logical.index, logical.parts)
        pieces = [piece for piece in stored.fragments if (piece.dim, piece.index, piece.parts) == cut]
        if not pieces or (logical.parts == 1 and any(piece.parts != 1 for piece in stored.fragments)):
            return logical.cut(self.read(logical.name, kind)).reshape(-1)[start : start + length]
        if len(pieces) == 1 and (start, length) == (0, pieces[0].length):  # no second copy of a large one
            return self._slice(pieces[0].file, f"{kind}/{logical.name}", 0, length, whole=True).float()
        values = torch.empty(length, dtype=torch.float32)
        filled = 0
        for piece in pieces:
            low, high = max(start, piece.start), min(start + length, piece.start + piece.length)
            if low >= high:
                continue
            values[low - start : high - start] = self._slice(
                piece.file, f"{kind}/{logical.name}", low - piece.start, high - piece.start, whole=high - low == piece.length
            )
            filled += high - low
        if filled != length:
            raise CheckpointError(f"{self.path}: {logical.name} is not complete: {filled} of {length} elements of a range")
        return values

    def check_shape(self, logical: LogicalTensor) -> None:
        """Raise CheckpointError when a tensor has another shape than `logical`."""
        shape = self.shape(logical.name)
        if shape != logical.shape:
            raise CheckpointError(
                f"{self.path}: {logical.name} has shape {list(shape)}, the model needs {list(logical.shape)}; "
                f"it is a checkpoint of another model"
            )

    def release(self) -> None:
        """Let go of the open files: their pages that were read count as this process's memory. Reading opens them again."""
        self._open.cache_clear()

    def _stored(self, name: str) -> StoredTensor:
        try:
            return self.manifest.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: holds no {name}; it is a checkpoint of another model") from None

    def _slice(self, file: str, key: str, low: int, high: int | None, *, whole: bool) -> Tensor:
        try:
            if whole:  # read, not mapped: what is mapped stays in memory for as long as the file is open
                return self._open(file, "pread").get_tensor(key)
            return self._open(file, "mmap").get_slice(key)[low:high]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path / file}: {key} cannot be read ({error})") from None

    def _open_file(self, file: str, backend: str) -> Any:
        return safe_open(self.path / file, framework="pt", backend=backend)
