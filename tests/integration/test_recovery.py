"""Runs that meet bad data, failing saves, damaged checkpoints and requests from outside, each to its proper end."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.ledger import parse_ranges
from tests.dist import run_ranks
from tests.integration.runs import EVALUATE_EVERY, STEPS, attempt, settings
from tests.timeouts import scaled
from tools.exactness import differences
from tools.fault_injection import Faults, Once, inject
from train.attempt import Attempt
from train.checkpoint.manifest import CheckpointError, DamagedCheckpoint, published, step_of
from train.checkpoint.reader import CheckpointReader
from train.config.guard import GuardConfig
from train.config.pretrain import PretrainConfig
from train.config.training import BatchConfig, CheckpointConfig
from train.loop import Trainer
from train.metrics.jsonl import read_metrics

pytestmark = pytest.mark.further

BATCH = 8  # sequences of a step; no ramp here, so that samples are steps


def with_faults(run_dir: Path, **faults: Any) -> Callable[[], None]:
    return partial(inject, Faults(**faults), run_dir / "marks")


def steady(corpus: Path, *, guard: GuardConfig | None = None, checkpoint: CheckpointConfig | None = None) -> PretrainConfig:
    config = settings(corpus, batch=BatchConfig(sequences=BATCH, micro_batch=2))
    return replace(config, guard=guard or config.guard, checkpoint=checkpoint or config.checkpoint)


def train_records(run_dir: Path) -> list[dict]:
    return [record for record in read_metrics(run_dir / "metrics.jsonl") if record["kind"] == "train"]


def samples_read(run_dir: Path) -> list[int]:
    ranges = [pair for record in train_records(run_dir) for pair in parse_ranges(str(record["sample_ranges"]))]
    return [sample for start, end in ranges for sample in range(start, end)]


# --- bad data -------------------------------------------------------------------------------------------------------------


def test_a_divergence_goes_back_and_leaves_the_data_out(corpus: Path, tmp_path: Path) -> None:
    """NaN in steps 8 and 9: back to the checkpoint of step 5, past the data of steps 6 to 9, and on to the end."""
    guard = GuardConfig(diverged_after_skips=2, leave_out_steps_before=2)
    change = with_faults(tmp_path, nan_samples=(7 * BATCH, 8 * BATCH))
    config = steady(corpus, guard=guard)
    assert run_ranks(attempt, 2, config, str(tmp_path), 1, change) == [("finished", STEPS)] * 2
    entries = json.loads((tmp_path / "interventions.json").read_text())
    assert [(entry["at_step"], entry["to_step"]) for entry in entries] == [(9, 5)]
    assert entries[0]["left_out"] == [5 * BATCH, 9 * BATCH]
    assert samples_read(tmp_path) == [*range(5 * BATCH), *range(9 * BATCH, (STEPS + 4) * BATCH)]
    records = train_records(tmp_path)
    assert [record["samples"] for record in records] == [BATCH * step for step in range(1, STEPS + 1)], "the schedule goes on"
    assert not any(record["skipped"] for record in records)
    assert CheckpointReader(published(tmp_path / "checkpoints")[-1]).state["interventions"] == entries


def test_a_run_that_diverges_again_and_again_ends(corpus: Path, tmp_path: Path) -> None:
    config = steady(corpus, guard=GuardConfig(diverged_after_skips=2, max_rollbacks=1, leave_out_steps_before=0))
    change = with_faults(tmp_path, nan_samples=tuple(range(7 * BATCH, 40 * BATCH)))
    assert run_ranks(attempt, 1, config, str(tmp_path), 1, change) == [("diverged", 9)]
    newest = published(tmp_path / "checkpoints")[-1]
    assert step_of(newest) == 5, "the last good one stays the newest"


def test_a_divergence_before_the_first_checkpoint_ends_the_run(corpus: Path, tmp_path: Path) -> None:
    config = steady(corpus, guard=GuardConfig(diverged_after_skips=2))
    change = with_faults(tmp_path, nan_samples=(BATCH, 2 * BATCH))
    assert run_ranks(attempt, 1, config, str(tmp_path), 1, change) == [("diverged", 3)]


def test_a_due_checkpoint_waits_for_a_good_step(corpus: Path, tmp_path: Path) -> None:
    """Step 5 is skipped: what was due then is saved after step 6."""
    checkpoint = CheckpointConfig(every_steps=5, keep_last=9)
    change = with_faults(tmp_path, nan_samples=(4 * BATCH,))
    run_ranks(attempt, 1, steady(corpus, checkpoint=checkpoint), str(tmp_path), 1, change)
    assert [step_of(path) for path in published(tmp_path / "checkpoints")] == [6, 10, 15, 16]


def test_a_spike_right_after_a_resume_is_seen_and_reported(corpus: Path, tmp_path: Path) -> None:
    guard = GuardConfig(spike_min_steps=4, report_samples=3)
    config = steady(corpus, guard=guard)
    stopping = replace(config, budget=replace(config.budget, stop_at_step=7))
    assert run_ranks(attempt, 2, stopping, str(tmp_path), 1) == [("stopped", 7)] * 2
    change = with_faults(tmp_path, spike_samples=tuple(range(7 * BATCH, 8 * BATCH)))
    assert run_ranks(attempt, 2, config, str(tmp_path), 2, change) == [("finished", STEPS)] * 2
    report = json.loads((tmp_path / "logs/attempt-02/spike-step-00000008.json").read_text())
    assert report["step"] == 8 and float(report["loss"]) > 1000
    assert set(map(int, report["loss_of_every_sample_after_the_update"])) == set(range(7 * BATCH, 8 * BATCH))
    assert len(report["samples"]) == 3
    for sample in report["samples"]:
        assert sample["documents"] and sample["text"] and 7 * BATCH <= sample["sample"] < 8 * BATCH
    losses = [float(sample["loss_after_the_update"]) for sample in report["samples"]]
    assert losses == sorted(losses, reverse=True)
    assert report["norms"]["weight/blocks.0.mlp.down.weight"] > 0 and "exp_avg/embedding.tokens.weight" in report["norms"]


def test_a_kill_right_after_a_rollback_does_not_forget_it(corpus: Path, tmp_path: Path) -> None:
    guard = GuardConfig(diverged_after_skips=2)
    data = {"nan_samples": (7 * BATCH, 8 * BATCH)}
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    assert run_ranks(attempt, 1, steady(corpus, guard=guard), str(calm), 1, with_faults(calm, **data)) == [("finished", STEPS)]
    with pytest.raises(AssertionError, match="exit codes"):
        run_ranks(attempt, 1, steady(corpus, guard=guard), str(killed), 1, partial(die_after_a_rollback, killed, data))
    assert len(json.loads((killed / "interventions.json").read_text())) == 1
    assert run_ranks(attempt, 1, steady(corpus, guard=guard), str(killed), 2, with_faults(killed, **data)) == [
        ("finished", STEPS)
    ]
    assert differences(calm, killed) == []


def die_after_a_rollback(run_dir: Path, data: dict) -> None:
    with_faults(run_dir, **data)()
    original = Trainer._roll_back

    def roll_back(self: Trainer, *arguments: Any) -> None:
        original(self, *arguments)
        signal.raise_signal(signal.SIGKILL)

    Trainer._roll_back = roll_back


# --- saves that fail ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full_disk", "dying_writer", "file_system_error"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_save_that_fails_is_tried_again(corpus: Path, tmp_path: Path, kind: str, rank: int) -> None:
    if kind == "file_system_error" and rank:
        pytest.skip("the folder is made by the first rank")
    checkpoint = CheckpointConfig(every_steps=5, keep_last=9)
    slowly = Once(kind="slow_rank", step=0, rank=0)  # or the failure would be known some steps later
    change = with_faults(tmp_path, once=(slowly, Once(kind=kind, step=3, rank=rank)))
    assert run_ranks(attempt, 2, steady(corpus, checkpoint=checkpoint), str(tmp_path), 1, change) == [("finished", STEPS)] * 2
    steps = [step_of(path) for path in published(tmp_path / "checkpoints")]
    assert 5 not in steps and {10, 15, 16} <= set(steps), "the one of step 5 was not written, the others were"
    assert any(5 < step < 10 for step in steps), "and it was made up for before the next was due"
    for path in published(tmp_path / "checkpoints"):
        CheckpointReader(path).verify()


def test_synchronous_saves_are_the_same(corpus: Path, tmp_path: Path) -> None:
    for name, asynchronous in (("beside", True), ("waiting", False)):
        checkpoint = CheckpointConfig(every_steps=5, asynchronous=asynchronous)
        assert (
            run_ranks(attempt, 2, steady(corpus, checkpoint=checkpoint), str(tmp_path / name), 1) == [("finished", STEPS)] * 2
        )
    left, right = (published(tmp_path / name / "checkpoints")[-1] for name in ("beside", "waiting"))
    for rank in range(2):
        file = f"rank-{rank:05d}.safetensors"
        assert (left / file).read_bytes() == (right / file).read_bytes()


def test_what_is_kept(corpus: Path, tmp_path: Path) -> None:
    """The last two, every tenth step for ever, and the best by held-out loss."""
    checkpoint = CheckpointConfig(every_steps=2, keep_last=2, keep_every_steps=6, keep_best=1)
    run_ranks(attempt, 1, steady(corpus, checkpoint=checkpoint), str(tmp_path), 1)
    kept = published(tmp_path / "checkpoints")
    scores = {
        record["step"]: record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl") if record["kind"] == "evaluation"
    }
    best = min(scores, key=scores.get)
    assert sorted({6, 12, 14, 16, best}) == [step_of(path) for path in kept]
    assert CheckpointReader(kept[-1]).manifest.health["validation_loss"] == scores[STEPS]
    assert STEPS % EVALUATE_EVERY == 0


# --- damaged checkpoints --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_checkpoints(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks with checkpoints of steps 5 and 7."""
    run_dir = tmp_path_factory.mktemp("two") / "run"
    config = steady(corpus)
    stopping = replace(config, budget=replace(config.budget, stop_at_step=7))
    assert run_ranks(attempt, 2, stopping, str(run_dir), 1) == [("stopped", 7)] * 2
    return run_dir


