"""`longhaul status`, `logs`, `cancel` and `resume`: what people do with runs that were submitted."""

from __future__ import annotations

import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from conf.compose import compose, read_config, to_plain, validate
from conf.errors import ConfigError, UserError
from conf.schema import shown
from slurm.history import CANCEL_FILE
from slurm.lifecycle import CONFIG_FILE, REPORT_FILE
from slurm.scheduler import Scheduler, scheduler_of
from slurm.submission import SUBMISSION_FILE, Submission, read_submission
from slurm.submit import refuse_if_active, reopen, send
from slurm.watch import Progress, Queue, Standing, find_run, find_runs, is_active, newest_log, standings
from train.config.changes import leaves
from train.config.runs import RUNS
from train.metrics.console import duration
from train.outcome import STOP_FILE, attempt_folder, last_attempt

POLL_SECONDS = 0.5
ASK_SECONDS = 20.0  # between two looks at the queue while a log is followed


@dataclass(frozen=True, kw_only=True)
class StatusConfig:
    run: str | None = None
    """Name of one run, for all of its parts; null: every run, one line each."""
    folder: str = "runs"
    """Where the runs are."""


@dataclass(frozen=True, kw_only=True)
class LogsConfig:
    run: str
    """Name of the run."""
    rank: int = 0
    """Whose log."""
    attempt: int | None = None
    """Number of the attempt; null: the newest, and those that come after it."""
    part: str = ""
    """Which run of a sweep, or part of a preparation, such as 003."""
    lines: int = 50
    """So many from the end are shown first."""
    follow: bool = True
    """Go on while the run goes on; Ctrl-C ends it."""
    folder: str = "runs"
    """Where the runs are."""

    def __post_init__(self) -> None:
        names = [name for name in ("rank", "lines") if getattr(self, name) < 0]
        if names:
            raise ConfigError([f"{name}={getattr(self, name)}: must not be negative" for name in names])


@dataclass(frozen=True, kw_only=True)
class CancelConfig:
    run: str
    """Name of the run."""
    save: bool = True
    """Let it save first; false ends it at once, and what came after its newest checkpoint is done again."""
    wait_seconds: float = 300.0
    """How long it may take to save before its jobs are ended."""
    folder: str = "runs"
    """Where the runs are."""


@dataclass(frozen=True, kw_only=True)
class ResumeConfig:
    run: str
    """Name of the run."""
    folder: str = "runs"
    """Where the runs are."""


def status(overrides: Sequence[str], config_dir: str | None = None) -> int:
    """`longhaul status`."""
    config = validate(StatusConfig, compose("status", overrides, config_dir))
    folder = Path(config.folder)
    if config.run is not None:
        _show_one(find_run(folder, config.run))
        return 0
    roots = find_runs(folder)
    if not roots:
        print(f"{folder}: no runs; `longhaul submit`, `longhaul pretrain` or `longhaul finetune` makes them")
        return 0
    rows, queue = [], Queue()
    for root in roots:
        name = str(root.relative_to(folder))
        try:
            units = standings(root, queue)
            rows.append(_row(name, units[0]) if len(units) == 1 else _summed(name, units))
        except UserError as error:  # of one run; the others are shown
            rows.append((name, "unknown", "-", "-", "-", "-", "-", "-", str(error)))
    print(table(HEADER, rows))
    return 0


HEADER = ("RUN", "STATE", "STEP", "LOSS", "TOK/S", "ETA", "TRIES", "NODES", "REASON")


def _show_one(root: Path) -> None:
    units = standings(root)
    print(table(HEADER, [_row(one.name, one) for one in units]))
    if len(units) > 1 and all((one.unit / CONFIG_FILE).exists() for one in units):
        print("\n" + results(units))
    for one in units:
        for job in one.jobs:
            print(f"{one.name}: job {job}")
        if (report := one.unit / REPORT_FILE).exists() and one.state == "stopped":
            print(f"{one.name}: {report} tells what its last attempts met")


