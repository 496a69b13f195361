"""What config.yaml holds in a checkpoint that was imported, not trained here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from train.config.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Origin:
    source: str
    """Folder, or name on the Hugging Face hub, that it was read from."""
    revision: str | None = None
    """Commit on the hub; null for a folder."""
    dtype: Literal["fp32", "bf16", "fp16"]
    """Of the weights; where they have several, the smallest that holds them all."""


@dataclass(frozen=True, kw_only=True)
class ImportedConfig:
    model: ModelConfig
    """Shape of the model."""
    origin: Origin
    """Where it comes from."""
