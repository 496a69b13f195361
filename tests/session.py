"""One run of the tests as a whole: limits of time for this machine, what it costs, and a record to resume from."""

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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Multiply the limit of each item, where it has one; a limit that is given by hand is what it says."""
    if config.getoption("timeout") is not None:
        return
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
        parts = [line.split("\t") for line in lines if line.count("\t") == 2]
        outcomes = {name: outcome for outcome, _, name in parts}  # the last one counts: a test may fail when it is torn down
        self._passed = {name for name, outcome in outcomes.items() if outcome == "passed"}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        done = [item for item in items if item.nodeid in self._passed]
        config.hook.pytest_deselected(items=done)
        items[:] = [item for item in items if item.nodeid not in self._passed]

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self._passed:
            session.exitstatus = pytest.ExitCode.OK  # all of them have passed before

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not self.writes or (report.when != "call" and report.passed):
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{report.outcome}\t{report.duration:.1f}\t{report.nodeid}\n")
