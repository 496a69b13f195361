"""Attention in torch's own operators: matrix products and a softmax. Holds S x S scores; can do everything, anywhere.

Shapes: B sequences, S positions, T = B x S tokens, N query heads, K key-value heads, D head size, G = N / K queries of a key;
P = B x K problems of R = G x S rows: the queries of a group stand below each other, so that one product reads their keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from train.model.attention.backend import Backend, Needs, by_sequence, mask_of
from train.model.attention.layout import Layout


class Eager(Backend):
    """The dtype's own arithmetic: one batched product with mask and scale in it, softmax, one more product.

    On a CPU in bf16 the quickest for short sequences: its softmax reads and writes bf16 and computes in fp32.
    """

    def why_not(self, needs: Needs) -> str | None:
        """Nothing ever stands against it."""
        return None

    def lay_out(self, needs: Needs, document_bounds: Tensor, num_tokens: int) -> Layout:
        """The mask as what is added to the scores, 0 or -inf, and as the product of `attend` takes it: [1 or P, R, S].

        Spread over the heads here, once, when the sequences differ; not again in every layer.
        """
        group = needs.num_heads // needs.kv_heads
        allowed_B1SS = mask_of(needs, document_bounds, num_tokens)
        heads = needs.kv_heads if needs.packed else 1
        bias_B1SS = torch.zeros(allowed_B1SS.shape, dtype=needs.dtype, device=allowed_B1SS.device)
        bias_B1SS.masked_fill_(~allowed_B1SS, float("-inf"))
        return Layout(mask=bias_B1SS.repeat(1, heads, group, 1).flatten(0, 1))

    def attend(
        self, query_TND: Tensor, key_TKD: Tensor, value_TKD: Tensor, *, needs: Needs, layout: Layout, dropout: float
    ) -> Tensor:
        """See `Backend.attend`."""
        length, kv_heads, size = needs.sequence_length, needs.kv_heads, needs.head_size
        group = needs.num_heads // kv_heads
        query_BSKGD = query_TND.view(-1, length, kv_heads, group, size)
        query_PRD = query_BSKGD.permute(0, 2, 3, 1, 4).reshape(-1, group * length, size)
        key_PSD, value_PSD = (by_sequence(states_TKD, length).reshape(-1, length, size) for states_TKD in (key_TKD, value_TKD))
        if needs.softcap is None:
            # Scale and mask are part of the product, so that nothing else of S x S is read or written before the softmax.
            score_PRS = torch.baddbmm(layout.mask, query_PRD, key_PSD.transpose(1, 2), alpha=needs.scale)
        else:
            score_PRS = torch.bmm(query_PRD, key_PSD.transpose(1, 2)) * (needs.scale / needs.softcap)
            score_PRS = needs.softcap * score_PRS.tanh() + layout.mask
        weight_PRS = F.dropout(F.softmax(score_PRS, dim=-1), dropout, training=dropout > 0)
        mixed_BKGSD = torch.bmm(weight_PRS, value_PSD).view(-1, kv_heads, group, length, size)
        return mixed_BKGSD.permute(0, 3, 1, 2, 4).reshape(query_TND.shape)


class Reference(Backend):
    """The definition, in float64, one operation after another: slow, and what every other backend is held against."""

    def why_not(self, needs: Needs) -> str | None:
        """Nothing ever stands against it."""
        return None

    def lay_out(self, needs: Needs, document_bounds: Tensor, num_tokens: int) -> Layout:
        """The mask as it is."""
        return Layout(mask=mask_of(needs, document_bounds, num_tokens))

    def attend(
        self, query_TND: Tensor, key_TKD: Tensor, value_TKD: Tensor, *, needs: Needs, layout: Layout, dropout: float
    ) -> Tensor:
        """See `Backend.attend`; the result is rounded to the dtype of the queries."""
        query_BNSD, key_BKSD, value_BKSD = (
            by_sequence(states_TND, needs.sequence_length).double() for states_TND in (query_TND, key_TKD, value_TKD)
        )
        group = needs.num_heads // needs.kv_heads
        key_BNSD, value_BNSD = (states.repeat_interleave(group, dim=1) for states in (key_BKSD, value_BKSD))
        score_BNSS = scores(query_BNSD, key_BNSD, layout.mask, scale=needs.scale, softcap=needs.softcap)
        weight_BNSS = F.dropout(score_BNSS.softmax(dim=-1), dropout, training=dropout > 0)
        return (weight_BNSS @ value_BNSD).transpose(1, 2).reshape(query_TND.shape).to(query_TND.dtype)


def scores(query_BNSD: Tensor, key_BNPD: Tensor, allowed: Tensor | None, *, scale: float, softcap: float | None) -> Tensor:
    """What the softmax is taken of: [B, N, S, P]; -inf where a query may not look. `allowed` None: it may everywhere."""
    score_BNSP = query_BNSD @ key_BNPD.transpose(-1, -2) * scale
    if softcap is not None:
        score_BNSP = softcap * torch.tanh(score_BNSP / softcap)
    return score_BNSP if allowed is None else score_BNSP.masked_fill(~allowed, float("-inf"))
