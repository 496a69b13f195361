"""Every schedule against an independent implementation, its borders, and that it depends on the samples alone."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
import transformers

from tests.unit.plan.test_plan import settings, simulated
from train.config.pretrain import PretrainConfig
from train.optim import lr_at
from train.plan import make_plan

PEAK, WARMUP, TOTAL = 3e-3, 40, 400
WORDS = [f"optim.lr={PEAK}", f"schedule.warmup_steps={WARMUP}", f"budget.steps={TOTAL}", "batch.sequences=8"]
KINDS = ("cosine", "wsd", "linear", "constant", "inverse_sqrt")


def rates(config: PretrainConfig) -> list[float]:
    """Learning rate of every step of the run."""
    plan = make_plan(config, 1)
    batches, consumed = simulated(config, plan.ramp)
    return [
        lr_at(place, batch=batch, optim=config.optim, schedule=config.schedule, plan=plan)
        for batch, place in zip(batches, consumed, strict=False)
    ]


def reference(kind: str, min_ratio: float) -> list[float]:
    """The same by transformers, whose step s has the warm-up share s / warm-up where ours has (s + 1) / warm-up."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    make = {
        "cosine": lambda: transformers.get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, WARMUP, TOTAL, min_lr_rate=min_ratio
        ),
        "wsd": lambda: transformers.get_wsd_schedule(
            optimizer, WARMUP, TOTAL // 5, TOTAL, decay_type="linear", min_lr_ratio=min_ratio
        ),
        "linear": lambda: transformers.get_linear_schedule_with_warmup(optimizer, WARMUP, TOTAL),
        "constant": lambda: transformers.get_constant_schedule_with_warmup(optimizer, WARMUP),
        "inverse_sqrt": lambda: transformers.get_inverse_sqrt_schedule(optimizer, WARMUP),
    }
    share = make[kind]().lr_lambdas[0]
    return [PEAK * share(step + 1 if step < WARMUP else step) for step in range(TOTAL)]


@pytest.mark.parametrize(
    ("kind", "min_ratio"),
    [("cosine", 0.1), ("cosine", 0.0), ("wsd", 0.0), ("wsd", 0.3), ("linear", 0.0), ("constant", 0.0), ("inverse_sqrt", 0.0)],
)
def test_against_transformers(kind: str, min_ratio: float) -> None:
    ours = rates(settings(*WORDS, f"schedule.kind={kind}", f"schedule.min_ratio={min_ratio}"))
    begin = WARMUP if kind == "wsd" else 0  # theirs warms up from min_ratio, ours from 0 like every other schedule
    assert ours[begin:] == pytest.approx(reference(kind, min_ratio)[begin:], rel=1e-12)


def test_linear_to_a_floor_by_hand() -> None:
    ours = rates(settings(*WORDS, "schedule.kind=linear", "schedule.min_ratio=0.1"))
    assert ours[WARMUP + 180] == pytest.approx(PEAK * (1 - 0.9 * 180 / 360))  # half of the way down
    assert ours[-1] == pytest.approx(PEAK * (0.1 + 0.9 / 360))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ramp", [[], ["batch.ramp_start=2", "batch.micro_batch=2", "batch.ramp_samples=600"]])
def test_borders(kind: str, ramp: list[str]) -> None:
    config = settings(*WORDS, f"schedule.kind={kind}", *ramp)
    ours = rates(config)
    assert len(ours) == TOTAL and min(ours) > 0 and max(ours) == pytest.approx(PEAK)
    assert ours[WARMUP - 1] == pytest.approx(PEAK)  # the warm-up ends on the peak, and what follows begins there
    assert ours[WARMUP] == pytest.approx(PEAK)
    assert ours[:WARMUP] == sorted(ours[:WARMUP]) and ours[WARMUP:] == sorted(ours[WARMUP:], reverse=True)
    # No jump anywhere: a step of the steepest part, which is the warm-up or WSD's decay, is a fortieth of the peak.
    assert max(abs(after - before) for before, after in zip(ours, ours[1:], strict=False)) <= PEAK / WARMUP * 2


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_warm_up_the_first_step_has_the_peak(kind: str) -> None:
    words = [word for word in WORDS if "warmup" not in word]
    if kind == "inverse_sqrt":
        words.append("schedule.warmup_steps=1")
    assert rates(settings(*words, f"schedule.kind={kind}"))[0] == pytest.approx(PEAK)


@pytest.mark.parametrize("kind", KINDS)
def test_beyond_the_budget_the_rate_stays_sane(kind: str) -> None:
    config = settings(*WORDS, f"schedule.kind={kind}")
    plan = make_plan(config, 1)
    last = lr_at(plan.total_samples, batch=8, optim=config.optim, schedule=config.schedule, plan=plan)
    later = lr_at(plan.total_samples * 3, batch=8, optim=config.optim, schedule=config.schedule, plan=plan)
    assert 0 <= later <= last <= PEAK
    if kind in ("cosine", "wsd", "linear"):
        assert later == last == pytest.approx(PEAK * 0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_position_is_counted_in_samples(kind: str) -> None:
    """Twice the batch, half the steps: the rate at the same sample is the same."""
    words = [f"optim.lr={PEAK}", f"schedule.kind={kind}"]
    small = settings(*words, "batch.sequences=8", "budget.steps=400", "schedule.warmup_steps=40")
    large = settings(*words, "batch.sequences=16", "budget.steps=200", "schedule.warmup_steps=20")
    assert rates(large)[20:] == pytest.approx(rates(small)[40::2])


def test_inverse_square_root_by_hand() -> None:
    ours = rates(settings(*WORDS, "schedule.kind=inverse_sqrt"))
    assert ours[4 * WARMUP] == pytest.approx(PEAK / 2) and ours[9 * WARMUP] == pytest.approx(PEAK / sqrt(9))
