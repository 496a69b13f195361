"""Runs a function over many tasks in several processes, with one progress bar."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from tqdm import tqdm

from conf.errors import UserError

TaskT = TypeVar("TaskT")
ResultT = TypeVar("ResultT")
Advance = Callable[[int], None]

_POLL_SECONDS = 0.2
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)

# In a worker process: how far all workers have come. Set once, by the process's initializer.
_counter: Any = None


def usable_cores() -> int:
    """Cores that this process may use: under Slurm those of its allocation, not of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(
    function: Callable[[TaskT, Advance], ResultT], tasks: Sequence[TaskT], *, workers: int, bar: tqdm[Any]
) -> list[ResultT]:
    """function(task, advance) for every task, in up to `workers` processes; results in the order of the tasks.

    `advance` moves the bar. One worker or one task runs in this process. An exception of a task comes up here, after the other
    tasks were called off. Raises UserError when a process is killed from outside.
    """
    if workers == 1 or len(tasks) <= 1:
        return [function(task, bar.update) for task in tasks]
    # spawn: a forked child of a process whose tokenizer has started threads can hang on a lock nobody will release.
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    shown = 0
    with ProcessPoolExecutor(
        min(workers, len(tasks)), mp_context=context, initializer=_start_worker, initargs=(counter, os.getpid())
    ) as pool:
        try:
            futures = [pool.submit(_call, function, task) for task in tasks]
            waiting = set(futures)
            while waiting:
                done, waiting = wait(waiting, timeout=_POLL_SECONDS, return_when=FIRST_EXCEPTION)
                bar.update(counter.value - shown)
                shown = bar.n
                for future in done:
                    future.result()
            return [future.result() for future in futures]
        except BrokenProcessPool:
            raise UserError(
                f"a worker process was killed from outside, most likely because memory ran out; give fewer than "
                f"workers={workers} and start the same command again: it continues where it stopped"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start_worker(counter: Any, parent: int) -> None:
    global _counter  # noqa: PLW0603  (a process's initializer has no other way to its tasks)
    _counter = counter
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends workers without a traceback each
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    if sys.platform == "linux":
        # A parent that is killed outright cannot end its workers; the kernel does.
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _call(function: Callable[[TaskT, Advance], ResultT], task: TaskT) -> ResultT:
    return function(task, _advance)


def _advance(count: int) -> None:
    with _counter.get_lock():
        _counter.value += count
