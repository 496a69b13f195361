"""Which checkpoints stay and where `best` leads, also while the newest best is not on disk; what they are compared by."""

from __future__ import annotations

from pathlib import Path

from train.checkpoint.manifest import MANIFEST, folder_of, published, resolve_checkpoint, step_of
from train.checkpoint.publication import Keep, link_best, retain
from train.state import Best


def checkpoints(run_dir: Path, *steps: int) -> Path:
    root = run_dir / "checkpoints"
    for step in steps:
        folder_of(root, step).mkdir(parents=True)
        (folder_of(root, step) / MANIFEST).write_text("{}")
    return root


def left(root: Path, keep: Keep) -> tuple[list[int], int | None]:
    """Steps of what stays, and of the best."""
    retain(root, keep)
    link_best(root, keep)
    link = root.parent / "best"
    return [step_of(path) for path in published(root)], step_of(link.resolve()) if link.is_symlink() else None


def test_the_best_before_stays_until_a_better_one_is_there(tmp_path: Path) -> None:
    root = checkpoints(tmp_path, 30, 50, 101)
    assert left(root, Keep(last=1, every_steps=None, num_best=1, best=(100, 50, 30))) == ([50, 101], 50)
    checkpoints(tmp_path, 150)
    assert left(root, Keep(last=1, every_steps=None, num_best=1, best=(150, 100, 50, 30))) == ([150], 150)
    assert resolve_checkpoint(str(tmp_path / "best")) == folder_of(root, 150)
    assert left(root, Keep(last=1, every_steps=None, best=(150,))) == ([150], None), "none is kept for being the best"


def test_as_many_stay_as_are_asked_for(tmp_path: Path) -> None:
    root = checkpoints(tmp_path, 10, 20, 30, 40, 50)
    assert left(root, Keep(last=1, every_steps=None, num_best=2, best=(45, 30, 20, 10))) == ([20, 30, 50], 30)


def test_one_that_was_never_written_takes_no_place() -> None:
    best = Best()
    for step, loss in ((50, 3.0), (100, 1.0), (150, 2.0), (200, 4.0)):
        best.note(step, loss, keep=1, least_gain=0.0)
    assert best.steps == [100, 150, 50, 200] and best.without_gain == 2, "patience goes by what was measured"
    assert best.is_to_be_kept(150, keep=1, on_disk=[50])
    assert not best.is_to_be_kept(150, keep=1, on_disk=[50, 100])
    assert not best.is_to_be_kept(200, keep=1, on_disk=[50])
    for step in range(300, 400):
        best.note(step, 0.5, keep=1, least_gain=0.0)
    assert len(best.steps) == 9


def test_another_yardstick_begins_anew() -> None:
    best = Best(steps=[8], criteria=[-0.8], without_gain=1)
    assert best.compare_by("accuracy") is None and best.steps == [8], "one of before yardsticks were kept goes on"
    assert best.compare_by("accuracy") is None and best.without_gain == 1
    assert best.compare_by("loss") == "accuracy"
    assert (best.steps, best.criteria, best.without_gain) == ([], [], 0)
