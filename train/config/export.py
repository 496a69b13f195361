"""Settings of `longhaul export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from conf.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    checkpoint: str
    """Folder of a checkpoint, or of a run, whose newest checkpoint is taken."""
    out: str | None = None
    """Folder to make; it appears only when everything is written and proved. null: exported/NAME-STEP, after the run."""
    format: Literal["hf"] = "hf"
    """Layout of the folder; hf: what `AutoModelForCausalLM.from_pretrained` of transformers reads."""
    adapter: bool = False
    """Write the adapters alone, as `PeftModel.from_pretrained` of PEFT reads them beside the model that they were trained on;
    false: the whole model, adapters merged into it. Adapters are in fp32."""
    base_model: str | None = None
    """adapter: what PEFT is told to find the base model by, a name on the hub or a folder; null: the name on the hub that it
    was imported from."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the written weights; auto: as they were imported; of a run fp32 where it computed in fp32, else bf16."""
    shard_bytes: int = 5_000_000_000
    """Most bytes of one weight file; only a single larger tensor exceeds it."""
    proof: bool = True
    """Load the folder with transformers in a process of its own, and compare it with the checkpoint; adapters with PEFT, beside
    their base, where PEFT is installed."""
    proof_sequences: int | None = 64
    """Held-out sequences on which the proof compares the loss; null: all of them."""
    overwrite: bool = False
    """Replace `out` when it is an earlier conversion."""

    def __post_init__(self) -> None:
        problems = []
        if not self.checkpoint:
            problems.append("checkpoint='': needs the folder of a checkpoint or of a run")
        if self.out is not None and Path(self.out).name in ("", ".."):
            problems.append(f"out={self.out!r}: needs the name of a folder to make, such as out=exported/first")
        if self.shard_bytes < 1024:
            problems.append(f"shard_bytes={self.shard_bytes}: must be at least 1024; 5000000000 is usual")
        if self.proof_sequences is not None and self.proof_sequences < 1:
            problems.append(f"proof_sequences={self.proof_sequences}: must be at least 1; null means all of them")
        if self.base_model is not None and not self.adapter:
            problems.append(f"base_model={self.base_model}: is of adapters; add adapter=true, or leave it out")
        if self.base_model == "":
            problems.append("base_model='': needs a name on the hub or a folder; null takes the name that it was imported from")
        if problems:
            raise ConfigError(problems)
