"""A spike is seen, noise and a falling loss are not; one spike does not hide the next; what is remembered survives a resume."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict
from pathlib import Path

import pytest

from train.config.guard import GuardConfig
from train.health.guard import Guard, GuardState, Verdict


class Watched:
    """A guard that counts the steps for itself."""

    def __init__(self, state: GuardState | None = None, **settings: object) -> None:
        self.guard = Guard(GuardConfig(**settings), state or GuardState())
        self.step = 0

    def see(self, loss: float, *, skipped: bool = False) -> Verdict:
        self.step += 1
        return self.guard.judge(loss, skipped=skipped, step=self.step, samples=8 * self.step)


def falling(step: int, noise: random.Random) -> float:
    return 2.0 + 6.0 * math.exp(-step / 300) + noise.gauss(0, 0.05)


def trained(steps: int, **settings: object) -> Watched:
    noise, watched = random.Random(1), Watched(**settings)
    for step in range(steps):
        assert watched.see(falling(step, noise)) == Verdict(spike=False)
    return watched


def test_no_alarm_on_a_noisy_falling_loss() -> None:
    trained(5000)


def test_spikes_are_seen_one_after_another() -> None:
    watched = trained(2000)
    assert watched.see(4.0).spike
    assert watched.see(4.5).spike
    assert not watched.guard.is_well
    assert not watched.see(2.01).spike
    assert watched.guard.is_well


@pytest.mark.parametrize("loss", [math.nan, math.inf, 2.0], ids=["nan", "inf", "a finite loss with an infinite gradient"])
def test_a_skipped_step_is_no_spike_and_not_remembered(loss: float) -> None:
    watched = trained(200)
    before = list(watched.guard.state.losses)
    assert watched.see(loss, skipped=True) == Verdict(spike=False)
    assert watched.guard.state.losses == before and not watched.guard.is_well
    assert watched.see(4.0 + falling(0, random.Random(0))).spike, "it is not blind afterwards"


def test_the_first_step_after_a_resume_is_judged_by_those_before_it() -> None:
    kept = json.loads(json.dumps(asdict(trained(1000).guard.state)))
    resumed = Watched(GuardState(**kept))
    assert resumed.see(500 * 2.2).spike
    assert not Watched().see(500 * 2.2).spike, "a guard without memory lets it pass"


def test_steps_that_are_not_finite_are_a_divergence_when_there_are_too_many() -> None:
    watched = trained(100, diverged_after_skips=3)
    assert [watched.see(math.nan, skipped=True).diverged for _ in range(2)] == [None, None]
    assert watched.see(2.0).diverged is None
    assert [watched.see(math.nan, skipped=True).diverged for _ in range(2)] == [None, None]
    assert watched.see(math.nan, skipped=True).diverged == "3 steps in a row were not finite"


def test_a_loss_that_stays_high_is_a_divergence_and_the_last_good_step_is_known() -> None:
    watched = trained(1000, diverged_after_spikes=5)
    verdicts = [watched.see(6.0) for _ in range(5)]
    assert [verdict.diverged for verdict in verdicts] == [None] * 4 + ["the loss was a spike for 5 steps in a row"]
    assert (watched.guard.state.good_step, watched.guard.state.good_samples) == (1000, 8000)


def recorded_losses() -> list[float]:
    """A real run of small batches: noisy, and falling slowly for most of its steps."""
    lines = (Path(__file__).parents[2] / "golden/losses_5000_steps.txt").read_text().splitlines()
    return [float(line) for line in lines if not line.startswith("#")]


def test_no_alarm_over_a_recorded_run() -> None:
    losses, watched = recorded_losses(), Watched()
    assert len(losses) == 5000
    assert [step for step, loss in enumerate(losses) if watched.see(loss).spike] == []


def test_a_spike_in_a_recorded_run_is_seen() -> None:
    """Twice the loss, anywhere behind the first steps: at most one in twenty hides in the noise of these small batches."""
    losses, missed, places = recorded_losses(), 0, range(100, 5000, 37)
    watched = Watched()
    for step, loss in enumerate(losses):
        if step in places:
            missed += not watched.see(2 * loss).spike
        watched.see(loss)
    assert missed <= len(places) / 20
