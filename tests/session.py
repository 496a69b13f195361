"""One run of the tests as a whole: limits of time for this machine, what it costs, and a record to go on from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import timeouts
from tests.cost import Meter


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="file of outcomes: what has passed by it is left out (tools/campaign.sh)")


def pytest_configure(config: pytest.Config) -> None:
    if timeouts.VARIABLE not in os.environ:  # workers inherit it
        workers = len(config.option.tx) if getattr(config.option, "tx", None) else 1
        os.environ[timeouts.VARIABLE] = str(timeouts.measure(workers))
    config.pluginmanager.register(Meter(config.rootpath), "longhaul-cost")
    if (path := config.getoption("record")) is not None:
        is_worker = hasattr(config, "workerinput")  # the first process hears of all outcomes
        config.pluginmanager.register(Record(config.rootpath / path, writes=not is_worker), "longhaul-record")


def pytest_report_header(config: pytest.Config) -> str:
    return f"limits of time are multiplied by {timeouts.factor():g}, as measured with all workers busy"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Multiply the limit of each item, where it has one."""
    usual = float(config.getini("timeout") or 0)
    for item in items:
        marker = item.get_closest_marker("timeout")
        seconds = float(marker.args[0]) if marker and marker.args else usual
        if seconds:
            item.add_marker(pytest.mark.timeout(timeouts.scaled(seconds)), append=False)


class Record:
    """Plugin: leaves out what has passed by the file, and writes each outcome to it as it becomes known."""

    def __init__(self, path: Path, *, writes: bool) -> None:
        self.path, self.writes = path, writes
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self._passed = {line.split("\t")[2] for line in lines if line.startswith("passed\t") and line.count("\t") == 2}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        done = [item for item in items if item.nodeid in self._passed]
        config.hook.pytest_deselected(items=done)
        items[:] = [item for item in items if item.nodeid not in self._passed]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not self.writes or (report.when != "call" and report.passed):
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{report.outcome}\t{report.duration:.1f}\t{report.nodeid}\n")
