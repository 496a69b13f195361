"""Tokens per second, MFU, step time, memory."""

from __future__ import annotations

import mmap

import pytest
import torch

from train import device
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


@pytest.mark.parametrize(("rate", "size"), [(1e9, 256), (5e9, 512), (1e11, 1024)])
def test_the_peak_of_a_slow_cpu_is_measured_on_small_matrices(monkeypatch: pytest.MonkeyPatch, rate: float, size: int) -> None:
    """At 1 GFLOP/s, which emulated bf16 gives, eight products of 1,024 would take 17 s."""
    asked = []

    def best_seconds(dtype: torch.dtype, size: int, repeats: int) -> float:
        asked.append(size)
        return 2 * size**3 / rate

    monkeypatch.setattr(device, "_best_seconds", best_seconds)
    assert device.measured_cpu_flops(torch.bfloat16) == pytest.approx(rate)
    assert asked == [256, size]
