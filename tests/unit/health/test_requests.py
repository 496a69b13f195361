"""When a time limit is near: by the time of a step and of a save so far."""

from __future__ import annotations

import pytest

from train.health.requests import Deadline


@pytest.mark.parametrize(
    ("now", "save", "step", "near"),
    [
        (0.0, 100.0, 10.0, False),
        (834.0, 100.0, 10.0, False),
        (836.0, 100.0, 10.0, True),
        (836.0, 5.0, 10.0, False),
        (905.0, None, 1.0, False),
        (909.0, None, 1.0, True),
    ],
    ids=["far away", "just before", "time for the save", "a quick save", "never saved", "never saved, a reserve of 60 s"],
)
def test_it_is_near_when_a_save_and_a_step_may_not_fit(now: float, save: float | None, step: float, near: bool) -> None:
    clock = [0.0]
    deadline = Deadline(1000.0, clock=lambda: clock[0])
    clock[0] = now
    deadline.save_seconds, deadline.step_seconds = save, step
    assert deadline.is_near() is near


def test_a_short_limit_leaves_time_for_steps() -> None:
    """A minute is Slurm's shortest limit: a reserve of a minute would end the run before its first step."""
    clock = [0.0]
    deadline = Deadline(60.0, clock=lambda: clock[0])
    assert not deadline.is_near()
    clock[0] = 52.0
    assert deadline.is_near()
