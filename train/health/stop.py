"""The request to stop: a signal sets a flag, the loop asks for it between steps and all ranks agree."""

from __future__ import annotations

import signal
from types import FrameType

from train.parallel import ParallelContext

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignal:
    """Collects SIGTERM, SIGINT and SIGUSR1; none of them interrupts a step or a save."""

    def __init__(self, context: ParallelContext) -> None:
        self.context = context
        self._received: str | None = None
        for number in SIGNALS:
            signal.signal(number, self._remember)

    def asked(self) -> str | None:
        """Why to stop, or None. All ranks must ask at the same place; one that was told is enough."""
        if not self.context.any_rank(self._received is not None):
            return None
        reasons = [reason for reason in self.context.gather_to_all(self._received) if reason]
        return reasons[0]

    def _remember(self, number: int, _: FrameType | None) -> None:
        self._received = signal.Signals(number).name
