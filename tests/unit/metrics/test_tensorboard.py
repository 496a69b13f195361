"""TensorBoard event files, read back with TensorBoard's own reader."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from conf.errors import UserError
from train.metrics.tensorboard import TensorBoardWriter


def record(step: int, loss: float, kind: str = "train") -> dict[str, float | int | str]:
    return {"kind": kind, "attempt": 1, "step": step, "tokens": step * 1000, "loss": loss, "time": 1e9 + step}


def scalars(folder: Path, tag: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def test_values_by_step_and_losses_by_tokens(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path, say=pytest.fail)
    for step in (1, 2, 3, 4):
        writer.write({**record(step, loss=float(step)), "lr": 0.5})
    writer.write({**record(4, loss=8.0, kind="evaluation"), "name": "code"})
    writer.write({**record(4, loss=9.0, kind="evaluation"), "probe/copying": 0.25, "perplexity": 3.0})
    writer.close("stopped")
    by_step, by_tokens = tmp_path / "tensorboard" / "by_step", tmp_path / "tensorboard" / "by_tokens"
    assert scalars(by_step, "train/loss") == {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}
    assert scalars(by_step, "train/lr") == dict.fromkeys((1, 2, 3, 4), 0.5)
    assert scalars(by_step, "val/code/loss") == {4: 8.0}
    assert scalars(by_tokens, "train/loss") == {1000: 1.0, 2000: 2.0, 3000: 3.0, 4000: 4.0}
    assert scalars(by_tokens, "val/code/loss") == {4000: 8.0} and scalars(by_tokens, "val/loss") == {4000: 9.0}
    assert scalars(by_step, "val/probe/copying") == {4: 0.25} and scalars(by_tokens, "val/probe/copying") == {4000: 0.25}


def test_a_resumed_run_replaces_what_it_went_back_over(tmp_path: Path) -> None:
    for steps, loss in (((1, 2, 3, 4), 1.0), ((3,), 2.0)):
        writer = TensorBoardWriter(tmp_path, say=pytest.fail)
        for step in steps:
            writer.write(record(step, loss=loss))
        writer.close("stopped")
    assert scalars(tmp_path / "tensorboard" / "by_step", "train/loss") == {1: 1.0, 2: 1.0, 3: 2.0}
    assert scalars(tmp_path / "tensorboard" / "by_tokens", "train/loss") == {1000: 1.0, 2000: 1.0, 3000: 2.0}


def test_a_folder_that_cannot_be_written_turns_it_off_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file where a folder should be")
    said: list[str] = []
    writer = TensorBoardWriter(tmp_path, say=said.append)
    for step in (1, 2):
        writer.write(record(step, loss=1.0))
    writer.close("finished")
    assert len(said) == 1 and "TensorBoard: off from step 1 on" in said[0]


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="monitor.tensorboard=true: .* not installed"):
        TensorBoardWriter(tmp_path, say=pytest.fail)
