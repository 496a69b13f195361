"""TensorBoard event files below `<run>/tensorboard`: every value by step, losses and probes by tokens as well."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from conf.errors import UserError
from train.metrics.record import Level, Output, Record

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FOLDER = "tensorboard"
_AXES = frozenset({"attempt", "step", "tokens", "samples", "time"})


class TensorBoardWriter:
    """Writes scalars; a resumed run hides what an earlier attempt had written beyond the step it resumes at.

    Purging goes by the event's step for all tags of a folder, so the two axes need a folder each. A folder that
    cannot be written turns this writer off, with one line.
    """

    def __init__(self, run_dir: Path, *, say: Callable[[str], None]) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise UserError(
                "monitor.tensorboard=true: the package tensorboard is not installed; "
                "install it or give monitor.tensorboard=false"
            )
        self._folder = run_dir / FOLDER
        self._say = say
        self._by_step: SummaryWriter | None = None
        self._by_tokens: SummaryWriter | None = None
        self._off = False

    def write(self, record: Record) -> None:
        if self._off:
            return
        try:
            self._add(record)
        except (OSError, RuntimeError, ValueError) as error:  # its own thread's failures surface here too
            self._off = True
            self._say(f"TensorBoard: off from step {record['step']} on ({error}); metrics.jsonl has every value")

    def outputs(self, step: int, outputs: Sequence[Output]) -> None:
        """Nothing: they are texts."""

    def _add(self, record: Record) -> None:
        step, tokens, time = int(record["step"]), record.get("tokens"), float(record["time"])
        section = _section(record)
        if self._by_step is None:
            self._by_step = _open(self._folder / "by_step", purge=step)
        for key, value in record.items():
            if key not in _AXES and isinstance(value, float | int):
                self._by_step.add_scalar(f"{section}/{key}", value, step, walltime=time)
        by_tokens = {key: value for key, value in record.items() if key == "loss" or key.startswith("probe/")}
        for key, value in by_tokens.items():
            if not (isinstance(tokens, int) and isinstance(value, float) and math.isfinite(value)):
                continue
            if self._by_tokens is None:
                self._by_tokens = _open(self._folder / "by_tokens", purge=tokens)
            self._by_tokens.add_scalar(f"{section}/{key}", value, tokens, walltime=time)

    def alert(self, title: str, text: str, level: Level) -> None:
        """TensorBoard tells nobody anything."""

    def close(self, outcome: str) -> None:
        for writer in (self._by_step, self._by_tokens):
            if writer is None:
                continue
            try:
                writer.close()
            except (OSError, RuntimeError, ValueError) as error:
                self._say(f"TensorBoard: the last values may be missing ({error}); metrics.jsonl has every value")


def _section(record: Record) -> str:
    name = record.get("name")
    if record["kind"] == "evaluation":
        return f"val/{name}" if name else "val"
    return str(record["kind"])


def _open(folder: Path, *, purge: int) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter

    # A new file with nothing before it purges nothing, so the first attempt needs no exception.
    return SummaryWriter(log_dir=str(folder), purge_step=purge)
