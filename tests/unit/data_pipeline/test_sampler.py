"""The sample order: bijections, blend counts, independence of the way it is asked, quality of the shuffle, speed far out."""

from __future__ import annotations

import time

import numpy as np
import pytest

from conf.errors import ConfigError
from data_pipeline.config import BLEND_SLOTS, blend_quotas
from data_pipeline.sampler import Sampler, permute


def keys(value: int, count: int) -> np.ndarray:
    return np.full(count, value, dtype=np.uint64)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 10, 97, 1000, 4096, 65536, 65537, 99_991])
def test_permute_is_a_bijection(size: int) -> None:
    for key in (0, 1, 2**63 + 11):
        mapped = permute(np.arange(size), size, keys(key, size))
        assert np.array_equal(np.sort(mapped), np.arange(size))


def test_small_permutations_reach_every_order() -> None:
    orders = {tuple(permute(np.arange(3), 3, keys(key * 7919, 3))) for key in range(500)}
    assert len(orders) == 6


def test_permute_takes_a_key_per_value() -> None:
    mixed = permute(np.array([5, 5, 9]), 1000, np.array([1, 2, 1], dtype=np.uint64))
    assert mixed[0] == permute(np.array([5]), 1000, keys(1, 1))[0]
    assert mixed[1] == permute(np.array([5]), 1000, keys(2, 1))[0]
    assert mixed[2] == permute(np.array([9]), 1000, keys(1, 1))[0]


def test_permute_shows_no_correlation() -> None:
    """Neighbours land independently; place and window are uncorrelated; each bucket gets its share (chi-square)."""
    size = 100_003
    mapped = permute(np.arange(size), size, keys(42, size)).astype(np.float64)
    limit = 4.0 / np.sqrt(size)  # four standard errors of a correlation
    assert abs(np.corrcoef(np.arange(size), mapped)[0, 1]) < limit
    for lag in (1, 2, 3, 316, 317, 1000):
        assert abs(np.corrcoef(mapped[:-lag], mapped[lag:])[0, 1]) < limit, lag
    first_part = mapped[: size // 4]
    counts = np.histogram(first_part, bins=100, range=(0, size))[0]
    expected = len(first_part) / 100
    assert 50 < ((counts - expected) ** 2 / expected).sum() < 160  # 99 degrees of freedom, thinned by sampling without return


def test_every_epoch_is_complete_and_its_own() -> None:
    sampler = Sampler([1000], weights=[1.0], names=["one"], seed=3)
    source, window, epoch = sampler.locate(np.arange(3000))
    assert not source.any() and np.array_equal(epoch, np.repeat([0, 1, 2], 1000))
    orders = [window[epoch == number] for number in range(3)]
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(1000))
    # Two unrelated orders of 1000 agree at about one place.
    assert (orders[0] == orders[1]).sum() < 10 and (orders[1] == orders[2]).sum() < 10


def test_blend_is_exact_in_every_block_and_epochs_are_complete() -> None:
    sampler = Sampler([700, 50_000, 3], weights=[0.25, 0.7, 0.05], names=["b", "a", "c"], seed=1)
    ids = np.arange(4 * BLEND_SLOTS)
    source, window, epoch = sampler.locate(ids)
    for block in range(4):
        inside = source[block * BLEND_SLOTS : (block + 1) * BLEND_SLOTS]
        assert np.bincount(inside, minlength=3).tolist() == [2500, 7000, 500]
    for number, windows in enumerate(sampler.num_windows):
        mine = source == number
        # A source's own samples run through its epochs in order, each epoch a permutation.
        assert np.array_equal(epoch[mine], np.arange(mine.sum()) // windows)
        for complete in range(mine.sum() // windows):
            assert np.array_equal(np.sort(window[mine & (epoch == complete)]), np.arange(windows))


def test_blend_is_spread_evenly_within_a_block() -> None:
    sampler = Sampler([10**6, 10**6], weights=[1, 1], names=["a", "b"], seed=0)
    source, _, _ = sampler.locate(np.arange(BLEND_SLOTS))
    per_hundred = source.reshape(100, 100).sum(axis=1)
    assert per_hundred.min() > 25 and per_hundred.max() < 75
    assert abs(np.corrcoef(source[:-1], source[1:])[0, 1]) < 0.04


def test_order_of_the_question_does_not_matter() -> None:
    sampler = Sampler([911, 77], weights=[2, 1], names=["a", "b"], seed=9)
    ids = np.random.default_rng(0).integers(0, 10**6, 500)
    together = np.stack(sampler.locate(ids))
    for place in range(0, 500, 25):
        fresh = Sampler([911, 77], weights=[2, 1], names=["a", "b"], seed=9)
        assert np.array_equal(np.stack(fresh.locate(ids[place : place + 1]))[:, 0], together[:, place])


def test_order_of_the_sources_does_not_matter() -> None:
    ids = np.arange(30_000)
    one = Sampler([911, 77, 5000], weights=[2, 1, 1], names=["a", "b", "c"], seed=9).locate(ids)
    other = Sampler([5000, 911, 77], weights=[1, 2, 1], names=["c", "a", "b"], seed=9).locate(ids)
    assert np.array_equal(np.array([1, 2, 0])[one[0]], other[0])
    assert np.array_equal(one[1], other[1]) and np.array_equal(one[2], other[2])


def test_seed_and_name_change_the_order() -> None:
    base = Sampler([1000], weights=[1], names=["a"], seed=0).locate(np.arange(1000))[1]
    for seed, name in ((1, "a"), (0, "b")):
        assert (Sampler([1000], weights=[1], names=[name], seed=seed).locate(np.arange(1000))[1] == base).sum() < 10


def test_golden_order() -> None:
    """The order is part of a run's identity: a change here breaks the resumption of every run."""
    source, window, epoch = Sampler([1000, 10], weights=[3, 1], names=["big", "small"], seed=1234).locate(
        np.array([0, 1, 2, 3, 4, 10_000, 123_456_789])
    )
    assert source.tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert window.tolist() == [922, 0, 51, 1, 196, 8, 808]
    assert epoch.tolist() == [0, 0, 0, 0, 0, 250, 92592]


@pytest.mark.parametrize("names", [["a"], ["a", "b", "c"]])
def test_far_samples_are_as_quick_as_near_ones(names: list[str]) -> None:
    sampler = Sampler([10**9] * len(names), weights=[1] * len(names), names=names, seed=0)

    def seconds(first: int) -> float:
        best = float("inf")
        for repeat in range(3):
            start = time.perf_counter()
            sampler.locate(np.arange(first + repeat * 1024, first + (repeat + 1) * 1024))
            best = min(best, time.perf_counter() - start)
        return best

    seconds(0)
    near, far = seconds(10), seconds(10**12)
    assert far < 10 * near + 0.01


def test_quotas_follow_the_largest_remainder() -> None:
    assert sum(blend_quotas([1, 1, 1])) == BLEND_SLOTS
    assert blend_quotas([1, 1, 1]) == (3334, 3333, 3333)
    assert blend_quotas([1, 99_999]) == (0, 10_000)


def test_errors_are_collected() -> None:
    with pytest.raises(ConfigError) as caught:
        Sampler([0, 5], weights=[1, 1e-9], names=["a", "b"], seed=0)
    text = str(caught.value)
    assert "source a: holds no complete window" in text and "source b: weight=1e-09 rounds to 0" in text
    with pytest.raises(ConfigError, match="names must differ"):
        Sampler([5, 5], weights=[1, 1], names=["a", "a"], seed=0)
