"""`-m`: one process per combination of the comma-separated values, one after another, each with a run name of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Self

from conf.compose import combinations
from conf.sweep import named_combinations
from train.config.runs import RUNS

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def run_all(verb: str, overrides: Sequence[str], config_dir: str | None) -> int:
    """Run `longhaul verb` once for each combination; returns the highest exit code. A signal stops the sweep.

    Raises ConfigError for words that cannot be read.
    """
    jobs = named_combinations(overrides) if verb in RUNS else combinations(overrides)
    codes: list[int] = []
    with _Job() as job:
        for number, words in enumerate(jobs, start=1):
            print(f"job {number} of {len(jobs)}: longhaul {verb} {' '.join(words)}", flush=True)
            command = [sys.executable, "-P", "-m", "tools.cli", verb, *words]
            codes.append(job.run(command + (["--config-dir", config_dir] if config_dir else [])))
            if job.stopped_by is not None:
                print(f"{job.stopped_by.name}: {len(jobs) - number} of {len(jobs)} jobs were not started", flush=True)
                break
    if len(jobs) > 1:
        print(f"{codes.count(0)} of {len(jobs)} jobs ended with exit code 0; codes: {codes}")
    return max(codes, default=0)


class _Job:
    """The process at work, and the signals that are passed on to it.

    It has a process group of its own: an interrupt from the terminal would otherwise reach it twice, and the second
    interrupt kills a run instead of letting it save.
    """

    def __init__(self) -> None:
        self.stopped_by: signal.Signals | None = None
        self._process: subprocess.Popen | None = None
        self._passed_on = False
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        for number in FORWARDED:
            if signal.getsignal(number) is not signal.SIG_IGN:  # under nohup a hang-up stays ignored
                self._previous[number] = signal.signal(number, self._pass_on)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def run(self, command: Sequence[str]) -> int:
        """Exit code of `command`, as a shell counts it."""
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)
        if self.stopped_by is not None and not self._passed_on:  # it came before there was anyone to pass it on to
            self._process.send_signal(self.stopped_by)
        code = self._process.wait()
        return code if code >= 0 else 128 - code

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.stopped_by = signal.Signals(number)
        if self._process is not None:
            self._passed_on = True
            self._process.send_signal(number)
