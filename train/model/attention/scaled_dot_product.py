"""Attention by torch's scaled_dot_product_attention: the kernel that torch picks, or one by name."""

from __future__ import annotations

from contextlib import nullcontext

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from train.model.attention.backend import HALF_PRECISION, Backend, Needs, by_sequence, mask_of
from train.model.attention.layout import Layout


class ScaledDotProduct(Backend):
    """torch's choice among its kernels. Documents and windows go in as a mask of S x S: it takes no lengths."""

    kernel: SDPBackend | None = None

    def why_not(self, needs: Needs) -> str | None:
        """It has no soft-cap; everything else goes."""
        if needs.softcap is not None:
            return "scaled_dot_product_attention has no soft-cap (model.attention_softcap)"
        return None

    def lay_out(self, needs: Needs, document_bounds: Tensor, num_tokens: int) -> Layout:
        """A mask for documents or a window; nothing for plain causal attention, which the kernels know."""
        if not needs.packed and needs.window is None:
            return Layout()
        return Layout(mask=mask_of(needs, document_bounds, num_tokens))

    def attend(
        self, query_TND: Tensor, key_TKD: Tensor, value_TKD: Tensor, *, needs: Needs, layout: Layout, dropout: float
    ) -> Tensor:
        """See `Backend.attend`."""
        query_BNSD, key_BKSD, value_BKSD = (
            by_sequence(states_TND, needs.sequence_length) for states_TND in (query_TND, key_TKD, value_TKD)
        )
        with nullcontext() if self.kernel is None else sdpa_kernel(self.kernel):
            mixed_BNSD = F.scaled_dot_product_attention(
                query_BNSD,
                key_BKSD,
                value_BKSD,
                attn_mask=layout.mask,
                is_causal=layout.mask is None,
                dropout_p=dropout,
                scale=needs.scale,
                enable_gqa=needs.grouped,
            )
        return mixed_BNSD.transpose(1, 2).reshape(query_TND.shape)


class FlashKernel(ScaledDotProduct):
    """torch's FlashAttention-2 on CUDA (no mask), its blocked kernel on a CPU (mask, but no dropout)."""

    kernel = SDPBackend.FLASH_ATTENTION

    def why_not(self, needs: Needs) -> str | None:
        """A GPU's kernel knows lengths and windows, but not through this call."""
        if needs.device.type == "cpu":
            return super().why_not(needs) or ("the CPU kernel has no dropout (model.dropout)" if needs.dropout else None)
        if needs.dtype not in HALF_PRECISION:
            return f"the kernel computes in bf16 or fp16, not in {needs.dtype}"
        return super().why_not(needs) or unmasked(needs)


class CudnnKernel(ScaledDotProduct):
    """cuDNN's fused kernel: the quickest of torch's on Hopper and Blackwell for plain causal attention."""

    kernel = SDPBackend.CUDNN_ATTENTION

    def why_not(self, needs: Needs) -> str | None:
        """Half precision on a GPU, without a mask."""
        if needs.device.type != "cuda":
            return f"needs a CUDA device, not {needs.device.type}"
        if needs.dtype not in HALF_PRECISION:
            return f"the kernel computes in bf16 or fp16, not in {needs.dtype}"
        return super().why_not(needs) or unmasked(needs)


class EfficientKernel(ScaledDotProduct):
    """The memory-efficient kernel (xFormers): any dtype, and masks."""

    kernel = SDPBackend.EFFICIENT_ATTENTION

    def why_not(self, needs: Needs) -> str | None:
        """A GPU; and as many keys as queries, since it shares none."""
        if needs.device.type != "cuda":
            return f"needs a CUDA device, not {needs.device.type}"
        if needs.grouped:
            return f"the kernel shares no keys between queries (model.num_kv_heads below model.num_heads={needs.num_heads})"
        return super().why_not(needs)


def unmasked(needs: Needs) -> str | None:
    """What a kernel that takes no mask cannot do."""
    if needs.packed:
        return "takes no lengths of documents through this call (data.document_mask=true)"
    if needs.window is not None:
        return f"takes no window through this call (model.window={needs.window})"
    return None
