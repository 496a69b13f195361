"""What the documents of a micro-batch mean to a kernel: cumulative lengths, or a mask of S x S.

Lengths cost nothing and are what variable-length kernels take; a mask is made only for a kernel that needs one. Nothing
here waits for the device: the number of bounds is fixed for the run, the unused ones are empty documents at the end.

Shapes: B sequences, S positions, T = B x S tokens batch-major.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Who may see whom in one micro-batch, in the form that a backend reads."""

    bounds: Tensor | None = None
    """int32 [documents + 1]: where each begins in T, and T; a document may be empty and never crosses a sequence."""
    mask: Tensor | None = None
    """Which keys a query may look at, in the backend's own shape and dtype."""


def sequence_bounds(num_tokens: int, sequence_length: int, device: torch.device) -> Tensor:
    """Bounds of sequences that are one document each: int32 [B + 1]."""
    return torch.arange(0, num_tokens + 1, sequence_length, dtype=torch.int32, device=device)


def document_of_tokens(document_bounds: Tensor, num_tokens: int) -> Tensor:
    """[T]: the place in `document_bounds` of the bound that ends a token's document."""
    token_T = torch.arange(num_tokens, device=document_bounds.device, dtype=document_bounds.dtype)
    # right=True puts a token behind every bound that is equal to it, so empty documents hold no token.
    return torch.searchsorted(document_bounds, token_T, right=True)


def allowed_keys(document_bounds: Tensor, num_tokens: int, sequence_length: int, *, window: int | None) -> Tensor:
    """[B, 1, S, S]: True where a query may look at a key: not later, in the same document, among the last `window`."""
    document_BS = document_of_tokens(document_bounds, num_tokens).view(-1, sequence_length)
    allowed_BSS = (document_BS.unsqueeze(2) == document_BS.unsqueeze(1)).tril_()
    if window is not None:
        allowed_BSS.triu_(1 - window)
    return allowed_BSS.unsqueeze(1)
