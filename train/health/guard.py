"""Tells from losses and skipped steps whether a run is well: a spike from noise, and a divergence from a spike.

A spike is a loss far above the median of the last ones, in units of their usual scatter. The losses that it is judged by
are kept in the checkpoint, so a resumed run is not blind for its first steps; a spike or a non-finite loss does not enter
them, so one cannot hide the next.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import median

from train.config.guard import GuardConfig

NORMAL_MAD = 1.4826  # standard deviation of a normal distribution in units of its median absolute deviation
FLOOR_NATS = 0.02  # a loss as flat as this still may wobble


@dataclass(kw_only=True)
class GuardState:
    """What the guard remembers; plain data, kept with every checkpoint."""

    losses: list[float] = field(default_factory=list)
    skipped_in_a_row: int = 0
    spikes_in_a_row: int = 0
    good_step: int = 0
    """Last step that was neither skipped nor a spike."""
    good_samples: int = 0
    """Consumed samples after it."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """On one step. `diverged`: why the run has to go back, or None."""

    spike: bool
    diverged: str | None = None


class Guard:
    """Judges each step by the ones before it."""

    def __init__(self, config: GuardConfig, state: GuardState) -> None:
        self.config, self.state = config, state

    def judge(self, loss: float, *, skipped: bool, step: int, samples: int) -> Verdict:
        """Judge the step that ended with `step` steps done and `samples` samples consumed; `loss` in nats."""
        config, state = self.config, self.state
        if skipped or not math.isfinite(loss):
            state.skipped_in_a_row += 1
            if state.skipped_in_a_row >= config.diverged_after_skips:
                return Verdict(spike=False, diverged=f"{state.skipped_in_a_row} steps in a row were not finite")
            return Verdict(spike=False)
        state.skipped_in_a_row = 0
        if self._is_spike(loss):
            state.spikes_in_a_row += 1
            if state.spikes_in_a_row >= config.diverged_after_spikes:
                return Verdict(spike=True, diverged=f"the loss was a spike for {state.spikes_in_a_row} steps in a row")
            return Verdict(spike=True)
        state.spikes_in_a_row = 0
        state.good_step, state.good_samples = step, samples
        state.losses = [*state.losses, loss][-config.spike_window_steps :]
        return Verdict(spike=False)

    @property
    def is_well(self) -> bool:
        """Whether the last step was neither skipped nor a spike."""
        return not (self.state.skipped_in_a_row or self.state.spikes_in_a_row)

    def _is_spike(self, loss: float) -> bool:
        losses = self.state.losses
        if len(losses) < self.config.spike_min_steps:
            return False
        middle = median(losses)
        scatter = NORMAL_MAD * median(abs(value - middle) for value in losses)
        return loss > middle + self.config.spike_threshold * max(scatter, FLOOR_NATS)
