"""A spike is seen, noise and a falling loss are not, and one spike does not hide the next."""

from __future__ import annotations

import math
import random

from train.health.spike import SpikeDetector


def falling(step: int, noise: random.Random) -> float:
    return 2.0 + 6.0 * math.exp(-step / 300) + noise.gauss(0, 0.05)


def test_no_alarm_on_a_noisy_falling_loss() -> None:
    noise, detector = random.Random(0), SpikeDetector()
    assert not any(detector.is_spike(falling(step, noise)) for step in range(5000))


def test_spikes_are_seen_one_after_another() -> None:
    noise, detector = random.Random(1), SpikeDetector()
    for step in range(2000):
        detector.is_spike(falling(step, noise))
    assert detector.is_spike(4.0)
    assert detector.is_spike(4.5)
    assert detector.is_spike(math.nan)
    assert detector.is_spike(math.inf)
    assert not detector.is_spike(falling(2000, noise))
