"""What a rank on a CPU asks of the C library's memory, on old and new versions of it."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest

from train.parallel import keep_freed_memory

THRESHOLD, TRIM = -3, -1


@pytest.mark.parametrize(
    ("largest", "expected"),
    [
        (2**40, [(THRESHOLD, 2**30), (TRIM, 2**31 - 1)]),
        (2**25, [(THRESHOLD, 2**30), (THRESHOLD, 2**25), (TRIM, 2**31 - 1)]),  # glibc before 2.35
        (0, [(THRESHOLD, 2**30), (THRESHOLD, 2**25)]),  # the other one alone would make every large block dear
    ],
)
def test_the_threshold_is_one_that_the_library_takes(
    largest: int, expected: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def mallopt(name: int, value: int) -> int:
        calls.append((name, value))
        return int(name == TRIM or value <= largest)

    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    keep_freed_memory()
    assert calls == expected


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())
    keep_freed_memory()
