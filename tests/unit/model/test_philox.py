"""Numbers by counter: words against Philox written out, values against their distributions, slices against the whole."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from scipy import stats

from train.model import philox

WORD = (1 << 64) - 1


def philox_4x64(counter: int, key: int) -> list[int]:
    """The four words of a counter, as Salmon et al. 2011 define 4x64-10: multiply, cross over, add the round's key."""
    c = [counter >> (64 * place) & WORD for place in range(4)]
    k = [key & WORD, key >> 64]
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [second >> 64 ^ c[1] ^ k[0], second & WORD, first >> 64 ^ c[3] ^ k[1], first & WORD]
        k = [(k[0] + 0x9E3779B97F4A7C15) & WORD, (k[1] + 0xBB67AE8584CAA73B) & WORD]
    return c


def words(key: int, *ranges: range) -> np.ndarray:
    """What `elements` hands to its maker, two elements for each word, so that an element tells its word."""
    found = philox.elements(key, ranges, lambda made: np.repeat(made, philox.ELEMENTS_OF_WORD))
    return np.concatenate(list(found))


def values(make: partial, key: int, count: int) -> np.ndarray:
    return np.concatenate(list(philox.elements(key, [range(count)], make)))


def test_the_published_example() -> None:
    """The known answer of Random123 for a counter and a key of ones."""
    answer = [0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0]
    assert philox_4x64((1 << 256) - 1, (1 << 128) - 1) == answer


@pytest.mark.parametrize("key", [0, 5, 2**63 - 1])
def test_words_are_those_of_the_counters(key: int) -> None:
    for element in (0, 1, 7, 8, 70_001, 2**40 + 3):
        word = element // 2
        [found] = words(key, range(element, element + 1))
        assert found == philox_4x64(1 + word // 4, key)[word % 4], element


@pytest.mark.parametrize("make", [partial(philox.normal, std=0.02), partial(philox.uniform, limit=0.1)])
@pytest.mark.parametrize("block", [2, 14, 1 << 15])
def test_slices_are_of_the_whole_whatever_the_blocks(make: partial, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = values(make, 3, 1000)
    monkeypatch.setattr(philox, "BLOCK_ELEMENTS", block)
    for ranges in ([range(1000)], [range(999)], [range(1, 2), range(5, 8)], [range(n, n + 13) for n in range(7, 900, 50)]):
        found = np.concatenate(list(philox.elements(3, ranges, make)))
        assert np.array_equal(found, np.concatenate([whole[part.start : part.stop] for part in ranges]))


def test_normals_are_normal() -> None:
    count = 1 << 20
    drawn = values(partial(philox.normal, std=0.02), 11, count).astype(np.float64) / 0.02
    # Each bound is passed by chance once in 10,000 keys or less; the key is fixed.
    assert stats.kstest(drawn, "norm").pvalue > 1e-4
    for power, (expected, spread) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96)], start=1):
        assert abs((drawn**power).mean() - expected) < 4 * np.sqrt(spread / count), power
    for beyond in (3.0, 4.0):
        assert abs((np.abs(drawn) > beyond).sum() - count * 2 * stats.norm.sf(beyond)) < 4 * np.sqrt(
            count * 2 * stats.norm.sf(beyond)
        ), beyond


def test_uniforms_are_uniform() -> None:
    drawn = values(partial(philox.uniform, limit=0.1), 11, 1 << 18)
    assert stats.kstest(drawn, stats.uniform(-0.1, 0.2).cdf).pvalue > 1e-4
    assert np.abs(drawn).max() <= np.float32(0.1)


def test_neighbours_and_neighbouring_keys_have_nothing_in_common() -> None:
    count = 1 << 18
    drawn = {key: values(partial(philox.normal, std=1.0), key, count).astype(np.float64) for key in (7, 8)}
    bound = 4 / np.sqrt(count)
    for lag in (1, 2, 3, 8, 1024):  # 1: the two values of a word, and of neighbouring words; 8: of neighbouring counters
        for of in (np.positive, np.abs, np.square):
            assert abs(np.corrcoef(of(drawn[7][:-lag]), of(drawn[7][lag:]))[0, 1]) < bound, (lag, of)
    for of in (np.positive, np.abs, np.square):
        assert abs(np.corrcoef(of(drawn[7]), of(drawn[8]))[0, 1]) < bound
    pairs = drawn[7].reshape(-1, 2)
    angle = np.arctan2(pairs[:, 1], pairs[:, 0])
    assert stats.kstest(angle, stats.uniform(-np.pi, 2 * np.pi).cdf).pvalue > 1e-4


def test_the_extreme_words_are_finite_and_right() -> None:
    """Radius and angle of single words in float64; the largest value is where the low half is 0."""
    low = np.array([0, 1, 2**31, 2**32 - 1, 0x12345678], dtype=np.uint64)
    high = np.array([0, 2**30 - 1, 2**31, 2**32 - 1, 0x9ABCDEF0], dtype=np.uint64)
    found = philox.normal(low | high << np.uint64(32), std=1.0).reshape(-1, 2)
    radius = np.sqrt(-2 * np.log((low.astype(np.float64) + 0.5) / 2**32))
    within = (high & np.uint64(2**30 - 1)).astype(np.int64)
    angle = np.where(within < 2**29, within, within - 2**30) * (np.pi / 2 / 2**30) + np.pi / 4
    signs = np.stack([1 - 2 * (high >> np.uint64(31)).astype(int), 1 - 2 * (high >> np.uint64(30) & np.uint64(1)).astype(int)])
    expected = (radius * np.stack([np.cos(angle), np.sin(angle)]) * signs).T
    # fp32 has steps of 256 below 2^32, so that radii below 3e-4, which one word in 10^7 has, are coarse.
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    np.testing.assert_allclose(found[:3], expected[:3], rtol=1e-5)
    assert np.abs(found).max() < 6.8 and np.abs(found).max() > 4.7
