"""What happened to a unit of work, attempt by attempt: `slurm/history.jsonl`, one line when a job begins and one when it ends.

A unit is what one job does: a run, one run of a sweep, one part of a preparation. Its folder holds its logs and this file.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

from conf.errors import UserError

Action = Literal["done", "again", "stop", "leave"]
FILE = Path("slurm") / "history.jsonl"
CANCEL_FILE = Path("slurm") / "CANCEL"  # a person has cancelled it; nothing follows until it is resumed


@dataclass(frozen=True, kw_only=True)
class Begin:
    """An attempt has begun."""

    attempt: int
    job: str
    nodes: tuple[str, ...]
    newest: int | None
    """Step of the newest checkpoint then; None: what is done here has no steps."""
    restarts: int = 0
    """How often the scheduler had started the job before."""
    time: float = field(default_factory=time.time)


@dataclass(frozen=True, kw_only=True)
class End:
    """An attempt has ended, and what was decided."""

    attempt: int
    state: str
    """finished, stopped, refused, crashed, unfit (a node failed its check) or lost (nobody was left to say how it ended)."""
    reason: str
    action: Action
    """done; again: another attempt follows; stop: none follows by itself; leave: the scheduler or a later attempt decides."""
    newest: int | None
    suspects: tuple[str, ...] = ()
    """Nodes that another attempt should not get."""
    time: float = field(default_factory=time.time)


@dataclass(frozen=True, kw_only=True)
class Resume:
    """A person wants it to go on, or to do more: what counted against it is forgotten, and that it was done."""

    time: float = field(default_factory=time.time)


Event = Begin | End | Resume
_KINDS: dict[str, type[Begin] | type[End] | type[Resume]] = {"begin": Begin, "end": End, "resume": Resume}


@dataclass(frozen=True)
class History:
    """The events of a unit, oldest first."""

    events: tuple[Event, ...] = ()

    @property
    def current(self) -> History:
        """What counts: all behind the last time that a person resumed it."""
        starts = [number for number, event in enumerate(self.events) if isinstance(event, Resume)]
        return History(self.events[starts[-1] + 1 :]) if starts else self

    @property
    def ends(self) -> list[End]:
        """The ends, oldest first."""
        return [event for event in self.events if isinstance(event, End)]

    @property
    def open(self) -> Begin | None:
        """The attempt that has begun and not ended."""
        ended = {end.attempt for end in self.ends}
        begun = [event for event in self.events if isinstance(event, Begin)]
        return begun[-1] if begun and begun[-1].attempt not in ended else None

    @property
    def last_end(self) -> End | None:
        """The newest end."""
        return self.ends[-1] if self.ends else None

    @property
    def is_done(self) -> bool:
        """Whether it is finished, as far as it was last asked for."""
        end = self.current.last_end
        return end is not None and end.action == "done"

    @property
    def stopped(self) -> End | None:
        """The end behind which nothing follows by itself, if that is where it stands."""
        end = self.current.last_end
        return end if end is not None and end.action == "stop" else None

    @property
    def suspects(self) -> tuple[str, ...]:
        """Nodes that an attempt should not get, the latest suspected last."""
        return tuple(dict.fromkeys(node for end in self.current.ends for node in end.suspects))

    def num_crashes(self) -> int:
        """Attempts that crashed or were lost."""
        return sum(end.state in ("crashed", "lost") for end in self.current.ends)

    def num_unfit(self) -> int:
        """How many attempts in a row, up to the last, ended before their first step by what was found out about nodes."""
        return sum(1 for _ in itertools.takewhile(lambda end: end.state == "unfit", reversed(self.current.ends)))

    def num_without_steps(self) -> int:
        """Attempts at something that has no steps to tell its progress by."""
        return sum(end.newest is None for end in self.current.ends)

    def num_without_progress(self) -> int:
        """How many attempts in a row, up to the last, left no newer checkpoint than they found."""
        begins = {event.attempt: event for event in self.events if isinstance(event, Begin)}
        count = 0
        for end in reversed(self.current.ends):
            begin = begins.get(end.attempt)
            if end.state == "unfit" or begin is None:
                continue  # it was not given the chance
            if begin.newest is None or end.newest is None or end.newest > begin.newest:
                break
            count += 1
        return count


def read_history(unit: Path) -> History:
    """What is known of a unit. A line that was cut off by a full disk or a crash is left out."""
    try:
        lines = (unit / FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return History()
    except OSError as error:
        raise UserError(f"{unit / FILE}: cannot be read ({error.strerror})") from None
    return History(tuple(event for line in lines if (event := _event(line)) is not None))


def _event(line: str) -> Event | None:
    try:
        raw = json.loads(line)
        kind = _KINDS[raw.pop("event")]
        known = {item.name for item in fields(kind)}
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in raw.items() if name in known}
        return kind(**values)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def add_event(unit: Path, event: Event) -> None:
    """Write one more event, whole and durably."""
    name = next(name for name, kind in _KINDS.items() if isinstance(event, kind))
    path = unit / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"event": name, **asdict(event)}) + "\n"
    with path.open("ab") as file:
        if file.tell() and not _ends_with_newline(path):
            line = "\n" + line  # the line before was cut off
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def listed(names: Sequence[str]) -> str:
    """Names as a list for a person; a dash for none."""
    return ",".join(names) or "-"
