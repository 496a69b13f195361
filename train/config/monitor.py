"""How a run is watched: the console, TensorBoard, Weights & Biases. `metrics.jsonl` is always written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from conf.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: WANDB_MODE where it is set, else online when a key is there, else offline."""
    project: str = "longhaul"
    """Project that the run belongs to."""
    entity: str | None = None
    """User or team that owns the project; null: the key's default."""
    group: str | None = None
    """Group of runs shown together; null: the experiment, or the run's name."""
    job_type: str | None = None
    """Kind of run within the group; null: the verb, such as pretrain."""
    tags: tuple[str, ...] = ()
    """Tags of the run."""
    alerts: bool = True
    """Send an alert at a loss spike, a stop and the finish."""
    init_timeout_seconds: float = 90.0
    """Wait this long for the service at the start, in the background; then go on without it."""
    finish_timeout_seconds: float = 60.0
    """Wait this long at the end for the last values to be sent."""

    def __post_init__(self) -> None:
        problems = []
        for name in ("init_timeout_seconds", "finish_timeout_seconds"):
            if getattr(self, name) <= 0:
                problems.append(f"{name}={getattr(self, name)}: must be above 0")
        if not self.project:
            problems.append("project='': needs a name; or mode=disabled")
        for tag in self.tags:
            if not 1 <= len(tag) <= 64:
                problems.append(f"tags={tag!r}: a tag has 1 to 64 characters")
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    console_every_steps: int = 10
    """Print every n-th step, and always the first and the last."""
    norms_every_steps: int | None = 100
    """Steps between records that carry the norms of weights, by layer, and of the optimizer's state; null: none."""
    stragglers_every_steps: int | None = 50
    """Steps between records that compare the computing time of the hosts; null: none."""
    tensorboard: bool = True
    """Write TensorBoard event files into the run's folder."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases."""

    def __post_init__(self) -> None:
        problems = [
            f"{name}={getattr(self, name)}: must be at least 1"
            for name in ("console_every_steps", "norms_every_steps", "stragglers_every_steps")
            if getattr(self, name) is not None and getattr(self, name) < 1
        ]
        if problems:
            raise ConfigError(problems)
