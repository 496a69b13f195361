"""The hash of what a step read: blind to order and layout, not to a token, a number or a swap."""

from __future__ import annotations

import hashlib
import random
import struct

import numpy as np
import pytest

from data_pipeline.ledger import combined, format_ranges, parse_ranges, sample_hash

TOKENS = np.array([5, 6, 7, 50_000], dtype=np.int64)


def test_the_hash_is_defined_by_its_bytes() -> None:
    """Written down once more, without NumPy: runs of other years must stay readable."""
    digest = hashlib.blake2b(struct.pack("<5q", 41, 5, 6, 7, 50_000), digest_size=8).digest()
    assert sample_hash(41, TOKENS) == struct.unpack("<Q", digest)[0]
    assert sample_hash(41, TOKENS.astype(np.uint16)) == sample_hash(41, TOKENS)


def test_what_the_hash_sees() -> None:
    seen = {sample_hash(41, TOKENS), sample_hash(42, TOKENS), sample_hash(41, TOKENS[::-1]), sample_hash(41, TOKENS[:3])}
    assert len(seen) == 4
    first, second = TOKENS, TOKENS + 1
    assert combined([sample_hash(0, first), sample_hash(1, second)]) != combined(
        [sample_hash(0, second), sample_hash(1, first)]
    )


@pytest.mark.parametrize("count", [0, 1, 2, 7, 200])
def test_order_and_ranks_do_not_count(count: int) -> None:
    chosen = random.Random(count)
    hashes = [chosen.getrandbits(64) for _ in range(count)]
    shuffled, cut = chosen.sample(hashes, count), count // 3
    parts = int(combined(shuffled[:cut]), 16) + int(combined(shuffled[cut:]), 16)
    assert combined(hashes) == combined(shuffled) == f"{parts % 2**64:016x}"


@pytest.mark.parametrize("ranges", [[], [(0, 8)], [(0, 8), (16, 24)], [(10**12, 10**12 + 1), (0, 0)]])
def test_ranges_as_text_come_back(ranges: list[tuple[int, int]]) -> None:
    assert parse_ranges(format_ranges(ranges)) == ranges


@pytest.mark.parametrize("text", ["8", "1-2-3", "a-b"])
def test_text_that_is_no_ranges(text: str) -> None:
    with pytest.raises(ValueError):
        parse_ranges(text)
