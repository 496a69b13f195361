"""Which linear layers have adapters, what their tensors are called, how large they are; which tensors train. Torch-free.

An adapter is low-rank for each projection of its own, as in PEFT, also where the projections are one matrix: of
query-key-value and of gate-up the first matrix is [projections, rank, in]. The second has the axes of the layer's output,
so that tensor-parallel ranks cut it as they cut the layer, [... out axes, rank].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from train.config.adapter import LoraConfig
from train.config.model import ModelConfig
from train.model.cost import is_block_matrix, parameter_shapes

Shape = tuple[int, ...]
WEIGHT = ".weight"
A, B, MAGNITUDE = ".lora_a.weight", ".lora_b.weight", ".lora_magnitude.weight"
NEW_HEAD = "score"
"""How the names of a classification head begin: a head that the base lacks trains beside the adapters."""


@dataclass(frozen=True, kw_only=True)
class Projections:
    """The projections that one linear layer computes: sections of its output along `axis`."""

    axis: int
    sections: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of projections."""
        return len(self.sections)


def projections_of(layer: str, out_shape: Shape) -> Projections:
    """The projections of a layer by its name; one for most."""
    if layer.endswith(".attention.qkv"):
        return Projections(axis=1, sections=(out_shape[1] - 2, 1, 1))
    if layer.endswith(".mlp.gate_up"):
        return Projections(axis=0, sections=(1, 1))
    return Projections(axis=0, sections=(out_shape[0],))


def is_adapter(name: str) -> bool:
    """Whether a logical name is that of an adapter's tensor."""
    return name.endswith((A, B, MAGNITUDE))


def adapted(layer: str, lora: LoraConfig | None) -> bool:
    """Whether a linear layer has an adapter."""
    return lora is not None and any(fnmatchcase(layer, pattern) for pattern in lora.targets)


def shapes_beside(layer: str, weight: Shape, lora: LoraConfig) -> dict[str, Shape]:
    """Logical name -> logical shape of the adapter of a layer whose weight has the logical shape `weight`."""
    *out, inner = weight
    count = projections_of(layer, tuple(out)).count
    shapes = {
        f"{layer}{A}": (lora.rank, inner) if count == 1 else (count, lora.rank, inner),
        f"{layer}{B}": (*out, lora.rank),
    }
    return shapes | ({f"{layer}{MAGNITUDE}": tuple(out)} if lora.dora else {})


def adapter_shapes(model: ModelConfig, lora: LoraConfig) -> dict[str, Shape]:
    """Logical name -> logical shape of all tensors of the adapters, in layer order."""
    found: dict[str, Shape] = {}
    for name, shape in parameter_shapes(model).items():
        layer = name.removesuffix(WEIGHT)
        if is_block_matrix(name) and adapted(layer, lora):
            found |= shapes_beside(layer, shape, lora)
    return found


def trains(name: str, *, lora: LoraConfig | None, frozen: Sequence[str]) -> bool:
    """Whether the tensor of a logical name trains: with adapters they alone, and a new head; never what is frozen."""
    if lora is not None and not is_adapter(name) and not name.startswith(NEW_HEAD):
        return False
    return not any(fnmatchcase(name, pattern) for pattern in frozen)


def all_shapes(model: ModelConfig, *, lora: LoraConfig | None) -> dict[str, Shape]:
    """Logical name -> logical shape of all tensors, adapters among them."""
    return parameter_shapes(model) | ({} if lora is None else adapter_shapes(model, lora))


def trained_shapes(model: ModelConfig, *, lora: LoraConfig | None, frozen: Sequence[str]) -> dict[str, Shape]:
    """Logical name -> logical shape of all that trains."""
    shapes = all_shapes(model, lora=lora)
    return {name: shape for name, shape in shapes.items() if trains(name, lora=lora, frozen=frozen)}


def problems_of(model: ModelConfig, *, lora: LoraConfig | None, frozen: Sequence[str]) -> list[str]:
    """What is wrong with the patterns for this model: one that means nothing, or all that would train is frozen."""
    names = list(all_shapes(model, lora=lora))
    layers = [name.removesuffix(WEIGHT) for name in names if is_block_matrix(name)]
    problems = []
    for pattern in () if lora is None else lora.targets:
        if not any(fnmatchcase(layer, pattern) for layer in layers):
            problems.append(f"targets={pattern}: is no linear layer of the model; it has {', '.join(layers[:4])} and so on")
    for pattern in frozen:
        if not any(fnmatchcase(name, pattern) for name in names):
            problems.append(f"frozen={pattern}: is no tensor of the model; it has {', '.join(names[:3])} and so on")
    if not problems and not trained_shapes(model, lora=lora, frozen=frozen):
        problems.append(f"frozen={', '.join(frozen)}: leaves nothing to train; leave something out of it")
    return problems
