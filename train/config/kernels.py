"""How the same arithmetic is carried out: what is kept for the backward pass, which kernels run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from conf.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    recompute: Literal["none", "full"] = "none"
    """Activations kept for the backward pass: all of them, or one per block and the rest computed again."""
    logits_bytes: int = 1 << 30
    """Most bytes of fp32 logits on a rank; beyond it head and loss run over chunks of tokens, at no further cost."""

    def __post_init__(self) -> None:
        if self.logits_bytes < 1:
            raise ConfigError([f"logits_bytes={self.logits_bytes}: must be at least 1; 1073741824 (1 GiB) is usual"])
