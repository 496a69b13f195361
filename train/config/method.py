"""What of a model is fine-tuned, and how."""

from __future__ import annotations

from dataclasses import dataclass

from conf.errors import ConfigError
from train.config.adapter import LoraConfig


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    lora: LoraConfig | None = None
    """Small trained matrices beside the frozen weights; null: the weights themselves are trained."""
    frozen: tuple[str, ...] = ()
    """Patterns of the names of parameters that stay as they are, such as embedding.* or blocks.0.*; with lora all others do."""
    layer_decay: float = 1.0
    """Learning rate of each layer as a fraction of that of the layer above it; the head has the run's own, one that is tied the
    embedding's, which is the lowest. 1: all alike."""
    neftune_alpha: float | None = None
    """Strength of the noise on the embeddings in training (NEFTune, Jain et al. 2023); 5 to 15 is usual. null: none."""

    def __post_init__(self) -> None:
        problems = []
        if self.lora is not None and self.frozen:
            problems.append(f"frozen={list(self.frozen)}: with lora all weights are frozen; leave it out, or lora")
        if not 0 < self.layer_decay <= 1:
            problems.append(f"layer_decay={self.layer_decay}: must be above 0 and at most 1; 0.65 to 0.95 is usual, 1 is none")
        if self.neftune_alpha is not None and self.neftune_alpha <= 0:
            problems.append(f"neftune_alpha={self.neftune_alpha}: must be above 0; null adds no noise")
        if problems:
            raise ConfigError(problems)
