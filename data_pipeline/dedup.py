"""Decisions made by the hash of a document's text: which copies go, which documents are held out.

Shape letters: N documents, in order. A hash is two uint64: [N, 2].
"""

from __future__ import annotations

import hashlib

import numpy as np

from data_pipeline.sampler import key_of, mix

HASH_BYTES = 16


def content_hash(text_utf8: bytes) -> bytes:
    """BLAKE2b of 128 bits: among 10^12 documents the chance that any two different ones meet is about 10^-15."""
    return hashlib.blake2b(text_utf8, digest_size=HASH_BYTES).digest()


def hash_array(hashes: list[bytes]) -> np.ndarray:
    """Hashes as uint64 [N, 2]."""
    return np.frombuffer(b"".join(hashes), dtype="<u8").reshape(-1, 2)


def first_occurrences(hashes_N2: np.ndarray) -> np.ndarray:
    """For every document the number of the first one with the same text, int64 [N]; its own number where it is the first."""
    order_N = np.lexsort((hashes_N2[:, 0], hashes_N2[:, 1]))  # stable: among equals the first document stays first
    sorted_N2 = hashes_N2[order_N]
    begins_N = np.ones(len(order_N), dtype=bool)
    begins_N[1:] = (sorted_N2[1:] != sorted_N2[:-1]).any(axis=1)
    group_first = order_N[begins_N]
    first_N = np.empty(len(order_N), dtype=np.int64)
    first_N[order_N] = group_first[np.cumsum(begins_N) - 1]
    return first_N


def choose_held_out(hashes_N2: np.ndarray, fraction: float, *, seed: int) -> np.ndarray:
    """Which documents are for validation, bool [N].

    By hash, so a document is on the same side whatever else is in the corpus, and copies are never on both sides. At least one
    of two or more different documents is held out when `fraction` is above 0.
    """
    if fraction == 0 or not len(hashes_N2):
        return np.zeros(len(hashes_N2), dtype=bool)
    score_N = mix(mix(hashes_N2[:, 0] ^ np.uint64(key_of("held out", seed))) ^ hashes_N2[:, 1])
    held_out_N = score_N < np.uint64(int(fraction * 2**64))
    if not held_out_N.any() and np.unique(score_N).size > 1:
        held_out_N = score_N == score_N.min()
    return held_out_N
