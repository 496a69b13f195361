"""What is asked of a run from outside: to stop, to save. Signals, files in the run's folder, a time limit; all ranks agree."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from conf.errors import UserError
from train.outcome import STOP_FILE, attempt_folder
from train.parallel import ParallelContext

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAVE_FILE = "SAVE"
_LOOK_SECONDS = 1.0  # between two looks at the files: a file system of many nodes is not asked at every step
_TIME_LIMIT, _STOP_FILE = len(SIGNALS), len(SIGNALS) + 1
_RESERVE_SECONDS = 60.0  # for a save whose time is not known yet; a tenth of the time, where that is less
_MARGIN = 1.5


@dataclass(frozen=True, kw_only=True)
class Stop:
    """Why the run is to stop. `on_purpose`: a person wants it to stay so."""

    reason: str
    on_purpose: bool


_STOPS = (
    *(Stop(reason=f"received {number.name}", on_purpose=number == signal.SIGINT) for number in SIGNALS),
    Stop(reason="the time limit is near", on_purpose=False),
    Stop(reason=f"the file {STOP_FILE} was put there", on_purpose=True),
)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What all ranks do now. `total`: the sum over the ranks of the numbers that came along, modulo 2**64."""

    stop: Stop | None
    save: bool
    total: int


class Deadline:
    """When a run has to begin to stop, so that its last save is done within its time."""

    def __init__(self, seconds_left: float, clock: Callable[[], float] = time.monotonic) -> None:
        """seconds_left: from now on; counted by a clock that nobody sets."""
        self._clock = clock
        self._ends_at = clock() + seconds_left
        self._reserve_seconds = min(_RESERVE_SECONDS, seconds_left / 10)
        self.save_seconds: float | None = None
        """The longest save so far; None: none yet."""
        self.step_seconds = 0.0
        """The longest step of late."""

    def is_near(self) -> bool:
        """Whether another step might leave too little time for the save."""
        save = self._reserve_seconds if self.save_seconds is None else self.save_seconds
        return self._clock() + _MARGIN * (save + self.step_seconds) >= self._ends_at


class Requests:
    """Collects what is asked of this rank; none of it interrupts a step or a save."""

    def __init__(self, context: ParallelContext, run_dir: Path, attempt: int, deadline: Deadline | None = None) -> None:
        self.context, self.run_dir, self.deadline = context, run_dir, deadline
        self._successor = attempt_folder(run_dir, attempt + 1)
        self._asked = [0] * len(_STOPS)
        self._save_asked = False
        self._next_look = 0.0
        for number in SIGNALS:
            signal.signal(number, self._remember)

    def ask_to_save(self) -> None:
        """Have a checkpoint written at the next chance; it is enough that one rank asks."""
        self._save_asked = True

    def agree(self, number: int = 0) -> Agreement:
        """What to do, on all ranks alike: all must ask at the same place; one that was told is enough.

        `number` is summed over the ranks on the way, modulo 2**64. Raises UserError on rank 0 when a later attempt has begun:
        a node that the scheduler had lost may go on beside it, and must not write any more.
        """
        if self.context.is_first:
            self._look()
        signed = number - 2**64 if number >= 2**63 else number
        *asked, save, total = self.context.sum_over_ranks([*self._asked, int(self._save_asked), signed])
        self._save_asked = False
        stop = next((stop for stop, count in zip(_STOPS, asked, strict=True) if count), None)
        return Agreement(stop=stop, save=bool(save), total=total % 2**64)

    def answered(self) -> None:
        """The stop has been carried out: the file that asked for it goes, or the next attempt would stop at once."""
        if self.context.is_first:
            with contextlib.suppress(OSError):
                (self.run_dir / STOP_FILE).unlink(missing_ok=True)

    def _look(self) -> None:
        if self.deadline is not None and self.deadline.is_near():
            self._asked[_TIME_LIMIT] = 1
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + _LOOK_SECONDS
        with contextlib.suppress(OSError):  # a file system that is away for a moment asks for nothing
            if self._successor.exists():
                raise UserError(f"{self._successor.name} of this run has begun; this one was left behind, and writes no more")
            if (self.run_dir / STOP_FILE).exists():
                self._asked[_STOP_FILE] = 1
            if (self.run_dir / SAVE_FILE).exists():
                (self.run_dir / SAVE_FILE).unlink()
                self._save_asked = True

    def _remember(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self._asked[SIGNALS.index(signal.SIGINT)]:
            os._exit(128 + number)  # asked twice: at once; what is half written is no checkpoint
        self._asked[SIGNALS.index(signal.Signals(number))] = 1
