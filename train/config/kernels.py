"""How the same arithmetic is carried out: what is kept for the backward pass, which kernels run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from conf.errors import ConfigError

AttentionName: TypeAlias = Literal[
    "auto",
    "flash4",
    "flash3",
    "flash2",
    "varlen",
    "sdpa",
    "sdpa_cudnn",
    "sdpa_flash",
    "sdpa_efficient",
    "eager",
    "reference",
]


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    attention: AttentionName = "auto"
    """Who computes attention: auto takes the best that is there; flash2, 3, 4 are the flash-attn packages, varlen and sdpa
    torch's own functions (sdpa_* one of its kernels), eager plain products that hold S x S scores, reference float64."""
    recompute: Literal["none", "full"] = "none"
    """Activations kept for the backward pass: all of them, or one per block and the rest computed again."""
    logits_bytes: int = 1 << 30
    """Most bytes of fp32 logits on a rank; beyond it head and loss run over chunks of tokens, at no further cost."""

    def __post_init__(self) -> None:
        if self.logits_bytes < 1:
            raise ConfigError([f"logits_bytes={self.logits_bytes}: must be at least 1; 1073741824 (1 GiB) is usual"])
