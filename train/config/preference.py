"""What preferences teach: Direct Preference Optimisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from conf.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    beta: float = 0.1
    """How closely the model keeps to the one that the run began with: the higher, the closer; 0.01 to 0.5 is usual."""
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """Of a pair's margin. sigmoid: DPO (Rafailov et al. 2023), of log-probabilities summed over an answer; ipo: the squared
    distance to 1 / (2 beta) (Azar et al. 2023), of their means over an answer, so that lengths do not count."""
    label_smoothing: float = 0.0
    """Share of the pairs that are taken to be the wrong way round (conservative DPO); with loss=sigmoid."""
    dropout: float | None = 0.0
    """Dropout of the model; null: its own. With any, a margin is compared with a reference that had none."""
    reference: str | None = None
    """Folder of another run of the same rows and the same beginning, whose log-probabilities of the reference are taken over;
    null: they are computed before the first step."""

    def __post_init__(self) -> None:
        problems = []
        if self.beta <= 0:
            problems.append(f"beta={self.beta}: must be above 0; 0.1 is usual")
        if not 0 <= self.label_smoothing < 0.5:
            problems.append(f"label_smoothing={self.label_smoothing}: must be at least 0 and below 0.5; 0 trusts all pairs")
        if self.label_smoothing and self.loss == "ipo":
            problems.append(f"label_smoothing={self.label_smoothing}: is of loss=sigmoid; set it to 0 with loss=ipo")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            problems.append(f"dropout={self.dropout}: must be at least 0 and below 1; null takes the model's own")
        if self.reference == "":
            problems.append("reference='': needs the folder of a run; null computes the log-probabilities anew")
        if problems:
            raise ConfigError(problems)
