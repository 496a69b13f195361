"""Speed and memory of a run: tokens per second over a window, MFU in both conventions, memory in GiB."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

GIB = 2**30


class Throughput:
    """Tokens per second over the last steps, and the share of the peak that they are worth.

    Two conventions of FLOPs per token are in use, so both are reported: `mfu` counts attention in full (PaLM),
    `mfu_causal` only the half that a causal mask leaves. `peak_flops` is that of all devices of the run together
    (dense, in the precision of the matrix products); None when the device is not known, then there is no MFU.

    A share is never above 1: a window that does more than the peak is the peak from then on, since the devices have shown
    that they can. That is a CPU whose peak was measured while others were at work, or, for `mfu`, a long sequence whose
    kernel leaves out what that convention counts. Each convention has its own, so that neither spoils the other.
    """

    def __init__(
        self,
        *,
        flops_per_token: float | None = None,
        flops_per_token_causal: float | None = None,
        peak_flops: float | None = None,
        window_steps: int = 20,
    ) -> None:
        flops = {"mfu": flops_per_token, "mfu_causal": flops_per_token_causal}
        self._flops = {name: value for name, value in flops.items() if value and peak_flops}
        self._peak_flops = dict.fromkeys(self._flops, peak_flops or 0.0)
        self._steps: deque[tuple[int, float]] = deque(maxlen=window_steps)
        self._warm = False

    def update(self, *, tokens: int, seconds: float) -> dict[str, float]:
        """Take one step of the whole run; returns tokens_per_second and, where the peak is known, mfu, mfu_causal.

        The first step is measured alone and then forgotten: it compiles, allocates and connects, and would weigh
        down the whole first window.
        """
        if not self._warm and len(self._steps) == 1:
            self._steps.clear()
            self._warm = True
        self._steps.append((tokens, seconds))
        total_seconds = sum(seconds for _, seconds in self._steps)
        if total_seconds <= 0:
            return {}
        rate = sum(tokens for tokens, _ in self._steps) / total_seconds
        values = {"tokens_per_second": rate}
        for name, flops in self._flops.items():
            self._peak_flops[name] = max(self._peak_flops[name], rate * flops)
            values[name] = rate * flops / self._peak_flops[name]
        return values


class StepTimer:
    """Splits the time of a step into waiting for data and the rest.

    timer.start()
    with timer.waiting_for_data():
        batch = next(batches)
    ...
    record |= timer.stop()
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._started = clock()
        self._waited = 0.0

    def start(self) -> None:
        self._started, self._waited = self._clock(), 0.0

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        began = self._clock()
        try:
            yield
        finally:
            self._waited += self._clock() - began

    def stop(self) -> dict[str, float]:
        """step_seconds and, within it, data_wait_seconds."""
        return {"step_seconds": self._clock() - self._started, "data_wait_seconds": self._waited}


def memory_gib() -> float | None:
    """Peak of allocated device memory where torch uses CUDA, else the resident set of this process; None: unknown."""
    torch = sys.modules.get("torch")  # not imported for this: a process without torch has no device memory
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return float(torch.cuda.max_memory_allocated() / GIB)
    try:
        num_pages = int(Path("/proc/self/statm").read_text().split()[1])
        return num_pages * os.sysconf("SC_PAGE_SIZE") / GIB
    except (OSError, ValueError):
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / GIB if sys.platform == "darwin" else peak * 1024 / GIB
