"""Faults that come from inside a rank, put in from outside: the program itself knows nothing of them.

Data faults belong to samples, so that every attempt and every layout meets them alike. The others happen once in a run,
at the given step on the given rank; a file in a folder of marks tells that one has happened, and in which attempt.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from train.checkpoint.manifest import published

Kind = Literal["hang", "stopped_rank", "slow_rank", "full_disk", "dying_writer", "file_system_error", "death_after_a_save"]
SLOW_SECONDS = 0.3


@dataclass(frozen=True, kw_only=True)
class Once:
    """A fault that happens once: before `step` on `rank`."""

    kind: Kind
    step: int
    rank: int


@dataclass(frozen=True, kw_only=True)
class Faults:
    """All faults of a run from inside."""

    nan_samples: tuple[int, ...] = ()
    """A step that reads one of them has a NaN in its gradient."""
    spike_samples: tuple[int, ...] = ()
    """The loss of a micro-batch that holds one of them is 500 times what it is."""
    once: tuple[Once, ...] = ()

    def write(self, path: Path) -> None:
        """Keep them for `read`."""
        path.write_text(json.dumps(asdict(self), indent=1))

    @staticmethod
    def read(path: Path) -> Faults:
        """What `write` kept."""
        raw = json.loads(path.read_text())
        return Faults(
            nan_samples=tuple(raw["nan_samples"]),
            spike_samples=tuple(raw["spike_samples"]),
            once=tuple(Once(**entry) for entry in raw["once"]),
        )


def inject(faults: Faults, marks: Path) -> None:
    """Alter this process so that it meets `faults`. `marks`: folder in the run's folder that tells which have happened."""
    from train.engine import Engine

    original = Engine.train_step

    def train_step(self: Engine, batches: Sequence[Any], *, step: int, **options: Any) -> Any:
        for fault in faults.once:
            if (fault.rank, fault.step) == (self.context.rank, step) and _first_time(marks, fault):
                _ACTIONS[fault.kind](marks.parent)
        read = {sample for batch in batches for sample in batch.sample_ids}
        endings = []
        if read & set(faults.nan_samples):
            endings.append(_poison(self))
        if read & set(faults.spike_samples):
            endings.append(_magnify(self))
        try:
            return original(self, batches, step=step, **options)
        finally:
            for end in endings:
                end()

    Engine.train_step = train_step  # type: ignore[method-assign]


def _first_time(marks: Path, fault: Once) -> bool:
    marks.mkdir(parents=True, exist_ok=True)
    try:
        with (marks / f"{fault.kind}-{fault.step}-{fault.rank}").open("x") as mark:
            mark.write(os.environ.get("LONGHAUL_ATTEMPT", "1"))
    except FileExistsError:
        return False
    return True


def _poison(engine: Any) -> Callable[[], None]:
    """NaN in a gradient until the returned function is called."""
    parameter = next(parameter for parameter in engine.module.parameters() if parameter.requires_grad)
    return parameter.register_hook(lambda gradient: gradient * math.nan).remove


def _magnify(engine: Any) -> Callable[[], None]:
    """Losses 500 times as high until the returned function is called."""
    head = engine.module.layers[-1]
    return head.register_forward_hook(lambda module, inputs, out: (out[0] * 500, out[1] * 500, out[2])).remove


def _die_after_a_save(run_dir: Path) -> None:
    """SIGKILL as soon as a checkpoint is there to resume from."""
    while not published(run_dir / "checkpoints"):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def _hang(_: Path) -> None:
    while True:
        time.sleep(3600.0)


def _stop_self(_: Path) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _be_slow(_: Path) -> None:
    """From now on every step of this rank takes longer."""
    from train.engine import Engine

    quick = Engine.train_step

    def slow(self: Engine, *arguments: Any, **options: Any) -> Any:
        time.sleep(SLOW_SECONDS)
        return quick(self, *arguments, **options)

    Engine.train_step = slow  # type: ignore[method-assign]


def _fill_disk(_: Path) -> None:
    """The next file that is written for a checkpoint ends in an error of the kernel, half written."""
    from train.checkpoint.writer import WriterProcess

    original = WriterProcess.write

    def write(self: WriterProcess, path: Path) -> dict[str, Any]:
        WriterProcess.write = original  # type: ignore[method-assign]
        limits = resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (10_000, limits[1]))
        try:
            return original(self, path)
        finally:
            resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, limits)

    WriterProcess.write = write  # type: ignore[method-assign]


def _kill_writer(_: Path) -> None:
    """The process that writes the next checkpoint is killed when it is asked to."""
    from train.checkpoint.writer import WriterProcess

    original = WriterProcess.write

    def write(self: WriterProcess, path: Path) -> dict[str, Any]:
        WriterProcess.write = original  # type: ignore[method-assign]
        self.process.kill()
        return original(self, path)

    WriterProcess.write = write  # type: ignore[method-assign]


def _fail_publication(_: Path) -> None:
    """The next checkpoint cannot be published: the file system answers with an error where its folder is made."""
    from train.checkpoint import saving

    original = saving.begin

    def begin(folder: Path, total_bytes: int) -> None:
        saving.begin = original
        raise OSError(5, "Input/output error", str(folder))

    saving.begin = begin


_ACTIONS: dict[Kind, Callable[[Path], None]] = {
    "death_after_a_save": _die_after_a_save,
    "hang": _hang,
    "stopped_rank": _stop_self,
    "slow_rank": _be_slow,
    "full_disk": _fill_disk,
    "dying_writer": _kill_writer,
    "file_system_error": _fail_publication,
}
