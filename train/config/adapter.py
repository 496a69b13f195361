"""LoRA: small trained matrices beside frozen ones."""

from __future__ import annotations

from dataclasses import dataclass

from conf.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    rank: int = 16
    """Columns of the first and rows of the second of the two matrices that stand beside a frozen one."""
    alpha: float = 32.0
    """Their product is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Share of the adapters' inputs that are dropped in training."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead, so that a larger rank does not learn more slowly (Kalajdzievski 2023)."""
    dora: bool = False
    """Train the length of each row of the merged matrix apart from its direction (Liu et al. 2024)."""
    targets: tuple[str, ...] = ("blocks.*.attention.qkv", "blocks.*.attention.output", "blocks.*.mlp.*")
    """Patterns of the names of the linear layers that get adapters; the default is all of the blocks."""

    def __post_init__(self) -> None:
        problems = []
        if self.rank < 1:
            problems.append(f"rank={self.rank}: must be at least 1; 8 to 64 is usual")
        if self.alpha <= 0:
            problems.append(f"alpha={self.alpha}: must be positive; twice the rank is usual")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout={self.dropout}: must be at least 0 and below 1; 0 and 0.05 are usual")
        if not self.targets:
            problems.append("targets=[]: leaves nothing to train; name linear layers, such as blocks.*.attention.qkv")
        if problems:
            raise ConfigError(problems)

    @property
    def scaling(self) -> float:
        """What the product of the two matrices is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)
