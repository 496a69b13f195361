"""Data that a run leaves out: which sample comes at a place of the run, as a pure function of the windows left out."""

from __future__ import annotations

from collections.abc import Sequence

Window = tuple[int, int]
"""Sample numbers [start, end)."""


def sample_at(position: int, windows: Sequence[Window]) -> int:
    """Number of the sample at `position`, counted from the run's beginning over the samples that are read.

    `windows` are disjoint and sorted, as `leave_out` returns them.
    """
    number = position
    for start, end in windows:
        if number < start:
            break
        number += end - start
    return number


def ranges_between(first: int, last: int, windows: Sequence[Window]) -> list[Window]:
    """Sample numbers at the positions [first, last), as ranges in order."""
    found: list[Window] = []
    position = first
    while position < last:
        start = sample_at(position, windows)
        ahead = next((begin for begin, _ in windows if begin > start), None)
        length = last - position if ahead is None else min(last - position, ahead - start)
        found.append((start, start + length))
        position += length
    return found


def leave_out(windows: Sequence[Window], more: Window) -> list[Window]:
    """`windows` and one more, disjoint and sorted; what touches becomes one."""
    merged: list[Window] = []
    for start, end in sorted([*windows, more]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged
