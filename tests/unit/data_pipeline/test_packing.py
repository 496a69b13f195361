"""Rows in sequences: nothing lost, nothing split, and as few as a packer that tries everything finds, or next to it."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.packing import one_each, pack, shuffled


def fewest(lengths: list[int], capacity: int) -> int:
    """The fewest sequences, by trying: the longest first, into every kind of room there is."""
    best = len(lengths)

    def place(rest: list[int], rooms: tuple[int, ...]) -> None:
        nonlocal best
        if len(rooms) >= best:
            return
        if not rest:
            best = len(rooms)
            return
        first, *others = rest
        for room in {room for room in rooms if room >= first}:
            at = rooms.index(room)
            place(others, (*rooms[:at], room - first, *rooms[at + 1 :]))
        place(others, (*rooms, capacity - first))

    place(sorted(lengths, reverse=True), ())
    return best


def slow_best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing by its definition, looking at every sequence."""
    sequences: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        rooms = [capacity - sum(lengths[one] for one in sequence) for sequence in sequences]
        fitting = [number for number, room in enumerate(rooms) if room >= lengths[row]]
        if fitting:
            sequences[min(fitting, key=lambda number: rooms[number])].append(row)
        else:
            sequences.append([row])
    return sequences


def sequences_of(lengths: list[int], capacity: int) -> list[list[int]]:
    packing = pack(np.array(lengths, dtype=np.int64), capacity)
    return [packing.rows_of(sequence).tolist() for sequence in range(packing.num_sequences)]


@pytest.mark.parametrize("seed", range(30))
def test_next_to_the_fewest(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 21, size=int(rng.integers(1, 12))).tolist()
    assert len(sequences_of(lengths, 20)) <= fewest(lengths, 20) * 11 / 9 + 1
    sums = [sorted(sum(lengths[row] for row in one) for one in way(lengths, 20)) for way in (sequences_of, slow_best_fit)]
    assert sums[0] == sums[1]


@pytest.mark.parametrize("size", [0, 1, 500])
def test_every_row_once_and_none_too_long(size: int) -> None:
    lengths = np.random.default_rng(size).integers(1, 65, size=size).tolist()
    sequences = sequences_of(lengths, 64)
    assert sorted(row for sequence in sequences for row in sequence) == list(range(size))
    assert all(0 < sum(lengths[row] for row in sequence) <= 64 for sequence in sequences)


def test_a_gap_is_filled_by_what_fits_it_best() -> None:
    assert sequences_of([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert sequences_of([7, 6, 3], 10) == [[0, 2], [1]]  # 3 leaves nothing in the first, 1 in the second


def test_little_room_is_left() -> None:
    lengths_R = np.random.default_rng(0).integers(10, 400, size=20_000)
    packing = pack(lengths_R, 1024)
    assert lengths_R.sum() / (packing.num_sequences * 1024) > 0.995
    assert packing.most_rows == max(len(packing.rows_of(sequence)) for sequence in range(packing.num_sequences))


def test_one_each() -> None:
    packing = one_each(3)
    assert [packing.rows_of(sequence).tolist() for sequence in range(packing.num_sequences)] == [[0], [1], [2]]
    assert (packing.most_rows, one_each(0).num_sequences, one_each(0).most_rows) == (1, 0, 0)


def test_the_first_sequences_of_a_shuffled_packing_are_like_all() -> None:
    lengths_R = np.random.default_rng(0).integers(1, 65, size=8_000)
    lengths_R[::50] = 64
    packing = pack(lengths_R, 64)
    mixed = shuffled(packing)
    before, after = ([tuple(one.rows_of(number).tolist()) for number in range(one.num_sequences)] for one in (packing, mixed))
    assert sorted(before) == sorted(after) and before != after
    first = len(after) // 8
    means = [np.mean([lengths_R[list(rows)].mean() for rows in order]) for order in (before[:first], after[:first], after)]
    assert means[0] > 1.5 * means[2] and abs(means[1] / means[2] - 1) < 0.05
    assert shuffled(packing).order_R.tolist() == mixed.order_R.tolist()
    assert (mixed.order_R.dtype, mixed.starts_Q1.dtype) == (np.int64, np.int64)


def test_the_first_rows_of_shuffled_files_are_of_each_as_much() -> None:
    mixed = shuffled(one_each(4_000))
    assert abs((mixed.order_R[:400] < 1_000).mean() - 0.25) < 0.06


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_to_shuffle(count: int) -> None:
    mixed = shuffled(one_each(count))
    assert (mixed.order_R.tolist(), mixed.starts_Q1.tolist()) == (list(range(count)), list(range(count + 1)))
