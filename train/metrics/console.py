"""The lines a person reads while a run goes on."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TextIO, get_args

from train.config.training import ProbeName
from train.metrics.record import Level, Output, Record, Value

PROBES = get_args(ProbeName)
TASK_FIGURES = (
    "accuracy", "f1_macro", "mcc", "bleu", "chrf", "rouge1", "rouge2", "rougeL", "exact_match", "f1", "reward_accuracy",
    "reward_margin", "reward_chosen", "reward_rejected",
)  # fmt: skip
"""Of a task's figures those that a person looks for first; metrics.jsonl has all of them."""
ROW_FIGURES = ("correct", "sentence_bleu", "sentence_chrf", "rouge1", "rougeL", "exact_match", "f1")
"""Of the figures of one output those that its line has room for."""
_RATE_WINDOW = 50
_SHOWN_CHARACTERS = 110
_COLORS = {"dim": "\033[2m", "bold": "\033[1m", "warn": "\033[33m", "error": "\033[31m"}
_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


class ConsoleWriter:
    """Prints every n-th step, and always the first, the last, and a skipped one; every evaluation; every alert."""

    def __init__(
        self,
        *,
        every_steps: int,
        total_steps: int,
        shown_outputs: int = 3,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._every_steps = every_steps
        self._total_steps = total_steps
        self._shown_outputs = shown_outputs
        self._stream = sys.stdout if stream is None else stream
        self._color = self._stream.isatty()
        self._clock = clock
        self._lock = threading.Lock()  # the background of another writer speaks through `say`
        self._progress: deque[tuple[int, float]] = deque(maxlen=_RATE_WINDOW)
        self._unprinted: Record | None = None
        self._first = True

    def write(self, record: Record) -> None:
        if record["kind"] == "evaluation":
            self._print(evaluation_line(record, self._total_steps), "bold")
            return
        step = int(record["step"])
        self._progress.append((step, self._clock()))
        due = step % self._every_steps == 0 or step >= self._total_steps or self._first or record.get("skipped")
        self._first = False
        self._unprinted = None if due else record
        if due:
            self._print_step(record)

    def _print_step(self, record: Record) -> None:
        line = train_line(record, self._total_steps, self._eta_seconds(int(record["step"])))
        self._print(line, "warn" if record.get("skipped") else None)

    def _eta_seconds(self, step: int) -> float | None:
        """Time to the last step at the pace of the last steps, evaluations and checkpoints between them included."""
        (first_step, first_time), (last_step, last_time) = self._progress[0], self._progress[-1]
        if last_step <= first_step:
            return None
        return (self._total_steps - step) * (last_time - first_time) / (last_step - first_step)

    def alert(self, title: str, text: str, level: Level) -> None:
        self._print(f"{level}: {title}: {text}", level if level != "info" else None)

    def outputs(self, step: int, outputs: Sequence[Output]) -> None:
        for output in outputs[: self._shown_outputs]:
            scores = "  ".join(f"{name} {value:.3f}" for name, value in output.scores.items() if name in ROW_FIGURES)
            self._print(
                f"  {_cut(output.input)}\n    truth  {_cut(output.truth)}\n    output {_cut(output.output)}  {scores}", "dim"
            )

    def say(self, text: str) -> None:
        """A line about the reporting itself."""
        self._print(text, "dim")

    def close(self, outcome: str) -> None:
        if self._unprinted is not None:
            self._print_step(self._unprinted)
            self._unprinted = None

    def _print(self, line: str, color: str | None) -> None:
        if self._color and color in _COLORS:
            line = f"{_COLORS[color]}{line}\033[0m"
        with self._lock:
            try:
                self._stream.write(line + "\n")
                self._stream.flush()
            except (OSError, ValueError):  # the reader went away, or the stream was closed: nobody to tell
                pass


def _cut(text: str) -> str:
    """A text on one line, the end of a long one."""
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_CHARACTERS else "..." + line[3 - _SHOWN_CHARACTERS :]


def train_line(record: Record, total_steps: int, eta_seconds: float | None = None) -> str:
    """One step; columns keep their places from line to line, an unknown value is a dash."""
    step_seconds, waited = record.get("step_seconds"), record.get("data_wait_seconds")
    wait_share = waited / step_seconds if _positive(step_seconds) and isinstance(waited, float | int) else None
    parts = [
        _position(record, total_steps),
        f"loss {_number(record.get('loss'), '.4f'):>7}",
        f"lr {_number(record.get('lr'), '.2e'):>8}",
        f"grad {_number(record.get('grad_norm'), '.3f'):>7}",
        f"{_short(record.get('tokens_per_second')):>6} tok/s",
        f"mfu {_percent(record.get('mfu')):>5}",
        f"mem {_number(record.get('memory_gib'), '.1f'):>5}G",
        f"wait {_percent(wait_share):>5}",
        f"eta {duration(eta_seconds):>6}",
    ]
    return "  ".join(parts) + ("  skipped" if record.get("skipped") else "")


def evaluation_line(record: Record, total_steps: int) -> str:
    """One evaluation."""
    title = f"evaluation of {record['name']}" if record.get("name") else "evaluation"
    parts = [
        _position(record, total_steps),
        f"{title}: loss {_number(record.get('loss'), '.4f')}",
        *([f"perplexity {_number(record['perplexity'], '.2f')}"] if "perplexity" in record else []),
        *([f"bits per byte {_number(record['bits_per_byte'], '.4f')}"] if "bits_per_byte" in record else []),
        *(f"{name} {_percent(record[f'probe/{name}'])}" for name in PROBES if f"probe/{name}" in record),
        *(f"{name} {_number(record[f'task/{name}'], '.4f')}" for name in TASK_FIGURES if f"task/{name}" in record),
    ]
    return "  ".join(parts)


def duration(seconds: float | None) -> str:
    """Two units at most: 2d04h, 3h12m, 5m07s, 12s."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86_400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86_400}d{whole % 86_400 // 3600:02d}h"


def _position(record: Record, total_steps: int) -> str:
    step, width = int(record["step"]), len(str(total_steps))
    share = 100 * step / total_steps if total_steps else 0.0
    return f"step {step:>{width}}/{total_steps} {share:5.1f}%"


def _positive(value: Value | None) -> bool:
    return isinstance(value, float | int) and value > 0


def _number(value: Value | None, form: str) -> str:
    return format(value, form) if isinstance(value, float | int) else "-"


def _percent(value: Value | None) -> str:
    return f"{100 * value:.1f}%" if isinstance(value, float | int) else "-"


def _short(value: Value | None) -> str:
    """Three or four digits and a unit: 812, 45.2k, 1.31M."""
    if not isinstance(value, float | int):
        return "-"
    for size, unit in _UNITS:
        if value >= size:
            scaled = value / size
            return f"{scaled:.2f}{unit}" if scaled < 10 else f"{scaled:.1f}{unit}"
    return f"{value:.0f}"
