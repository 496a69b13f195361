"""The one thing that the loop reports to: completes each record and hands it to the writers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from train.config.monitor import MonitorConfig
from train.metrics.console import ConsoleWriter
from train.metrics.jsonl import FILE_NAME, JsonlWriter
from train.metrics.record import Level, Output, RunIdentity, Value, Writer, plain
from train.metrics.tensorboard import TensorBoardWriter
from train.metrics.throughput import Throughput, memory_gib
from train.metrics.weights_and_biases import WandbWriter

_ENDINGS: dict[str, Level] = {"finished": "info", "stopped": "warn"}


class Metrics:
    """Reports a run. Only the first rank has one; the others have `NullMetrics`.

    `throughput` adds tokens_per_second and MFU to a step that comes with tokens and step_seconds.
    `save_wandb_id` is called from a background thread when the run had to get a new id in Weights & Biases.
    Raises UserError when metrics.jsonl cannot be written, or TensorBoard is asked for and not installed.
    """

    def __init__(
        self,
        config: MonitorConfig,
        run_dir: Path,
        identity: RunIdentity,
        total_steps: int,
        *,
        throughput: Throughput | None = None,
        save_wandb_id: Callable[[str], None] | None = None,
    ) -> None:
        self._identity = identity
        self._throughput = throughput or Throughput()
        self._place: dict[str, Value] = {}
        self._closed = False
        console = ConsoleWriter(every_steps=config.console_every_steps, total_steps=total_steps)
        # The truth comes first: a record is on disk before anything else can go wrong with it.
        self._writers: list[Writer] = [JsonlWriter(run_dir / FILE_NAME, say=console.say), console]
        if config.tensorboard:
            self._writers.append(TensorBoardWriter(run_dir, say=console.say))
        if config.wandb.mode != "disabled":
            self._writers.append(
                WandbWriter(config.wandb, run_dir, identity=identity, say=console.say, save_wandb_id=save_wandb_id)
            )

    def train(self, record: Mapping[str, Value]) -> None:
        """Report one step: step and loss, by custom also samples, tokens, lr, grad_norm, step_seconds,
        data_wait_seconds, skipped; anything else is written too.

        Raises TypeError for a value that is no plain number or text.
        """
        values = plain(record)
        tokens, seconds = values.get("tokens"), values.get("step_seconds")
        before = self._place.get("tokens", 0 if values["step"] == 1 else "unknown")
        derived: dict[str, Value] = {}
        # The first step after a resume has no step before it to count its tokens from.
        if isinstance(tokens, int) and isinstance(before, int) and isinstance(seconds, float) and tokens > before:
            derived |= self._throughput.update(tokens=tokens - before, seconds=seconds)
        memory = memory_gib()
        if memory is not None:
            derived["memory_gib"] = memory
        self._place = {key: values[key] for key in ("samples", "tokens") if key in values}
        self._write("train", {**derived, **values})

    def evaluation(self, record: Mapping[str, Value]) -> None:
        """Report one evaluation: step and loss, by custom also perplexity, bits_per_byte, probe/NAME, and `name` where it is
        of one of several held-out sets.

        Raises TypeError for a value that is no plain number or text.
        """
        self._write("evaluation", {**self._place, **plain(record)})

    def outputs(self, step: int, outputs: Sequence[Output]) -> None:
        """Report what the model answered to held-out rows after `step`."""
        for writer in self._writers:
            writer.outputs(step, outputs)

    def alert(self, title: str, text: str, level: Level = "warn") -> None:
        """Tell people something that should not wait until they look: a loss spike, a skipped step."""
        for writer in self._writers:
            writer.alert(title, text, level)

    def close(self, outcome: str, reason: str = "") -> None:
        """Report the end, finished, stopped or anything worse, and write out everything. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        identity = self._identity
        text = f"{identity.name}, attempt {identity.attempt}" + (f": {reason}" if reason else "")
        self.alert(f"run {outcome}", text, _ENDINGS.get(outcome, "error"))
        for writer in self._writers:
            writer.close(outcome)

    def _write(self, kind: str, values: Mapping[str, Value]) -> None:
        assert "step" in values, "a record says which step it is of"
        record = {
            "kind": kind,
            "attempt": self._identity.attempt,
            "step": values["step"],
            **values,
            "time": time.time(),
        }
        for writer in self._writers:
            writer.write(record)


class NullMetrics:
    """Reports nothing: for all ranks but the first."""

    def train(self, record: Mapping[str, Value]) -> None:
        """Nothing."""

    def evaluation(self, record: Mapping[str, Value]) -> None:
        """Nothing."""

    def outputs(self, step: int, outputs: Sequence[Output]) -> None:
        """Nothing."""

    def alert(self, title: str, text: str, level: Level = "warn") -> None:
        """Nothing."""

    def close(self, outcome: str, reason: str = "") -> None:
        """Nothing."""
