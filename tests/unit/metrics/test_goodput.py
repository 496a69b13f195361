"""Every second of a run's life is booked once, and the books are carried on cheaply."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from train.metrics.goodput import Goodput, resume_goodput
from train.metrics.record import encode


def written(path: Path, steps: range, *, attempt: int = 1, goodput: Goodput | None = None, start: float = 1000.0) -> Goodput:
    """Steps of 2 s each, one behind the other from `start` on."""
    goodput = goodput or Goodput()
    with path.open("ab") as file:
        for number, step in enumerate(steps, start=1):
            goodput.add("productive", 2.0)
            record = {"kind": "train", "step": step, "attempt": attempt, "time": start + 2 * number, **goodput.fields()}
            file.write(encode(record))
    return goodput


def test_a_run_without_a_past(tmp_path: Path) -> None:
    goodput = resume_goodput(tmp_path / "metrics.jsonl", step=0, started=5.0, now=9.0)
    assert goodput.fields()["seconds_restart"] == 4.0 and goodput.fields()["goodput"] == 0.0


def test_what_is_done_again_is_lost(tmp_path: Path) -> None:
    """12 steps of 2 s, killed, 10 s of nothing, 6 s of starting, on from step 10."""
    path = tmp_path / "metrics.jsonl"
    written(path, range(1, 13))
    fields = resume_goodput(path, step=10, started=1034.0, now=1040.0).fields()
    assert [fields[f"seconds_{name}"] for name in ("productive", "lost", "idle", "restart")] == [20.0, 4.0, 10.0, 6.0]
    assert fields["goodput"] == pytest.approx(20 / 40)


def test_a_second_restart_goes_on_from_the_books(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, range(1, 13))
    books = resume_goodput(path, step=10, started=1034.0, now=1040.0)
    written(path, range(11, 15), attempt=2, goodput=books, start=1040.0)
    fields = resume_goodput(path, step=10, started=1050.0, now=1051.0).fields()
    assert fields["seconds_productive"] == 20.0 and fields["seconds_lost"] == 4.0 + 8.0
    assert sum(fields[name] for name in fields if name != "goodput") == pytest.approx(51.0), "all the time since the start"


def test_a_torn_line_and_other_kinds_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, range(1, 5))
    with path.open("ab") as file:
        file.write(encode({"kind": "evaluation", "step": 4, "time": 1e9}))
        file.write(b'{"kind": "train", "step": 5, "ti')
    assert resume_goodput(path, step=4, started=1008.0, now=1008.0).fields()["seconds_lost"] == 0.0


def test_the_cost_does_not_grow_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    with path.open("wb") as file:
        file.truncate(200_000_000)  # a hole: whoever reads it reads 200 MB
    written(path, range(1_000_000, 1_000_100))
    real, read = os.pread, []

    def counted(file: int, length: int, start: int) -> bytes:
        read.append(length)
        return real(file, length, start)

    monkeypatch.setattr(os, "pread", counted)
    fields = resume_goodput(path, step=1_000_090, started=0.0, now=0.0).fields()
    assert fields["seconds_lost"] == 18.0
    assert sum(read) <= 128 * 1024
