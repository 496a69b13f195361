"""Data that is left out: against a list from which the samples were taken out."""

from __future__ import annotations

import random

from train.health.windows import leave_out, ranges_between, sample_at


def test_against_a_list() -> None:
    draw = random.Random(0)
    for _ in range(200):
        windows, gone = [], set()
        for _ in range(draw.randrange(5)):
            start = draw.randrange(200)
            window = (start, start + draw.randrange(1, 40))
            windows = leave_out(windows, window)
            gone |= set(range(*window))
        left = [number for number in range(600) if number not in gone]
        assert [sample_at(position, windows) for position in range(len(left))] == left
        first = draw.randrange(300)
        last = first + draw.randrange(1, 60)
        ranges = ranges_between(first, last, windows)
        assert [number for start, end in ranges for number in range(start, end)] == left[first:last]
        assert all(end < begin for (_, end), (begin, _) in zip(ranges, ranges[1:], strict=False)), "as few ranges as can be"


def test_windows_stay_disjoint_and_sorted() -> None:
    assert leave_out([(10, 20), (40, 50)], (15, 25)) == [(10, 25), (40, 50)]
    assert leave_out([(10, 20)], (20, 30)) == [(10, 30)]
    assert leave_out([(10, 50)], (20, 30)) == [(10, 50)]
    assert leave_out([(40, 50)], (1, 2)) == [(1, 2), (40, 50)]