def damage(draw: random.Random, folder: Path) -> tuple[Path, bytes]:
    """Flip a bit of a byte of a file, or cut it there; the file and its old content."""
    path = draw.choice([path for path in sorted(folder.rglob("*")) if path.is_file()])
    content = path.read_bytes()
    place = draw.randrange(len(content))
    changed = content[:place] if draw.random() < 0.3 else _flipped(content, place, draw.randrange(8))
    path.write_bytes(changed)
    return path, content


def _flipped(content: bytes, place: int, bit: int) -> bytes:
    return content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :]


def is_found(folder: Path) -> bool:
    try:
        CheckpointReader(folder).verify()
    except CheckpointError:
        return True
    return False


def test_every_damaged_byte_is_found(two_checkpoints: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(published(two_checkpoints / "checkpoints")[-1], tmp_path / "step-00000007"))
    assert not is_found(folder)
    draw, missed = random.Random(0), []
    for _ in range(500):
        path, content = damage(draw, folder)
        if not is_found(folder):
            missed.append(path)
        path.write_bytes(content)
    assert missed == []
    assert not is_found(folder)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_one_before_a_damaged_one_is_taken(corpus: Path, two_checkpoints: Path, tmp_path: Path, seed: int) -> None:
    run_dir = Path(shutil.copytree(two_checkpoints, tmp_path / "run"))
    older, newest = published(run_dir / "checkpoints")
    before = {path: path.read_bytes() for path in older.rglob("*") if path.is_file()}
    damage(random.Random(seed), newest)
    config = steady(corpus)
    stopping = replace(config, budget=replace(config.budget, stop_at_step=6))
    assert run_ranks(attempt, 2, stopping, str(run_dir), 2) == [("stopped", 6)] * 2
    assert train_records(run_dir)[-1]["attempt"] == 1 and not (newest / "manifest.json").exists()
    reason = next((run_dir / "checkpoints/quarantined").glob("*.reason.txt")).read_text()
    assert "step-00000007" in reason
    assert {path: path.read_bytes() for path in before} == before, "nothing else was touched"


