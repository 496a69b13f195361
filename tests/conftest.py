"""What all tests share: the tiers' limits and cost, and a small prepared corpus that none of them may write to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests import timeouts
from tests.cost import Meter

# Small products gain nothing from a second thread, and on busy cores the two wait for each other for most of the time.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    if timeouts.VARIABLE not in os.environ:  # workers inherit it
        workers = len(config.option.tx) if getattr(config.option, "tx", None) else 1
        os.environ[timeouts.VARIABLE] = str(timeouts.measure(workers))
    config.pluginmanager.register(Meter(config.rootpath), "longhaul-cost")


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


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a prepared corpus: 400 documents in several shards, about 30,000 tokens, vocabulary 300."""
    from tests.unit.data_pipeline.corpora import prepared, some_texts

    return prepared(tmp_path_factory.mktemp("corpus"), some_texts(400)).folder
