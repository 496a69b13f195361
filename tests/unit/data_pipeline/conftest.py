"""Prepared corpora that several tests read; none of them may write to these."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.manifest import Manifest
from tests.unit.data_pipeline.corpora import prepared, some_texts


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """300 documents in several shards, vocabulary 300."""
    return prepared(tmp_path_factory.mktemp("tiny"), some_texts(300))


@pytest.fixture(scope="session")
def tiny_second(tmp_path_factory: pytest.TempPathFactory, tiny: Manifest) -> Manifest:
    """100 other documents with the tokenizer of `tiny`."""
    from data_pipeline.config import TokenizerConfig

    tokenizer = TokenizerConfig(path=str(tiny.tokenizer_path), engine="hf")
    return prepared(tmp_path_factory.mktemp("second"), some_texts(100, seed=1), tokenizer=tokenizer)


@pytest.fixture
def own_copy(tiny: Manifest, tmp_path: Path) -> Path:
    """A copy of `tiny` to damage."""
    import shutil

    return Path(shutil.copytree(tiny.folder, tmp_path / "copy"))
