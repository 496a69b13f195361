"""Where a run stands: what a resumed run needs beside weights and moments, and what was done to save it from itself."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from train.checkpoint.manifest import write_durably
from train.health.guard import GuardState
from train.health.windows import Window, leave_out

INTERVENTIONS_FILE = "interventions.json"
SPARE_BEST = 8  # best evaluations that are remembered beyond those kept: a checkpoint may fail to be written, or be damaged


@dataclass(kw_only=True)
class Best:
    """The best evaluations so far, and how long it has been since the last of them."""

    steps: list[int] = field(default_factory=list)
    """Of the best evaluations, the best first; more than checkpoints are kept for it, as not all may be on disk."""
    criteria: list[float] = field(default_factory=list)
    """Theirs, the lower the better."""
    without_gain: int = 0
    """Evaluations in a row since the best."""
    yardstick: str | None = None
    """What they are compared by; None: nothing yet, or written before this was kept."""

    def compare_by(self, yardstick: str) -> str | None:
        """Go by this figure from now on; the one before where that was another, and all begins anew."""
        before, self.yardstick = self.yardstick, yardstick
        if before in (None, yardstick):
            return None
        self.steps, self.criteria, self.without_gain = [], [], 0
        return before

    def note(self, step: int, criterion: float, *, keep: int, least_gain: float) -> None:
        """Take in an evaluation; one that is no number is as bad as can be."""
        criterion = criterion if math.isfinite(criterion) else math.inf
        gained = not self.criteria or criterion < self.criteria[0] - least_gain
        self.without_gain = 0 if gained else self.without_gain + 1
        if math.isinf(criterion):
            return
        found = sorted([*zip(self.criteria, self.steps, strict=True), (criterion, step)])[: keep + SPARE_BEST]
        self.criteria, self.steps = [one for one, _ in found], [step for _, step in found]

    def is_to_be_kept(self, step: int, *, keep: int, on_disk: Collection[int]) -> bool:
        """Whether `step` is among the best `keep` of those whose checkpoints are there, its own counted among them."""
        return step in [one for one in self.steps if one == step or one in on_disk][:keep]


@dataclass(kw_only=True)
class TrainState:
    """Sample order, learning rate and dropout are functions of this, so there is no generator to save."""

    step: int = 0
    samples: int = 0
    """Samples consumed; which they are follows from the windows left out."""
    tokens: int = 0
    updates: int = 0
    """Optimizer updates; a skipped step is none."""
    adjustments: list[dict[str, Any]] = field(default_factory=list)
    """Settings that were changed on the way, each with its step."""
    interventions: list[dict[str, Any]] = field(default_factory=list)
    """Rollbacks: from where to where, why, and the sample numbers left out."""
    initialisation: int = 1
    """Version of the initial values that the run began with; 1: from before this was kept."""
    evaluation_due: bool = False
    """A stop came before the evaluation of this step was through; it is made up for first."""
    guard: GuardState = field(default_factory=GuardState)
    best: Best = field(default_factory=Best)

    @staticmethod
    def from_plain(raw: Mapping[str, Any]) -> TrainState:
        """The state of a checkpoint; one that was written before a field existed has the field's default."""
        known = {name: value for name, value in raw.items() if name in TrainState.__dataclass_fields__}
        nested = {"guard": GuardState(**raw.get("guard", {})), "best": Best(**raw.get("best", {}))}
        return TrainState(**{**known, **nested})

    def to_plain(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @property
    def left_out(self) -> list[Window]:
        """Sample numbers that are not read, disjoint and sorted."""
        windows: list[Window] = []
        for entry in self.interventions:
            windows = leave_out(windows, tuple(entry["left_out"]))
        return windows

    def remember(self, interventions: list[dict[str, Any]]) -> None:
        """Take over rollbacks that happened after this state was saved."""
        self.interventions += [entry for entry in interventions if entry not in self.interventions]


def read_interventions(run_dir: Path) -> list[dict[str, Any]]:
    """The rollbacks of a run, oldest first: a checkpoint from before one does not know of it."""
    path = run_dir / INTERVENTIONS_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def write_interventions(run_dir: Path, interventions: list[dict[str, Any]]) -> None:
    """Keep the rollbacks, before anything else is done about one."""
    write_durably(run_dir / INTERVENTIONS_FILE, json.dumps(interventions, indent=1).encode())
