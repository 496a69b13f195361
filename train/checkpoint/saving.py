"""One save, from the values in memory to the published folder, beside the training.

A thread of each rank carries it through: values into shared memory, the rank's file by the writing process, and, on the
first rank, the publication once all ranks have written. The ranks tell each other by the store, so that no collective of
the training is disturbed; the loop waits for nothing but the copy.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.checkpoint.image import FileImage
from train.checkpoint.manifest import CheckpointError
from train.checkpoint.publication import Publication, begin, discard
from train.checkpoint.writer import WriterProcess
from train.parallel import ParallelContext


@dataclass(frozen=True, kw_only=True)
class SaveResult:
    """How a save ended: published, or why not."""

    step: int
    problem: str | None
    bytes: int
    seconds: float
    """From the call to the published folder."""


@dataclass(frozen=True, kw_only=True)
class SaveTask:
    """What is saved, and what the file says of it."""

    publication: Publication
    file: str
    index: list[Any]
    has_probe: bool
    total_bytes: int
    """Of all ranks."""
    key: str
    """Prefix on the board, of this save alone."""
    stale_key: str | None = None
    """Prefix of a save whose end all ranks have read; what is left of it is taken down."""


class Saving(threading.Thread):
    """A save under way. `staged` is set once the values are copied: from then on weights may change."""

    def __init__(self, task: SaveTask, image: FileImage, writer: WriterProcess, context: ParallelContext) -> None:
        super().__init__(name=f"save-{task.publication.step}", daemon=True)
        self.task, self.image, self.writer, self.context = task, image, writer, context
        self.staged = threading.Event()
        self.result: SaveResult | None = None
        self._copied: torch.cuda.Event | None = None
        self._tensors: Mapping[str, Tensor] = {}
        self._began = time.monotonic()

    def begin(self, tensors: Mapping[str, Tensor]) -> None:
        """Start copying: on a stream of its own from a GPU, in this thread from a CPU."""
        self._tensors = tensors
        if self.context.device.type == "cuda":
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.image.stage(tensors)
                self._copied = stream.record_event()
        self.start()

    def before_update(self) -> None:
        """Called before weights and moments change: waits for the copy. A GPU waits on its own, the CPU goes on."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
        else:
            self.staged.wait()

    def run(self) -> None:
        """Carry the save through; what goes wrong is in `result`, on every rank."""
        problem: str | None = "an error of the program ended it, see the log"
        try:
            problem = self._through()
        finally:
            self.result = SaveResult(
                step=self.task.publication.step,
                problem=problem,
                bytes=self.task.total_bytes,
                seconds=time.monotonic() - self._began,
            )

    def _through(self) -> str | None:
        try:
            if self._copied is not None:
                self._copied.synchronize()
            else:
                self.image.stage(self._tensors)
        finally:
            self._tensors = {}
            self.staged.set()
        folder = Path(self.task.publication.folder)
        if problem := self._by_first("begun", lambda: begin(folder, self.task.total_bytes)):
            return problem
        self._post(f"written/{self.context.rank}", self._write(folder))
        return self._by_first("published", self._publish)

    def _write(self, folder: Path) -> dict[str, Any]:
        if bad := self.image.not_finite():
            return {"problem": f"{bad[0]} and {len(bad) - 1} more are not finite" if bad[1:] else f"{bad[0]} is not finite"}
        try:
            written = self.writer.write(folder / self.task.file)
        except CheckpointError as error:
            return {"problem": str(error)}
        return {"file": self.task.file, "index": self.task.index, "probe": self.task.has_probe, **written}

    def _publish(self) -> None:
        names = [f"written/{rank}" for rank in range(self.context.world_size)]
        reports = [self._answer(name) for name in names]
        # A rank that has written has read all that came before; the indices of a large job would fill the board.
        for name in (*names, "begun"):
            self.context.take_down(f"{self.task.key}/{name}")
        if self.task.stale_key is not None:
            self.context.take_down(f"{self.task.stale_key}/published")
        problems = list(dict.fromkeys(report["problem"] for report in reports if "problem" in report))
        try:
            if problems:
                raise CheckpointError("; ".join(problems))
            self.writer.publish(self.task.publication, reports)
        except CheckpointError:
            discard(Path(self.task.publication.folder))
            raise

    def _by_first(self, name: str, action: Callable[[], None]) -> str | None:
        """Have the first rank do `action`; on all ranks the problem that it had, if it had one."""
        if self.context.is_first:
            answer = {}
            try:
                action()
            except CheckpointError as error:
                answer = {"problem": str(error)}
            except OSError as error:
                answer = {"problem": f"{error.filename or self.task.publication.folder}: {error.strerror or error}"}
            self._post(name, answer)
            return answer.get("problem")
        return self._answer(name).get("problem")

    def _post(self, name: str, answer: Mapping[str, Any]) -> None:
        self.context.post(f"{self.task.key}/{name}", json.dumps(answer).encode())

    def _answer(self, name: str) -> dict[str, Any]:
        posted = self.context.posted(f"{self.task.key}/{name}")
        assert posted is not None, "the wait has no end of its own: a rank that died ends the attempt"
        return json.loads(posted)
