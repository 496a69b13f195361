"""attend(): one signature for attention, whatever kernel does it; and what a micro-batch's layout means to a kernel.

Shapes: B sequences, S positions, T = B x S tokens batch-major, N query heads, K key-value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Mask:
    """Who may see whom. `allowed_B1SS` is True where a query may look at a key; None: plain causal, no documents."""

    sequence_length: int
    allowed_B1SS: Tensor | None


def causal_mask(document_bounds: Tensor, *, num_tokens: int, sequence_length: int, packed: bool) -> Mask:
    """The mask of a micro-batch: causal, and inside documents when `packed`.

    `document_bounds` [max bounds] are the cumulative starts of documents over T, padded with T; int32.
    """
    if not packed:
        return Mask(sequence_length=sequence_length, allowed_B1SS=None)
    token_T = torch.arange(num_tokens, device=document_bounds.device, dtype=document_bounds.dtype)
    document_BS = torch.searchsorted(document_bounds, token_T, right=True).view(-1, sequence_length)
    same_BSS = document_BS.unsqueeze(2) == document_BS.unsqueeze(1)
    return Mask(sequence_length=sequence_length, allowed_B1SS=same_BSS.tril_().unsqueeze(1))


def attend(query_TND: Tensor, key_TKD: Tensor, value_TKD: Tensor, mask: Mask, *, dropout: float = 0.0) -> Tensor:
    """Causal attention of each sequence over itself; returns [T, N, D].

    Scores are scaled by 1/sqrt(D). Head n reads key-value head n // (N / K).
    """
    query_BNSD = _by_sequence(query_TND, mask.sequence_length)
    key_BKSD = _by_sequence(key_TKD, mask.sequence_length)
    value_BKSD = _by_sequence(value_TKD, mask.sequence_length)
    output_BNSD = F.scaled_dot_product_attention(
        query_BNSD,
        key_BKSD,
        value_BKSD,
        attn_mask=mask.allowed_B1SS,
        is_causal=mask.allowed_B1SS is None,
        dropout_p=dropout,
        enable_gqa=query_TND.shape[1] != key_TKD.shape[1],
    )
    return output_BNSD.transpose(1, 2).reshape(query_TND.shape)


def attend_cached(query_BNSD: Tensor, key_BKPD: Tensor, value_BKPD: Tensor, allowed_B1SP: Tensor | None) -> Tensor:
    """Attention of S new positions over P cached ones; returns [B, N, S, D]. `allowed` None: each sees all of them."""
    return F.scaled_dot_product_attention(
        query_BNSD,
        key_BKPD,
        value_BKPD,
        attn_mask=allowed_B1SP,
        enable_gqa=query_BNSD.shape[1] != key_BKPD.shape[1],
    )


def _by_sequence(states_TND: Tensor, sequence_length: int) -> Tensor:
    """[T, N, D] -> a view [B, N, S, D]."""
    tokens, heads, size = states_TND.shape
    return states_TND.view(tokens // sequence_length, sequence_length, heads, size).transpose(1, 2)
