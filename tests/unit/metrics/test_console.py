"""The console: which steps are printed, and what a line looks like."""

from __future__ import annotations

import io
import math

import pytest

from train.metrics.console import ConsoleWriter, duration, evaluation_line, train_line

FULL = {
    "kind": "train",
    "step": 120,
    "loss": 3.14159,
    "lr": 3e-4,
    "grad_norm": 0.8765,
    "tokens_per_second": 45_210.0,
    "mfu": 0.4123,
    "memory_gib": 61.234,
    "step_seconds": 2.0,
    "data_wait_seconds": 0.01,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_full_line() -> None:
    assert train_line(FULL, 1000, 3 * 3600 + 12 * 60 + 20) == (
        "step  120/1000  12.0%  loss  3.1416  lr 3.00e-04  grad   0.876   45.2k tok/s  mfu 41.2%  "
        "mem  61.2G  wait  0.5%  eta  3h12m"
    )


def test_columns_keep_their_places() -> None:
    bare = {"kind": "train", "step": 7, "loss": math.nan, "grad_norm": math.inf}
    big = {**FULL, "step": 1000, "loss": 11.25, "tokens_per_second": 1.3e9, "mfu": 0.05, "grad_norm": 123.5}
    lines = [train_line(record, 1000, 5.0) for record in (FULL, bare, big)]
    for word in ("loss", "lr", "grad", "tok/s", "mfu", "mem", "wait", "eta"):
        assert len({line.index(word) for line in lines}) == 1, word
    assert "loss     nan" in lines[1] and "mfu     -" in lines[1]


def test_an_evaluation_line() -> None:
    record = {"kind": "evaluation", "step": 50, "loss": 2.5, "perplexity": 12.18, "bits_per_byte": 0.9}
    assert evaluation_line(record, 100) == (
        "step  50/100  50.0%  evaluation: loss 2.5000  perplexity 12.18  bits per byte 0.9000"
    )
    assert "evaluation of code: loss" in evaluation_line({**record, "name": "code"}, 100)
    probes = {"probe/brackets": 1 / 3, "probe/copying": 0.125, "probe/copying_loss": 7.5}
    assert evaluation_line({**record, **probes}, 100).endswith("bits per byte 0.9000  copying 12.5%  brackets 33.3%")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59, "59s"), (307, "5m07s"), (11_520, "3h12m"), (187_300, "2d04h"), (None, "-"), (math.inf, "-")],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def printed(*steps: int, every: int, total: int, close: bool = True) -> list[int]:
    stream = io.StringIO()
    console = ConsoleWriter(every_steps=every, total_steps=total, stream=stream)
    for step in steps:
        console.write({**FULL, "step": step, "skipped": int(step == 4)})
    if close:
        console.close("stopped")
    return [int(line.split("/")[0].split()[1]) for line in stream.getvalue().splitlines()]


def test_every_nth_the_first_the_last_and_skipped_steps() -> None:
    assert printed(*range(1, 24), every=10, total=23) == [1, 4, 10, 20, 23]
    assert printed(*range(7, 13), every=10, total=23) == [7, 10, 12], "the last of a stopped attempt"
    assert printed(*range(7, 13), every=10, total=23, close=False) == [7, 10]


def test_the_eta_counts_what_lies_between_steps() -> None:
    stream, now = io.StringIO(), [0.0]
    console = ConsoleWriter(every_steps=1, total_steps=100, stream=stream, clock=lambda: now[0])
    for step in (1, 2, 3):
        console.write({**FULL, "step": step, "step_seconds": 1.0})
        now[0] += 60.0  # one second of step, the rest evaluation and checkpoint
    lines = stream.getvalue().splitlines()
    assert lines[0].endswith("eta      -")
    assert lines[2].endswith("eta  1h37m")


def test_colours_are_for_terminals() -> None:
    for stream, colored in ((Terminal(), True), (io.StringIO(), False)):
        console = ConsoleWriter(every_steps=1, total_steps=10, stream=stream)
        console.alert("loss spike", "step 3", "error")
        assert ("\033[" in stream.getvalue()) == colored
        assert "error: loss spike: step 3" in stream.getvalue()


def test_a_closed_stream_does_not_stop_the_run() -> None:
    stream = io.StringIO()
    console = ConsoleWriter(every_steps=1, total_steps=10, stream=stream)
    stream.close()
    console.write({**FULL, "step": 1})
