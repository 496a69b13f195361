"""How runs stand: by the scheduler's queue, the history of their units, and what they measured. Also without a cluster."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from conf.compose import read_config
from conf.errors import UserError
from conf.schema import nearest
from slurm.history import CANCEL_FILE, Begin, History, listed, read_history
from slurm.scheduler import Job, LocalScheduler, SlurmScheduler, scheduler_of
from slurm.submission import SUBMISSION_FILE, Stage, Submission, read_submission
from train.config.runs import RUNS
from train.metrics.jsonl import FILE_NAME
from train.metrics.record import Value, decode
from train.outcome import attempt_folder, last_attempt, read_outcome
from train.plan import make_plan

_TAIL_BYTES = 256 * 1024
_PACE_STEPS = 50
_QUIET_SECONDS = 300.0  # a run without a scheduler that has written nothing for so long is not taken for running
_DEPTH = 4  # of a run's name, in parts


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a training run measured last."""

    step: int
    total_steps: int | None
    loss: float
    tokens_per_second: float | None
    eta_seconds: float | None
    validation_loss: float | None
    age_seconds: float
    """Since the last line."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How one unit stands."""

    name: str
    unit: Path
    state: str
    reason: str
    attempts: int
    nodes: str
    progress: Progress | None
    jobs: tuple[str, ...] = ()


def find_runs(folder: Path) -> list[Path]:
    """Folders of the runs below `folder`, submitted or not, by name."""
    found: list[Path] = []

    def look(place: Path, depth: int) -> None:
        if (place / SUBMISSION_FILE).exists() or (place / "run.json").exists():
            found.append(place)
        elif depth:
            children: list[Path] = []
            with contextlib.suppress(OSError):  # a folder that may not be read holds no run of ours
                children = sorted(place.iterdir())
            for child in children:
                if child.is_dir() and not child.name.startswith("."):
                    look(child, depth - 1)

    if folder.is_dir():
        look(folder, _DEPTH)
    return found


def find_run(folder: Path, name: str) -> Path:
    """The folder of one run. Raises UserError when there is none of that name."""
    root = (folder / name).resolve()
    if (root / SUBMISSION_FILE).exists() or (root / "run.json").exists():
        return root
    known = [str(path.relative_to(folder)) for path in find_runs(folder)]
    raise UserError(f"run={name}: no such run below {folder}.{nearest(name, known) or ' `longhaul status` lists them'}")


class Queue:
    """The jobs that wait or run, asked for once: a controller with a thousand users is not asked for every run anew."""

    def __init__(self) -> None:
        self._slurm: Mapping[str, Job] | str | None = None

    def of(self, submission: Submission) -> Mapping[str, Job] | str:
        """Jobs of a submission; a text, why, when nobody knows."""
        try:
            if submission.scheduler == "local":
                return LocalScheduler().jobs(submission.job_ids())
            if self._slurm is None:
                self._slurm = SlurmScheduler().queue()
        except UserError as error:
            if submission.scheduler == "local":
                return str(error)
            self._slurm = str(error)
        return self._slurm


def standings(root: Path, queue: Queue | None = None) -> list[Standing]:
    """Every unit of a run. Raises UserError for a run whose files cannot be read."""
    if not (root / SUBMISSION_FILE).exists():
        return [_unsubmitted(root)]
    submission = read_submission(root)
    jobs = (queue or Queue()).of(submission)
    return [_standing(submission, jobs, stage=stage, number=number, unit=unit) for stage, number, unit in submission.units()]


def is_active(root: Path) -> bool:
    """Whether a run has jobs, or seems to run without any; also where the queue does not answer."""
    return any(one.jobs or one.state.startswith(("running", "waiting")) for one in standings(root))


def _standing(submission: Submission, queue: Mapping[str, Job] | str, *, stage: Stage, number: int, unit: Path) -> Standing:
    history = read_history(unit)
    progress = read_progress(unit)
    name = submission.name if unit == submission.root else f"{submission.name}/{unit.relative_to(submission.root)}"
    mine: list[Job] = []
    if isinstance(queue, str):
        state, reason = _state_without_queue(history, queue)
    else:
        mine = [job for one in stage.jobs for job in _of_unit(queue, one, number, array=len(stage.units) > 1)]
        state, reason = _state(submission, history, mine)
        if state == "lost" and (unit / CANCEL_FILE).exists():
            state, reason = "cancelled", "by `longhaul cancel`, without a save"
        job = history.open.job if history.open is not None else (stage.jobs or ("",))[-1]
        if history.open is None and len(stage.units) > 1:
            job = f"{job}_{number}"
        if state in ("lost", "cancelled") and job and (ended := _end_of(submission, job)):
            reason = f"{reason}; Slurm says {ended} of job {job}"
    begun = [event for event in history.events if isinstance(event, Begin)]
    nodes = next((job.nodes for job in mine if job.nodes), "") or (listed(begun[-1].nodes) if begun else "-")
    return Standing(
        name=name,
        unit=unit,
        state=state,
        reason=reason,
        attempts=last_attempt(unit),
        nodes=nodes,
        progress=progress,
        jobs=tuple(job.id for job in mine),
    )


