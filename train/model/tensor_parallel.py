"""Factories of the linear and embedding layers, tagged with their logical tensors.

`expand` layers grow the residual stream into heads or MLP width, `reduce` layers write back to it. On one tensor rank
both are torch's own `nn.Linear`, so that a single GPU pays nothing and compiles without graph breaks.
"""

from __future__ import annotations

from math import prod

from torch import nn

from train.config.model import ModelConfig
from train.model.logical import LogicalTensor, tag


def expand_linear(name: str, out_shape: tuple[int, ...], model: ModelConfig) -> nn.Linear:
    """Linear layer from the hidden size to `out_shape`, flattened: weight [prod(out_shape), hidden]."""
    layer = nn.Linear(model.hidden_size, prod(out_shape), bias=model.bias)
    tag(layer.weight, LogicalTensor(name=f"{name}.weight", shape=(*out_shape, model.hidden_size)))
    if model.bias:
        tag(layer.bias, LogicalTensor(name=f"{name}.bias", shape=out_shape))
    return layer


def reduce_linear(name: str, in_size: int, model: ModelConfig) -> nn.Linear:
    """Linear layer from `in_size` to the hidden size: weight [hidden, in_size]."""
    layer = nn.Linear(in_size, model.hidden_size, bias=model.bias)
    tag(layer.weight, LogicalTensor(name=f"{name}.weight", shape=(model.hidden_size, in_size), dim=1))
    if model.bias:
        tag(layer.bias, LogicalTensor(name=f"{name}.bias", shape=(model.hidden_size,)))
    return layer


def vocab_embedding(name: str, model: ModelConfig) -> nn.Embedding:
    """Lookup table of the padded vocabulary: weight [padded vocabulary, hidden]."""
    layer = nn.Embedding(model.padded_vocab_size, model.hidden_size)
    tag(layer.weight, LogicalTensor(name=f"{name}.weight", shape=(model.padded_vocab_size, model.hidden_size)))
    return layer


def vocab_linear(name: str, model: ModelConfig) -> nn.Linear:
    """Output matrix of an untied head: weight [padded vocabulary, hidden], never a bias."""
    layer = nn.Linear(model.hidden_size, model.padded_vocab_size, bias=False)
    tag(layer.weight, LogicalTensor(name=f"{name}.weight", shape=(model.padded_vocab_size, model.hidden_size)))
    return layer
