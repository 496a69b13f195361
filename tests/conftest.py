"""What all tests share: one torch thread, and a small prepared corpus that none of them may write to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.session import (  # noqa: F401  (hooks of pytest)
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_configure,
)

# Small products gain nothing from a second thread, and on busy cores the two wait for each other for most of the time.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a prepared corpus: 400 documents in several shards, about 30,000 tokens, vocabulary 300."""
    from tests.unit.data_pipeline.corpora import prepared, some_texts

    return prepared(tmp_path_factory.mktemp("corpus"), some_texts(400)).folder
