"""Initial values: a table by logical name, one generator per (seed, logical name).

GPT-2 and Llama practice: matrices and embeddings normal(0, init_std); the matrices that write to the residual stream
normal(0, init_std / sqrt(2 x layers)) (Radford et al. 2019); norms act as 1, biases as 0. Since a value depends on the seed
and the logical name alone, every layout starts from the same bits.

With muP (Yang et al. 2022, Tensor Programs V, table 8) the matrices of the blocks shrink with the root of the width; their
learning rate shrinks with the width (`train.optim`) and so do the logits (`train.model.heads`). Heads keep their size, so the
scale of the attention scores stays.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from math import sqrt

import torch
from torch import Tensor

from train.config.model import ModelConfig
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


def initial_value(model: ModelConfig, logical: LogicalTensor, seed: int) -> Tensor:
    """This rank's slice of the initial value of `logical`: fp32, on the CPU, of its local shape."""
    for pattern, std_of in SPREADS.items():
        if re.fullmatch(pattern, logical.name):
            generator = torch.Generator().manual_seed(keyed_seed(seed, logical.name))
            whole = torch.empty(logical.shape).normal_(0.0, std_of(model), generator=generator)
            return logical.cut(whole).contiguous()
    if logical.name.endswith((A, MAGNITUDE)):
        return logical.cut(_adapter_value(model, logical, seed)).contiguous()
    for pattern, value_of in CONSTANTS.items():
        if re.fullmatch(pattern, logical.name):
            return torch.full(logical.local_shape, value_of(model))
    raise AssertionError(f"{logical.name} has no line in the table of initial values")


def _adapter_value(model: ModelConfig, logical: LogicalTensor, seed: int) -> Tensor:
    """The whole value of an adapter's tensor, as PEFT's: uniform below 1 / sqrt(inputs), or the lengths of a weight's rows."""
    if logical.name.endswith(A):
        generator = torch.Generator().manual_seed(keyed_seed(seed, logical.name))
        limit = 1 / sqrt(logical.shape[-1])
        return torch.empty(logical.shape).uniform_(-limit, limit, generator=generator)
    weight = logical.name.removesuffix(MAGNITUDE) + WEIGHT
    whole = LogicalTensor(name=weight, shape=parameter_shapes(model)[weight])
    return torch.linalg.vector_norm(initial_value(model, whole, seed), dim=-1)