def test_weights_that_compute_something_else_are_set_aside(corpus: Path, two_checkpoints: Path, tmp_path: Path) -> None:
    """Its hashes are right, as if the values had been copied while they changed; the logits of the fixed batch tell."""
    run_dir = Path(shutil.copytree(two_checkpoints, tmp_path / "run"))
    config = steady(corpus)
    stopping = replace(config, budget=replace(config.budget, stop_at_step=6))
    with pytest.raises(AssertionError, match="no checkpoint can be used, all are left as they are"):
        run_ranks(attempt, 2, stopping, str(run_dir), 2, load_noise_always)
    assert len(published(run_dir / "checkpoints")) == 2, "where all fail the program is to blame, not the files"
    assert run_ranks(attempt, 2, stopping, str(run_dir), 3, load_noise_from_the_newest) == [("stopped", 6)] * 2
    assert "the logits of the fixed batch are off" in next((run_dir / "checkpoints/quarantined").glob("*.txt")).read_text()


def load_noise_from_the_newest(only: str = "step-00000007") -> None:
    from train.checkpoint.reader import CheckpointReader

    original = CheckpointReader.read_range

    def noisy(self: CheckpointReader, logical: Any, kind: str, *place: int) -> Any:
        values = original(self, logical, kind, *place)
        return values + 0.1 if only in str(self.path) and kind == "weight" else values

    CheckpointReader.read_range = noisy


def load_noise_always() -> None:
    load_noise_from_the_newest("step-")


def test_a_checkpoint_of_nothing_but_a_manifest_is_damaged(two_checkpoints: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(published(two_checkpoints / "checkpoints")[-1], tmp_path / "step-00000009"))
    with pytest.raises(DamagedCheckpoint, match="is of step 7"):
        CheckpointReader(folder)


# --- requests -------------------------------------------------------------------------------------------------------------


