"""The faults of a campaign: when each comes, how it is done to a run from outside, and what it met."""

from __future__ import annotations

import itertools
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from conf.errors import UserError
from tools.fault_injection import Faults, Once
from tools.faulty_run import MARKS_FOLDER
from tools.watched_run import PUBLISHED, UnexpectedEnd, WatchedRun
from train.checkpoint.manifest import published
from train.outcome import ExitCode, last_attempt, read_outcome

Kind = Literal[
    "machine", "supervisor", "rank", "machine_in_save", "rank_in_save", "sigterm", "two_interrupts", "flipped_byte",
    "cut_file", "stopped_rank", "hang", "slow_rank", "full_disk", "dying_writer", "file_system_error",
]  # fmt: skip
MEANING: dict[Kind, str] = {
    "machine": "SIGKILL to every process at once",
    "supervisor": "SIGKILL to the supervisor alone: its ranks have to end by themselves",
    "rank": "SIGKILL to one rank: the supervisor has to start again",
    "machine_in_save": "SIGKILL to every process while a checkpoint is written",
    "rank_in_save": "SIGKILL to one rank while a checkpoint is written",
    "sigterm": "SIGTERM: the run has to save, stop with 85, and go on when started again",
    "two_interrupts": "SIGINT twice: the run has to stop at once, with the old state whole",
    "flipped_byte": "every process killed, and a bit of the newest checkpoint flipped",
    "cut_file": "every process killed, and a file of the newest checkpoint cut",
    "stopped_rank": "SIGSTOP to one rank: the watchdog has to notice",
    "hang": "one rank stands still within a step: the watchdog has to notice",
    "slow_rank": "one rank is slow from then on: nothing may change",
    "full_disk": "a checkpoint's file ends half written in an error of the kernel",
    "dying_writer": "the process that writes a checkpoint is killed",
    "file_system_error": "the folder of a checkpoint cannot be made",
}
IN_SAVE = frozenset({"machine_in_save", "rank_in_save"})
DAMAGE = frozenset({"flipped_byte", "cut_file"})
INSIDE = frozenset({"hang", "slow_rank", "full_disk", "dying_writer", "file_system_error"})
STEPS_BEHIND = 3  # a save that has not begun so many steps later will not
ENDS_NO_ATTEMPT = frozenset({"slow_rank", "full_disk", "dying_writer", "file_system_error"})


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a campaign has to know of the run: its ranks, steps and samples, and the steps that end with a save."""

    processes: int
    steps: int
    samples: int
    save_steps: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Moment:
    """When a fault comes, and which. `fraction` of a step after the step's end, or that far into a save."""

    step: int
    kind: Kind
    fraction: float

    def rank(self, shape: Shape) -> int:
        """The rank that it happens to."""
        return int(self.fraction * 1000) % shape.processes


@dataclass(frozen=True, kw_only=True)
class Strike:
    """What a fault met."""

    moment: Moment
    attempt: int
    """The attempt that it came to."""
    time: float
    """Unix seconds."""
    step: int
    """Last step that the attempt had written."""
    newest: int
    """Step of the newest checkpoint then that is whole; 0: none."""
    torn: int | None = None
    """Step of the checkpoint whose save it interrupted."""


def ends_its_attempt(strike: Strike) -> bool:
    """Whether the attempt that met it has to end by it."""
    return strike.moment.kind not in ENDS_NO_ATTEMPT


def plan_moments(count: int, kinds: Sequence[Kind], shape: Shape, *, seed: int) -> list[Moment]:
    """Seeded moments, spread over the run, every kind as often as the others. Their steps rise, so that each attempt gets
    further and the last one finishes.

    Raises UserError for a run that is too short.
    """
    draw = random.Random(seed)
    drawn = [kinds[number % len(kinds)] for number in range(count)]
    draw.shuffle(drawn)
    in_saves = sum(kind in IN_SAVE for kind in drawn)
    first = shape.save_steps[1] + 1 if len(shape.save_steps) > 1 else 1  # damage needs an older checkpoint to fall back on
    saves = [step for step in shape.save_steps if step >= first]
    if in_saves > len(saves) or count > shape.steps - 2 - first:
        raise UserError(
            f"faults={count}: the run has {shape.steps} steps, and {len(saves)} saves for {in_saves} faults within one; each "
            "fault needs one of its own: give a longer budget.steps, a lower checkpoint.every_steps, or fewer faults"
        )
    at_saves = set(draw.sample(saves, in_saves))
    free = [step for step in range(first, shape.steps - 1) if step not in at_saves]
    at_steps = set(draw.sample(free, count - in_saves))
    inside = iter([kind for kind in drawn if kind in IN_SAVE])
    other = iter([kind for kind in drawn if kind not in IN_SAVE])
    return [
        Moment(step=step, kind=next(inside if step in at_saves else other), fraction=draw.random())
        for step in sorted(at_saves | at_steps)
    ]


