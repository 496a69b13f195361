"""Factories of the linear and embedding layers, tagged with their logical tensors.

`expand` layers grow the residual stream into heads or MLP width, `reduce` layers write back to it. On one tensor rank
both are torch's own `nn.Linear`, so that a single GPU pays nothing and compiles without graph breaks.
"""

from __future__ import annotations

from math import prod

from torch import nn

from train.model.blueprint import Blueprint
from train.model.logical import LogicalTensor, tag


def expand_linear(name: str, out_shape: tuple[int, ...], blueprint: Blueprint) -> nn.Linear:
    """Linear layer from the hidden size to `out_shape`, flattened: weight [prod(out_shape), hidden]."""
    layer = nn.Linear(blueprint.model.hidden_size, prod(out_shape), bias=blueprint.model.bias)
    tag(layer.weight, LogicalTensor(name=f"{name}.weight", shape=(*out_shape, blueprint.model.hidden_size)))
    if blueprint.model.bias:
        tag(layer.bias, LogicalTensor(name=f"{name}.bias", shape=out_shape))
    return layer


def reduce_linear(name: str, in_size: int, blueprint: Blueprint) -> nn.Linear:
    """Linear layer from `in_size` to the hidden size: weight [hidden, in_size]."""
    layer = nn.Linear(in_size, blueprint.model.hidden_size, bias=blueprint.model.bias)
    tag(layer.weight, LogicalTensor(name=f"{name}.weight", shape=(blueprint.model.hidden_size, in_size), dim=1))
    if blueprint.model.bias:
        tag(layer.bias, LogicalTensor(name=f"{name}.bias", shape=(blueprint.model.hidden_size,)))
    return layer


def vocab_embedding(name: str, blueprint: Blueprint) -> nn.Embedding:
    """Lookup table of the padded vocabulary: weight [padded vocabulary, hidden]."""
    layer = nn.Embedding(blueprint.model.padded_vocab_size, blueprint.model.hidden_size)
    tag(
        layer.weight,
        LogicalTensor(name=f"{name}.weight", shape=(blueprint.model.padded_vocab_size, blueprint.model.hidden_size)),
    )
    return layer


def vocab_linear(name: str, blueprint: Blueprint) -> nn.Linear:
    """Output matrix of an untied head: weight [padded vocabulary, hidden], never a bias."""
    layer = nn.Linear(blueprint.model.hidden_size, blueprint.model.padded_vocab_size, bias=False)
    tag(
        layer.weight,
        LogicalTensor(name=f"{name}.weight", shape=(blueprint.model.padded_vocab_size, blueprint.model.hidden_size)),
    )
    return layer
