"""`longhaul pretrain` from its first start to its end, as a person runs it: stopped, refused, stopped by a signal, moved to
another layout, finished, called once more. One story, since every start costs seconds; each test reads one part of it.
"""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.integration.runs import WORDS
from tests.timeouts import scaled
from tools.watched_run import WatchedRun
from train.checkpoint.reader import CheckpointReader
from train.metrics.jsonl import read_metrics
from train.outcome import Outcome, last_attempt, read_outcome

STOP, SIGNAL, END, NEVER = 6, 9, 20, 2000
"""Steps: of the ordered stop, of the signal, of the end, and a budget that nobody waits for."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of the command, after its end."""

    code: int
    text: str
    attempts: int
    """Attempts of the run so far."""


@dataclass(frozen=True, kw_only=True)
class Story:
    """All calls of one run."""

    run_dir: Path
    stopped: Call
    refused: Call
    signalled: Call
    finished: Call
    repeated: Call
    orphans: list[str]

    def outcome(self, attempt: int) -> Outcome:
        outcome = read_outcome(self.run_dir, attempt)
        assert outcome is not None
        return outcome

    @property
    def record(self) -> dict:
        """run.json."""
        return json.loads((self.run_dir / "run.json").read_text())


@pytest.fixture(scope="module")
def story(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("runs")
    run_dir, orphans = folder / "story", []
    common = (
        *WORDS, "monitor=default", "monitor.wandb.mode=offline", f"data.sources=[{{path: {corpus}}}]",
        f"run.folder={folder}", "run.name=story",
    )  # fmt: skip

    def call(*words: str, signal_at: int | None = None) -> Call:
        run = WatchedRun([sys.executable, "-P", "-m", "tools.cli", "pretrain", *common, *words], run_dir, scaled(120.0))
        run.log.unlink(missing_ok=True)
        attempt = last_attempt(run_dir) + 1
        try:
            run.start()
            if signal_at is not None:
                run.wait(lambda: run.last_step(attempt) >= signal_at, f"step {signal_at} was reached")
                run.supervisor.send_signal(signal.SIGTERM)
            code = run.wait_ended()
        finally:
            run.close()
            orphans.extend(run.orphans)
        return Call(code=code, text=run.log.read_text(), attempts=last_attempt(run_dir))

    two_ranks, long = ("launch.processes=2", "parallel=zero1"), f"budget.steps={NEVER}"
    one_rank = ("launch.processes=1", "parallel=zero3", f"budget.steps={END}", "optim.lr=0.001")
    return Story(
        run_dir=run_dir,
        stopped=call(*two_ranks, long, f"budget.stop_at_step={STOP}"),
        refused=call(*two_ranks, long, "model.num_layers=3", "run.seed=5"),
        signalled=call(*two_ranks, long, signal_at=SIGNAL),
        finished=call(*one_rank),
        repeated=call(*one_rank),
        orphans=orphans,
    )


def test_it_stops_where_it_was_told_to(story: Story) -> None:
    assert story.stopped.code == 85, story.stopped.text
    outcome = story.outcome(1)
    assert (outcome.state, outcome.step, outcome.reason) == ("stopped", STOP, f"budget.stop_at_step={STOP}")
    assert dict(outcome.rank_codes) == {"0": 85, "1": 85}
    assert outcome.on_purpose, "no launcher goes on behind the step that a person named"
    assert "run the same command again" in outcome.next


def test_it_refuses_what_cannot_change(story: Story) -> None:
    assert story.refused.code == 93
    for field, value, before in (("model.num_layers", "3", "2"), ("run.seed", "5", "1234")):
        line = next(line for line in story.refused.text.splitlines() if f"{field}={value}" in line)
        assert f"was trained with {before}" in line and "another run.name" in line
    assert story.refused.attempts == 1, "no rank was started"
    assert "Traceback" not in story.refused.text


def test_a_signal_makes_it_save_and_stop(story: Story) -> None:
    assert story.signalled.code == 85, story.signalled.text
    outcome = story.outcome(2)
    assert (outcome.state, outcome.reason, outcome.on_purpose) == ("stopped", "received SIGTERM", False)
    assert outcome.step is not None and SIGNAL <= outcome.step < NEVER
    first = min(record["step"] for record in _lines(story.run_dir) if record["attempt"] == 3)
    assert first == outcome.step + 1, "the next attempt went on from the very step"


def test_it_goes_on_in_another_layout(story: Story) -> None:
    assert story.finished.code == 0, story.finished.text
    outcome = story.outcome(3)
    assert (outcome.state, outcome.step, dict(outcome.rank_codes)) == ("finished", END, {"0": 0})
    newest = CheckpointReader(story.run_dir / "checkpoints" / f"step-{END:08d}")
    newest.verify()
    assert newest.manifest.layout == {"world_size": 1, "tensor": 1, "zero": 3}


def test_changes_are_recorded_with_their_step(story: Story) -> None:
    step = story.outcome(2).step
    newest = CheckpointReader(story.run_dir / "checkpoints" / f"step-{END:08d}")
    assert newest.state["adjustments"] == [
        {"step": step, "field": "budget.steps", "before": NEVER, "after": END},
        {"step": step, "field": "optim.lr", "before": 0.003, "after": 0.001},
    ]
    assert "optim.lr: 0.003 -> 0.001" in story.finished.text
    assert all(record["lr"] <= 0.001 for record in _lines(story.run_dir) if record["kind"] == "train" and record["step"] > step)


def test_a_finished_run_is_left_alone(story: Story) -> None:
    assert story.repeated.code == 0
    assert "is finished" in story.repeated.text
    assert story.repeated.attempts == story.record["attempts"] == 3
    assert json.loads((story.run_dir / "FINISHED").read_text()) == {"step": END}


def test_the_metrics_are_complete(story: Story) -> None:
    train = [record for record in read_metrics(story.run_dir / "metrics.jsonl") if record["kind"] == "train"]
    assert [record["step"] for record in train] == list(range(1, END + 1))
    assert sum(record["kind"] == "train" for record in _lines(story.run_dir)) == END, "no step was done twice"
    tokens = [record["tokens"] for record in train]
    assert tokens == sorted(tokens) and len(set(tokens)) == END
    assert {record["attempt"] for record in train} == {1, 2, 3}


def test_weights_and_biases_sees_one_run(story: Story) -> None:
    folders = sorted((story.run_dir / "wandb").glob("offline-run-*"))
    assert len(folders) == 3
    assert {folder.name.rsplit("-", 1)[-1] for folder in folders} == {story.record["wandb_id"]}
    assert all(any(folder.glob("*.wandb")) for folder in folders)


def test_tensorboard_has_every_step(story: Story) -> None:
    events = EventAccumulator(str(story.run_dir / "tensorboard" / "by_step")).Reload()
    assert sorted({event.step for event in events.Scalars("train/loss")}) == list(range(1, END + 1))


def test_no_process_is_left(story: Story) -> None:
    assert story.orphans == []


def _lines(run_dir: Path) -> list[dict]:
    """Every line of metrics.jsonl, those that were replaced too."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
