"""Initial values: a table by logical name, and one stream of random numbers for each (seed, logical name).

GPT-2 and Llama practice: matrices and embeddings normal(0, init_std); the matrices that write to the residual stream
normal(0, init_std / sqrt(2 x layers)) (Radford et al. 2019); norms act as 1, biases as 0. Since a value depends on the seed,
the logical name and the element's place in the whole tensor alone, every layout starts from the same bits, and a rank makes
those of its own part.

With muP (Yang et al. 2022, Tensor Programs V, table 8) the matrices of the blocks shrink with the root of the width; their
learning rate shrinks with the width (`train.optim`) and so do the logits (`train.model.heads`). Heads keep their size, so the
scale of the attention scores stays.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from math import sqrt

import torch
from torch import Tensor

from train.config.model import ModelConfig
from train.model import philox
from train.model.adapters import MAGNITUDE, WEIGHT, A, B
from train.model.cost import parameter_shapes
from train.model.logical import LogicalTensor


def _plain(model: ModelConfig) -> float:
    return model.init_std


def _inner(model: ModelConfig) -> float:
    return model.init_std / sqrt(model.width_ratio)


def _to_residual(model: ModelConfig) -> float:
    return model.init_std / sqrt(2 * model.num_layers * model.width_ratio)


def _neutral_weight(model: ModelConfig) -> float:
    return 0.0 if model.norm_one_plus else 1.0


# Pattern of the logical name -> standard deviation around 0, or the value of all elements.
SPREADS: dict[str, Callable[[ModelConfig], float]] = {
    r"embedding\.(tokens|positions)\.weight": _plain,
    r"blocks\.\d+\.(attention\.qkv|mlp\.gate_up|mlp\.up)\.weight": _inner,
    r"blocks\.\d+\.(attention\.output|mlp\.down)\.weight": _to_residual,
    r"(head|score)\.weight": _plain,
}
CONSTANTS: dict[str, Callable[[ModelConfig], float]] = {
    r".*_norm\.weight": _neutral_weight,
    r".*\.bias": lambda model: 0.0,
    r".*" + re.escape(B): lambda model: 0.0,
}


def keyed_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts; equal parts give equal seeds on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class Normal:
    """Around 0."""

    std: float


@dataclass(frozen=True)
class Uniform:
    """Between -limit and limit."""

    limit: float


def draw(model: ModelConfig, logical: LogicalTensor, seed: int, into: Tensor, *, start: int = 0) -> None:
    """Write the initial values of this rank's flattened slice of `logical`, from `start` on, into flat `into`.

    Whatever its dtype and device, and however large: it is filled block by block.
    """
    if logical.name.endswith(MAGNITUDE):
        return _draw_lengths(model, logical, seed, into, start=start)
    distribution = _distribution(model, logical)
    if isinstance(distribution, float):
        into.fill_(distribution)
        return None
    filled = 0
    for block in _elements(distribution, logical, seed, logical.runs(start, into.numel())):
        into[filled : filled + len(block)].copy_(block)
        filled += len(block)
    return None


def _distribution(model: ModelConfig, logical: LogicalTensor) -> Normal | Uniform | float:
    if logical.name.endswith(A):  # as PEFT's: uniform below 1 / sqrt(inputs)
        return Uniform(1 / sqrt(logical.shape[-1]))
    for pattern, std_of in SPREADS.items():
        if re.fullmatch(pattern, logical.name):
            return Normal(std_of(model))
    for pattern, value_of in CONSTANTS.items():
        if re.fullmatch(pattern, logical.name):
            return value_of(model)
    raise AssertionError(f"{logical.name} has no line in the table of initial values")


def _elements(distribution: Normal | Uniform, logical: LogicalTensor, seed: int, ranges: Iterable[range]) -> Iterator[Tensor]:
    """Elements of a whole tensor, by their places in its flattened order, in blocks: fp32 on the CPU."""
    if isinstance(distribution, Normal):
        make = partial(philox.normal, std=distribution.std)
    else:
        make = partial(philox.uniform, limit=distribution.limit)
    return map(torch.from_numpy, philox.elements(keyed_seed(seed, logical.name), ranges, make))


def _draw_lengths(model: ModelConfig, logical: LogicalTensor, seed: int, into: Tensor, *, start: int) -> None:
    """`draw` of DoRA's magnitudes: the lengths of the rows of a weight that has its initial values."""
    name = logical.name.removesuffix(MAGNITUDE) + WEIGHT
    weight = LogicalTensor(name=name, shape=parameter_shapes(model)[name])
    distribution, width = _distribution(model, weight), weight.shape[-1]
    assert isinstance(distribution, Normal), f"{name} is a matrix"
    filled = 0
    for rows in logical.runs(start, into.numel()):
        for row in rows:
            blocks = _elements(distribution, weight, seed, [range(row * width, (row + 1) * width)])
            into[filled] = torch.linalg.vector_norm(torch.cat(list(blocks)))
            filled += 1
