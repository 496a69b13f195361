"""The whole configuration of a pretraining run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from data_pipeline.config import DataConfig
from train.config.settings import RunSettings


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunSettings):
    stage: Literal["pretrain"] = "pretrain"
    """The verb that made the run."""
    initial_checkpoint: str | None = None
    """Folder of a checkpoint, or of a run, whose model and weights the run begins with, such as an imported one; null: the
    model above, with random weights."""
    data: DataConfig = field(default_factory=DataConfig)
    """Prepared corpora and how they are read."""

    @property
    def sequence_length(self) -> int:
        """Tokens of a sequence."""
        return self.data.sequence_length

    def _own_problems(self) -> list[str]:
        if self.budget.epochs is None:
            return []
        return [f"budget.epochs={self.budget.epochs:g}: is of fine-tuning; give budget.tokens or budget.steps"]
