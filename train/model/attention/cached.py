"""Attention of new positions over cached ones: the continuations of sequences, step by step.

Shapes: B sequences, S new positions, P cached positions (the new ones included), N query heads, K key-value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from train.model.attention.plain import scores


@dataclass(frozen=True, kw_only=True)
class CachedView:
    """Which of the cached positions the new ones may look at, for one window; shared by the layers that have it."""

    first: int
    """The first position that any of them sees."""
    allowed: Tensor | None
    """True where a new position sees one from `first` on: [S, P], or [B, 1, S, P] where sequences differ; None: each sees all
    of them."""


def view_of_cache(start: int, end: int, *, window: int | None, device: torch.device) -> CachedView:
    """The view of the new positions start..end; a single one needs no mask, which keeps the fast kernels open to it."""
    first = 0 if window is None else max(0, start - window + 1)
    if end - start == 1:
        return CachedView(first=first, allowed=None)
    behind_SP = torch.arange(start, end, device=device).unsqueeze(1) - torch.arange(first, end, device=device)
    allowed_SP = behind_SP >= 0
    return CachedView(first=first, allowed=allowed_SP if window is None else allowed_SP & (behind_SP < window))


def view_of_ragged_cache(positions_BS: Tensor, cached_BP: Tensor, *, window: int | None) -> CachedView:
    """The view of new positions over entries that say themselves which position they hold, -1 for none.

    A new entry without a position sees the others without one, itself among them: a softmax over nothing would be NaN.
    """
    behind_BSP = positions_BS.unsqueeze(2) - cached_BP.unsqueeze(1)
    same_kind_BSP = (positions_BS < 0).unsqueeze(2) == (cached_BP < 0).unsqueeze(1)
    allowed_BSP = same_kind_BSP & (behind_BSP >= 0)
    if window is not None:
        allowed_BSP &= behind_BSP < window
    return CachedView(first=0, allowed=allowed_BSP.unsqueeze(1))


def attend_cached(
    query_BNSD: Tensor, cache_BKPD: tuple[Tensor, Tensor], view: CachedView, *, scale: float, softcap: float | None
) -> Tensor:
    """Mixed values [B, N, S, D] of S new positions over the cached keys and values."""
    key_BKPD, value_BKPD = (states[:, :, view.first :] for states in cache_BKPD)
    group = query_BNSD.shape[1] // key_BKPD.shape[1]
    if softcap is None and group > 1 and query_BNSD.is_cuda and view.allowed is not None:
        # With a mask torch's kernels for CUDA take no grouped heads, but the one that holds all scores.
        key_BKPD, value_BKPD = (states.repeat_interleave(group, dim=1) for states in (key_BKPD, value_BKPD))
        group = 1
    if softcap is None:
        return F.scaled_dot_product_attention(
            query_BNSD, key_BKPD, value_BKPD, attn_mask=view.allowed, scale=scale, enable_gqa=group > 1
        )
    key_BNPD, value_BNPD = (states.repeat_interleave(group, dim=1) for states in (key_BKPD, value_BKPD))
    score_BNSP = scores(query_BNSD, key_BNPD, view.allowed, scale=scale, softcap=softcap)
    return score_BNSP.softmax(dim=-1) @ value_BNPD
