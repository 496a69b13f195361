"""Which host is slow: the time that each rank computes, without its waiting for the others."""

from __future__ import annotations

from statistics import median

from train.host import host_name
from train.parallel import ParallelContext


class Stragglers:
    """Gathers the busy seconds of all ranks every so many steps."""

    def __init__(self, context: ParallelContext, every_steps: int | None) -> None:
        """every_steps: None never gathers."""
        self.context, self.every_steps = context, every_steps
        self._host = host_name()
        self._seconds: list[float] = []

    def after(self, step: int, busy_seconds: float) -> dict[str, float | str | int]:
        """Take one step's `busy_seconds` of this rank; fields for its record when it is one that gathers, on all ranks."""
        self._seconds.append(busy_seconds)
        if self.every_steps is None or step % self.every_steps:
            return {}
        mine, self._seconds = (self._host, median(self._seconds)), []
        return summary(self.context.gather_to_all(mine))


def summary(busy: list[tuple[str, float]]) -> dict[str, float | str | int]:
    """Fields of a record from host and busy seconds of every rank."""
    seconds = [value for _, value in busy]
    slowest = max(range(len(busy)), key=seconds.__getitem__)
    by_host: dict[str, list[float]] = {}
    for host, value in busy:
        by_host.setdefault(host, []).append(value)
    host = max(by_host, key=lambda name: median(by_host[name]))
    middle = median(seconds)
    return {
        "busy_seconds_median": middle,
        "busy_seconds_max": seconds[slowest],
        "straggler_ratio": seconds[slowest] / middle if middle > 0 else 1.0,
        "slowest_rank": slowest,
        "slowest_host": host,
    }
