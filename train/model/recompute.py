"""How a block is run in training: which activations are kept for the backward pass, and whether it is compiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from train.config.kernels import KernelsConfig

# What is dear to compute and cheap to keep: everything else of a block is element-wise work and is done again.
KEPT = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::baddbmm",
        "aten::_scaled_mm",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "torch_attn::_varlen_attn",
        "flash_attn::_flash_attn_forward",
        "flash_attn::_flash_attn_varlen_forward",
        "flash_attn_3::fwd",
    }
)


def trained(body: Callable[..., Tensor], kernels: KernelsConfig) -> Callable[..., Tensor]:
    """`body` as training runs it; without gradients nothing is kept and nothing done twice.

    Under ZeRO 3 and on several tensor ranks the graph of a compiled block breaks at every gathered layer and collective;
    the pieces between them are compiled.
    """
    if kernels.recompute == "full":
        body = partial(checkpoint, body, use_reentrant=False)
    elif kernels.recompute == "selective":
        contexts = partial(create_selective_checkpoint_contexts, _policy)
        body = partial(checkpoint, body, use_reentrant=False, context_fn=contexts)
    return torch.compile(body, dynamic=False) if kernels.compile else body


def _policy(_: Any, operator: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    schema = getattr(operator, "_schema", None)  # an operator of higher order has none
    kept = schema is not None and schema.name in KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
