"""Attention by the flash-attn packages: FlashAttention 2, 3 (Hopper) and 4 (CuTe). The only importer of them.

All three take cumulative lengths, windows, soft-caps and grouped heads; their signatures differ in details, which are
here. The backward pass is asked to add in a fixed order, so that a resumed run goes on to the bit. Written, not shown:
the calls are checked against the packages' signatures, and have not been run on a GPU.

Sources: Dao 2023 (FlashAttention-2), Shah et al. 2024 (FlashAttention-3), the packages' interface files at v2.8.3 and at
commit 0251105 of Dao-AILab/flash-attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from train.model.attention.backend import HALF_PRECISION, Backend, Needs
from train.model.attention.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Functions:
    """The two functions of a package: sequences of one length [B, S, N, D], and documents by cumulative lengths [T, N, D]."""

    fixed: Callable[..., Any]
    varlen: Callable[..., Any]


class Flash(Backend):
    """What the three packages share."""

    package: ClassVar[str]
    majors: ClassVar[tuple[int, ...]]
    """Compute capabilities' first figures that forward and backward run on."""
    most_head_size: ClassVar[int]
    unlimited: ClassVar[int | None] = -1
    """How the package says that a window has no limit."""
    drops: ClassVar[bool] = False

    def load(self) -> Functions:
        """Import the package. Raises ImportError or OSError when it is not there or does not fit this torch."""
        raise NotImplementedError

    @cached_property
    def functions(self) -> Functions:
        """The package's functions; imported when first asked for, which `why_not` does."""
        return self.load()

    def why_not(self, needs: Needs) -> str | None:
        """The right GPU, half precision, and the package."""
        if needs.device.type != "cuda":
            return f"needs a CUDA device, not {needs.device.type}"
        if needs.capability[0] not in self.majors:
            shown = ", ".join(f"{major}.x" for major in self.majors)
            return f"runs on compute capability {shown}; the device has {'.'.join(map(str, needs.capability))}"
        if needs.dtype not in HALF_PRECISION:
            return f"the kernel computes in bf16 or fp16, not in {needs.dtype}"
        if needs.head_size > self.most_head_size or needs.head_size % 8:
            return f"the head size must be a multiple of 8 up to {self.most_head_size}, not {needs.head_size}"
        if needs.dropout and not self.drops:
            return "the package has no dropout (model.dropout)"
        if needs.dropout and needs.softcap is not None:
            return "the package has no dropout together with a soft-cap (model.dropout, model.attention_softcap)"
        try:
            self.functions  # noqa: B018  (the import is what is tried)
        except (ImportError, OSError) as error:
            return f"the package {self.package} is not installed or does not load ({error})"
        return None

    def keywords(self, needs: Needs, dropout: float) -> dict[str, Any]:
        """What both functions are given besides tensors and lengths."""
        return {
            "softmax_scale": needs.scale,
            "causal": True,
            # (keys before, keys after); a window counts the query itself.
            "window_size": (self.unlimited if needs.window is None else needs.window - 1, 0),
            "softcap": needs.softcap or 0.0,
            "deterministic": True,
        }

    def attend(
        self, query_TND: Tensor, key_TKD: Tensor, value_TKD: Tensor, *, needs: Needs, layout: Layout, dropout: float
    ) -> Tensor:
        """See `Backend.attend`."""
        keywords = self.keywords(needs, dropout)
        if needs.packed:
            mixed = self.functions.varlen(
                query_TND,
                key_TKD,
                value_TKD,
                cu_seqlens_q=layout.bounds,
                cu_seqlens_k=layout.bounds,
                # The longest possible: how long the longest document is, only the device knows.
                max_seqlen_q=needs.sequence_length,
                max_seqlen_k=needs.sequence_length,
                **keywords,
            )
        else:
            parts = (states.unflatten(0, (-1, needs.sequence_length)) for states in (query_TND, key_TKD, value_TKD))
            mixed = self.functions.fixed(*parts, **keywords)
        if isinstance(mixed, tuple):  # FlashAttention-4 and some releases of 3 give the normalisers too
            mixed = mixed[0]
        return mixed.reshape(query_TND.shape)


class Flash2(Flash):
    """FlashAttention-2, the package flash-attn: Ampere and newer; the only one with dropout."""

    package, majors, most_head_size, drops = "flash_attn", (8, 9, 10, 11, 12), 256, True

    def load(self) -> Functions:
        """See `Flash.load`."""
        from flash_attn import flash_attn_func, flash_attn_varlen_func

        return Functions(fixed=flash_attn_func, varlen=flash_attn_varlen_func)

    def keywords(self, needs: Needs, dropout: float) -> dict[str, Any]:
        """The common ones, and dropout."""
        return super().keywords(needs, dropout) | {"dropout_p": dropout}


class Flash3(Flash):
    """FlashAttention-3, built from the folder hopper: H100, H200. In a fixed order it goes up to heads of 192."""

    package, majors, most_head_size = "flash_attn_interface", (9,), 192

    def load(self) -> Functions:
        """See `Flash.load`."""
        from flash_attn_interface import flash_attn_func, flash_attn_varlen_func

        return Functions(fixed=flash_attn_func, varlen=flash_attn_varlen_func)


class Flash4(Flash):
    """FlashAttention-4, the package flash-attn-4: Hopper and Blackwell; kernels are compiled at the first call."""

    package, majors, most_head_size, unlimited = "flash_attn.cute", (9, 10, 11), 128, None

    def load(self) -> Functions:
        """See `Flash.load`."""
        from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

        return Functions(fixed=flash_attn_func, varlen=flash_attn_varlen_func)
