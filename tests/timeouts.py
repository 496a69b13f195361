"""How much longer things take on this machine than on the one that the tests' limits were written for.

Limits in tests (how long a command may run, how soon a rank has to answer, seconds that are handed to the program) are
written for two quiet cores of an ordinary server with AVX2. `measure` times a fixed piece of work at the start of a test
run, with as many processes as there will be workers, and every limit is multiplied by what comes out, never by less than 1.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

VARIABLE = "LONGHAUL_TEST_TIME_FACTOR"
"""Set by the first process of a test run for its workers and all that they start; set it by hand to choose the factor."""
REFERENCE_SECONDS = 0.55
"""What `WORK` takes on the machine that the limits were written for: an EPYC 7003 at 2.4 GHz, two cores, both at work."""
MOST = 10.0
# Interpreter and memory, in the share in which tests need them; products of a training step are small beside both.
WORK = """
import hashlib
total = 0
for number in range(3_000_000):
    total += number & 7
block = bytes(1 << 20)
for _ in range(64):
    block = hashlib.sha256(block).digest() * (1 << 15)
"""


def measure(processes: int) -> float:
    """Seconds of the work here, `processes` times at once, over the reference's; from 1 to `MOST`."""
    started = time.monotonic()
    workers = [subprocess.Popen([sys.executable, "-I", "-S", "-c", WORK]) for _ in range(processes)]
    for worker in workers:
        worker.wait()
    return min(MOST, max(1.0, round((time.monotonic() - started) / REFERENCE_SECONDS, 2)))


def factor() -> float:
    """By what limits are multiplied in this test run."""
    return float(os.environ.get(VARIABLE, "1"))


def scaled(seconds: float) -> float:
    """A limit that was written for the reference machine, as it is on this one."""
    return round(seconds * factor(), 2)