def _row(name: str, one: Standing) -> tuple[str, ...]:
    step, loss, rate, eta = _numbers(one.progress)
    if not one.state.startswith("running"):
        rate, eta = "-", "-"
    return (name, one.state, step, loss, rate, eta, str(one.attempts), one.nodes, one.reason or "-")


def _numbers(progress: Progress | None) -> tuple[str, str, str, str]:
    if progress is None:
        return ("-", "-", "-", "-")
    total = "" if progress.total_steps is None else f"/{progress.total_steps}"
    rate = "-" if progress.tokens_per_second is None else f"{progress.tokens_per_second:,.0f}"
    left = progress.eta_seconds
    eta = "-" if left is None or (progress.total_steps or 0) <= progress.step else duration(left)
    return (f"{progress.step}{total}", f"{progress.loss:.4f}", rate, eta)


def _summed(name: str, units: Sequence[Standing]) -> tuple[str, ...]:
    """One line for a run of many parts."""
    counts: dict[str, int] = {}
    for one in units:
        counts[one.state] = counts.get(one.state, 0) + 1
    state = ", ".join(f"{count} {state}" for state, count in counts.items())
    reason = next((one.reason for one in units if one.state in ("stopped", "lost", "cancelled")), "-")
    tries = sum(one.attempts for one in units)
    return (name, state, "-", "-", "-", "-", str(tries), "-", reason)


