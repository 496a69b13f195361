"""What is done when a run diverges: back to the last checkpoint from before, past the data that it diverged on."""

from __future__ import annotations

from pathlib import Path

from train.checkpoint.store import CheckpointStore
from train.config.guard import GuardConfig
from train.engine import Engine
from train.health.windows import sample_at
from train.parallel import ParallelContext
from train.state import TrainState, write_interventions


class CannotRecover(Exception):
    """The run has to end: the budget of rollbacks is used up, or there is nothing to go back to."""


class Recovery:
    """Takes a run back."""

    def __init__(self, config: GuardConfig, run_dir: Path, *, store: CheckpointStore, context: ParallelContext) -> None:
        self.config, self.run_dir, self.store, self.context = config, run_dir, store, context

    def roll_back(self, engine: Engine, state: TrainState, reason: str, *, step_samples: int) -> TrainState:
        """The state to go on from, its weights and moments in `engine`; all ranks together.

        `step_samples`: samples of one step, in which the data before the first bad step is measured.
        Raises CannotRecover, with the run as it was, when it must end instead.
        """
        if len(state.interventions) >= self.config.max_rollbacks:
            raise CannotRecover(f"{reason}, after {len(state.interventions)} rollbacks (guard.max_rollbacks)")
        self.store.finish()
        good = state.guard
        reader = self.store.load_newest(engine, before_step=good.good_step + 1)
        if reader is None:
            raise CannotRecover(f"{reason}, and no checkpoint is from before, at step {good.good_step} or earlier")
        back = TrainState.from_plain(reader.state)
        back.remember(state.interventions)
        first = max(back.samples, good.good_samples - self.config.leave_out_steps_before * step_samples)
        entry = {
            "at_step": state.step,
            "to_step": back.step,
            "reason": reason,
            "left_out": [sample_at(first, state.left_out), sample_at(state.samples - 1, state.left_out) + 1],
        }
        back.interventions.append(entry)
        if self.context.is_first:
            write_interventions(self.run_dir, back.interventions)
        self.context.barrier()
        why = f"written after the run had begun to diverge: {reason}"
        self.store.quarantine_from(good.good_step + 1, why, best=back.best.steps)
        return back
