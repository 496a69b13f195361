"""Rules of a key map: a logical tensor, the names it has in a foreign format, and how its values are laid out there.

A transform has an exact inverse, so that one table serves both directions.

Shapes: K key-value heads, R queries per key-value head, D head size, H hidden, F inner width of the MLP, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from train.config.model import ModelConfig

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Transform:
    """One logical tensor to its foreign tensors and back; `join(split(x)) == x` to the bit, but for padding rows."""

    split: Callable[[Tensor, ModelConfig], tuple[Tensor, ...]]
    join: Callable[[tuple[Tensor, ...], ModelConfig], Tensor]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One line of a table; `{layer}` stands for the number of the block in all names."""

    logical: str
    foreign: tuple[str, ...]
    transform: Transform


def _cut_vocabulary(padded_VH: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
    return (padded_VH[: model.vocab_size],)


def _pad_vocabulary(parts: tuple[Tensor, ...], model: ModelConfig) -> Tensor:
    (rows_VH,) = parts
    missing = model.padded_vocab_size - rows_VH.shape[0]
    # Zeros: a padded row is never looked up and its logit is masked, so that no value of it is wrong.
    return torch.cat([rows_VH, rows_VH.new_zeros(missing, *rows_VH.shape[1:])])


def _split_groups(fused: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
    """[K, R + 2, D, ...] -> queries [K R D, ...], keys [K D, ...], values [K D, ...]; heads in their order."""
    rest = fused.shape[3:]
    return tuple(part.reshape(-1, *rest) for part in (fused[:, :-2], fused[:, -2], fused[:, -1]))


def _join_groups(parts: tuple[Tensor, ...], model: ModelConfig) -> Tensor:
    query, key, value = (part.reshape(model.kv_heads, -1, model.head_dim, *part.shape[1:]) for part in parts)
    return torch.cat([query, key, value], dim=1)


def _concatenate_groups(fused: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
    """[K, R + 2, D] -> all queries, all keys, all values in one row [(R + 2) K D]."""
    return (torch.cat(_split_groups(fused, model)),)


def _regroup(parts: tuple[Tensor, ...], model: ModelConfig) -> Tensor:
    (row,) = parts
    query_rows, kv_rows = model.num_heads * model.head_dim, model.kv_heads * model.head_dim
    return _join_groups(row.split([query_rows, kv_rows, kv_rows]), model)


SAME = Transform(split=lambda whole, _: (whole,), join=lambda parts, _: parts[0])
TRANSPOSED = Transform(split=lambda whole, _: (whole.T,), join=lambda parts, _: parts[0].T)
VOCABULARY = Transform(split=_cut_vocabulary, join=_pad_vocabulary)
QKV_APART = Transform(split=_split_groups, join=_join_groups)
QKV_IN_A_ROW = Transform(split=_concatenate_groups, join=_regroup)
# GPT-2's Conv1D keeps its matrix as [in, out].
QKV_CONV1D = Transform(
    split=lambda fused, model: (_concatenate_groups(fused, model)[0].T,),
    join=lambda parts, model: _regroup((parts[0].T,), model),
)
QKV_BY_HEAD = Transform(
    split=lambda fused, _: (fused.flatten(0, 2),),
    join=lambda parts, model: parts[0].unflatten(0, (model.kv_heads, -1, model.head_dim)),
)
GATE_AND_UP_IN_A_ROW = Transform(
    split=lambda fused, _: (fused.flatten(0, 1),), join=lambda parts, _: parts[0].unflatten(0, (2, -1))
)
GATE_AND_UP = Transform(split=lambda fused, _: (fused[0], fused[1]), join=lambda parts, _: torch.stack(parts))


def pair(logical: str, foreign: str, transform: Transform = SAME) -> Rule:
    """A rule with one foreign name."""
    return Rule(logical=logical, foreign=(foreign,), transform=transform)


def fan(logical: str, foreign: str, names: tuple[str, ...], transform: Transform) -> Rule:
    """A rule with several foreign names: those of `names` in the place of `*`."""
    return Rule(logical=logical, foreign=tuple(foreign.replace("*", name) for name in names), transform=transform)
