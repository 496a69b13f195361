"""Settings of `longhaul evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from conf.errors import ConfigError
from data_pipeline.task_config import TaskConfig
from train.config.monitor import WandbConfig

VERBATIM = ("task.prompt", "task.target_prefix")
"""Fields that hold prose: a command line's words for them are taken as they are."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    checkpoint: str | None = None
    """Folder of a checkpoint, or of a run, whose newest checkpoint is taken; give this or hf."""
    hf: str | None = None
    """Folder of a Hugging Face model, or its name on the hub; give this or checkpoint."""
    task: TaskConfig = field(default_factory=TaskConfig)
    """What the model is asked to do; left out, what a fine-tuned run has learned, of another model language."""
    limit: int | None = None
    """Examples, or documents, that are read of each source; null: all."""
    out: str | None = None
    """Folder to make; null: evaluations/STEP-TASK in the run's folder, with a number where that is taken."""
    processes: int = 1
    """Ranks of this machine, one GPU each; those that do not share a model divide the examples."""
    tensor: int = 1
    """Ranks that share the model; for one that a single GPU cannot hold. Must divide processes."""
    batch_tokens: int | None = None
    """Tokens that a rank runs at a time, padding included; null: 1,024 on a CPU, 65,536 on a GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What to compute on; auto: CUDA when this machine has it."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Weights and activations; auto: bf16 where the GPU or the CPU multiplies it, fp32 elsewhere."""
    verify: bool = True
    """Compare the files of a checkpoint with their hashes before they are read (about 1 GB a second), and those of a prepared
    corpus, or of the rows of a run, that were not compared before or have changed since."""
    resamples: int = 1000
    """Resamples of the examples that the confidence intervals are taken from; 0: no intervals."""
    confidence: float = 0.95
    """Share of such intervals that hold the true figure."""
    seed: int = 0
    """Seed of the resamples."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases: the scores go there as a run of their own, in the group of the run that made the checkpoint."""

    def __post_init__(self) -> None:
        problems = []
        if (self.checkpoint is None) == (self.hf is None):
            problems.append("checkpoint: give exactly one of checkpoint and hf, such as checkpoint=runs/first")
        for name in ("checkpoint", "hf"):
            if getattr(self, name) == "":
                problems.append(f"{name}='': needs the folder of a model")
        for name in ("limit", "batch_tokens", "processes", "tensor"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"{name}={value}: must be at least 1")
        if not problems and self.processes % self.tensor:
            problems.append(f"tensor={self.tensor}: must divide processes={self.processes}; give processes={self.tensor}")
        if self.resamples < 0:
            problems.append(f"resamples={self.resamples}: must not be negative; 0 makes no intervals")
        if self.seed < 0:
            problems.append(f"seed={self.seed}: must not be negative")
        if not 0 < self.confidence < 1:
            problems.append(f"confidence={self.confidence}: must lie between 0 and 1, such as 0.95")
        if problems:
            raise ConfigError(problems)
