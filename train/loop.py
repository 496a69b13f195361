"""The loop: step, log, evaluate, save, stop. It asks neither for the parallel mode nor for the model."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from data_pipeline.loader import Loader, MicroBatch
from data_pipeline.prefetcher import Prefetcher
from train.checkpoint.store import CheckpointStore
from train.config.pretrain import PretrainConfig
from train.engine import Engine, StepResult
from train.health.garbage import GarbageSchedule
from train.health.spike import SpikeDetector
from train.health.stop import StopSignal
from train.metrics import Metrics, NullMetrics
from train.optim import lr_at
from train.parallel import ParallelContext
from train.plan import RunPlan

MAX_SKIPPED_IN_A_ROW = 10  # non-finite gradients; more do not come from a bad batch but from a broken model


@dataclass(kw_only=True)
class TrainState:
    """Where a run stands: everything that a resumed run needs beside weights and moments.

    Sample order, learning rate and dropout are functions of it, so there is no generator to save.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    updates: int = 0
    skipped_in_a_row: int = 0
    adjustments: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How the loop ended: finished, stopped (resumable) or diverged (not to be restarted)."""

    state: Literal["finished", "stopped", "diverged"]
    reason: str


@dataclass(kw_only=True)
class Trainer:
    """The parts of a run, and the loop over them."""

    config: PretrainConfig
    plan: RunPlan
    context: ParallelContext
    engine: Engine
    loader: Loader
    held_out: Loader | None
    store: CheckpointStore
    metrics: Metrics | NullMetrics
    stop: StopSignal
    state: TrainState
    spikes: SpikeDetector = field(default_factory=SpikeDetector)

    def run(self) -> Ending:
        """Train from the present state to the end of the budget, or until something asks to stop."""
        ending = self._reason_to_end()
        for last in self.steps():
            ending = last
        return ending

    def steps(self) -> Iterator[Ending | None]:
        """Train step by step; after each comes None, after the last why it was the last."""
        state, plan = self.state, self.plan
        ending = self._reason_to_end()
        garbage = GarbageSchedule(self.config.kernels.collect_garbage_steps)
        with garbage, Prefetcher(self.loader.micro_batch, self._groups()) as batches:
            while ending is None:
                started = time.perf_counter()
                batch = plan.batch_at(state.samples)
                micro_batches = [next(batches) for _ in range(plan.micro_batches_at(state.samples))]
                waited = time.perf_counter() - started
                lr = lr_at(state.samples, batch=batch, optim=self.config.optim, schedule=self.config.schedule, plan=plan)
                result = self.engine.train_step(micro_batches, lr=lr, step=state.step)
                self._advance(batch, result)
                self._log_step(result, lr, batch, waited=waited, seconds=time.perf_counter() - started)
                ending = self._reason_to_end()
                self._evaluate_if_due(ending)
                self._save_if_due(ending)
                garbage.after(state.step)
                yield ending

    def _groups(self) -> Iterator[list[int]]:
        """Sample ids of this rank's micro-batches, from the present state on without end."""
        samples, plan = self.state.samples, self.plan
        while True:
            for index in range(plan.micro_batches_at(samples)):
                first = samples + (index * plan.data_parallel + self.context.data_rank) * plan.micro_batch
                yield list(range(first, first + plan.micro_batch))
            samples += plan.batch_at(samples)

    def _advance(self, batch: int, result: StepResult) -> None:
        state = self.state
        state.step += 1
        state.samples += batch
        state.tokens += batch * self.plan.sequence_length
        state.skipped_in_a_row = state.skipped_in_a_row + 1 if result.skipped else 0
        state.updates = self.engine.updates

    def _reason_to_end(self) -> Ending | None:
        state, budget = self.state, self.config.budget
        if state.samples >= self.plan.total_samples:
            return Ending(state="finished", reason=f"the budget of {self.plan.total_steps:,} steps is used up")
        if state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            return Ending(state="diverged", reason=f"{MAX_SKIPPED_IN_A_ROW} steps in a row had a non-finite gradient")
        if asked := self.stop.asked():
            return Ending(state="stopped", reason=f"received {asked}")
        if budget.stop_at_step is not None and state.step >= budget.stop_at_step:
            return Ending(state="stopped", reason=f"budget.stop_at_step={budget.stop_at_step}")
        return None

    def _log_step(self, result: StepResult, lr: float, batch: int, *, waited: float, seconds: float) -> None:
        state = self.state
        self.metrics.train(
            {
                "step": state.step,
                "samples": state.samples,
                "tokens": state.tokens,
                "loss": result.loss,
                "lr": lr,
                "grad_norm": result.grad_norm,
                "target_tokens": result.target_tokens,
                "batch": batch,
                "skipped": int(result.skipped),
                "step_seconds": seconds,
                "data_wait_seconds": waited,
            }
        )
        if result.skipped:
            self.metrics.alert("non-finite gradient", f"step {state.step} was skipped", level="warn")
        elif self.spikes.is_spike(result.loss):
            self.metrics.alert("loss spike", f"loss {result.loss:.4f} at step {state.step}", level="warn")

    def _evaluate_if_due(self, ending: Ending | None) -> None:
        every = self.config.evaluate.every_steps
        due = every is not None and self.state.step % every == 0
        if self.held_out is not None and (due or (ending is not None and ending.state == "finished")):
            figures = self.evaluate(self.held_out)
            self.metrics.evaluation({"step": self.state.step, "tokens": self.state.tokens, **figures})

    def _save_if_due(self, ending: Ending | None) -> None:
        every = self.config.checkpoint.every_steps
        due = every is not None and self.state.step % every == 0
        if ending is not None and ending.state == "diverged":
            return  # the last good checkpoint stays the newest
        if due or ending is not None:
            self.store.save(self.engine, step=self.state.step, tokens=self.state.tokens, state=asdict(self.state))

    def evaluate(self, held_out: Loader) -> dict[str, float]:
        """Loss, perplexity and bits per byte of the held-out split: sums over all targets, divided once."""
        sums = torch.zeros(3, dtype=torch.float64)  # loss in nats, targets, UTF-8 bytes of the targets
        started = time.perf_counter()
        for batch, counts in self._held_out_batches(held_out):
            result = self.engine.evaluate(batch)
            if counts:
                sums += torch.tensor([result.loss_sum, result.target_tokens, batch.target_bytes], dtype=torch.float64)
        loss_sum, targets, target_bytes = self.context.sum_over_data(sums.to(self.context.device)).tolist()
        loss = loss_sum / targets
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": loss_sum / math.log(2) / target_bytes,
            "target_tokens": int(targets),
            "seconds": time.perf_counter() - started,
        }

    def _held_out_batches(self, held_out: Loader) -> Iterator[tuple[MicroBatch, bool]]:
        """This rank's held-out batches, and whether each counts: every rank gets equally many, as ZeRO 3 needs."""
        settings = self.config.evaluate
        size = settings.micro_batch or self.config.batch.micro_batch
        available = min(held_out.num_samples, settings.max_samples or held_out.num_samples)
        groups = [list(range(first, min(first + size, available))) for first in range(0, available, size)]
        ranks, rank = self.context.data_parallel, self.context.data_rank
        for index in range(-(-len(groups) // ranks)):
            mine = index * ranks + rank
            yield held_out.micro_batch(groups[min(mine, len(groups) - 1)]), mine < len(groups)