def plan_data_faults(shape: Shape, *, divergence_steps: int, seed: int) -> Faults:
    """Bad samples, the same for every attempt: single NaNs, single spikes, and one stretch of NaNs that is a divergence."""
    draw = random.Random(seed + 1)
    per_step = shape.samples // shape.steps
    few = max(1, shape.steps // 60)
    # Between the first saves and the last: a divergence needs a checkpoint to go back to, and steps to end well.
    low, high = shape.samples // 4, shape.samples * 3 // 4
    start = draw.randrange(low, high)
    stretch = range(start, start + (divergence_steps + 1) * per_step, max(1, per_step // 2))
    return Faults(
        nan_samples=tuple(sorted({*draw.sample(range(low, high), few), *stretch})),
        spike_samples=tuple(sorted(draw.sample(range(low, high), few))),
    )


def faults_of(moments: Sequence[Moment], data: Faults, shape: Shape) -> Faults:
    """What the ranks themselves have to do."""
    once = [
        Once(kind=moment.kind, step=moment.step, rank=0 if moment.kind == "file_system_error" else moment.rank(shape))
        for moment in moments
        if moment.kind in INSIDE
    ]
    return Faults(nan_samples=data.nan_samples, spike_samples=data.spike_samples, once=tuple(once))


def do_fault(run: WatchedRun, moment: Moment, shape: Shape, *, pace_seconds: float, ended: int) -> Strike | None:
    """Start the run where it does not run, wait for the moment, do the fault; returns when the run has to help itself.

    Attempt `ended` has met its end already, though its processes may still be there: the fault comes to a later one.
    None when the save that it was to come into did not take place: another fault had kept it from being written.
    """
    run.start()
    began = time.time()
    if moment.kind in INSIDE:
        return _await_inside(run, moment, shape)
    attempt = reach(run, moment, later_than=ended)
    ranks = run.wait_for_ranks(attempt, shape.processes)
    if moment.kind in IN_SAVE:
        files = 1 + int(moment.fraction * (shape.processes + 3))  # a rank's file each, three small ones, the tokenizer
        if not _meets_save(run, moment, attempt, files=files, since=began):
            return None
    else:
        time.sleep(moment.fraction * pace_seconds)
    struck = time.time()
    rank = ranks[moment.rank(shape)]
    if moment.kind in ("machine", "machine_in_save", *DAMAGE):
        run.kill_all(ranks)
    elif moment.kind == "supervisor":
        run.kill_supervisor()
    elif moment.kind in ("rank", "rank_in_save"):
        run.kill_rank(rank)
    elif moment.kind == "stopped_rank":
        rank.send_signal(signal.SIGSTOP)
    elif moment.kind == "sigterm":
        _stop(run, [signal.SIGTERM], ExitCode.RESUMABLE)
    else:
        _stop(run, [signal.SIGINT, signal.SIGINT], None)
    torn = [step for step in shape.save_steps if 0 < run.files_of_save(step, began) < PUBLISHED]
    if moment.kind in DAMAGE:
        _damage(run, moment)
    return Strike(
        moment=moment,
        attempt=attempt,
        time=struck,
        step=run.last_step(attempt),
        newest=run.newest_checkpoint(),
        torn=max(torn, default=None),
    )


def _meets_save(run: WatchedRun, moment: Moment, attempt: int, *, files: int, since: float) -> bool:
    """Wait for so many files of the moment's save; False when the run has gone on without it."""
    looks = itertools.count()

    def is_decided() -> bool:
        if run.files_of_save(moment.step, since) >= files:
            return True
        return next(looks) % 500 == 499 and run.last_step(attempt) > moment.step + STEPS_BEHIND

    run.wait(is_decided, f"step {moment.step} was saved", every_seconds=1e-4)
    return run.files_of_save(moment.step, since) > 0


def reach(run: WatchedRun, moment: Moment, *, later_than: int) -> int:
    """Wait until an attempt behind `later_than` has done the moment's step; its number."""

    def has_done_it() -> bool:
        attempt = last_attempt(run.run_dir)
        return attempt > later_than and run.last_step(attempt) >= moment.step

    run.wait(has_done_it, f"step {moment.step} was reached")
    return last_attempt(run.run_dir)


def _await_inside(run: WatchedRun, moment: Moment, shape: Shape) -> Strike:
    rank = 0 if moment.kind == "file_system_error" else moment.rank(shape)
    mark = run.run_dir / MARKS_FOLDER / f"{moment.kind}-{moment.step}-{rank}"
    run.wait(lambda: mark.exists() and mark.stat().st_size > 0, f"the {moment.kind} at step {moment.step} happened")
    attempt = int(mark.read_text())
    return Strike(
        moment=moment,
        attempt=attempt,
        time=mark.stat().st_mtime,
        step=run.last_step(attempt),
        newest=run.newest_checkpoint(),
    )


def _stop(run: WatchedRun, signals: Sequence[signal.Signals], expected: ExitCode | None) -> None:
    for number in signals:
        run.supervisor.send_signal(number)
        time.sleep(0.1)
    code = run.wait_ended()
    if code == ExitCode.FINISHED or (expected is not None and code != expected):
        raise UnexpectedEnd(f"exit code {code} after {signals[0].name}")


def _damage(run: WatchedRun, moment: Moment) -> None:
    """Flip a bit of the newest checkpoint, or cut a file of it, where there is an older one to fall back on."""
    folders = published(run.run_dir / "checkpoints")
    if len(folders) < 2:
        return
    draw = random.Random(moment.fraction)
    path: Path = draw.choice([path for path in sorted(folders[-1].rglob("*")) if path.is_file()])
    place = draw.randrange(path.stat().st_size)
    with path.open("r+b") as stream:
        if moment.kind == "cut_file":
            stream.truncate(place)
            return
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ (1 << draw.randrange(8))]))


def detection_seconds(run_dir: Path, strike: Strike) -> float | None:
    """From the fault to the end of its attempt, as the supervisor wrote it down; None where nobody was left to write."""
    outcome = read_outcome(run_dir, strike.attempt)
    return None if outcome is None else outcome.time - strike.time
