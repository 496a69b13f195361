"""What metrics.jsonl says about a run, in columns: some hundred bytes a step, so that a million steps fit into memory.

Owns the reading of what happened: restarts, rollbacks, when attempts began. Draws nothing.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm

from train.metrics.jsonl import read_lines
from train.metrics.record import Value


@dataclass(kw_only=True)
class Column:
    """One field of the train records: in which line it stood, and its value to seven digits."""

    rows: array = field(default_factory=lambda: array("i"))
    values: array = field(default_factory=lambda: array("f"))


@dataclass(kw_only=True)
class History:
    """The records of a run; of a step that was done again the last line counts."""

    columns: dict[str, Column] = field(default_factory=dict)
    """Numbers of the train records, by field."""
    held_out: dict[str, dict[int, float]] = field(default_factory=dict)
    """Name of the held-out set, mostly empty -> step -> loss."""
    evaluations: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)
    """Name, mostly empty -> figure, such as bits_per_byte -> step -> value: all numbers of the evaluation records."""
    probes: dict[str, dict[int, float]] = field(default_factory=dict)
    """Name of a probe's figure -> step -> value."""
    restarts: list[int] = field(default_factory=list)
    """First steps of the attempts after the first."""
    rollbacks: list[int] = field(default_factory=list)
    """Steps at which the run went back within an attempt."""
    begun: dict[int, float] = field(default_factory=dict)
    """Attempt -> unix seconds of its start, for those that did a step."""
    last: dict[str, Value] = field(default_factory=dict)
    """The record of the highest step; empty without any."""
    totals: dict[str, Value] = field(default_factory=dict)
    """The train record that was written last: its sums over the run's time are the newest."""
    _steps: array = field(default_factory=lambda: array("q"))

    @staticmethod
    def read(path: Path) -> History:
        """Read in one pass. Raises UserError for a file that is missing or broken."""
        history = History()
        for record in tqdm(read_lines(path), desc="reading metrics", unit=" lines", leave=False, disable=None):
            if record["kind"] == "evaluation":
                losses = history.held_out.setdefault(str(record.get("name", "")), {})
                losses[int(record["step"])] = float(record.get("loss", np.nan))
                for key in record:
                    if key.startswith("probe/"):
                        figures = history.probes.setdefault(key.removeprefix("probe/"), {})
                        figures[int(record["step"])] = float(record[key])
                figures = history.evaluations.setdefault(str(record.get("name", "")), {})
                for figure, value in record.items():
                    if not isinstance(value, str):
                        figures.setdefault(figure, {})[int(record["step"])] = float(value)
            elif record["kind"] == "train":
                history._take(record)
        return history

    def _take(self, record: dict[str, Value]) -> None:
        step, before = int(record["step"]), self.totals
        if record.get("attempt") != before.get("attempt"):
            if before:
                self.restarts.append(step)
            self.begun.setdefault(int(record.get("attempt", 1)), _beginning(record, before))
        elif step <= int(before["step"]):
            self.rollbacks.append(int(before["step"]))
        row = len(self._steps)
        self._steps.append(step)
        for name, value in record.items():
            if isinstance(value, str):
                continue
            column = self.columns.get(name)
            if column is None:
                column = self.columns[name] = Column()
            column.rows.append(row)
            column.values.append(value)
        self.totals = record
        if step >= int(self.last.get("step", 0)):
            self.last = record

    @cached_property
    def _counting(self) -> np.ndarray:
        """Rows that count, in the order of their steps."""
        steps = np.frombuffer(self._steps, dtype=np.int64)
        _, from_the_end = np.unique(steps[::-1], return_index=True)
        return len(steps) - 1 - from_the_end

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of the records that count and have `name`, in the order of their steps."""
        found = self.columns.get(name)
        if found is None:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
        rows = np.frombuffer(found.rows, dtype=np.int32)
        place = np.full(len(self._steps), -1, dtype=np.int64)
        place[rows] = np.arange(len(rows))
        chosen = self._counting[place[self._counting] >= 0]
        steps = np.frombuffer(self._steps, dtype=np.int64)[chosen]
        return steps, np.frombuffer(found.values, dtype=np.float32)[place[chosen]]

    def steps_with(self, name: str) -> np.ndarray:
        """Steps whose `name` is not 0."""
        steps, values = self.column(name)
        return steps[values != 0]

    @property
    def steps_again(self) -> int:
        """Lines that a later one replaced."""
        return len(self._steps) - len(self._counting)

    @property
    def best_held_out(self) -> tuple[float, int, str] | None:
        """(lowest loss, its step, name of the set), of all sources together where that is known; None without a finite one."""
        sets = {"": self.held_out[""]} if "" in self.held_out else self.held_out
        scores = [(loss, step, name) for name, losses in sets.items() for step, loss in losses.items() if np.isfinite(loss)]
        return min(scores, default=None)


def _beginning(record: Mapping[str, Value], before: Mapping[str, Value]) -> float:
    """When the attempt of this first record began: what it took to get here is booked as `restart`."""
    starting = float(record.get("seconds_restart", 0.0)) - float(before.get("seconds_restart", 0.0))
    return float(record.get("time", 0.0)) - float(record.get("step_seconds", 0.0)) - max(0.0, starting)
