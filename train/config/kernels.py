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
    compile: bool = False
    """Compile each block, and head and loss, with torch.compile; the first step then takes a minute or so."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations kept for the backward pass: all; the results of matrix products and attention kernels; one per block."""
    logits_bytes: int = 1 << 30
    """Most bytes of fp32 logits on a rank; beyond it head and loss run over chunks of tokens, at no further cost."""
    fp8_scaling: Literal["tensorwise", "rowwise"] = "tensorwise"
    """precision=fp8: one scale for a matrix, with gradients in e5m2 (fastest), or one for each row, all in e4m3 (closest)."""
    collect_garbage_steps: int | None = 1000
    """Steps between runs of Python's garbage collector, on all ranks at once; null: Python's own moments, each rank's other."""

    def __post_init__(self) -> None:
        problems = []
        if self.logits_bytes < 1:
            problems.append(f"logits_bytes={self.logits_bytes}: must be at least 1; 1073741824 (1 GiB) is usual")
        if self.collect_garbage_steps is not None and self.collect_garbage_steps < 1:
            problems.append(f"collect_garbage_steps={self.collect_garbage_steps}: must be at least 1; null leaves it to Python")
        if problems:
            raise ConfigError(problems)
