"""`best` in a run's folder: it leads to the best checkpoint that is there, whatever becomes of the others."""

from __future__ import annotations

import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tests.dist import run_ranks
from tests.integration.runs import EVALUATE_EVERY, STEPS, attempt
from tests.integration.test_recovery import BATCH, ask_at, die_after_a_rollback, send_usr1, steady, with_faults
from tools.fault_injection import Once
from train.checkpoint.manifest import published, resolve_checkpoint, step_of
from train.checkpoint.reader import CheckpointReader
from train.config.guard import GuardConfig
from train.config.training import CheckpointConfig
from train.loop import Trainer
from train.saver import Saver

pytestmark = pytest.mark.further


def test_a_rollback_takes_it_back_at_once(corpus: Path, tmp_path: Path) -> None:
    """Steps 8 and 9 are NaN, and step 8 was saved all the same as the best so far: it is set aside, `best` leads to step 4."""
    checkpoint = CheckpointConfig(every_steps=None, keep_last=2, keep_best=2)
    config = steady(corpus, guard=GuardConfig(diverged_after_skips=2), checkpoint=checkpoint)
    data = {"nan_samples": (7 * BATCH, 8 * BATCH)}
    with pytest.raises(AssertionError, match="exit codes"):
        run_ranks(attempt, 1, config, str(tmp_path), 1, partial(save_whatever_comes, tmp_path, data))
    assert [step_of(path) for path in published(tmp_path / "checkpoints")] == [4]
    assert (tmp_path / "checkpoints/quarantined/step-00000008.1").is_dir()
    assert step_of(resolve_checkpoint(str(tmp_path / "best"))) == 4


def save_whatever_comes(run_dir: Path, data: dict) -> None:
    die_after_a_rollback(run_dir, data)
    original = Saver.save_if
    Saver.save_if = lambda self, *arguments, **more: original(self, *arguments, **more | {"is_well": True})


def test_a_damaged_best_gives_its_place_to_the_one_before(corpus: Path, tmp_path: Path) -> None:
    checkpoint = CheckpointConfig(every_steps=4, keep_last=9, keep_best=2)
    config = steady(corpus, checkpoint=checkpoint)
    stopping = replace(config, budget=replace(config.budget, stop_at_step=8))
    assert run_ranks(attempt, 1, stopping, str(tmp_path), 1) == [("stopped", 8)]
    older, newest = published(tmp_path / "checkpoints")
    assert resolve_checkpoint(str(tmp_path / "best")) == newest
    (newest / "state.json").write_text("{}")
    with pytest.raises(AssertionError, match="exit codes"):
        run_ranks(attempt, 1, config, str(tmp_path), 2, die_before_a_step)
    assert resolve_checkpoint(str(tmp_path / "best")) == older
    no_more = replace(config, checkpoint=replace(checkpoint, keep_best=0))
    assert run_ranks(attempt, 1, no_more, str(tmp_path), 3) == [("finished", STEPS)]
    assert not (tmp_path / "best").is_symlink(), "none is kept for being the best"


def test_a_best_that_cannot_be_written_leaves_the_one_before(corpus: Path, tmp_path: Path) -> None:
    """Step 8 is the best and cannot be written; step 9, which is saved in its place, was not measured."""
    checkpoint = CheckpointConfig(every_steps=None, keep_last=1, keep_best=1, asynchronous=False)
    config = steady(corpus, checkpoint=checkpoint)
    stopping = replace(config, budget=replace(config.budget, stop_at_step=10))
    change = with_faults(tmp_path, once=(Once(kind="file_system_error", step=7, rank=0),))
    assert run_ranks(attempt, 2, stopping, str(tmp_path), 1, change) == [("stopped", 10)] * 2
    assert [step_of(path) for path in published(tmp_path / "checkpoints")] == [4, 10]
    assert step_of(resolve_checkpoint(str(tmp_path / "best"))) == 4
    assert CheckpointReader(tmp_path / "checkpoints/step-00000010").state["best"]["steps"] == [8, 4]
    assert run_ranks(attempt, 2, config, str(tmp_path), 2) == [("finished", STEPS)] * 2
    assert step_of(resolve_checkpoint(str(tmp_path / "best"))) == STEPS


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_evaluation_that_is_made_up_for_counts(corpus: Path, tmp_path: Path, ranks: int) -> None:
    """A stop comes within the last evaluation: the next attempt evaluates, and ends without a step or a save."""
    config = steady(corpus, checkpoint=CheckpointConfig(every_steps=None, keep_last=1, keep_best=1))
    change = partial(ask_at, STEPS, send_usr1, tmp_path, in_evaluation=True)
    assert run_ranks(attempt, ranks, config, str(tmp_path), 1, change) == [("stopped", STEPS)] * ranks
    assert step_of(resolve_checkpoint(str(tmp_path / "best"))) == STEPS - EVALUATE_EVERY
    assert run_ranks(attempt, ranks, config, str(tmp_path), 2) == [("finished", STEPS)] * ranks
    assert step_of(resolve_checkpoint(str(tmp_path / "best"))) == STEPS
    assert [step_of(path) for path in published(tmp_path / "checkpoints")] == [STEPS]
    CheckpointReader(tmp_path / "best").verify()


def die_before_a_step() -> None:
    Trainer._advance = lambda *_: signal.raise_signal(signal.SIGKILL)
