"""The processes of one attempt: starting, watching, signalling and ending them. Decides nothing about restarts."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from conf.errors import UserError

_PR_SET_PDEATHSIG = 1
# Loaded here, not in the child: between fork and exec nothing may import or allocate much.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_GUARD_FILE = Path(__file__).with_name("orphan_guard.py")


def num_cores() -> int:
    """Cores that this process may use, which under Slurm or taskset are fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class RankGroup:
    """The ranks of one attempt on this machine, each the leader of a session of its own.

    A session of its own keeps a terminal's Ctrl-C away from the ranks: the supervisor forwards it once, and a save
    is not disturbed by it. An ended leader is left unreaped until `sweep`, so that its number cannot be given to
    another process while its group is still to be killed.
    """

    def __init__(self, log_folder: Path) -> None:
        self.log_folder = log_folder
        self.codes: dict[int, int] = {}
        """Exit code of each rank that ended, in the order of ending; negative: ended by that signal."""
        self.ended_by_us: set[int] = set()
        """Ranks that were still alive when `end` or `kill` signalled them."""
        self._processes: list[subprocess.Popen[bytes]] = []
        self._guard: subprocess.Popen[bytes] | None = None

    def log_path(self, rank: int) -> Path:
        return self.log_folder / f"rank-{rank:05d}.log"

    def start(self, command: Sequence[str], *, processes: int, environment: Mapping[str, str]) -> None:
        """Start `processes` ranks of `command`.

        The rendezvous port is bound and listening before any rank runs, and rank 0 inherits the socket: nobody can
        take the port between its choice and its use. Raises UserError when the command cannot be run.
        """
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_GUARD_FILE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        # The backlog holds every rank that connects before rank 0 has imported torch and accepts.
        with socket.create_server(("127.0.0.1", 0), backlog=max(128, 4 * processes)) as store:
            shared = {
                **environment,
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(store.getsockname()[1]),
            }
            shared.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // processes)))
            shared.setdefault("PYTHONUNBUFFERED", "1")  # a log that lags is no help after a crash
            shared.setdefault("PYTHONFAULTHANDLER", "1")  # a segmentation fault leaves a stack in the log
            for rank in range(processes):
                own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                if rank == 0:
                    own["LONGHAUL_STORE_FD"] = str(store.fileno())
                self._start_rank(command, rank=rank, environment=own, keep=(store.fileno(),) if rank == 0 else ())

    def _start_rank(self, command: Sequence[str], *, rank: int, environment: Mapping[str, str], keep: tuple[int, ...]) -> None:
        supervisor = os.getpid()
        with self.log_path(rank).open("ab") as log:
            try:
                process = subprocess.Popen(
                    list(command),
                    stdin=subprocess.DEVNULL,  # nothing may ever wait for an answer from a terminal
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=dict(environment),
                    pass_fds=keep,
                    start_new_session=True,
                    # Safe here: the supervisor has a single thread.
                    preexec_fn=lambda: _die_with(supervisor),
                )
            except (OSError, subprocess.SubprocessError) as error:
                raise UserError(f"rank {rank} cannot be started: {command[0]}: {error}") from None
        self._processes.append(process)
        assert self._guard is not None and self._guard.stdin is not None, "the guard starts before the ranks"
        try:
            self._guard.stdin.write(b"watch %d\n" % process.pid)
            self._guard.stdin.flush()
        except OSError:
            pass  # the guard was killed; the parent-death signal still ends the ranks

    def poll(self) -> dict[int, int]:
        """Codes of the ranks that ended since the last call; they stay unreaped."""
        fresh: dict[int, int] = {}
        for rank, process in enumerate(self._processes):
            if rank in self.codes:
                continue
            ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is not None:
                fresh[rank] = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        self.codes.update(fresh)
        return fresh

    @property
    def alive(self) -> list[int]:
        """Ranks that had not ended at the last `poll`."""
        return [rank for rank in range(len(self._processes)) if rank not in self.codes]

    def send(self, number: signal.Signals) -> None:
        """Signal the ranks alone, not their children: a data loader must serve until its rank has stopped."""
        for rank in self.alive:
            os.kill(self._processes[rank].pid, number)

    def end(self) -> None:
        """Ask the ranks that are left to end."""
        self.ended_by_us.update(self.alive)
        self.send(signal.SIGTERM)
        self.send(signal.SIGCONT)  # one that was stopped could not hear it

    def kill(self) -> None:
        """End the ranks that are left and their children, now."""
        self.ended_by_us.update(self.alive)
        for rank in self.alive:
            _kill_group(self._processes[rank].pid)

    def sweep(self) -> None:
        """Kill whatever is left of every group, then reap the ranks. No rank runs when this returns."""
        for process in self._processes:
            _kill_group(process.pid)
        deadline = time.monotonic() + 5.0
        while self.alive and time.monotonic() < deadline:
            self.poll()
            time.sleep(0.01)
        for rank in self.codes:
            self._processes[rank].wait()
        self._dismiss_guard()

    def _dismiss_guard(self) -> None:
        if self._guard is None:
            return
        try:
            self._guard.communicate(b"clear\n", timeout=5.0)
        except (OSError, subprocess.TimeoutExpired):
            self._guard.kill()
            self._guard.wait()
        self._guard = None


def _kill_group(leader: int) -> None:
    # macOS answers EPERM for a group that holds only a zombie.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def _die_with(parent: int) -> None:
    """In the child before exec: ask the kernel for SIGKILL when the supervisor dies."""
    if _LIBC is None:
        return
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the request was made
        os._exit(1)
