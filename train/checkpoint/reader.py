"""Reads a checkpoint without a process group: the weights to compute with, wherever they lie.

A run that trains a part of a model writes that part alone and names its base, the checkpoint that holds the rest. Here both
are one; the weights of layers with adapters are given with these merged into them, in fp32.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from torch import Tensor

from train.checkpoint.manifest import MANIFEST, CheckpointError, file_facts
from train.checkpoint.stored import StoredCheckpoint
from train.config.adapter import LoraConfig
from train.model.adapters import MAGNITUDE, WEIGHT, A, B, is_adapter
from train.model.logical import LogicalTensor
from train.model.lora import merged


class CheckpointReader(StoredCheckpoint):
    """One checkpoint folder and, where it has one, its base."""

    def __init__(self, path: Path, *, base: Path | None = None) -> None:
        """`base`: where its base lies now; None: where its manifest says."""
        super().__init__(path)
        self._base_place = base

    @cached_property
    def base(self) -> CheckpointReader | None:
        """What holds the weights that its run did not train; None: the run trained all.

        Raises CheckpointError when it is gone, or another one lies in its place.
        """
        named = self.manifest.base
        if named is None:
            return None
        place = home_of(self.path) / named.path if self._base_place is None else self._base_place
        mark = f"SHA-256 of its manifest.json: {named.sha256[:12]}..."
        if not (place / MANIFEST).is_file():
            raise CheckpointError(
                f"{self.path}: holds what its run trained, the other weights lie in {place}, where no checkpoint is now; put "
                f"the one back that the run began with ({mark})"
            )
        found = file_facts(place / MANIFEST).sha256
        if found != named.sha256:
            raise CheckpointError(
                f"{place}: is another checkpoint than the one that {self.path} was trained on ({mark}, here {found[:12]}...); "
                f"put that one back in its place"
            )
        return CheckpointReader(place)

    @property
    def adapter(self) -> LoraConfig | None:
        """The settings of its adapters, whose tensors are read by their names; None: it has none."""
        return self.manifest.adapter

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Logical names of the tensors of its adapters, in layer order."""
        return tuple(name for name in super().names if is_adapter(name))

    @property
    def names(self) -> tuple[str, ...]:
        """Logical names of the model's weights, in layer order; those of adapters are in `adapter_names`."""
        own = super().names
        if self.base is None:
            return own
        here = {*own, *self.manifest.base.tensors}
        listed = tuple(name for name in self.base.names if name in here)
        return (*listed, *(name for name in own if name not in listed and not is_adapter(name)))

    def shape(self, name: str) -> tuple[int, ...]:
        """Logical shape of a tensor."""
        return self.base.shape(name) if self._is_of_base(name) else super().shape(name)

    def kinds(self, name: str) -> tuple[str, ...]:
        """What is stored of a tensor: its weight, and what its optimizer keeps."""
        return ("weight",) if self._is_of_base(name) else super().kinds(name)

    def lies_apart(self, name: str) -> bool:
        """Whether a range of a tensor can be read only by way of all of it."""
        if self._is_of_base(name):
            return self._has_adapter(name) or self.base.lies_apart(name)
        return super().lies_apart(name)

    def verify(self) -> None:
        """Compare every file with the manifest, those of the base too; raises CheckpointError at the first that differs."""
        super().verify()
        if self.base is not None:
            self.base.verify()

    def read(self, name: str, kind: str = "weight") -> Tensor:
        """A whole logical tensor, fp32; a weight with its adapter merged. Raises CheckpointError when a part is missing."""
        if not self._is_of_base(name):
            return super().read(name, kind)
        self._check_kind(name, kind)
        whole = self.base.read(name)
        if not self._has_adapter(name):
            return whole
        layer = name.removesuffix(WEIGHT)
        adapter = {f"{layer}{part}": super(CheckpointReader, self).read(f"{layer}{part}") for part in self._parts}
        return merged(layer, whole, adapter, self.adapter)

    def read_range(self, logical: LogicalTensor, kind: str, start: int, length: int) -> Tensor:
        """Elements [start, start + length) of the flattened slice that `logical` describes, fp32, adapters merged."""
        if not self._is_of_base(logical.name):
            return super().read_range(logical, kind, start, length)
        if not self._has_adapter(logical.name):
            return self.read_apart(logical, kind, start, length)
        self._check_kind(logical.name, kind)
        self.check_shape(logical)
        return logical.cut(self.read(logical.name)).reshape(-1)[start : start + length]

    def read_apart(self, logical: LogicalTensor, kind: str, start: int, length: int) -> Tensor:
        """The same of weights without their adapters, as the run computes with them."""
        if not self._is_of_base(logical.name):
            return self.read_range(logical, kind, start, length)
        self._check_kind(logical.name, kind)
        return self.base.read_range(logical, kind, start, length)

    def release(self) -> None:
        """Let go of the open files: their pages that were read count as this process's memory. Reading opens them again."""
        super().release()
        if self.base is not None:
            self.base.release()

    @property
    def _parts(self) -> tuple[str, ...]:
        return (A, B, MAGNITUDE) if self.adapter.dora else (A, B)

    def _has_adapter(self, name: str) -> bool:
        return f"{name.removesuffix(WEIGHT)}{A}" in self.manifest.tensors

    def _is_of_base(self, name: str) -> bool:
        return self.manifest.base is not None and name in self._of_base

    @cached_property
    def _of_base(self) -> frozenset[str]:
        return frozenset(self.manifest.base.tensors)

    def _check_kind(self, name: str, kind: str) -> None:
        if kind != "weight":
            raise CheckpointError(f"{self.path}: holds no {kind} of {name}, which its run did not train")


def home_of(folder: Path) -> Path:
    """The folder that the base of a checkpoint is looked for from: its run's; of one that lies elsewhere, its own."""
    folder = folder.resolve()  # a link may lead to it
    return folder.parent.parent if folder.parent.name == "checkpoints" else folder
