"""Notices a rank that stands still, and says which one it is: stacks and last step of all ranks in one report.

Every rank beats by saying what it begins. A thread sends the beat to the store about once a second; when the beat is older
than its deadline, here or on another rank, all ranks send their stacks, one of them writes `hang.json` and `hang.txt`, and
all leave. A rank that cannot answer, because it is stopped or its interpreter is held up, is named as such; what the
interpreter cannot do then (show its stacks, leave) is done by a thread of the standard library's faulthandler.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from train.config.watchdog import WatchdogConfig
from train.host import host_name

Phase = Literal["start-up", "data", "forward", "update", "log", "evaluate", "save"]
PROGRESS: tuple[Phase, ...] = ("start-up", "data", "forward", "update", "log", "evaluate", "save")
_IN_COLLECTIVE = ("torch/distributed/", "deepspeed/comm/")
_KEY = "watchdog"
HANG_FILE = "hang.json"


class Store(Protocol):
    """What is used of torch.distributed's store."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...


class Silent:
    """Watches nothing: for processes that have nobody to restart them."""

    def phase(self, name: Phase, step: int = 0) -> None:
        """Nothing."""

    def connect(self, store: Any, hosts: Sequence[str]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Watchdog:
    """This rank's. `leave` is called on the rank that writes the report, with its summary and the hosts that lag; then every
    rank exits with 1."""

    def __init__(
        self, config: WatchdogConfig, *, folder: Path, rank: int, world_size: int, leave: Callable[[str, Sequence[str]], None]
    ) -> None:
        self.config, self.folder, self.rank, self.world_size = config, folder, rank, world_size
        self._leave = leave
        self._beat: tuple[Phase, int, float] = ("start-up", 0, time.monotonic())
        self._first_step_done = False
        self._store: Store | None = None
        self._hosts = [host_name()] * world_size
        self._alarm: str | None = None
        self._closed = threading.Event()
        given = [value for value in _deadlines(config).values() if value is not None]
        self._tick = min(0.5, *(value / 8 for value in given)) if given else 0.5
        self._main = threading.main_thread().ident
        folder.mkdir(parents=True, exist_ok=True)
        self._stacks_file = (folder / f"stacks-rank-{rank:05d}.txt").open("w")
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def phase(self, name: Phase, step: int = 0) -> None:
        """Say what begins now. A rank that says nothing within the deadline of what it began counts as hung."""
        if name == "log":
            self._first_step_done = True
        self._beat = (name, step, time.monotonic())

    def connect(self, store: Any, hosts: Sequence[str]) -> None:
        """Meet the other ranks; `hosts` are theirs, by rank.

        The store's client becomes one of its own: with the training's, which may be waiting, this would wait too.
        """
        self._hosts = list(hosts)
        self._store = store.clone() if hasattr(store, "clone") else store
        threading.Thread(target=self._publish, name="watchdog-beats", daemon=True).start()

    def close(self) -> None:
        """Watch no more."""
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()

    def _deadline(self) -> float | None:
        phase = self._beat[0] if self._first_step_done or self._beat[0] in ("evaluate", "save") else "start-up"
        return _deadlines(self.config)[phase]

    def _watch(self) -> None:
        """The thread that decides. It never touches the store itself: the store's owner may be the one that hangs."""
        while not self._closed.wait(self._tick):
            phase, step, began = self._beat
            deadline, quiet = self._deadline(), time.monotonic() - began
            if deadline is not None:
                if quiet > deadline:
                    self._alarm = self._alarm or f"rank {self.rank} was silent for {quiet:.1f} s in {phase} of step {step}"
                # Where the interpreter is held up this thread stands still too, and that clock runs out.
                left = max(0.0, deadline - quiet) + 3 * self.config.grace_seconds + 10 * self._tick
                faulthandler.dump_traceback_later(left, exit=True, file=self._stacks_file)
            if self._alarm is not None:
                self._end(self._alarm)

    def _publish(self) -> None:
        """The thread that tells the others, and hears of their alarm."""
        store = self._store
        assert store is not None, "connected before"
        with contextlib.suppress(Exception):  # whatever the store says: without it each rank watches itself alone
            while not self._closed.wait(self._tick):
                store.set(f"{_KEY}/beat/{self.rank}", json.dumps(self._facts()))
                if store.check([f"{_KEY}/alarm"]):
                    self._alarm = self._alarm or store.get(f"{_KEY}/alarm").decode()

    def _facts(self) -> dict[str, Any]:
        phase, step, began = self._beat
        return {
            "rank": self.rank,
            "host": host_name(),
            "pid": os.getpid(),
            "step": step,
            "phase": phase,
            "silent_seconds": round(time.monotonic() - began, 3),
        }

    def _end(self, alarm: str) -> None:
        """Gather, report on one rank, leave on all. Does not return."""
        stacks = self._stacks()
        mine = {**self._facts(), "stacks": stacks}
        with contextlib.suppress(OSError):
            self._stacks_file.write("\n".join(stacks.values()))
            self._stacks_file.flush()
        found: dict[int, dict[str, Any]] = {self.rank: mine}
        gathering = threading.Thread(target=self._gather, args=(alarm, mine, found), daemon=True)
        gathering.start()
        gathering.join(2 * self.config.grace_seconds)
        if self._is_reporter():
            summary, behind = self._report(alarm, dict(found))
            print(f"longhaul: {summary}", file=sys.stderr, flush=True)
            with contextlib.suppress(Exception):  # nothing may keep it from leaving
                self._leave(summary, [self._hosts[rank] for rank in behind])
        else:
            time.sleep(self.config.grace_seconds / 2)  # the launcher ends all when the first leaves: let the report be done
        os._exit(1)

    def _gather(self, alarm: str, mine: Mapping[str, Any], found: dict[int, dict[str, Any]]) -> None:
        """Put what each rank sends into `found`, until all have or the time is over."""
        store = self._store
        if store is None:
            return
        with contextlib.suppress(Exception):
            store.set(f"{_KEY}/alarm", alarm)
            store.set(f"{_KEY}/stacks/{self.rank}", json.dumps(mine))
            until = time.monotonic() + self.config.grace_seconds
            while len(found) < self.world_size and time.monotonic() < until:
                for rank in range(self.world_size):
                    if rank not in found and store.check([f"{_KEY}/stacks/{rank}"]):
                        found[rank] = json.loads(store.get(f"{_KEY}/stacks/{rank}"))
                time.sleep(0.02)
            for rank in range(self.world_size):  # of those that do not answer, at least where they were last
                if rank not in found and store.check([f"{_KEY}/beat/{rank}"]):
                    found[rank] = json.loads(store.get(f"{_KEY}/beat/{rank}"))

    def _is_reporter(self) -> bool:
        """Whether this rank is the first to say so; a file decides, since the store may be what hangs."""
        try:
            os.close(os.open(self.folder / HANG_FILE, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        except OSError:
            return self.rank == 0
        return True

    def _report(self, alarm: str, found: dict[int, dict[str, Any]]) -> tuple[str, list[int]]:
        """Write both files; the summary, and the ranks that lag."""
        silent = [rank for rank in range(self.world_size) if "stacks" not in found.get(rank, {})]
        behind = silent or lagging(list(found.values()))
        names = ", ".join(f"rank {rank} on {self._hosts[rank]}" for rank in behind)
        what = "does not answer" if silent else "lags"
        where = found.get(behind[0])
        seen = f", last seen in {where['phase']} of step {where['step']}" if where else ""
        summary = f"hung: {names} {what}{seen} ({alarm})"
        report = {"summary": summary, "lagging_ranks": behind, "ranks": [found[rank] for rank in sorted(found)]}
        lines = [summary]
        for rank in sorted(found):
            facts = {key: value for key, value in found[rank].items() if key != "stacks"}
            lines += ["", " ".join(f"{key}={value}" for key, value in facts.items())]
            lines += list(found[rank].get("stacks", {"": "(no stacks)"}).values())
        with contextlib.suppress(OSError):
            (self.folder / HANG_FILE).write_text(json.dumps(report, indent=1), encoding="utf-8")
            (self.folder / "hang.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return f"{summary}; the stacks of all ranks are in {self.folder / 'hang.txt'}", behind

    def _stacks(self) -> dict[str, str]:
        """Text of the stack of every thread but this one, the main thread first."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        frames = sorted(sys._current_frames().items(), key=lambda item: item[0] != self._main)
        return {
            names.get(ident, str(ident)): f"thread {names.get(ident, ident)}:\n" + "".join(traceback.format_stack(frame))
            for ident, frame in frames
            if ident != threading.get_ident()
        }


def lagging(reports: list[dict[str, Any]]) -> list[int]:
    """Ranks that hold the others up: those with the least progress, and among equals those that wait for nobody."""

    def progress(report: Mapping[str, Any]) -> tuple[int, int]:
        return report["step"], PROGRESS.index(report["phase"])

    least = min(progress(report) for report in reports)
    last = [report for report in reports if progress(report) == least]
    alone = [report for report in last if not _waits_for_others(report["stacks"])]
    return [report["rank"] for report in alone or last]


def _waits_for_others(stacks: Mapping[str, str]) -> bool:
    main = next(iter(stacks.values()), "")
    return any(f'"{place}' in main or f"/{place}" in main for place in _IN_COLLECTIVE)


def _deadlines(config: WatchdogConfig) -> dict[str, float | None]:
    """Seconds for each phase."""
    step = dict.fromkeys(("data", "forward", "update", "log"), config.step_seconds)
    return {"start-up": config.startup_seconds, **step, "evaluate": config.evaluate_seconds, "save": config.save_seconds}
