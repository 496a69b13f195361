"""Ways to break the program, each applied inside a rank: mistakes of a resume, and deaths inside a save.

They prove the proof: what compares two runs has to notice every mistake, and a death must do no harm.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from train.checkpoint import publication, saving
from train.checkpoint.manifest import folder_of
from train.checkpoint.store import CheckpointStore
from train.checkpoint.writer import WriterProcess
from train.engine import Engine
from train.loop import Trainer
from train.state import TrainState

KILLED_SAVE = 10
"""Step whose save is not survived."""


def dropout_seeded_once() -> None:
    """Dropout goes on from a generator that is seeded at the start of each process, not by the place in the run."""
    original, seeded = Engine._seed_dropout, []

    def seed_once(self: Engine, step: int, micro_batch: int) -> None:
        if not seeded:
            original(self, step, micro_batch)
        seeded.append(step)

    Engine._seed_dropout = seed_once


def samples_shifted_by_one() -> None:
    """A resumed run reads each sample's successor."""
    original = Trainer._groups

    def shifted(self: Trainer) -> Iterator[list[int]]:
        by = int(self.state.samples > 0)
        for group in original(self):
            yield [sample + by for sample in group]

    Trainer._groups = shifted


def moments_not_restored() -> None:
    """A checkpoint gives back the weights alone."""

    def weights_only(self: CheckpointStore, engine: Engine, reader: Any) -> None:
        for piece in engine.fragments():
            piece.tensors["weight"].copy_(reader.read_range(piece.logical, "weight", piece.start, piece.length))

    CheckpointStore._fill = weights_only


def updates_not_restored() -> None:
    """Adam's bias correction starts again from the first update."""
    original = Engine.loaded
    Engine.loaded = lambda self, updates: original(self, 0)


MISTAKES: tuple[Callable[[], None], ...] = (
    dropout_seeded_once,
    samples_shifted_by_one,
    moments_not_restored,
    updates_not_restored,
)


def guard_forgotten() -> None:
    """A resumed run judges losses by none before."""
    original = TrainState.from_plain
    TrainState.from_plain = staticmethod(lambda raw: original({**raw, "guard": {}}))


def manifest_before_the_files() -> None:
    """A save says that it is done before the ranks have written: a kill then leaves a checkpoint of nothing."""
    original = saving.begin

    def begin(folder: Path, total_bytes: int) -> None:
        original(folder, total_bytes)
        (folder / publication.MANIFEST).write_text("{}")
        time.sleep(0.3)

    saving.begin = begin


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_within_a_rank_file() -> None:
    """Half of the weights are on disk."""
    original = WriterProcess.write

    def half(self: WriterProcess, path: Path) -> dict[str, Any]:
        facts = original(self, path)
        if path.parent.name == folder_of(Path(), KILLED_SAVE).name:
            os.truncate(path, facts["bytes"] // 2)
            _die()
        return facts

    WriterProcess.write = half


def _publish_here() -> None:
    """Publish in the rank, where what publishes can be altered."""

    def publish(self: WriterProcess, task: publication.Publication, reports: Any) -> None:
        publication.publish(task, reports)

    WriterProcess.publish = publish


def die_before_the_manifest() -> None:
    """Everything is on disk but the manifest."""
    _publish_here()
    original = publication.write_durably

    def write(path: Path, data: bytes) -> None:
        if path.name == publication.MANIFEST and path.parent.name == folder_of(Path(), KILLED_SAVE).name:
            path.with_name(".manifest.json.partial").write_bytes(data[: len(data) // 2])
            _die()
        original(path, data)

    publication.write_durably = write


def die_while_removing_the_oldest() -> None:
    """The new checkpoint is published, and the removal of an old one has begun."""
    _publish_here()
    original = publication.shutil.rmtree

    def remove(path: Path) -> None:
        if folder_of(path.parent, KILLED_SAVE + 5).exists():
            next(path.glob("*.safetensors")).unlink()
            _die()
        original(path)

    publication.shutil.rmtree = remove


DEATHS: tuple[Callable[[], None], ...] = (die_within_a_rank_file, die_before_the_manifest, die_while_removing_the_oldest)


def manifest_published_first() -> None:
    """The order of a save turned round, and a death between the manifest and the rank's file."""
    _publish_here()
    original = publication.publish

    def publish(task: publication.Publication, reports: Any) -> None:
        original(task, reports)
        if task.step == KILLED_SAVE:
            (Path(task.folder) / reports[0]["file"]).unlink()
            _die()

    publication.publish = publish
