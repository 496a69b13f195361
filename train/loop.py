"""The loop: step, log, evaluate, save, stop. It asks neither for the parallel mode nor for the model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from data_pipeline.ledger import combined, format_ranges
from data_pipeline.loader import SampleSource
from data_pipeline.prefetcher import Prefetcher
from train.config.settings import RunSettings
from train.engine import Engine, StepResult
from train.health.garbage import GarbageSchedule
from train.health.guard import Guard, Verdict
from train.health.norms import by_layer
from train.health.requests import Agreement, Requests, Stop
from train.health.stragglers import Stragglers
from train.health.watchdog import Silent, Watchdog
from train.health.windows import ranges_between, sample_at
from train.metrics import Goodput, Metrics, NullMetrics, Value
from train.metrics.record import Output
from train.optim import lr_at
from train.parallel import ParallelContext
from train.plan import RunPlan
from train.recovery import CannotRecover, Recovery
from train.saver import Saver
from train.spike_report import SpikeReporter
from train.state import TrainState

ASK_EVERY_BATCHES = 8  # of an evaluation, whether to stop


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How the loop ended: finished, stopped (resumable), diverged or unsaved (not to be restarted as it is)."""

    state: Literal["finished", "stopped", "diverged", "unsaved"]
    reason: str
    on_purpose: bool = False
    """Whether a person asked for it, and wants it to stay so."""
    patience: int | None = None
    """evaluate.patience, where it ended a run before its budget was used up."""


class Interrupted(Exception):
    """An evaluation that was given up because the run is to stop."""

    def __init__(self, stop: Stop) -> None:
        super().__init__(stop.reason)
        self.stop = stop


class Examiner(Protocol):
    """Measures the model; all ranks together. It draws no random number and leaves nothing changed."""

    outputs: Sequence[Output]
    """What the model answered in the last run, where it was asked for texts or labels."""

    def run(self, before_batch: Callable[[int], None]) -> list[dict[str, Value]]:
        """Records of what was found, the first of all the data; `before_batch` is called with the number of each batch."""

    def criterion(self, records: Sequence[Mapping[str, Value]]) -> float:
        """The figure by which one checkpoint is better than another: the lower the better."""


