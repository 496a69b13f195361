"""`longhaul pretrain` as processes: started, watched from outside by what it writes, killed, and started again."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from train.checkpoint.manifest import MANIFEST, folder_of, published, step_of
from train.metrics.jsonl import FILE_NAME
from train.metrics.record import Value, decode
from train.outcome import ExitCode, last_attempt

MARK = "LONGHAUL_WATCHED"  # environment variable by which every process of a run is known, whoever its parent is
END_SECONDS = 15.0  # within this all processes of a killed run must be gone
TAIL_BYTES = 16 * 1024
PUBLISHED = sys.maxsize


class UnexpectedEnd(Exception):
    """The run ended, or stood still, when nobody had touched it."""


class WatchedRun:
    """One run: its command, its folder, its processes."""

    def __init__(self, command: Sequence[str], run_dir: Path, patience_seconds: float) -> None:
        self.command = list(command)
        self.run_dir = run_dir
        self.patience_seconds = patience_seconds
        self.log = run_dir.with_name(f"{run_dir.name}.log")
        self.orphans: list[str] = []
        """Processes that outlived their supervisor."""
        self._ports: set[int] = set()
        self._mark = secrets.token_hex(8)
        self._supervisor: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the command, unless it runs."""
        if self._supervisor is not None:
            return
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._supervisor = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, MARK: self._mark}
            )

    def wait(self, condition: Callable[[], bool], what: str, *, every_seconds: float = 0.002) -> None:
        """Wait for `condition`. Raises UnexpectedEnd when the run ends first, or it takes too long."""
        assert self._supervisor is not None, "started before"
        deadline = time.monotonic() + self.patience_seconds
        while not condition():
            code = self._supervisor.poll()
            if code is not None:
                self._supervisor = None
                raise UnexpectedEnd(f"exit code {code} before {what}\n{self._end_of_log()}")
            if time.monotonic() > deadline:
                raise UnexpectedEnd(f"waited {self.patience_seconds:g} s for {what}\n{self._end_of_log()}")
            time.sleep(every_seconds)

    def wait_for_ranks(self, attempt: int, processes: int) -> list[psutil.Process]:
        """The ranks of `attempt`, by rank, once all are there."""
        self.wait(lambda: last_attempt(self.run_dir) >= attempt, f"attempt {attempt} began", every_seconds=0.05)
        self.wait(lambda: len(self.ranks()) == processes, f"attempt {attempt} had its ranks", every_seconds=0.05)
        ranks = self.ranks()
        for process in ranks[:1]:
            with contextlib.suppress(psutil.Error):
                listening = [link for link in process.net_connections() if link.status == psutil.CONN_LISTEN]
                self._ports |= {link.laddr.port for link in listening}
        return ranks

    def wait_ended(self) -> int:
        """Wait for the end of the command; its exit code. What is left of its processes then is an orphan."""
        assert self._supervisor is not None, "started before"
        try:
            code = self._supervisor.wait(self.patience_seconds)
        except subprocess.TimeoutExpired:
            raise UnexpectedEnd(f"no end within {self.patience_seconds:g} s\n{self._end_of_log()}") from None
        self.bury()
        return code

    def finish(self) -> None:
        """Start it where it does not run, and wait for the end of its budget. Raises UnexpectedEnd for any other ending."""
        self.start()
        code = self.wait_ended()
        if code != ExitCode.FINISHED:
            raise UnexpectedEnd(f"exit code {code}\n{self._end_of_log()}")

    def bound_ports(self) -> list[int]:
        """Ports on which its first ranks listened and somebody still does, some time after the last process has gone."""
        deadline = time.monotonic() + END_SECONDS
        while (left := [port for port in sorted(self._ports) if _answers(port)]) and time.monotonic() < deadline:
            time.sleep(0.1)  # of a killed process the kernel clears away the memory first
        return left

    @property
    def supervisor(self) -> psutil.Process:
        """The process of the command."""
        assert self._supervisor is not None, "started before"
        return psutil.Process(self._supervisor.pid)

    def ranks(self) -> list[psutil.Process]:
        """The ranks that run now, by rank."""
        places = {}
        for process in self.supervisor.children():
            try:
                if "LONGHAUL_ATTEMPT" in process.environ() and "RANK" in process.environ():
                    places[int(process.environ()["RANK"])] = process
            except psutil.Error:  # it ended between the two looks
                continue
        return [places[rank] for rank in sorted(places)]

    def kill_all(self, ranks: Sequence[psutil.Process] = ()) -> None:
        """SIGKILL to every process, as when the machine dies; `ranks` first, without a look around that takes time."""
        for process in [*ranks, self.supervisor]:
            _kill(process)
        while left := self._marked():  # helpers, and what was born meanwhile
            for process in left:
                _kill(process)
        self.bury()

    def kill_supervisor(self) -> None:
        """SIGKILL to the supervisor alone; its ranks have to end by themselves, or count as orphans."""
        self.supervisor.kill()
        self.bury()

    def kill_rank(self, rank: psutil.Process) -> None:
        """SIGKILL to one rank; returns when it is dead. The supervisor has to notice."""
        _kill(rank)
        while _is_alive(rank):
            time.sleep(0.0005)

    def bury(self) -> None:
        """After the supervisor's end: wait until no process is left; those that stay are noted as orphans and killed."""
        assert self._supervisor is not None, "started before"
        self._supervisor.wait()
        self._supervisor = None
        deadline = time.monotonic() + END_SECONDS
        while (left := self._marked()) and time.monotonic() < deadline:
            time.sleep(0.02)
        for process in left:
            self.orphans.append(f"{process.pid}: {' '.join(process.info['cmdline'] or [])}")
            _kill(process)

    def close(self) -> None:
        """Leave no process behind, whatever happened."""
        if self._supervisor is not None:
            self.kill_all()

    def _marked(self) -> list[psutil.Process]:
        """Every process of this run that is alive, by the mark in its environment."""
        return [
            process
            for process in psutil.process_iter(["environ", "cmdline", "status"])
            if (process.info["environ"] or {}).get(MARK) == self._mark and process.info["status"] != psutil.STATUS_ZOMBIE
        ]

    def records(self) -> list[dict[str, Value]]:
        """All lines of metrics.jsonl, those that a later attempt replaced too."""
        return [decode(line) for line in (self.run_dir / FILE_NAME).read_bytes().splitlines()]

    def last_step(self, attempt: int) -> int:
        """Newest step that `attempt` has written; 0: none yet."""
        try:
            with (self.run_dir / FILE_NAME).open("rb") as stream:
                stream.seek(max(0, os.fstat(stream.fileno()).st_size - TAIL_BYTES))
                whole = [line for line in stream.read().splitlines(keepends=True) if line.endswith(b"\n")]
        except FileNotFoundError:
            return 0
        record = decode(whole[-1]) if whole else {}
        return int(record["step"]) if record.get("attempt") == attempt else 0

    def newest_checkpoint(self) -> int:
        """Step of the newest checkpoint that a resumed run would take; 0: none."""
        folders = published(self.run_dir / "checkpoints")
        return step_of(folders[-1]) if folders else 0

    def files_of_save(self, step: int, since: float) -> int:
        """How many files the save of `step` has written so far; 0: it has not begun, PUBLISHED: it is over.

        A folder that was last touched before `since` (unix seconds) was left by an earlier attempt.
        """
        folder = folder_of(self.run_dir / "checkpoints", step)
        try:
            names = [path.name for path in folder.iterdir()]
            if MANIFEST in names:
                return PUBLISHED
            return len(names) if folder.stat().st_mtime >= since else 0
        except FileNotFoundError:
            return 0

    def _end_of_log(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:]
        return "\n".join([f"the end of {self.log}:", *(f"  | {line}" for line in lines)])


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.2)
        return probe.connect_ex(("127.0.0.1", port)) == 0