def results(units: Sequence[Standing]) -> str:
    """What the runs of a sweep were given that the others were not, and what came out, the best first."""
    settings = [leaves(to_plain(read_config(RUNS, one.unit / CONFIG_FILE))) for one in units]
    names = [
        name
        for name in settings[0]
        if not name.startswith(("run.", "launch.")) and len({str(one.get(name)) for one in settings}) > 1
    ]

    def outcome(one: Standing) -> float:
        found = one.progress
        value = None if found is None else found.validation_loss if found.validation_loss is not None else found.loss
        return float("inf") if value is None or value != value else value

    ranked = sorted(zip(units, settings, strict=True), key=lambda pair: outcome(pair[0]))
    rows = []
    for one, given in ranked:
        found = one.progress
        held_out = "-" if found is None or found.validation_loss is None else f"{found.validation_loss:.4f}"
        loss = "-" if found is None else f"{found.loss:.4f}"
        step = "-" if found is None else str(found.step)
        rows.append((one.unit.name, *(shown(given.get(name)) for name in names), step, loss, held_out, one.state))
    return table(("RUN", *names, "STEP", "LOSS", "HELD-OUT LOSS", "STATE"), rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side; the last one is cut where the terminal ends."""
    widths = [max(len(row[index]) for row in (header, *rows)) for index in range(len(header) - 1)]
    room = max(30, shutil.get_terminal_size((200, 24)).columns - sum(widths) - 2 * len(widths))
    lines = []
    for row in (header, *rows):
        last = " ".join(row[-1].split())
        cut = last if len(last) <= room or not sys.stdout.isatty() else last[: room - 3] + "..."
        lines.append("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), cut]).rstrip())
    return "\n".join(lines)


def logs(overrides: Sequence[str], config_dir: str | None = None) -> int:
    """`longhaul logs`."""
    config = validate(LogsConfig, compose("logs", overrides, config_dir))
    root = find_run(Path(config.folder), config.run)
    unit = root / config.part
    if not unit.is_dir():
        raise UserError(f"part={config.part}: {root} has no such part")
    if not config.part and (root / SUBMISSION_FILE).exists():
        parts = [str(place.relative_to(root)) for _, _, place in read_submission(root).units() if place != root]
        if parts:
            raise UserError(f"run={config.run}: has parts; say which by part={parts[0]} ({', '.join(parts)})")
    number = config.attempt or last_attempt(unit)
    follows = config.follow and config.attempt is None
    active, asked = is_active(root), time.monotonic()
    path = attempt_folder(unit, number) / f"rank-{config.rank:05d}.log"
    while follows and active and not path.exists():  # it waits, or its nodes are being checked
        time.sleep(POLL_SECONDS)
        number = max(1, last_attempt(unit))
        path = attempt_folder(unit, number) / path.name
        if time.monotonic() - asked > ASK_SECONDS:
            active, asked = is_active(root), time.monotonic()
    position = _show_log(newest_log(unit, config.rank, config.attempt), config.lines)
    while follows:
        position = _show_more(path, position)
        if last_attempt(unit) > number:
            number += 1
            path, position = attempt_folder(unit, number) / path.name, 0
            print(f"----- attempt {number}", flush=True)
        elif time.monotonic() - asked > ASK_SECONDS or not active:
            active, asked = is_active(root), time.monotonic()
            if not active:
                _show_more(path, position)
                return 0
        time.sleep(POLL_SECONDS)
    return 0


def _show_log(path: Path, lines: int) -> int:
    """Print the last lines; where they end."""
    content = path.read_bytes()
    whole = content.decode("utf-8", errors="replace").splitlines()
    for line in whole[len(whole) - min(lines, len(whole)) :]:
        print(line)
    sys.stdout.flush()
    return len(content)


def _show_more(path: Path, position: int) -> int:
    """Print what has come since `position`; the new one."""
    if not path.exists():
        return position
    with path.open("rb") as file:
        file.seek(position)
        more = file.read()
    sys.stdout.write(more.decode("utf-8", errors="replace"))
    sys.stdout.flush()
    return position + len(more)


def cancel(overrides: Sequence[str], config_dir: str | None = None) -> int:
    """`longhaul cancel`: jobs that wait are taken out of the queue, those that run save first."""
    config = validate(CancelConfig, compose("cancel", overrides, config_dir))
    root = find_run(Path(config.folder), config.run)
    if not (root / SUBMISSION_FILE).exists():
        (root / STOP_FILE).touch()
        print(f"{config.run} was not submitted: the file {root / STOP_FILE} asks it to save and stop, if it runs")
        return 0
    submission = read_submission(root)
    scheduler = scheduler_of(submission.scheduler)
    active = scheduler.jobs(submission.job_ids())
    if not active:
        raise UserError(f"run={config.run}: has no job; `longhaul status run={config.run}` tells how it stands")
    for _, _, unit in submission.units():
        (unit / "slurm").mkdir(parents=True, exist_ok=True)
        (unit / CANCEL_FILE).touch()
    waiting = [job.id for job in active.values() if job.state == "PENDING"]
    running = [job.id for job in active.values() if job.state != "PENDING"]
    scheduler.cancel(waiting)
    what = "save and stop" if config.save else "ended, without saving"
    print(f"cancelled        {len(waiting)} waiting job(s)" + (f"; {', '.join(running)} {what}" if running else ""))
    if running and config.save:
        scheduler.signal(running, signal.SIGUSR1)
        left = _await_end(scheduler, running, config.wait_seconds)
        if left:
            print(f"not ended within {config.wait_seconds:g} s: {', '.join(left)}; ending them", file=sys.stderr)
            scheduler.cancel(left)
    elif running:
        scheduler.cancel(running)
    print(f"next             longhaul resume run={shown(config.run)} goes on from the newest checkpoint")
    return 0


def _await_end(scheduler: Scheduler, jobs: Sequence[str], seconds: float) -> list[str]:
    deadline = time.monotonic() + seconds
    while (left := sorted(scheduler.jobs(jobs))) and time.monotonic() < deadline:
        time.sleep(4 * POLL_SECONDS)
    return left


def resume(overrides: Sequence[str], config_dir: str | None = None) -> int:
    """`longhaul resume`: submit the same scripts again; what counted against the run is forgotten."""
    config = validate(ResumeConfig, compose("resume", overrides, config_dir))
    root = find_run(Path(config.folder), config.run)
    if not (root / SUBMISSION_FILE).exists():
        raise UserError(f"run={config.run}: was not submitted; the words of `longhaul` that began it go on with it")
    submission: Submission = read_submission(root)
    scheduler = scheduler_of(submission.scheduler)
    refuse_if_active(root)
    if submission.unit_states().finished:
        print(f"{config.run} is finished; nothing to do")
        return 0
    reopen(submission, even_finished=False)
    send(submission, scheduler)
    return 0
