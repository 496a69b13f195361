"""A Hugging Face folder read in place of a checkpoint: settings, tokenizer, and weights by their logical names."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.io import sha256_of, sha256_of_texts
from train.config.model import ModelConfig
from train.convert.hf_import import Found, inspect_folder
from train.convert.keymap import KeyMap
from train.convert.weights import WeightFormat


class HuggingFaceReader:
    """The model in `folder`; nothing is written. Raises UserError for a folder that our decoder cannot take."""

    def __init__(self, folder: Path, format: WeightFormat = "safetensors") -> None:
        self.path = folder
        self.found: Found = inspect_folder(folder, format)
        self._keymap = KeyMap(self.found.model)

    @property
    def model(self) -> ModelConfig:
        """Shape of the model."""
        return self.found.model

    @property
    def tokenizer_folder(self) -> Path:
        """The folder itself."""
        return self.path

    @property
    def names(self) -> tuple[str, ...]:
        """Logical names, in layer order."""
        return tuple(self._keymap.logical_shapes)

    def read(self, name: str, kind: str = "weight") -> Tensor:
        """The fp32 tensor of a logical name. Raises UserError when it cannot be read, or is not finite."""
        assert kind == "weight", "a Hugging Face folder holds weights alone"
        return self._keymap.to_logical(name, lambda key: self.found.files.read(self.found.place[key]).to(torch.float32))

    @cached_property
    def hash(self) -> str:
        """SHA-256 over the settings and the weight files, about 1 GB a second."""
        return sha256_of_texts(sha256_of(path) for path in (self.path / "config.json", *self.found.files.files))


def tokenizer_of_transformers(folder: Path) -> Any:
    """The tokenizer in `folder` as transformers reads it: for its chat template, which ours does not know."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
