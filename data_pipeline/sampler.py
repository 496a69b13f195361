"""The sample order: which window of which source sample n is. Pure arithmetic on (seed, names, weights, windows); numpy only.

Sample n is found in O(1), so a run continues at any sample; the order knows no budget, no batch and no world size.

A blend is kept exactly in every block of BLEND_SLOTS samples: a keyed shuffle of the block's slots decides the source, so the
k-th sample of a source is known by counting within one block. That k becomes epoch k // windows and, by a permutation keyed
with the epoch, one window; within an epoch every window comes exactly once.

Shape letters: S samples, B slots of a block, N sources.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence

import numpy as np

from conf.errors import ConfigError
from data_pipeline.config import BLEND_SLOTS, blend_quotas

# Eight rounds: four make a Feistel network a strong pseudorandom permutation for large halves (Luby and Rackoff, 1988); twice
# that for small ones, where few values of a half leave a round little to mix.
NUM_ROUNDS = 8

_MIX_ADD = np.uint64(0x9E3779B97F4A7C15)
_MIX_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_MIX_SECOND = np.uint64(0x94D049BB133111EB)


def mix(values: np.ndarray) -> np.ndarray:
    """Hash uint64 to uint64, bijectively: the output function of SplitMix64 (Steele, Lea and Flood, 2014)."""
    mixed = values + _MIX_ADD
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX_FIRST
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX_SECOND
    return mixed ^ (mixed >> np.uint64(31))


def key_of(*parts: str | int) -> int:
    """A 64-bit key from words and numbers; the same on every machine and in every version."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def permute(values_S: np.ndarray, size: int, keys_S: np.ndarray) -> np.ndarray:
    """Map each value of [0, size) to another of [0, size); for one key this is a bijection.

    values_S: int64; keys_S: uint64 of the same shape, the permutation to use for each value.

    A Feistel network over Z_a x Z_b with a * b just above `size`, and cycle walking back into range for the few that leave it
    (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). It needs no table, however large `size` is.
    """
    if size == 1:
        return np.zeros_like(values_S)
    left_size = math.isqrt(size - 1) + 1
    right_size = -(-size // left_size)
    mapped_S = _feistel(values_S.astype(np.uint64), keys_S, left_size=left_size, right_size=right_size)
    outside = np.flatnonzero(mapped_S >= size)
    while outside.size:
        mapped_S[outside] = _feistel(mapped_S[outside], keys_S[outside], left_size=left_size, right_size=right_size)
        outside = outside[mapped_S[outside] >= size]
    return mapped_S.astype(np.int64)


def _feistel(values_S: np.ndarray, keys_S: np.ndarray, *, left_size: int, right_size: int) -> np.ndarray:
    num_left, num_right = np.uint64(left_size), np.uint64(right_size)
    left_S, right_S = values_S // num_right, values_S % num_right
    for round_number in range(0, NUM_ROUNDS, 2):
        round_keys_S = mix(keys_S + np.uint64(round_number))
        left_S = (left_S + mix(right_S ^ round_keys_S) % num_left) % num_left
        round_keys_S = mix(keys_S + np.uint64(round_number + 1))
        right_S = (right_S + mix(left_S ^ round_keys_S) % num_right) % num_right
    return left_S * num_right + right_S


class Sampler:
    """The order of the training samples over one or more sources."""

    def __init__(self, num_windows: Sequence[int], *, weights: Sequence[float], names: Sequence[str], seed: int) -> None:
        """num_windows, weights, names: one for each source; the order of the sources changes nothing but their numbers.

        Raises ConfigError for a source without a window, a name given twice or a weight that rounds to no slot of a block.
        """
        assert len(num_windows) == len(weights) == len(names) > 0, "one window count, weight and name for every source"
        self.num_windows = tuple(int(windows) for windows in num_windows)
        self.names = tuple(names)
        by_name = sorted(range(len(names)), key=lambda index: names[index])
        quotas = blend_quotas([weights[index] for index in by_name])
        self.quotas = tuple(quotas[by_name.index(index)] for index in range(len(names)))
        self._check(weights)
        # Slots of a block before it is shuffled: sources in the order of their names, each as often as its quota.
        self._slots_B = np.repeat(np.array(by_name, dtype=np.int64), quotas)
        self._blend_key = key_of("blend", seed)
        self._source_keys = tuple(np.uint64(key_of("windows", seed, name)) for name in self.names)
        self._block = functools.lru_cache(maxsize=8)(self._shuffled_block)

    def locate(self, sample_ids_S: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Source, window and epoch (all int64 [S]) of the samples with these numbers (int64 [S], from 0)."""
        sample_ids_S = np.asarray(sample_ids_S, dtype=np.int64)
        assert sample_ids_S.ndim == 1 and (sample_ids_S.size == 0 or sample_ids_S.min() >= 0), "sample ids count from 0"
        source_S, count_S = self._draw(sample_ids_S)
        window_S = np.empty_like(sample_ids_S)
        epoch_S = np.empty_like(sample_ids_S)
        for source, windows in enumerate(self.num_windows):
            chosen = np.flatnonzero(source_S == source)
            if not chosen.size:
                continue
            epoch_S[chosen], place = np.divmod(count_S[chosen], windows)
            keys = mix(self._source_keys[source] ^ mix(epoch_S[chosen].astype(np.uint64)))
            window_S[chosen] = permute(place, windows, keys)
        return source_S, window_S, epoch_S

    def samples_per_epoch(self, source: int) -> float:
        """Samples of the whole blend in which `source` is read once."""
        return self.num_windows[source] * BLEND_SLOTS / self.quotas[source]

    def _draw(self, sample_ids_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source of each sample, and how many samples of that source came before it."""
        if len(self.names) == 1:
            return np.zeros_like(sample_ids_S), sample_ids_S
        quotas = np.array(self.quotas, dtype=np.int64)
        block_S, slot_S = np.divmod(sample_ids_S, BLEND_SLOTS)
        source_S = np.empty_like(sample_ids_S)
        count_S = np.empty_like(sample_ids_S)
        for block in np.unique(block_S):
            inside = np.flatnonzero(block_S == block)
            source_B, rank_B = self._block(int(block))
            source_S[inside] = source_B[slot_S[inside]]
            count_S[inside] = block * quotas[source_S[inside]] + rank_B[slot_S[inside]]
        return source_S, count_S

    def _shuffled_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Source of every slot of a block, and the slot's rank among those of its source."""
        key = np.uint64(key_of("block", self._blend_key, block))
        # Sorting by a keyed hash, and not numpy's own shuffle, whose stream may change with numpy's version.
        shuffle_B = np.argsort(mix(np.arange(BLEND_SLOTS, dtype=np.uint64) ^ key), kind="stable")
        source_B = self._slots_B[shuffle_B]
        rank_B = np.empty_like(source_B)
        for source in range(len(self.names)):
            slots = np.flatnonzero(source_B == source)
            rank_B[slots] = np.arange(slots.size)
        return source_B, rank_B

    def _check(self, weights: Sequence[float]) -> None:
        problems = []
        for name, windows, quota, weight in zip(self.names, self.num_windows, self.quotas, weights, strict=True):
            if windows < 1:
                problems.append(f"source {name}: holds no complete window; shorten sequence_length or prepare more text")
            if quota == 0:
                problems.append(
                    f"source {name}: weight={weight} rounds to 0 of the {BLEND_SLOTS} slots of a block; raise it or drop it"
                )
        if len(set(self.names)) != len(self.names):
            problems.append(f"sources: names must differ, got {', '.join(self.names)}; give each a name of its own")
        if problems:
            raise ConfigError(problems)
