"""When a checkpoint is saved, and what is done when that fails: the policy around the store."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from train.checkpoint.manifest import published, step_of
from train.checkpoint.store import CheckpointStore, SaveResult
from train.engine import Engine, StepResult
from train.health.requests import Deadline
from train.metrics import Goodput, Metrics, NullMetrics
from train.state import TrainState

LAST_TRIES = 3
LAST_PAUSE_SECONDS = 2.0  # doubled between the tries of the last save
MOST_STEPS_TO_RETRY = 256


class Saver:
    """Saves through `store`. A save that fails warns and is tried again after 1, 2, 4, ... steps; the run goes on."""

    def __init__(self, store: CheckpointStore, metrics: Metrics | NullMetrics, deadline: Deadline | None = None) -> None:
        self.store, self.metrics, self.deadline = store, metrics, deadline
        self._wanted = False
        self._failures = 0
        self._retry_at: int | None = None
        self._stalled = self._logged_stall = 0.0
        self._health: dict[str, float] = {}
        self._validation: tuple[int, float] | None = None
        self._productive_at: dict[int, float] = {}

    def note_step(self, result: StepResult, seconds: float) -> None:
        """The figures that a checkpoint of these weights will carry: those of the last update; a skipped step is none."""
        if self.deadline is not None:
            self.deadline.step_seconds = max(seconds, 0.9 * self.deadline.step_seconds)
        if not result.skipped:
            self._health = {"loss": result.loss, "grad_norm": result.grad_norm}

    def note_validation(self, step: int, loss: float) -> None:
        """The held-out loss of the weights after `step`."""
        self._validation = (step, loss)

    def before_update(self) -> None:
        """To be called right before weights change: a save under way copies them first."""
        began = time.perf_counter()
        self.store.before_update()
        self._stalled += time.perf_counter() - began

    def stalled_seconds(self) -> float:
        """How long `before_update` has waited since this was last asked."""
        stalled, self._stalled = self._stalled, 0.0
        self._logged_stall += stalled
        return stalled

    def stall_record(self) -> dict[str, float]:
        """How long the loop was held up by a save since the last record, where it was."""
        stalled, self._logged_stall = self._logged_stall, 0.0
        return {"checkpoint_stall_seconds": stalled} if stalled > 1e-4 else {}

    def save_if(self, engine: Engine, state: TrainState, *, due: bool, is_well: bool, goodput: Goodput) -> None:
        """Begin a save where one is due; in a run that is not well it waits for the first step that is."""
        self._note(self.store.poll(), state.step)
        self._wanted |= due
        if self._wanted and is_well:
            self._begin(engine, state, goodput)

    def retry_is_due(self, step: int) -> bool:
        """Whether a save that failed is to be tried again; only the first rank ever says so."""
        if self._retry_at is None or step < self._retry_at or not self.store.context.is_first:
            return False
        self._retry_at = None
        return True

    def save_last(self, engine: Engine, state: TrainState, *, goodput: Goodput) -> str | None:
        """Save before leaving and wait for it; the problem when it could not be written."""
        pause, problem = LAST_PAUSE_SECONDS, None
        for attempt in range(LAST_TRIES):
            if attempt:
                time.sleep(pause)
                pause *= 2
            self._begin(engine, state, goodput)
            problem = self.settle(state.step)
            if problem is None:
                break
        return problem

    def settle(self, step: int = 0) -> str | None:
        """Wait for a save under way; its problem, if it had one."""
        result = self.store.finish()
        self._note(result, step)
        return result.problem if result is not None else None

    def close(self) -> None:
        """Wait for the save under way, and give back what saving needs."""
        self.settle()
        self.store.close()

    @property
    def is_idle(self) -> bool:
        """Whether no save is under way."""
        return self.store.is_idle

    def steps_on_disk(self) -> list[int]:
        """Steps of the checkpoints on disk, the newest last."""
        return [step_of(folder) for folder in published(self.store.root)]

    def newest_step(self) -> int | None:
        """Step of the newest checkpoint on disk."""
        return max(self.steps_on_disk(), default=None)

    def mark(self, step: int, goodput: Goodput) -> None:
        """Remember how much work was done at the checkpoint of `step`."""
        self._productive_at[step] = goodput.fields()["seconds_productive"]

    def productive_since(self, step: int, goodput: Goodput) -> float:
        """Seconds of work since the checkpoint of `step`, as far as this attempt knows."""
        return goodput.fields()["seconds_productive"] - self._productive_at.get(step, 0.0)

    def _begin(self, engine: Engine, state: TrainState, goodput: Goodput) -> None:
        began = time.perf_counter()
        self._note(self.store.finish(), state.step)
        self._wanted = False
        self.mark(state.step, goodput)
        self.store.save(
            engine,
            step=state.step,
            tokens=state.tokens,
            state=state.to_plain(),
            health=self._figures(state),
            best=state.best.steps,
        )
        if not self.store.config.asynchronous:
            self._note(self.store.finish(), state.step)
        seconds = time.perf_counter() - began
        self._logged_stall += seconds
        goodput.add("checkpoint", seconds)

    def _figures(self, state: TrainState) -> Mapping[str, Any]:
        if self._validation is not None and self._validation[0] == state.step:
            return {**self._health, "validation_loss": self._validation[1]}
        return self._health

    def _note(self, result: SaveResult | None, step: int) -> None:
        if result is None:
            return
        if result.problem is None:
            self._failures, self._retry_at = 0, None
            if self.deadline is not None:
                self.deadline.save_seconds = max(result.seconds, self.deadline.save_seconds or 0.0)
            return
        wait = min(2**self._failures, MOST_STEPS_TO_RETRY)
        self._failures += 1
        self._retry_at = step + wait
        self.metrics.alert(
            "checkpoint not written", f"step {result.step}: {result.problem}; tried again {wait} steps later", level="warn"
        )
