"""What a run's metrics say about how far it is."""

from __future__ import annotations

from pathlib import Path

from slurm.watch import read_progress
from train.metrics.record import encode


def test_the_held_out_loss_is_that_of_all_sources(tmp_path: Path) -> None:
    train = {"kind": "train", "attempt": 1, "step": 4, "tokens": 64, "loss": 5.0, "time": 1e9}
    held_out = {**train, "kind": "evaluation", "loss": 4.0}
    records = [train, held_out, {**held_out, "name": "code", "loss": 2.0}, {**held_out, "name": "prose", "loss": 6.0}]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(map(encode, records)))
    progress = read_progress(tmp_path)
    assert progress is not None and progress.validation_loss == 4.0
