"""Factories of the linear and embedding layers, tagged with their logical tensors; what crosses tensor-parallel ranks.

`expand` layers grow the residual stream into heads or MLP width, `reduce` layers write back to it. On one tensor rank
both are torch's own `nn.Linear`, so that a single GPU pays nothing and compiles without graph breaks; on several they
are megatron-core's, each rank holding its heads, its part of the MLP width, its rows of the vocabulary.

Shapes: T tokens, H hidden, V padded vocabulary, t tensor-parallel ranks. Under sequence parallelism the hidden states
between the layers are [T / t, H]: the rank's own rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from train.model.blueprint import Blueprint
from train.model.float8 import Float8Linear
from train.model.init import keyed_seed
from train.model.logical import LogicalTensor, tag
from train.parallel import TensorRanks

if TYPE_CHECKING:
    from types import ModuleType


def expand_linear(name: str, out_shape: tuple[int, ...], blueprint: Blueprint, *, cut_dim: int = 0, bias: bool) -> nn.Module:
    """Linear layer from the hidden size to `out_shape`, flattened; ranks share it along `cut_dim` of that shape."""
    tensor, hidden = blueprint.tensor, blueprint.model.hidden_size
    if tensor.size == 1:
        layer: nn.Module = _whole_linear(hidden, prod(out_shape), blueprint, bias=bias)
    else:
        layer = _split_layers().Expand(hidden, prod(out_shape), bias=bias, tensor=tensor)
    part = {"dim": cut_dim, "index": tensor.rank, "parts": tensor.size}
    tag(layer.weight, LogicalTensor(name=f"{name}.weight", shape=(*out_shape, hidden), **part))
    if bias:
        tag(layer.bias, LogicalTensor(name=f"{name}.bias", shape=out_shape, **part))
    return layer


def reduce_linear(name: str, in_size: int, blueprint: Blueprint, *, bias: bool) -> nn.Module:
    """Linear layer from `in_size`, of which each rank holds a part, to the hidden size: weight [hidden, in_size]."""
    tensor, hidden = blueprint.tensor, blueprint.model.hidden_size
    if tensor.size == 1:
        layer: nn.Module = _whole_linear(in_size, hidden, blueprint, bias=bias)
    else:
        layer = _split_layers().Reduce(in_size, hidden, bias=bias, tensor=tensor)
    part = {"dim": 1, "index": tensor.rank, "parts": tensor.size}
    tag(layer.weight, LogicalTensor(name=f"{name}.weight", shape=(hidden, in_size), **part))
    if bias:
        tag(layer.bias, LogicalTensor(name=f"{name}.bias", shape=(hidden,)))
    return layer


def _whole_linear(in_size: int, out_size: int, blueprint: Blueprint, *, bias: bool) -> nn.Module:
    """A linear layer of one rank alone."""
    if blueprint.float8 is None:
        return nn.Linear(in_size, out_size, bias=bias)
    return Float8Linear(in_size, out_size, bias=bias, scaling=blueprint.float8)


def vocab_embedding(name: str, blueprint: Blueprint) -> nn.Module:
    """Lookup table [padded vocabulary, hidden]; on several ranks each holds its rows of it."""
    tensor, model = blueprint.tensor, blueprint.model
    if tensor.size == 1:
        layer: nn.Module = nn.Embedding(model.padded_vocab_size, model.hidden_size)
    else:
        layer = _split_layers().Lookup(model.padded_vocab_size, model.hidden_size, tensor=tensor)
    _tag_vocabulary(name, layer, blueprint)
    return layer


def vocab_linear(name: str, blueprint: Blueprint) -> nn.Module:
    """Holder of an untied head's matrix [padded vocabulary, hidden], never a bias; `LossHead` multiplies with it."""
    model = blueprint.model
    layer = nn.Linear(model.hidden_size, model.padded_vocab_size // blueprint.tensor.size, bias=False)
    _tag_vocabulary(name, layer, blueprint)
    return layer


def _tag_vocabulary(name: str, layer: nn.Module, blueprint: Blueprint) -> None:
    tensor, model = blueprint.tensor, blueprint.model
    shape = (model.padded_vocab_size, model.hidden_size)
    tag(layer.weight, LogicalTensor(name=f"{name}.weight", shape=shape, index=tensor.rank, parts=tensor.size))


def replicated(parameter: Tensor, tensor: TensorRanks, *, partial: bool) -> Tensor:
    """A parameter that every rank holds whole, to be used in a computation of which the rank does a part.

    Its gradient is then the sum over the ranks. `partial`: the part is one even without sequence parallelism (a rank's
    own heads); otherwise only the rows of sequence parallelism are. DeepSpeed does not reduce these gradients, and the
    ranks' copies would drift apart without an error.
    """
    if tensor.size > 1 and (partial or tensor.sequence_parallel):
        return _mappings().copy_to_tensor_model_parallel_region(parameter, group=tensor.group)
    return parameter


def own_rows(per_token: Tensor, tensor: TensorRanks) -> Tensor:
    """The rows of [T, ...] that this rank works on between the split layers; no gradient flows."""
    return per_token.chunk(tensor.size)[tensor.rank] if tensor.sequence_parallel else per_token


def all_rows(hidden_TH: Tensor, tensor: TensorRanks) -> Tensor:
    """All rows [T, H] on every rank, each of which will use them for its part: the gradient is summed over the ranks."""
    if tensor.size == 1:
        return hidden_TH
    if tensor.sequence_parallel:
        return _mappings().gather_from_sequence_parallel_region(hidden_TH, group=tensor.group)
    return _mappings().copy_to_tensor_model_parallel_region(hidden_TH, group=tensor.group)


def all_columns(logits_TV: Tensor, tensor: TensorRanks) -> Tensor:
    """The logits of the whole vocabulary, from the ranks' parts of it."""
    if tensor.size == 1:
        return logits_TV
    return _mappings().gather_from_tensor_model_parallel_region(logits_TV, group=tensor.group)


def sum_of_parts(values: Tensor, tensor: TensorRanks) -> Tensor:
    """Sum over the tensor-parallel ranks, for a use that is the same on all of them."""
    if tensor.size == 1:
        return values
    return _mappings().reduce_from_tensor_model_parallel_region(values.contiguous(), group=tensor.group)


def vocab_parallel_loss(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    """Cross-entropy [T] of logits whose columns lie on several ranks; overwrites fp32 logits.

    A label outside the vocabulary gives a finite value and no error: the caller leaves it out.
    """
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    return vocab_parallel_cross_entropy(logits_TV, labels_T.contiguous())


@contextmanager
def own_draws(tensor: TensorRanks, name: str, *, dropout: float) -> Iterator[None]:
    """Random draws that are this rank's own, in a place where the ranks otherwise draw alike.

    Without sequence parallelism the ranks hold the same hidden states and must drop the same of them, but each has its
    own heads. The stream is keyed by the shared one's seed, the layer and the rank, so a recomputation draws it again.
    """
    if not dropout or tensor.size == 1 or tensor.sequence_parallel:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(keyed_seed(torch.initial_seed(), name, tensor.rank))
        yield


def _mappings() -> ModuleType:
    from megatron.core.tensor_parallel import mappings

    return mappings


@cache
def _split_layers() -> Any:
    """megatron-core's layers with our calling convention; made when first needed, since the import takes seconds."""
    from train.model import split_layers

    return split_layers
