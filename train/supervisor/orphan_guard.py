"""A tiny process that outlives a supervisor killed with SIGKILL, and ends what it leaves behind.

Started by path, with the standard library alone. Reads lines from stdin: `watch PGID` or `clear`. When stdin closes
it kills every process group that is still watched. The kernel's parent-death signal ends the ranks themselves, but
not their children (data loader workers, for one); these share the rank's process group.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys


def main() -> None:
    for name in ("SIGHUP", "SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    groups: list[int] = []
    for line in sys.stdin:
        if line.startswith("watch "):
            groups.append(int(line.split()[1]))
        elif line.strip() == "clear":
            groups.clear()
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main()