def ask_at(step: int, action: Callable[[Path], None], run_dir: Path, *, in_evaluation: bool = False) -> None:
    """Have `action` done by the first rank in the middle of `step`, or of the evaluation after it."""
    original = Trainer._evaluate if in_evaluation else Trainer._advance

    def then(self: Trainer, *arguments: Any) -> Any:
        if self.state.step == step and self.context.is_first:
            action(run_dir)
            self.requests._next_look = 0.0
        return original(self, *arguments)

    setattr(Trainer, original.__name__, then)


def touch_stop(run_dir: Path) -> None:
    (run_dir / "STOP").touch()


def touch_save(run_dir: Path) -> None:
    (run_dir / "SAVE").touch()


def send_usr1(_: Path) -> None:
    signal.raise_signal(signal.SIGUSR1)


@pytest.mark.parametrize(("action", "reason"), [(touch_stop, "the file STOP"), (send_usr1, "received SIGUSR1")])
def test_a_request_stops_all_ranks_at_the_same_step(corpus: Path, tmp_path: Path, action: Callable, reason: str) -> None:
    endings = run_ranks(attempt, 2, steady(corpus), str(tmp_path), 1, partial(ask_at, 6, action, tmp_path))
    assert endings == [("stopped", 8)] * 2 or endings == [("stopped", 7)] * 2
    assert step_of(published(tmp_path / "checkpoints")[-1]) == endings[0][1]
    assert not (tmp_path / "STOP").exists(), "or the next attempt would stop at once"
    assert run_ranks(attempt, 2, steady(corpus), str(tmp_path), 2) == [("finished", STEPS)] * 2


def begin_another(run_dir: Path) -> None:
    (run_dir / "logs" / "attempt-02").mkdir(parents=True)


def test_an_attempt_that_was_left_behind_writes_no_more(corpus: Path, tmp_path: Path) -> None:
    """Its node was given up by the scheduler, and works on beside the attempt that has taken over."""
    config = steady(corpus)
    config = replace(config, checkpoint=replace(config.checkpoint, asynchronous=False))  # what was begun before may stay undone
    with pytest.raises(AssertionError, match="attempt-02 of this run has begun"):
        run_ranks(attempt, 1, config, str(tmp_path), 1, partial(ask_at, 6, begin_another, tmp_path))
    assert train_records(tmp_path)[-1]["step"] in (6, 7)
    assert step_of(published(tmp_path / "checkpoints")[-1]) == 5


def test_a_save_is_asked_for(corpus: Path, tmp_path: Path) -> None:
    checkpoint = CheckpointConfig(every_steps=None, keep_last=9)
    change = partial(ask_at, 6, touch_save, tmp_path)
    assert run_ranks(attempt, 2, steady(corpus, checkpoint=checkpoint), str(tmp_path), 1, change) == [("finished", STEPS)] * 2
    asked, last = [step_of(path) for path in published(tmp_path / "checkpoints")]
    assert asked in (7, 8) and last == STEPS
    assert not (tmp_path / "SAVE").exists()


def test_a_stop_within_an_evaluation_is_made_up_for(corpus: Path, tmp_path: Path) -> None:
    calm, stopped = tmp_path / "calm", tmp_path / "stopped"
    assert run_ranks(attempt, 2, steady(corpus), str(calm), 1) == [("finished", STEPS)] * 2
    change = partial(ask_at, 8, send_usr1, stopped, in_evaluation=True)
    assert run_ranks(attempt, 2, steady(corpus), str(stopped), 1, change) == [("stopped", 8)] * 2
    assert 8 not in {record["step"] for record in read_metrics(stopped / "metrics.jsonl") if record["kind"] == "evaluation"}
    assert run_ranks(attempt, 2, steady(corpus), str(stopped), 2) == [("finished", STEPS)] * 2
    assert differences(calm, stopped) == []


def test_a_time_limit_leaves_time_for_the_save(corpus: Path, tmp_path: Path) -> None:
    """The limit is 9 s away, the 16 steps take a second each, and time is held back for a save that was never measured."""
    seconds = (scaled(9.0), scaled(1.0))
    assert run_ranks(limited, 1, steady(corpus), str(tmp_path), *seconds) == ["stopped: the time limit is near"]
    assert step_of(published(tmp_path / "checkpoints")[-1]) < STEPS


def limited(context: Any, config: PretrainConfig, run_dir: str, limit_seconds: float, step_seconds: float) -> str:
    from train.stages.training import train

    original = Trainer._advance

    def slowly(self: Trainer, *arguments: Any) -> None:
        time.sleep(step_seconds)
        original(self, *arguments)

    Trainer._advance = slowly
    Path(run_dir).mkdir(exist_ok=True)
    one = Attempt(run_dir=Path(run_dir), number=1, ends_at=time.time() + limit_seconds)
    ending, _ = train(config, context, one, run={"run_id": "small", "wandb_id": "small"})
    return f"{ending.state}: {ending.reason}"
