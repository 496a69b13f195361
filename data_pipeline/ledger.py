"""What a step read, in a form that can be checked later: ranges of sample numbers and a hash of their tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

_MODULUS = 2**64


def sample_hash(sample_id: int, tokens: np.ndarray) -> int:
    """64 bits of a sample's number and its input tokens; the same in every layout."""
    words = np.empty(len(tokens) + 1, dtype="<i8")
    words[0], words[1:] = sample_id, tokens
    return int.from_bytes(hashlib.blake2b(words.data, digest_size=8).digest(), "little")


def combined(hashes: Iterable[int]) -> str:
    """One hash of several samples, whatever their order and whoever read them: 16 hexadecimal digits."""
    return f"{sum(hashes) % _MODULUS:016x}"


def format_ranges(ranges: Sequence[tuple[int, int]]) -> str:
    """Half-open ranges as text: 0-8,16-24."""
    return ",".join(f"{start}-{end}" for start, end in ranges)


def parse_ranges(text: str) -> list[tuple[int, int]]:
    """The inverse of `format_ranges`. Raises ValueError for text that is none."""
    pairs = [part.split("-") for part in text.split(",") if part]
    return [(int(start), int(end)) for start, end in pairs]
