"""What a layer asks of attention, and what every backend answers: whether it can, and the result.

Shapes: B sequences, S positions, T = B x S tokens batch-major, N query heads, K key-value heads, D head size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from train.model.attention.layout import Layout, allowed_keys, sequence_bounds

HALF_PRECISION = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Causal attention of each sequence over itself, as one kind of layer wants it computed. Heads are this rank's."""

    num_heads: int
    kv_heads: int
    head_size: int
    sequence_length: int
    packed: bool
    """Whether documents of a sequence are kept apart."""
    window: int | None = None
    """Tokens that a query sees at most, itself included; None: all before it."""
    scale: float
    """What the products of queries and keys are multiplied with."""
    softcap: float | None = None
    """Scores become softcap x tanh(score / softcap), before the mask."""
    dropout: float = 0.0
    """Probability of dropping an attention weight in training."""
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")

    @property
    def grouped(self) -> bool:
        """Whether several query heads share one key-value head."""
        return self.num_heads != self.kv_heads

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability of the CUDA device: (8, 0) is an A100, (9, 0) an H100, (10, 0) a B200."""
        return torch.cuda.get_device_capability(self.device)


class Backend(ABC):
    """One way to compute attention. `name` is the value of kernels.attention."""

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def why_not(self, needs: Needs) -> str | None:
        """What stands against this backend for `needs`, as the end of a sentence; None: it can."""

    def lay_out(self, needs: Needs, document_bounds: Tensor, num_tokens: int) -> Layout:
        """What this backend reads of a micro-batch; made once for all layers with the same needs.

        `document_bounds` int32 [max bounds]: the cumulative starts of documents over T, filled up with T. By default the
        lengths are handed on, and nothing of S x S is made.
        """
        if not needs.packed:
            document_bounds = sequence_bounds(num_tokens, needs.sequence_length, document_bounds.device)
        return Layout(bounds=document_bounds)

    @abstractmethod
    def attend(
        self, query_TND: Tensor, key_TKD: Tensor, value_TKD: Tensor, *, needs: Needs, layout: Layout, dropout: float
    ) -> Tensor:
        """Mixed values [T, N, D]. Query head n reads key-value head n // (N / K)."""


def by_sequence(states_TND: Tensor, sequence_length: int) -> Tensor:
    """[T, N, D] -> a view [B, N, S, D]."""
    return states_TND.unflatten(0, (-1, sequence_length)).transpose(1, 2)


def mask_of(needs: Needs, document_bounds: Tensor, num_tokens: int) -> Tensor:
    """True where a query may look at a key: [B, 1, S, S], or [1, 1, S, S] when all sequences are alike."""
    if needs.packed:
        return allowed_keys(document_bounds, num_tokens, needs.sequence_length, window=needs.window)
    one_sequence = sequence_bounds(needs.sequence_length, needs.sequence_length, document_bounds.device)
    return allowed_keys(one_sequence, needs.sequence_length, needs.sequence_length, window=needs.window)
