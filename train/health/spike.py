"""Tells a loss spike from noise: the distance from the median of the last losses, in units of their usual scatter."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

WINDOW_STEPS = 128
MIN_STEPS = 32  # fewer losses give no scatter to speak of
THRESHOLD = 8.0  # in standard deviations, as estimated from the median absolute deviation
NORMAL_MAD = 1.4826  # standard deviation of a normal distribution in units of its median absolute deviation
FLOOR_NATS = 0.02  # a loss as flat as this still may wobble


class SpikeDetector:
    """Keeps the last losses; a spike or a non-finite loss does not enter them, so one cannot hide the next."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW_STEPS)

    def is_spike(self, loss: float) -> bool:
        """Whether `loss`, in nats, stands out above the last ones; remembers it when it does not."""
        if not math.isfinite(loss):
            return True
        if len(self._losses) >= MIN_STEPS:
            middle = median(self._losses)
            scatter = NORMAL_MAD * median(abs(value - middle) for value in self._losses)
            if loss > middle + THRESHOLD * max(scatter, FLOOR_NATS):
                return True
        self._losses.append(loss)
        return False
