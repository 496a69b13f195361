"""A stop while nothing has begun that would have to be saved: corpora are prepared, or a run is being checked."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(Exception):
    """A signal asked for a stop; its text is the signal's name."""


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM and SIGUSR1 raise Stopped inside: this may take minutes, and a batch system does not wait.

    In this process alone: workers that are forked from it, and ended by a signal when they are done, end as ever.
    """
    own = os.getpid()

    def stop(number: int, _: FrameType | None) -> None:
        if os.getpid() != own:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        raise Stopped(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
