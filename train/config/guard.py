"""What a run does about losses and gradients that are not as they should be."""

from __future__ import annotations

from dataclasses import dataclass

from conf.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    spike_threshold: float = 8.0
    """A loss is a spike when it stands this many standard deviations (by the median absolute deviation) above the median."""
    spike_window_steps: int = 128
    """Steps that the median is taken of; spikes are not among them."""
    spike_min_steps: int = 32
    """Fewer losses than these give no scatter to speak of, and no spike."""
    diverged_after_skips: int = 10
    """So many steps in a row with a non-finite loss or gradient are a divergence."""
    diverged_after_spikes: int = 50
    """So many steps in a row with a spike are a divergence."""
    max_rollbacks: int = 2
    """How often a run that diverges goes back to a checkpoint from before and leaves out the data that it diverged on."""
    leave_out_steps_before: int = 2
    """Steps before the first bad one whose data is left out too: a loss shows what the updates before it did."""
    report_samples: int = 16
    """Samples with the highest loss whose text goes into the report of a spike; 0: no report."""

    def __post_init__(self) -> None:
        problems = []
        if self.spike_threshold <= 0:
            problems.append(f"spike_threshold={self.spike_threshold}: must be above 0")
        for name in ("spike_window_steps", "spike_min_steps", "diverged_after_skips", "diverged_after_spikes"):
            if getattr(self, name) < 1:
                problems.append(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("max_rollbacks", "leave_out_steps_before", "report_samples"):
            if getattr(self, name) < 0:
                problems.append(f"{name}={getattr(self, name)}: must not be negative")
        if not problems and self.spike_min_steps > self.spike_window_steps:
            problems.append(
                f"spike_min_steps={self.spike_min_steps}: must not exceed guard.spike_window_steps={self.spike_window_steps}"
            )
        if problems:
            raise ConfigError(problems)
