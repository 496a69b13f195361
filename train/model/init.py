"""Initial values: one table, one generator per (seed, logical name).

GPT-2 and Llama practice: matrices and embeddings normal(0, init_std); the matrices that write to the residual stream
normal(0, init_std / sqrt(2 x layers)) (Radford et al. 2019); norms 1, biases 0. Since a value depends on the seed and the
logical name alone, every layout starts from the same bits.

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
from train.model.logical import LogicalTensor

# (pattern of the logical name, standard deviation from the configuration, or a constant)
TABLE: tuple[tuple[str, Callable[[ModelConfig], float] | None, float], ...] = (
    (r"embedding\.(tokens|positions)\.weight", lambda model: model.init_std, 0.0),
    (
        r"blocks\.\d+\.(attention\.qkv|mlp\.gate_up|mlp\.up)\.weight",
        lambda model: model.init_std / sqrt(model.width_ratio),
        0.0,
    ),
    (
        r"blocks\.\d+\.(attention\.output|mlp\.down)\.weight",
        lambda model: model.init_std / sqrt(2 * model.num_layers * model.width_ratio),
        0.0,
    ),
    (r"head\.weight", lambda model: model.init_std, 0.0),
    (r"(.*_norm|final_norm)\.weight", None, 1.0),
    (r".*\.bias", None, 0.0),
)


def keyed_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts; equal parts give equal seeds on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def initial_value(model: ModelConfig, logical: LogicalTensor, seed: int) -> Tensor:
    """This rank's slice of the initial value of `logical`: fp32, on the CPU, of its local shape."""
    for pattern, std_of, constant in TABLE:
        if re.fullmatch(pattern, logical.name):
            if std_of is None:
                return torch.full(logical.local_shape, constant)
            generator = torch.Generator().manual_seed(keyed_seed(seed, logical.name))
            whole = torch.empty(logical.shape).normal_(0.0, std_of(model), generator=generator)
            return logical.cut(whole).contiguous()
    raise AssertionError(f"{logical.name} has no line in the table of initial values")
