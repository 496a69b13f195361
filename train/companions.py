"""A command that runs on several ranks of this machine and is watched at the terminal: this process is rank 0, the
others are copies of its command line, silent and gone when it ends, however it ends.

For commands that keep nothing of their way, from a minute of generation with a model that one GPU cannot hold to a night of
evaluation. Runs that save, and go on after a failure, are the supervisor's.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO

import torch

from conf.errors import UserError
from train.outcome import ExitCode
from train.parallel import ParallelContext, leave_ranks, start_rank

DAY_SECONDS = 86_400.0
JOINING_SECONDS = 600.0  # from the start of the copies: they import torch, and whatever else the command does first
_POLL_SECONDS = 0.1
_LEAVING_SECONDS = 10.0  # a companion that has nothing left to do leaves at once
_GRACE_SECONDS = 4.0  # gloo raises at once where a partner is gone; NCCL waits for it
_OURS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "LONGHAUL_STORE_FD")
# Asks the kernel for SIGKILL when the parent dies, then becomes the command: no hook between fork and exec, which could
# find a lock taken by one of torch's threads.
_DIE_WITH_PARENT = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""


@contextmanager
def ranks(
    size: int, device: str, *, tensor_parallel: int = 1, sequence_parallel: bool = False, timeout_seconds: float = DAY_SECONDS
) -> Iterator[ParallelContext]:
    """The context of this rank among `size` ranks of one process group, `tensor_parallel` of them to a model.

    A copy ends where its `with` does. A second use in the process starts new copies, which run the command from its
    beginning to the first. A collective fails after `timeout_seconds`, which is for ranks that are alive and apart: when a
    companion fails, this raises UserError with the end of what it said, or, where this rank waits for it without an end,
    says so and leaves the process with the same code.
    """

    def join() -> ParallelContext:
        layout = {"tensor_parallel": tensor_parallel, "sequence_parallel": sequence_parallel}
        leave_ranks()
        return start_rank(device, timeout_seconds, joining_seconds=min(JOINING_SECONDS, timeout_seconds), **layout)

    if "RANK" in os.environ:  # one of the copies
        yield join()
        raise SystemExit(0)
    with _environment(size) as store:
        companions = _Companions(size)
        try:
            companions.start()
            os.environ["LONGHAUL_STORE_FD"] = str(os.dup(store.fileno()))
            context = join()
            companions.joined.set()
            yield context
            companions.see_off()
        except RuntimeError as error:  # a collective that lost its partner
            if failure := companions.failure(within_seconds=_GRACE_SECONDS / 2):
                raise UserError(failure) from error
            raise
        finally:
            companions.end()


@contextmanager
def _environment(size: int) -> Iterator[socket.socket]:
    """The variables and the threads of rank 0, and the socket where it will serve the store; as before at the end."""
    before = {name: os.environ.get(name) for name in _OURS}
    threads = torch.get_num_threads()
    with socket.create_server(("127.0.0.1", 0), backlog=max(128, size)) as store:
        os.environ.update(
            WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.getsockname()[1]), RANK="0", LOCAL_RANK="0"
        )
        if "OMP_NUM_THREADS" not in os.environ:
            part = max(1, len(os.sched_getaffinity(0)) // size)
            os.environ["OMP_NUM_THREADS"] = str(part)
            torch.set_num_threads(part)  # torch is imported here and took all cores: two ranks of two cores took 204 s, not 35
        try:
            yield store
        finally:
            torch.set_num_threads(threads)
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


class _Companions:
    """The processes of the ranks above 0, what each of them says, and a thread that watches them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.joined = threading.Event()
        """All ranks have met; until then this one cannot notice that another is gone."""
        self._processes: list[subprocess.Popen[bytes]] = []
        self._said: list[IO[bytes]] = []
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="companions", daemon=True)

    def start(self) -> None:
        """Start the copies of this command, and watch them."""
        for rank in range(1, self.size):
            self._said.append(tempfile.TemporaryFile())  # noqa: SIM115 (`end` closes it)
            self._processes.append(
                subprocess.Popen(
                    _command(),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=self._said[-1],
                    env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                )
            )
        self._watcher.start()
        atexit.register(self.end)  # lm-eval has no word for a model's end

    def failure(self, *, within_seconds: float = 0.0) -> str | None:
        """What is to be said of the rank that failed, if any does `within_seconds`: one that tells a reason before others."""
        deadline = time.monotonic() + within_seconds
        while not (failed := self._failed()):
            if time.monotonic() >= deadline:
                return None
            time.sleep(_POLL_SECONDS)
        number = min(failed, key=lambda number: self._processes[number].returncode != ExitCode.DO_NOT_RESTART)
        code = self._processes[number].returncode
        how = f"ended with code {code}" if code > 0 else f"was ended by {_signal_name(-code)}"
        return f"rank {number + 1} of {self.size} {how}:\n{self._last_words(number) or '(it said nothing)'}"

    def _failed(self) -> list[int]:
        return [number for number, process in enumerate(self._processes) if process.poll()]

    def _last_words(self, number: int) -> str:
        file = self._said[number].fileno()
        end = os.fstat(file).st_size
        return os.pread(file, 2000, max(0, end - 2000)).decode(errors="replace").strip()

    def see_off(self) -> None:
        """The work is done, whatever becomes of them now: let them leave by themselves, if they do so soon."""
        self._over.set()
        deadline = time.monotonic() + _LEAVING_SECONDS
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))

    def end(self) -> None:
        """None of them is left."""
        self._over.set()
        atexit.unregister(self.end)
        if self._watcher.is_alive():
            self._watcher.join()  # it reads what they said
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        for file in self._said:
            file.close()

    def _watch(self) -> None:
        while not self._failed():
            if self._over.wait(_POLL_SECONDS):
                return
        # Where this rank can find out by itself it raises, and all that is open is closed as ever.
        if self._over.wait(_GRACE_SECONDS if self.joined.is_set() else 2 * _POLL_SECONDS):
            return
        self._leave(f"longhaul: {self.failure()}", ExitCode.DO_NOT_RESTART)

    def _leave(self, text: str, code: int) -> None:
        """End the process from beside its main thread, which waits in a library and hears nothing."""
        for process in self._processes:
            process.kill()
        with suppress(OSError, ValueError):
            print(text, file=sys.stderr, flush=True)
        os._exit(code)


def _command() -> Sequence[str]:
    if sys.platform != "linux":
        return sys.orig_argv
    return [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *sys.orig_argv]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal has none
        return f"signal {number}"
