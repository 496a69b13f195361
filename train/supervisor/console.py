"""What the supervisor shows: rank 0's log as it grows, the end of a failing rank's log, and its own lines."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from pathlib import Path

_CHUNK_BYTES = 4096  # at most PIPE_BUF: a pipe that select calls writable takes this much without blocking
_TAIL_BYTES = 64 * 1024
_LINE_CHARACTERS = 1000


def say(text: str) -> None:
    """One line of the supervisor's own, on stderr."""
    with contextlib.suppress(OSError):  # the terminal is gone; the run goes on, and outcome.json tells the story
        print(f"longhaul: {text}", file=sys.stderr, flush=True)


def last_lines(path: Path, count: int) -> list[str]:
    """The last `count` lines of a file that may be large, long lines cut: a screen has to take them."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().decode("utf-8", errors="replace").splitlines()[-count:]
    except OSError:
        return []
    return [line if len(line) <= _LINE_CHARACTERS else line[:_LINE_CHARACTERS] + " ..." for line in lines]


class LogStream:
    """Copies a growing log to stdout.

    The rank writes to its file and never to a pipe of ours: a terminal that is held (Ctrl-S) or slow then delays
    this copy, not the training, and nothing here blocks the watch over the ranks either.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._source: int | None = None
        self._pending = b""
        try:
            sys.stdout.flush()
            self._target: int | None = sys.stdout.fileno()
        except (AttributeError, OSError, ValueError):  # no stdout, or one that is no file
            self._target = None

    def pump(self) -> bool:
        """Copy what is there and can be taken now; False when nothing is left to copy."""
        if self._target is None:
            return False
        try:
            if self._source is None:
                self._source = os.open(self._path, os.O_RDONLY)
            while True:
                self._pending = self._pending or os.read(self._source, _CHUNK_BYTES)
                if not self._pending:
                    return False
                if not select.select([], [self._target], [], 0)[1]:
                    return True
                self._pending = self._pending[os.write(self._target, self._pending) :]
        except OSError:  # the reader of our output went away
            self._target = None
            return False

    def close(self, timeout_seconds: float = 2.0) -> None:
        """Copy the rest, waiting no longer than this for a slow reader."""
        deadline = time.monotonic() + timeout_seconds
        while self.pump() and time.monotonic() < deadline:
            time.sleep(0.02)
        if self._source is not None:
            os.close(self._source)
            self._source = None
