"""Python's garbage collector on a schedule: collections at random moments of random ranks make every rank wait."""

from __future__ import annotations

import gc
from types import TracebackType


class GarbageSchedule:
    """While it is entered, cycles are collected every `every_steps` steps only; None leaves the collector alone."""

    def __init__(self, every_steps: int | None) -> None:
        self.every_steps = every_steps

    def __enter__(self) -> GarbageSchedule:
        if self.every_steps is not None:
            gc.collect()
            gc.freeze()  # what the start has left is there to stay; a collection need not look at it
            gc.disable()
        return self

    def after(self, step: int) -> None:
        """Collect when `step`, the number of steps done, is due."""
        if self.every_steps is not None and step % self.every_steps == 0:
            gc.collect()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self.every_steps is not None:
            gc.enable()
            gc.unfreeze()
