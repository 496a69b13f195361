"""Settings of `longhaul import`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from conf.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    hf: str
    """Folder of a Hugging Face model, or its name on the hub, such as Qwen/Qwen3-0.6B."""
    out: str | None = None
    """Folder to make; it appears only when everything is written and proved. null: imported/NAME."""
    revision: str | None = None
    """Branch, tag or commit on the hub; null: main."""
    tokenizer: str | None = None
    """Folder of the tokenizer; null: that of the model."""
    weights: Literal["safetensors", "bin"] = "safetensors"
    """Which weight files are read; bin: pickled ones, by torch's loader that builds nothing but tensors."""
    shard_bytes: int = 5_000_000_000
    """Most bytes of one weight file; only a single larger tensor exceeds it."""
    proof: bool = True
    """Compare the checkpoint with the model that transformers makes of the folder, in a process of its own."""
    overwrite: bool = False
    """Replace `out` when it is an earlier import."""

    def __post_init__(self) -> None:
        problems = []
        if not self.hf:
            problems.append("hf='': needs the folder of a Hugging Face model, or its name on the hub")
        if self.out is not None and Path(self.out).name in ("", ".."):
            problems.append(f"out={self.out!r}: needs the name of a folder to make, such as out=imported/first")
        if self.shard_bytes < 1024:
            problems.append(f"shard_bytes={self.shard_bytes}: must be at least 1024; 5000000000 is usual")
        if problems:
            raise ConfigError(problems)
