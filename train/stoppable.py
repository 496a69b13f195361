"""A stop while nothing has begun that would have to be saved: corpora are prepared, or a run is being checked."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(Exception):
    """A signal asked for a stop; its text is the signal's name."""


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM and SIGUSR1 raise Stopped inside: this may take minutes, and a batch system does not wait."""

    def stop(number: int, _: FrameType | None) -> None:
        raise Stopped(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