@dataclass(kw_only=True)
class Trainer:
    """The parts of a run, and the loop over them."""

    config: RunSettings
    plan: RunPlan
    context: ParallelContext
    engine: Engine
    loader: SampleSource
    examiner: Examiner | None
    saver: Saver
    recovery: Recovery
    metrics: Metrics | NullMetrics
    requests: Requests
    spikes: SpikeReporter
    state: TrainState
    stragglers: Stragglers
    watchdog: Watchdog | Silent = field(default_factory=Silent)
    goodput: Goodput = field(default_factory=Goodput)

    def run(self) -> Ending:
        """Train from the present state to the end of the budget, or until something asks to stop."""
        ending = None
        for last in self.steps():
            ending = last
        assert ending is not None, "the last thing that comes is why it was the last"
        return ending

    def steps(self) -> Iterator[Ending | None]:
        """Train step by step; after each comes None, after the last why it was the last."""
        garbage = GarbageSchedule(self.config.kernels.collect_garbage_steps)
        with garbage:
            if (ending := self._make_up()) is not None:
                yield ending
            while ending is None:
                state = self.state
                with Prefetcher(self.loader.micro_batch, self._groups()) as batches:
                    while ending is None and self.state is state:  # a rollback begins with another state and other data
                        ending = self._step(batches)
                        garbage.after(self.state.step)
                        yield ending

    def _step(self, batches: Prefetcher) -> Ending | None:
        started = time.perf_counter()
        state, plan = self.state, self.plan
        batch, first = plan.batch_at(state.samples), state.samples
        self.watchdog.phase("data", state.step)
        micro_batches = [next(batches) for _ in range(plan.micro_batches_at(state.samples))]
        waited = time.perf_counter() - started
        lr = lr_at(state.samples, batch=batch, optim=self.config.optim, schedule=self.config.schedule, plan=plan)
        self.watchdog.phase("forward", state.step)
        result = self.engine.train_step(micro_batches, lr=lr, step=state.step, before_update=self._before_update)
        stalled = self.saver.stalled_seconds()
        mine = 0 if self.context.tensor.rank else sum(batch.data_hash for batch in micro_batches) % 2**64
        agreement = self.requests.agree(mine)
        self._advance(batch, result)
        self.watchdog.phase("log", state.step)
        guard = Guard(self.config.guard, state.guard)
        verdict = guard.judge(result.loss, skipped=result.skipped, step=state.step, samples=state.samples)
        seconds = time.perf_counter() - started
        self.saver.note_step(result, seconds)
        self.goodput.add("productive", seconds - stalled)
        self.goodput.add("checkpoint", stalled)
        self._log_step(
            result,
            {
                "lr": lr,
                "batch": batch,
                "spike": int(verdict.spike),
                "data_hash": combined([agreement.total]),
                "data_wait_seconds": waited,
                **self.stragglers.after(state.step, result.busy_seconds),
            },
            first=first,
            seconds=seconds,
        )
        self._tell(result, verdict, first=first, lr=lr)
        if verdict.diverged is not None:
            return self._roll_back(verdict.diverged, batch)
        return self._after_step(agreement, is_well=guard.is_well)

    def _before_update(self) -> None:
        self.watchdog.phase("update", self.state.step)
        self.saver.before_update()

    def _after_step(self, agreement: Agreement, *, is_well: bool) -> Ending | None:
        ending = self._reason_to_end(agreement)
        every = self.config.evaluate.every_steps
        due = every is not None and self.state.step % every == 0
        if self.examiner is not None and (due or (ending is not None and ending.state == "finished")):
            self.state.evaluation_due = True
            ending = self._evaluate(self.examiner) or ending
        return self._save(agreement, ending, is_well=is_well)

    def _make_up(self) -> Ending | None:
        """What an earlier attempt left undone; then the reason to end before the first step, if there is one."""
        ending = self._reason_to_end(self.requests.agree())
        if self.state.evaluation_due and self.examiner is not None and (ending is None or ending.state == "finished"):
            ending = self._evaluate(self.examiner) or ending
            # The weights are those of the checkpoint of this step, which may be the best now: no save has to follow. It stays
            # as it is on disk, evaluation due, since writing it anew would take it away for a while.
            self.saver.store.keep_best(self.state.best.steps)
        if ending is not None and ending.state == "stopped":
            self.requests.answered()
        return ending

    def _groups(self) -> Iterator[list[int]]:
        """Sample numbers of this rank's micro-batches, from the present state on without end."""
        samples, plan, left_out = self.state.samples, self.plan, self.state.left_out
        while True:
            for index in range(plan.micro_batches_at(samples)):
                first = samples + (index * plan.data_parallel + self.context.data_rank) * plan.micro_batch
                yield [sample_at(position, left_out) for position in range(first, first + plan.micro_batch)]
            samples += plan.batch_at(samples)

    def _advance(self, batch: int, result: StepResult) -> None:
        state = self.state
        state.step += 1
        state.samples += batch
        state.tokens += batch * self.plan.sequence_length
        state.updates = self.engine.updates

    def _reason_to_end(self, agreement: Agreement) -> Ending | None:
        state, budget = self.state, self.config.budget
        if state.samples >= self.plan.total_samples:
            return Ending(state="finished", reason=f"the budget of {self.plan.total_steps:,} steps is used up")
        if agreement.stop is not None:
            return _stopped(agreement.stop)
        if budget.stop_at_step is not None and state.step >= budget.stop_at_step:
            return Ending(state="stopped", reason=f"budget.stop_at_step={budget.stop_at_step}", on_purpose=True)
        return None

    def _log_step(self, result: StepResult, more: dict[str, Value], *, first: int, seconds: float) -> None:
        state, every = self.state, self.config.monitor.norms_every_steps
        norms = self.engine.norms() if every is not None and state.step % every == 0 else {}
        self.metrics.train(
            {
                "step": state.step,
                "samples": state.samples,
                "tokens": state.tokens,
                "loss": result.loss,
                "grad_norm": result.grad_norm,
                "target_tokens": result.target_tokens,
                **{f"task/{name}": value for name, value in result.means.items()},
                "skipped": int(result.skipped),
                "sample_ranges": format_ranges(ranges_between(first, state.samples, state.left_out)),
                "step_seconds": seconds,
                **more,
                **{f"norm/{name}": norm for name, norm in by_layer(norms).items()},
                **self.saver.stall_record(),
                **self.goodput.fields(),
            }
        )

    def _tell(self, result: StepResult, verdict: Verdict, *, first: int, lr: float) -> None:
        """Tell people of a step that was not as it should be."""
        state = self.state
        if result.skipped:
            self.metrics.alert("non-finite step", f"step {state.step} was skipped: its loss or gradient is not finite")
        if verdict.spike and state.guard.spikes_in_a_row == 1:
            path = self.spikes.write(self.engine, state, result, first=first, lr=lr)
            self.metrics.alert("loss spike", f"loss {result.loss:.4f} at step {state.step}; {path}")

    def _roll_back(self, reason: str, batch: int) -> Ending | None:
        self.watchdog.phase("save", self.state.step)
        self.saver.settle()
        try:
            back = self.recovery.roll_back(self.engine, self.state, reason, step_samples=batch)
        except CannotRecover as error:
            return Ending(state="diverged", reason=str(error))
        entry = back.interventions[-1]
        self.goodput.lose(self.saver.productive_since(back.step, self.goodput))
        self.metrics.alert(
            "rolled back",
            f"{reason}: back from step {entry['at_step']} to {entry['to_step']}, samples {entry['left_out'][0]} to "
            f"{entry['left_out'][1] - 1} are left out; rollback {len(back.interventions)} of {self.config.guard.max_rollbacks}",
            level="error",
        )
        self.state = back
        return None

    def _save(self, agreement: Agreement, ending: Ending | None, *, is_well: bool) -> Ending | None:
        """Save where it is due; the ending, with what became of its save."""
        self.watchdog.phase("save", self.state.step)
        every = self.config.checkpoint.every_steps
        due = agreement.save or (every is not None and self.state.step % every == 0) or self._is_best()
        if ending is None:
            self.saver.save_if(self.engine, self.state, due=due, is_well=is_well, goodput=self.goodput)
            if self.saver.retry_is_due(self.state.step):
                self.requests.ask_to_save()
            return None
        problem = self.saver.save_last(self.engine, self.state, goodput=self.goodput)
        if ending.state == "stopped":
            self.requests.answered()
        if problem is None:
            return ending
        kept = self.saver.newest_step()
        reason = f"{ending.reason}, but the last checkpoint could not be written: {problem}; "
        reason += "there is no other" if kept is None else f"the newest is of step {kept}"
        return replace(ending, state="stopped" if ending.state == "stopped" else "unsaved", reason=reason)

    def _is_best(self) -> bool:
        """Whether this step is to be kept for what was measured; all ranks together."""
        step, best, keep = self.state.step, self.state.best, self.config.checkpoint.keep_best
        if keep == 0 or step not in best.steps:
            return False
        return best.is_to_be_kept(step, keep=keep, on_disk=self.context.from_first(self.saver.steps_on_disk()))

    def _evaluate(self, examiner: Examiner) -> Ending | None:
        """Measure the model and report; the ending, when a request to stop came before it was through, or it was one too many
        without a gain."""
        started = time.perf_counter()
        try:
            records = examiner.run(self._before_batch)
        except Interrupted as request:
            return _stopped(request.stop)
        finally:
            self.goodput.add("evaluation", time.perf_counter() - started)
        state, settings = self.state, self.config.evaluate
        state.evaluation_due = False
        self.saver.note_validation(state.step, float(records[0]["loss"]))
        keep, measure = self.config.checkpoint.keep_best, self.config.yardstick
        if (before := state.best.compare_by(measure)) is not None:
            text = f"at step {state.step}, as is the count of evaluate.patience: they go by {measure}, before it was {before}"
            self.metrics.alert("the best is looked for anew", text, level="info")
        state.best.note(state.step, examiner.criterion(records), keep=keep, least_gain=settings.least_gain)
        place = {"step": self.state.step, "samples": self.state.samples, "tokens": self.state.tokens}
        for record in records:
            self.metrics.evaluation({**place, **record})
        if examiner.outputs:
            self.metrics.outputs(state.step, examiner.outputs)
        if settings.patience is None or state.best.without_gain < settings.patience:
            return None
        since = f"none since step {state.best.steps[0]:,}" if state.best.steps else "none had a finite figure"
        reason = f"{state.best.without_gain} evaluations without a gain, {since}"
        return Ending(state="finished", reason=reason, patience=settings.patience)

    def _before_batch(self, number: int) -> None:
        """Between the batches of an evaluation. Raises Interrupted when the run is to stop."""
        if number % ASK_EVERY_BATCHES == 0 and (stop := self.requests.agree().stop) is not None:
            raise Interrupted(stop)
        self.watchdog.phase("evaluate", self.state.step)


def _stopped(stop: Stop) -> Ending:
    return Ending(state="stopped", reason=stop.reason, on_purpose=stop.on_purpose)
