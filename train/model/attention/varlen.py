"""Attention by torch's varlen_attn: FlashAttention over cumulative lengths, with nothing to install."""

from __future__ import annotations

import inspect

from torch import Tensor

from train.model.attention.backend import HALF_PRECISION, Backend, Needs
from train.model.attention.layout import Layout

KEYWORDS = ("scale", "window_size", "enable_gqa")


class TorchVarlen(Backend):
    """Documents as lengths, windows, grouped heads; no soft-cap and no dropout. Written, not shown."""

    def why_not(self, needs: Needs) -> str | None:
        """An Ampere GPU or newer, half precision; a torch whose function has the keywords."""
        if needs.device.type != "cuda":
            return f"needs a CUDA device, not {needs.device.type}"
        if needs.capability < (8, 0):
            return f"needs compute capability 8.0 (A100), the device has {'.'.join(map(str, needs.capability))}"
        if needs.dtype not in HALF_PRECISION:
            return f"the kernel computes in bf16 or fp16, not in {needs.dtype}"
        if needs.softcap is not None:
            return "varlen_attn has no soft-cap (model.attention_softcap)"
        if needs.dropout:
            return "varlen_attn has no dropout (model.dropout)"
        if needs.head_size > 256 or needs.head_size % 8:
            return f"the head size must be a multiple of 8 up to 256, not {needs.head_size}"
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError as error:
            return f"this torch has no varlen_attn ({error})"
        if missing := [name for name in KEYWORDS if name not in inspect.signature(varlen_attn).parameters]:
            return f"varlen_attn of this torch does not take {', '.join(missing)}"
        return None

    def attend(
        self, query_TND: Tensor, key_TKD: Tensor, value_TKD: Tensor, *, needs: Needs, layout: Layout, dropout: float
    ) -> Tensor:
        """See `Backend.attend`. How long the longest document is, only the device knows: the longest possible is given."""
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(
            query_TND,
            key_TKD.contiguous(),
            value_TKD.contiguous(),
            layout.bounds,
            layout.bounds,
            needs.sequence_length,
            needs.sequence_length,
            scale=needs.scale,
            # (keys before, keys after): -1 is without limit; a window counts the query itself.
            window_size=(-1 if needs.window is None else needs.window - 1, 0),
            enable_gqa=needs.grouped,
        )
