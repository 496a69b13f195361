"""Where the wall-clock time of a run goes, over all its attempts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from train.metrics.record import Value, decode

CATEGORIES = ("productive", "lost", "restart", "checkpoint", "evaluation", "idle")
_BLOCK_BYTES = 64 * 1024


class Goodput:
    """Seconds by category: work that counts, work that had to be done again, starting, waiting for checkpoints, reading
    the held-out text, and the time when no attempt ran.

    The totals go into every record, so the last line of metrics.jsonl has them for the next attempt.
    """

    def __init__(self, carried: Mapping[str, Value] | None = None) -> None:
        """carried: the record to go on from."""
        self._seconds = {name: float((carried or {}).get(f"seconds_{name}", 0.0)) for name in CATEGORIES}

    def add(self, category: str, seconds: float) -> None:
        """Book `seconds`."""
        self._seconds[category] += seconds

    def lose(self, seconds: float) -> None:
        """What was work has to be done again."""
        seconds = max(0.0, min(seconds, self._seconds["productive"]))
        self._seconds["productive"] -= seconds
        self._seconds["lost"] += seconds

    def fields(self) -> dict[str, float]:
        """As the fields of a record."""
        total = sum(self._seconds.values())
        fields = {f"seconds_{name}": seconds for name, seconds in self._seconds.items()}
        return {**fields, "goodput": self._seconds["productive"] / total if total else 0.0}


def resume_goodput(path: Path, *, step: int, started: float, now: float) -> Goodput:
    """The account of a run that goes on from `step`; `started`, `now`: unix seconds of this attempt's start and of now.

    Reads metrics.jsonl at `path` from its end back to that step and no further, so its cost does not grow with the run.
    """
    last: Mapping[str, Value] | None = None
    kept: Mapping[str, Value] | None = None
    for record in _backwards(path):
        last = last or record
        if record["kind"] == "train" and int(record["step"]) <= step:
            kept = record
            break
    goodput = Goodput(last)
    if last is not None:
        before = 0.0 if kept is None else float(kept.get("seconds_productive", 0.0))
        goodput.lose(float(last.get("seconds_productive", 0.0)) - before)
        goodput.add("idle", max(0.0, started - float(last["time"])))
    goodput.add("restart", max(0.0, now - started))
    return goodput


def _backwards(path: Path) -> Iterator[dict[str, Value]]:
    """Train records of the file, the last first; a line that is none is passed over."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        end, rest = os.fstat(file).st_size, b""
        while end > 0 or rest:
            start = max(0, end - _BLOCK_BYTES)
            lines = (os.pread(file, end - start, start) + rest).split(b"\n")
            rest = lines.pop(0) if start else b""
            end = start
            for line in reversed(lines):
                try:
                    record = decode(line)
                except ValueError:
                    continue
                if record["kind"] == "train":
                    yield record
            if not start:
                return
    finally:
        os.close(file)
