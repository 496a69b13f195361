"""Logical tensors: the name and shape a parameter has in every layout, and the slice of it that a rank holds.

Checkpoints, initial values and exports speak of logical tensors only; how ranks cut them is known here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class LogicalTensor:
    """One parameter as a rank holds it: `shape` is the whole; the rank has part `index` of `parts` along `dim`."""

    name: str
    shape: tuple[int, ...]
    dim: int = 0
    index: int = 0
    parts: int = 1

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of this rank's slice."""
        shape = list(self.shape)
        shape[self.dim] //= self.parts
        return tuple(shape)

    @property
    def local_numel(self) -> int:
        """Number of elements of this rank's slice."""
        return prod(self.local_shape)

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's slice of a tensor of the logical shape."""
        return whole.view(self.shape).chunk(self.parts, dim=self.dim)[self.index]

    def runs(self, start: int, length: int) -> Iterator[range]:
        """Where elements [start, start + length) of this rank's flattened slice lie in the flattened whole, in order."""
        width = prod(self.shape[self.dim :]) if self.parts > 1 else prod(self.shape)
        run = width // self.parts  # elements of the slice that are neighbours in the whole
        while length > 0:
            number, place = divmod(start, run)
            first, count = number * width + self.index * run + place, min(run - place, length)
            yield range(first, first + count)
            start, length = start + count, length - count


def tag(parameter: nn.Parameter, logical: LogicalTensor) -> None:
    """Remember on the parameter which logical tensor it is; the mark survives ZeRO 3's partitioning."""
    parameter.logical = logical  # type: ignore[attr-defined]
    # DeepSpeed's and megatron-core's mark: without it a slice would count on the first tensor rank only in the norm.
    parameter.tensor_model_parallel = logical.parts > 1  # type: ignore[attr-defined]


def logical_of(parameter: nn.Parameter) -> LogicalTensor:
    """The logical tensor that `parameter` was tagged with."""
    return parameter.logical  # type: ignore[attr-defined]


def logical_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Logical name -> parameter, each once (a tied weight is one parameter), in the order of the layers."""
    return {logical_of(parameter).name: parameter for parameter in module.parameters()}