def _state_without_queue(history: History, why: str) -> tuple[str, str]:
    """(state, reason) by the run's folder alone."""
    end = history.current.last_end
    told = f"attempt {end.attempt} {end.state}: {end.reason}" if end is not None else ""
    if history.open is None and end is not None and end.action in ("done", "stop"):
        return ("finished" if end.action == "done" else "stopped"), told
    reason = f"the queue is not known here ({why})" + (f"; {told}" if told else "")
    return ("running?" if history.open is not None else "waiting?"), reason


def _end_of(submission: Submission, job: str) -> str:
    try:
        return scheduler_of(submission.scheduler).end_of(job)
    except UserError:
        return ""


def _of_unit(queue: Mapping[str, Job], job: str, number: int, *, array: bool) -> Iterator[Job]:
    if job in queue:
        yield queue[job]
    elif array and f"{job}_{number}" in queue:
        yield queue[f"{job}_{number}"]


def _state(submission: Submission, history: History, jobs: Sequence[Job]) -> tuple[str, str]:
    """(state, reason) in words: what the queue says first, then how the last attempt ended."""
    end = history.last_end
    why = f"attempt {end.attempt} {end.state}: {end.reason}" if end else ""
    active = next((job for job in jobs if job.state not in ("PENDING",)), jobs[0] if jobs else None)
    if active is not None and not history.is_done:
        if active.state == "RUNNING":
            return "running", f"after {why}" if end else ""
        if active.state == "PENDING":
            expected = f", expected at {active.start}" if active.start else ""
            return "waiting", active.reason + expected + (f"; {why}" if end else "")
        return active.state.lower(), why
    if end is not None and history.open is None:
        return {"done": "finished", "again": "stopped", "leave": "stopped", "stop": "stopped"}[end.action], why
    if history.open is not None:
        return "lost", f"attempt {history.open.attempt} has no job any more and left no word; longhaul resume goes on"
    failed = [Path(folder).name for folder in submission.after if read_submission(Path(folder)).unit_states().failed]
    if failed:
        return "cancelled", f"{', '.join(failed)} failed, which it was to come after"
    if earlier := submission.unit_states().failed:
        return "cancelled", f"a stage before it failed ({earlier})"
    return "cancelled", "it has no job, and was never begun"


def _unsubmitted(root: Path) -> Standing:
    """A run that was started by `longhaul pretrain` or `longhaul finetune`."""
    attempt, progress = last_attempt(root), read_progress(root)
    outcome = read_outcome(root, attempt) if attempt else None
    state, reason, nodes = "lost", "no word of its end", "-"
    if outcome is not None:
        state, reason, nodes = outcome.state, outcome.reason, outcome.host
    elif progress is None or progress.age_seconds < _QUIET_SECONDS:
        state, reason = "running", ""
    return Standing(name=root.name, unit=root, state=state, reason=reason, attempts=attempt, nodes=nodes, progress=progress)


def read_progress(unit: Path) -> Progress | None:
    """What the end of a run's metrics says; None where there is nothing."""
    records = list(_tail(unit / FILE_NAME))
    steps = [record for record in records if record["kind"] == "train"]
    if not steps:
        return None
    evaluations = [record for record in records if record["kind"] == "evaluation" and not record.get("name")]
    last = steps[-1]
    recent = [record for record in steps[-_PACE_STEPS:] if record.get("attempt") == last.get("attempt")]
    seconds = float(last["time"]) - float(recent[0]["time"])
    done = int(last["step"]) - int(recent[0]["step"])
    total = _total_steps(unit)
    pace = seconds / done if done > 0 else None
    return Progress(
        step=int(last["step"]),
        total_steps=total,
        loss=float(last["loss"]),
        tokens_per_second=(int(last["tokens"]) - int(recent[0]["tokens"])) / seconds if done > 0 and seconds > 0 else None,
        eta_seconds=None if pace is None or total is None else max(0, total - int(last["step"])) * pace,
        validation_loss=float(evaluations[-1]["loss"]) if evaluations else None,
        age_seconds=time.time() - float(last["time"]),
    )


def _tail(path: Path) -> Iterator[Mapping[str, Value]]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            lines = file.read().splitlines(keepends=True)
    except OSError:
        return
    for line in lines:
        try:
            if line.endswith(b"\n"):
                yield decode(line)
        except ValueError:  # the first one is cut
            continue


def _total_steps(unit: Path) -> int | None:
    try:
        config = read_config(RUNS, unit / "config.yaml")
    except UserError:
        return None
    return make_plan(config, config.launch.processes or 1).total_steps


def newest_log(unit: Path, rank: int, attempt: int | None) -> Path:
    """Log of a rank. Raises UserError when there is none."""
    number = last_attempt(unit) if attempt is None else attempt
    if number == 0:
        raise UserError(f"{unit}: nothing has begun yet; `longhaul status` tells what it waits for")
    path = attempt_folder(unit, number) / f"rank-{rank:05d}.log"
    if not path.exists():
        there = sorted(int(one.stem.removeprefix("rank-")) for one in path.parent.glob("rank-*.log"))
        ranks = f"ranks {there[0]} to {there[-1]} have one" if there else "no rank has begun"
        raise UserError(f"rank={rank}: attempt {number} has no log of it; {ranks}")
    return path
