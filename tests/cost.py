"""What a test run costs: CPU seconds of all processes by folder and by file, printed before pytest's closing line.

Wall time says little where several workers share few cores. Each worker adds up its own time and that of every process
below it, the ended ones too, whenever it has done with a file.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import psutil
import pytest

from tests.timeouts import factor

DEAR = 10.0
"""CPU seconds from which a file is listed by name."""


class Meter:
    """Plugin: counts in each worker, sums in the first process, and prints there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.seconds: Counter[str] = Counter()
        self.items: Counter[str] = Counter()
        self._counted = tree_seconds()
        self._machine = machine_seconds()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self.items[self._file(item)] += 1

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self, item: pytest.Item, nextitem: pytest.Item | None) -> None:
        if nextitem is None or nextitem.path != item.path:
            now = tree_seconds()
            self.seconds[self._file(item)] += now - self._counted
            self._counted = now

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        output = getattr(session.config, "workeroutput", None)
        if output is not None:
            output["cost"] = (dict(self.seconds), dict(self.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: object) -> None:
        seconds, items = getattr(node, "workeroutput", {}).get("cost", ({}, {}))
        self.seconds.update(seconds)
        self.items.update(items)

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.seconds:
            return
        folders: Counter[str] = Counter()
        items: Counter[str] = Counter()
        for path, seconds in self.seconds.items():
            folder = "/".join(path.split("/")[:2])
            folders[folder] += seconds
            items[folder] += self.items[path]
        write = terminalreporter.write_line
        write(f"limits of time were multiplied by {factor():g}, as measured at the start with all workers busy")
        write("CPU seconds of all processes")
        for folder, seconds in folders.most_common():
            write(f"{seconds:8.0f}  {folder}  ({items[folder]:,} items)")
        busy = machine_seconds() - self._machine
        write(f"{sum(folders.values()):8.0f}  together; {busy:.0f} by the machine's own count, with all else that ran on it")
        write(f"files above {DEAR:g} s")
        for path, seconds in self.seconds.most_common():
            if seconds < DEAR:
                break
            write(f"{seconds:8.0f}  {path}  ({self.items[path]:,} items)")

    def _file(self, item: pytest.Item) -> str:
        return item.path.relative_to(self.root).as_posix()


def tree_seconds() -> float:
    """CPU seconds of this process and of all below it, the ended ones included where their parent has waited for them."""
    own = psutil.Process()
    total = 0.0
    for process in [own, *own.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.Error:  # it has ended since
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def machine_seconds() -> float:
    """CPU seconds that this machine has spent on anything since it was started."""
    times = psutil.cpu_times()
    return times.user + times.system + times.nice
