"""What crosses tensor-parallel ranks between the split layers; on one rank all of it is nothing.

Shapes: T tokens, H hidden, V padded vocabulary. Under sequence parallelism a rank holds its own rows of the hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from train.model.init import keyed_seed
from train.parallel import TensorRanks

if TYPE_CHECKING:
    from types import ModuleType


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


def own_rows_of_sum(parts_TX: Tensor, tensor: TensorRanks) -> Tensor:
    """The sum of [T, ...] over the tensor-parallel ranks; under sequence parallelism the rank's own rows of it."""
    if tensor.sequence_parallel:
        return _mappings().reduce_scatter_to_sequence_parallel_region(parts_TX.contiguous(), group=tensor.group)
    return sum_of_parts(parts_TX, tensor)


def sum_for_parts(values: Tensor, tensor: TensorRanks) -> Tensor:
    """Sum over the tensor-parallel ranks, each of which will use it for its part: the gradient is summed over the ranks."""
    if tensor.size == 1:
        return values
    return _mappings().copy_to_tensor_model_parallel_region(sum_of_parts(values, tensor), group=tensor.group)


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
