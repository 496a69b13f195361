"""What a start reads of a corpus: one rank and the launcher its manifest, and shards are hashed by the first start alone."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from conf.errors import UserError
from data_pipeline.manifest import Manifest, read_manifest
from tests.dist import run_ranks
from tests.integration.runs import settings
from tests.unit.data_pipeline.corpora import prepared, some_texts
from train.attempt import Attempt
from train.config.training import LaunchConfig, RunConfig
from train.launch import get_ready
from train.metrics import NullMetrics
from train.parallel import ParallelContext
from train.stages import pretrain


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return prepared(tmp_path_factory.mktemp("corpus"), some_texts(150))


def opened_by(work: Callable[[], object], folder: Path) -> dict[str, int]:
    """How often each file below a folder is opened; the hook stays, so the process should end soon."""
    opened: Counter[str] = Counter()

    def count(event: str, given: tuple) -> None:
        if event == "open" and str(given[0]).startswith(f"{folder}/"):
            opened[str(Path(str(given[0])).relative_to(folder))] += 1

    sys.addaudithook(count)
    work()
    return dict(opened)


def start(context: ParallelContext, corpus: str, runs: str) -> tuple[dict[str, int], dict[str, int]]:
    """Files of the corpus that the launcher opens, on the first rank, and that a rank does for its loaders."""
    config = settings(Path(corpus))
    config = replace(
        config, run=RunConfig(name="small", folder=runs), launch=LaunchConfig(device="cpu", processes=context.world_size)
    )
    by_launcher = opened_by(partial(get_ready, config), Path(corpus)) if context.is_first else {}

    def load() -> None:
        run = Attempt(run_dir=Path(runs) / "small", number=1)
        material = pretrain.material(config, context, run, NullMetrics())
        assert material.loader.micro_batch([0]).target_tokens
        material.examiner(None)  # type: ignore[arg-type]  (makes the validation loader; asks nothing of the engine yet)

    return by_launcher, opened_by(load, Path(corpus))


def test_manifests_are_read_once_and_shards_hashed_once(corpus: Manifest, tmp_path: Path) -> None:
    listed = {file.name for file in corpus.files}
    for is_second in (False, True):
        (by_launcher, by_first), (_, by_other) = run_ranks(start, 2, str(corpus.folder), str(tmp_path))
        assert by_launcher.pop("manifest.json") == 1
        assert by_first.pop("manifest.json") == 1, "for all ranks"
        assert "manifest.json" not in by_other
        hashed = set(by_launcher) & listed
        assert hashed == (set() if is_second else listed)
        assert by_launcher["verified.json"] == 1
        assert by_first == by_other, "what it trains on"


def refused(context: ParallelContext, corpus: str) -> str:
    with pytest.raises(UserError) as caught:
        context.read_once(partial(read_manifest, corpus))
    return str(caught.value)


def test_what_the_first_rank_meets_is_raised_on_all(tmp_path: Path) -> None:
    first, other = run_ranks(refused, 2, str(tmp_path / "nothing"))
    assert first == other and "nothing: no such prepared corpus" in first
