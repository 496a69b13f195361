"""How long a rank may show no sign of life before the run is ended, for a restart."""

from __future__ import annotations

from dataclasses import dataclass

from conf.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    startup_seconds: float | None = 1800.0
    """Until the first step is done: libraries, corpus, checkpoint, compilation; null: for ever."""
    step_seconds: float | None = 300.0
    """Within a step, from one part of it to the next; below launch.collective_timeout_seconds, so that the report comes first;
    null: for ever."""
    evaluate_seconds: float | None = 300.0
    """Within an evaluation, from batch to batch; null: for ever."""
    save_seconds: float | None = 1800.0
    """Waiting for a checkpoint to be written; null: for ever."""
    grace_seconds: float = 5.0
    """How long the stacks of the other ranks are waited for."""

    def __post_init__(self) -> None:
        problems = [
            f"{name}={getattr(self, name)}: must be above 0; null waits for ever"
            for name in ("startup_seconds", "step_seconds", "evaluate_seconds", "save_seconds")
            if getattr(self, name) is not None and getattr(self, name) <= 0
        ]
        if self.grace_seconds <= 0:
            problems.append(f"grace_seconds={self.grace_seconds}: must be above 0")
        if problems:
            raise ConfigError(problems)
