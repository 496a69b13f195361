"""Tokens per second, MFU, step time, memory."""

from __future__ import annotations

import mmap

import pytest

from train.metrics.throughput import StepTimer, Throughput, memory_gib


def test_the_rate_is_over_the_window_and_not_the_mean_of_rates() -> None:
    throughput = Throughput(window_steps=2)
    throughput.update(tokens=100, seconds=50.0)
    assert throughput.update(tokens=100, seconds=1.0) == {"tokens_per_second": 100.0}, "the first step is forgotten"
    assert throughput.update(tokens=100, seconds=3.0) == {"tokens_per_second": 50.0}
    assert throughput.update(tokens=100, seconds=1.0) == {"tokens_per_second": 50.0}


def test_mfu_in_both_conventions() -> None:
    throughput = Throughput(flops_per_token=8e9, flops_per_token_causal=7e9, peak_flops=8 * 989e12)
    values = throughput.update(tokens=400_000, seconds=1.0)
    assert values["mfu"] == pytest.approx(400_000 * 8e9 / (8 * 989e12))
    assert values["mfu_causal"] == pytest.approx(values["mfu"] * 7 / 8)


def test_a_window_that_does_more_than_the_peak_raises_it() -> None:
    """Not the one number alone: later ones are shares of what the machine has shown. Each convention has its own."""
    throughput = Throughput(flops_per_token=10.0, flops_per_token_causal=6.0, peak_flops=700.0, window_steps=1)
    throughput.update(tokens=1, seconds=1.0)
    shares = []
    for tokens in (35, 100, 50, 140):  # 350, 1000, 500, 1400 FLOP/s in full; 210, 600, 300, 840 causally
        values = throughput.update(tokens=tokens, seconds=1.0)
        shares += [values["mfu"], values["mfu_causal"]]
    assert shares == pytest.approx([350 / 700, 210 / 700, 1, 600 / 700, 500 / 1000, 300 / 700, 1, 1])


def test_no_mfu_for_an_unknown_device() -> None:
    assert set(Throughput(flops_per_token=8e9).update(tokens=10, seconds=1.0)) == {"tokens_per_second"}


def test_a_step_without_duration_says_nothing() -> None:
    assert Throughput().update(tokens=10, seconds=0.0) == {}


def test_the_step_timer_splits_the_wait() -> None:
    times = iter([0.0, 10.0, 11.0, 13.0, 14.0, 14.5, 20.0])
    timer = StepTimer(clock=lambda: next(times))
    timer.start()
    for _ in range(2):
        with timer.waiting_for_data():
            pass
    assert timer.stop() == {"step_seconds": 10.0, "data_wait_seconds": 2.5}


def test_memory_is_that_of_this_process() -> None:
    before = memory_gib()
    with mmap.mmap(-1, 64 * 2**20) as pages:  # not from the allocator's heap, which may hold as much that is free
        pages.write(b"x" * len(pages))
        after = memory_gib()
    assert before is not None and after is not None
    assert 0.05 < after - before < 0.2
