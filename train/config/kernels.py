"""How the same arithmetic is carried out: what is kept for the backward pass, which kernels run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    recompute: Literal["none", "full"] = "none"
    """Activations kept for the backward pass: all of them, or one per block and the rest computed again."""
