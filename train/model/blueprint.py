"""What layers are built from: the model's shape, the kernels that compute it, the ranks that share it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from train.config.adapter import LoraConfig
from train.config.kernels import KernelsConfig
from train.config.model import ModelConfig
from train.config.preference import PreferenceConfig
from train.model.float8 import Scaling
from train.parallel import ALONE, TensorRanks


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """Handed to every layer; a layer reads its sizes from `model`, and never asks for a mode."""

    model: ModelConfig
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    tensor: TensorRanks = ALONE
    device: torch.device = torch.device("cpu")
    """What the layers will compute on, wherever they are built."""
    dtype: torch.dtype = torch.float32
    """What the layers will compute in."""
    float8: Scaling | None = None
    """How the products of linear layers are scaled into 8-bit floats; None: they are computed in `dtype`."""
    lora: LoraConfig | None = None
    """Adapters beside linear layers, which then train alone; None: the layers themselves train."""
    neftune_alpha: float | None = None
    """Strength of the noise on the embeddings in training; None: there is none."""
    frozen: tuple[str, ...] = ()
    """Patterns of the logical names of tensors that keep their values."""
    preference: PreferenceConfig | None = None
    """How pairs of rows are compared; None: rows are learned as they are."""
