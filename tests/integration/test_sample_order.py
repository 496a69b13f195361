"""The samples that a run reads first depend on the seed alone: not on its length, its ranks, or a batch ramp."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from tests.dist import run_ranks
from tests.integration.runs import settings
from train.attempt import Attempt
from train.config.pretrain import PretrainConfig
from train.config.training import BatchConfig, RunConfig
from train.metrics import NullMetrics
from train.parallel import ParallelContext
from train.plan import make_plan
from train.stages.training import build

pytestmark = pytest.mark.further

STEPS = 6
PLAIN = BatchConfig(sequences=6, micro_batch=1)


def read(context: ParallelContext, config: PretrainConfig, run_dir: str) -> list[list[tuple[int, str]]]:
    """(sample id, hash of its tokens) of every sample that this rank trained on, step by step, in a real run."""
    one = Attempt(run_dir=Path(run_dir), number=1)
    trainer = build(config, context, one, NullMetrics(), plan=make_plan(config, context.world_size))
    seen: list[list[tuple[int, str]]] = []
    train_step = trainer.engine.train_step

    def recording(batches, **options):
        rows = [
            (i, row)
            for batch in batches
            for i, row in zip(batch.sample_ids, batch.tokens.view(len(batch.sample_ids), -1), strict=True)
        ]
        seen.append([(i, hashlib.sha256(row.numpy().tobytes()).hexdigest()) for i, row in rows])
        return train_step(batches, **options)

    trainer.engine.train_step = recording
    trainer.run()
    return seen


def order(corpus: Path, run_dir: Path, ranks: int, *, steps: int = STEPS, batch: BatchConfig = PLAIN, seed: int = 11) -> list:
    """The samples of a whole run, in order: those of a step come from all its ranks."""
    config = replace(settings(corpus, steps=steps, batch=batch), run=RunConfig(name="order", seed=seed))
    by_rank = run_ranks(read, ranks, config, str(run_dir))
    return [sample for step in zip(*by_rank, strict=True) for sample in sorted(sum(step, []))]


@pytest.fixture(scope="module")
def reference(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list:
    found = order(corpus, tmp_path_factory.mktemp("reference"), 1)
    assert [sample for sample, _ in found] == list(range(STEPS * PLAIN.sequences))
    assert len({content for _, content in found}) > 0.9 * len(found), "different samples are different text"
    return found


def test_four_times_the_budget(corpus: Path, tmp_path: Path, reference: list) -> None:
    assert order(corpus, tmp_path, 1, steps=4 * STEPS)[: len(reference)] == reference


def test_three_ranks(corpus: Path, tmp_path: Path, reference: list) -> None:
    assert order(corpus, tmp_path, 3) == reference


def test_a_batch_ramp(corpus: Path, tmp_path: Path, reference: list) -> None:
    ramp = BatchConfig(sequences=6, micro_batch=1, ramp_start=2, ramp_increment=2, ramp_samples=12)
    found = order(corpus, tmp_path, 1, steps=2 * STEPS, batch=ramp)
    assert found[: len(reference)] == reference


def test_another_seed_reads_otherwise(corpus: Path, tmp_path: Path, reference: list) -> None:
    assert [content for _, content in order(corpus, tmp_path, 1, seed=12)] != [content for _, content in reference]
