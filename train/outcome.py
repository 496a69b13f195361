"""How an attempt ended: exit codes, `logs/attempt-NN/outcome.json`, and the numbering of attempts. No torch here."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from enum import IntEnum
from pathlib import Path
from typing import Literal, cast, get_args

from conf.errors import UserError
from train.host import host_name

State = Literal["finished", "stopped", "refused", "crashed"]

STOP_FILE = "STOP"  # in a run's folder: a person asks it to save and stop

_ATTEMPT_FOLDER = re.compile(r"attempt-(\d+)")


class ExitCode(IntEnum):
    """What a process of a run tells its caller. Any other code is a crash."""

    FINISHED = 0
    CRASHED = 1
    RESUMABLE = 85
    DO_NOT_RESTART = 93


_CODE_OF_STATE: dict[State, ExitCode] = {
    "finished": ExitCode.FINISHED,
    "stopped": ExitCode.RESUMABLE,
    "refused": ExitCode.DO_NOT_RESTART,
    "crashed": ExitCode.CRASHED,
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of one attempt, for scripts to decide by and for people to read."""

    attempt: int
    """Number of the attempt, from 1."""
    state: State
    """finished, stopped (saved; run again), refused (do not run again as it is) or crashed."""
    reason: str
    """One sentence: why it ended."""
    next: str
    """One sentence: what to do now."""
    step: int | None = None
    """Last step that was done; None: unknown."""
    time: float = field(default_factory=time.time)
    """When it ended, in unix seconds."""
    host: str = field(default_factory=host_name)
    """Machine that wrote this."""
    on_purpose: bool = False
    """A person asked for this stop: no launcher starts the run again by itself."""
    suspects: tuple[str, ...] = ()
    """Machines that seem to have caused a crash."""
    rank_codes: Mapping[str, int] = field(default_factory=dict)
    """Exit code of each rank that is known; a negative code is the signal that ended it."""

    @property
    def exit_code(self) -> ExitCode:
        """The code that goes with the state."""
        return _CODE_OF_STATE[self.state]


def attempt_folder(run_dir: Path, attempt: int) -> Path:
    """Folder of an attempt's logs and outcome."""
    return run_dir / "logs" / f"attempt-{attempt:02d}"


def last_attempt(run_dir: Path) -> int:
    """Number of the newest attempt; 0 when there was none."""
    logs = run_dir / "logs"
    if not logs.is_dir():
        return 0
    matches = (_ATTEMPT_FOLDER.fullmatch(entry.name) for entry in logs.iterdir())
    return max((int(match.group(1)) for match in matches if match), default=0)


def claim_attempt(run_dir: Path) -> int:
    """Make the folder of the next attempt and return its number; two callers never get the same one."""
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    while True:
        attempt = last_attempt(run_dir) + 1
        try:
            attempt_folder(run_dir, attempt).mkdir()
        except FileExistsError:  # another caller was faster between the look and the mkdir
            continue
        return attempt


def write_outcome(run_dir: Path, outcome: Outcome) -> Path:
    """Write `outcome.json` of the attempt, whole or not at all, and return its path."""
    path = attempt_folder(run_dir, outcome.attempt) / "outcome.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".outcome.{os.getpid()}")
    text = json.dumps({**asdict(outcome), "exit_code": int(outcome.exit_code)}, indent=2) + "\n"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # scripts decide by this file, also after the machine lost power
    temporary.replace(path)
    return path


def read_outcome(run_dir: Path, attempt: int) -> Outcome | None:
    """The outcome of an attempt, or None when it wrote none.

    Raises UserError for a file that is not an outcome: it was changed by hand or by another program.
    """
    path = attempt_folder(run_dir, attempt) / "outcome.json"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); move it away to go by exit codes") from None
    known = {item.name for item in fields(Outcome)}
    if not isinstance(tree, dict) or tree.get("state") not in get_args(State):
        states = ", ".join(get_args(State))
        raise UserError(f"{path}: needs a state out of {states}; move it away to go by exit codes")
    try:
        outcome = Outcome(**cast(dict, {key: value for key, value in tree.items() if key in known}))
        return replace(outcome, suspects=tuple(outcome.suspects))
    except TypeError as error:
        raise UserError(f"{path}: {error}; move it away to go by exit codes") from None


@dataclass(frozen=True, kw_only=True)
class CrashNote:
    """What one rank says of its own end by an exception."""

    rank: int
    host: str
    time: float
    """Unix seconds."""
    error: str


def write_crash_note(run_dir: Path, attempt: int, *, rank: int, error: str) -> None:
    """Leave this rank's note beside the logs: which rank fell first, and whether all fell alike, tells whose fault it was.

    Where it cannot be written nothing happens: the log has the error too.
    """
    note = CrashNote(rank=rank, host=host_name(), time=time.time(), error=error)
    with contextlib.suppress(OSError):
        path = attempt_folder(run_dir, attempt) / f"crash-{rank:05d}.json"
        path.write_text(json.dumps(asdict(note)) + "\n", encoding="utf-8")


def read_crash_notes(run_dir: Path, attempt: int) -> list[CrashNote]:
    """The notes of the ranks that crashed by an exception, the first one first; those half written are left out."""
    notes = []
    for path in attempt_folder(run_dir, attempt).glob("crash-*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            notes.append(CrashNote(**json.loads(path.read_text(encoding="utf-8"))))
    return sorted(notes, key=lambda note: note.time)
