"""Which rows share a sequence: the best fit for the longest first. Pure; rows are neither split nor lost.

Shape letters: R rows, Q sequences.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np

from data_pipeline.sampler import mix


@dataclass(frozen=True)
class Packing:
    """The rows of every sequence."""

    order_R: np.ndarray
    """int64: the rows, sequence by sequence."""
    starts_Q1: np.ndarray
    """int64 [Q + 1]: where each sequence begins in `order_R`, and its end."""

    @property
    def num_sequences(self) -> int:
        """How many sequences there are."""
        return len(self.starts_Q1) - 1

    @property
    def most_rows(self) -> int:
        """Rows of the sequence that has most."""
        return int(np.diff(self.starts_Q1).max(initial=0))

    def rows_of(self, sequence: int) -> np.ndarray:
        """The rows of one sequence."""
        return self.order_R[self.starts_Q1[sequence] : self.starts_Q1[sequence + 1]]


def pack(lengths_R: np.ndarray, capacity: int) -> Packing:
    """Best-fit decreasing: each row, the longest first, into the sequence that it leaves the least room in.

    O(R log R): sequences are kept by the room they have left, of which there are at most `capacity` kinds. At most 11/9 of the
    fewest sequences, and 1 more (Johnson, 1973); of rows much shorter than a sequence next to none is wasted.
    """
    assert lengths_R.size == 0 or 1 <= lengths_R.min() <= lengths_R.max() <= capacity, "rows are cut before they are packed"
    sequence_R = np.empty(len(lengths_R), dtype=np.int64)
    with_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # those that some sequence has, sorted
    num_sequences = 0
    for row in np.argsort(-lengths_R, kind="stable").tolist():
        length = int(lengths_R[row])
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            sequence, room = num_sequences, capacity
            num_sequences += 1
        else:
            room = rooms[place]
            sequence = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        sequence_R[row] = sequence
        room -= length
        if room:
            if room not in with_room:
                with_room[room] = []
                bisect.insort(rooms, room)
            with_room[room].append(sequence)
    return _grouped(sequence_R, num_sequences)


def one_each(num_rows: int) -> Packing:
    """Every row a sequence of its own."""
    return _grouped(np.arange(num_rows, dtype=np.int64), num_rows)


def shuffled(packing: Packing) -> Packing:
    """The same sequences in an order that tells nothing of their rows' lengths, and is always the same: the first of them are a
    fair sample of all, whatever the packing began with, and of files one behind the other as much of each."""
    number_Q = np.arange(packing.num_sequences, dtype=np.int64)
    # Sorting by a hash, and not numpy's own shuffle, whose stream may change with numpy's version.
    sequences_Q = np.argsort(mix(number_Q.astype(np.uint64)), kind="stable")
    order_R = np.concatenate([np.empty(0, dtype=np.int64), *map(packing.rows_of, sequences_Q)])
    counts_Q = np.diff(packing.starts_Q1)[sequences_Q]
    return Packing(order_R=order_R, starts_Q1=np.concatenate([[0], np.cumsum(counts_Q)]).astype(np.int64))


def in_groups(packing: Packing, size: int) -> Packing:
    """A packing of groups as one of their rows, which are neighbours: those of group n are the rows from n x size on."""
    order_R = (packing.order_R[:, None] * size + np.arange(size)).reshape(-1)
    return Packing(order_R=order_R, starts_Q1=packing.starts_Q1 * size)


def _grouped(sequence_R: np.ndarray, num_sequences: int) -> Packing:
    counts_Q = np.bincount(sequence_R, minlength=num_sequences)
    starts_Q1 = np.concatenate([[0], np.cumsum(counts_Q)]).astype(np.int64)
    return Packing(order_R=np.argsort(sequence_R, kind="stable").astype(np.int64), starts_Q1=starts_Q1)
