"""Factories of the linear and embedding layers, tagged with their logical tensors.

`expand` layers grow the residual stream into heads or MLP width, `reduce` layers write back to it. On one tensor rank
both are torch's own linear layer, so that a single GPU pays nothing and compiles without graph breaks; on several they
are megatron-core's, each rank holding its heads, its part of the MLP width, its rows of the vocabulary. Where the blueprint
says so they have an adapter (`train.model.lora`).

Shapes: T tokens, H hidden, V padded vocabulary, t tensor-parallel ranks. Under sequence parallelism the hidden states
between the layers are [T / t, H]: the rank's own rows.
"""

from __future__ import annotations

from functools import cache
from math import prod
from typing import Any

from torch import nn

from train.model.adapters import adapted
from train.model.blueprint import Blueprint
from train.model.empty import EmptyEmbedding, EmptyLinear
from train.model.float8 import Float8Linear
from train.model.logical import LogicalTensor, tag
from train.model.lora import with_adapter


def expand_linear(name: str, out_shape: tuple[int, ...], blueprint: Blueprint, *, cut_dim: int = 0, bias: bool) -> nn.Module:
    """Linear layer from the hidden size to `out_shape`, flattened; ranks share it along `cut_dim` of that shape."""
    tensor, hidden = blueprint.tensor, blueprint.model.hidden_size
    if tensor.size == 1:
        layer = _whole_linear(name, hidden, prod(out_shape), blueprint, bias=bias)
    else:
        layer = _class(_split_layers().Expand, name, blueprint)(hidden, prod(out_shape), bias=bias, tensor=tensor)
    part = {"dim": cut_dim, "index": tensor.rank, "parts": tensor.size}
    tag(layer.weight, LogicalTensor(name=f"{name}.weight", shape=(*out_shape, hidden), **part))
    if bias:
        tag(layer.bias, LogicalTensor(name=f"{name}.bias", shape=out_shape, **part))
    if adapted(name, blueprint.lora):
        layer.attach(name, blueprint, reduces=False)
    return layer


def reduce_linear(name: str, in_size: int, blueprint: Blueprint, *, bias: bool) -> nn.Module:
    """Linear layer from `in_size`, of which each rank holds a part, to the hidden size: weight [hidden, in_size]."""
    tensor, hidden = blueprint.tensor, blueprint.model.hidden_size
    if tensor.size == 1:
        layer = _whole_linear(name, in_size, hidden, blueprint, bias=bias)
    else:
        layer = _class(_split_layers().Reduce, name, blueprint)(in_size, hidden, bias=bias, tensor=tensor)
    part = {"dim": 1, "index": tensor.rank, "parts": tensor.size}
    tag(layer.weight, LogicalTensor(name=f"{name}.weight", shape=(hidden, in_size), **part))
    if bias:
        tag(layer.bias, LogicalTensor(name=f"{name}.bias", shape=(hidden,)))
    if adapted(name, blueprint.lora):
        layer.attach(name, blueprint, reduces=True)
    return layer


def _whole_linear(name: str, in_size: int, out_size: int, blueprint: Blueprint, *, bias: bool) -> nn.Module:
    """A linear layer of one rank alone."""
    if blueprint.float8 is None:
        return _class(EmptyLinear, name, blueprint)(in_size, out_size, bias=bias)
    return _class(Float8Linear, name, blueprint)(in_size, out_size, bias=bias, scaling=blueprint.float8)


def _class(layer: type[nn.Module], name: str, blueprint: Blueprint) -> type[nn.Module]:
    return with_adapter(layer) if adapted(name, blueprint.lora) else layer


def vocab_embedding(name: str, blueprint: Blueprint) -> nn.Module:
    """Lookup table [padded vocabulary, hidden]; on several ranks each holds its rows of it."""
    tensor, model = blueprint.tensor, blueprint.model
    if tensor.size == 1:
        layer: nn.Module = EmptyEmbedding(model.padded_vocab_size, model.hidden_size)
    else:
        layer = _split_layers().Lookup(model.padded_vocab_size, model.hidden_size, tensor=tensor)
    _tag_vocabulary(name, layer, blueprint)
    return layer


def vocab_linear(name: str, blueprint: Blueprint) -> nn.Module:
    """Holder of an untied head's matrix [padded vocabulary, hidden], never a bias; `LossHead` multiplies with it."""
    model = blueprint.model
    layer = EmptyLinear(model.hidden_size, model.padded_vocab_size // blueprint.tensor.size, bias=False)
    _tag_vocabulary(name, layer, blueprint)
    return layer


def _tag_vocabulary(name: str, layer: nn.Module, blueprint: Blueprint) -> None:
    tensor, model = blueprint.tensor, blueprint.model
    shape = (model.padded_vocab_size, model.hidden_size)
    tag(layer.weight, LogicalTensor(name=f"{name}.weight", shape=shape, index=tensor.rank, parts=tensor.size))


@cache
def _split_layers() -> Any:
    """megatron-core's layers with our calling convention; made when first needed, since the import takes seconds."""
    from train.model import split_layers

    return split_layers
