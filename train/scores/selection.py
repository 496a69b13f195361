"""Which of the evaluations that lie in a folder speak of a checkpoint, or of a run as far as it was evaluated. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from train.scores.record import Evaluation, find_evaluations


def home_of(checkpoint: Path, *, imported: bool) -> Path:
    """The folder that has the evaluations of a checkpoint below it: its run's, or its own where it is of no run."""
    place = checkpoint.resolve()
    return place.parent.parent if place.parent.name == "checkpoints" and not imported else place


def of_checkpoint(home: Path, *, manifest_hash: str, step: int) -> list[Evaluation]:
    """All evaluations of one checkpoint, newest first. manifest_hash: SHA-256 of its manifest.json.

    Where an evaluation has no hash the step decides; where it has another, the step was trained again since.
    """
    return [
        evaluation
        for evaluation in reversed(find_evaluations(home))
        if (evaluation.model.get("hash") or manifest_hash) == manifest_hash and evaluation.model.get("step", step) == step
    ]


def of_run(home: Path) -> list[Evaluation]:
    """All evaluations of the newest checkpoint of a run that has any, newest first."""
    found = find_evaluations(home)[::-1]
    newest = max(found, key=lambda evaluation: evaluation.model.get("step", -1), default=None)
    if newest is None:
        return []
    step, digest = newest.model.get("step"), newest.model.get("hash")
    return [one for one in found if one.model.get("step") == step and one.model.get("hash") == digest]


def newest_of_each(evaluations: Iterable[Evaluation]) -> list[Evaluation]:
    """Of several evaluations of the same name, kind and data the one that comes first."""
    first: dict[tuple[str, str, str], Evaluation] = {}
    for evaluation in evaluations:
        first.setdefault((evaluation.name, evaluation.kind, evaluation.data_hash), evaluation)
    return list(first.values())
