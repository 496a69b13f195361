"""metrics.jsonl: one line a step. It is the truth; every other writer can be filled from it again."""

from __future__ import annotations

import errno
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from conf.errors import UserError
from train.metrics.record import Level, Output, Record, Value, decode, encode

FILE_NAME = "metrics.jsonl"
OUTPUTS_FOLDER = "outputs"
_HELD_LINES = 100_000  # some 30 MB: a day of steps while a file system is full
_BLOCK_BYTES = 64 * 1024


class JsonlWriter:
    """Appends records, one write call a line, so that a killed process tears at most the last one.

    A disk that refuses a line does not stop the run: lines wait in memory, in order, for the disk to take them.
    """

    def __init__(self, path: Path, *, say: Callable[[str], None]) -> None:
        self._path = path
        self._say = say
        self._held: deque[bytes] = deque()
        self._num_lost = 0
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            self._size = _repair(self._file)
        except OSError as error:
            raise UserError(f"{path}: cannot be opened for writing ({error.strerror})") from None

    def write(self, record: Record) -> None:
        was_holding = bool(self._held)
        self._held.append(encode(record))
        if len(self._held) > _HELD_LINES:
            self._held.popleft()
            self._num_lost += 1
        try:
            while self._held:
                self._append(self._held[0])
                self._held.popleft()
        except OSError as error:
            if not was_holding:
                self._say(f"{self._path}: {error.strerror}; lines are held in memory until it can be written")
            return
        if was_holding:
            lost = f"; {self._num_lost} lines were lost" if self._num_lost else ""
            self._say(f"{self._path}: written again{lost}")

    def outputs(self, step: int, outputs: Sequence[Output]) -> None:
        """`outputs/step-NNNNNNNN.jsonl` beside the metrics: one line a row."""
        path = self._path.parent / OUTPUTS_FOLDER / f"step-{step:08d}.jsonl"
        lines = [json.dumps(asdict(output), ensure_ascii=False) for output in outputs]
        try:
            path.parent.mkdir(exist_ok=True)
            temporary = path.with_name(f".{path.name}")
            temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", errors="backslashreplace")
            temporary.replace(path)
        except OSError as error:
            self._say(f"{path}: {error.strerror}; the outputs of this step are not kept")

    def _append(self, line: bytes) -> None:
        try:
            num_written = os.write(self._file, line)
            if num_written != len(line):  # the disk filled up within the line
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(self._file, self._size)
            raise
        self._size += len(line)

    def alert(self, title: str, text: str, level: Level) -> None:
        """Alerts are for people; the numbers that caused them are in the records."""

    def close(self, outcome: str) -> None:
        if self._held:
            self._say(f"{self._path}: the last {len(self._held)} lines could not be written")
        os.close(self._file)


def _repair(file: int) -> int:
    """Make the file end with a whole line and return its size: what a killed writer left is cut, or completed."""
    size = os.fstat(file).st_size
    tail = b""
    while len(tail) < size and b"\n" not in tail:
        start = max(0, size - len(tail) - _BLOCK_BYTES)
        tail = os.pread(file, size - len(tail) - start, start) + tail
    torn = tail[tail.rfind(b"\n") + 1 :]
    if not torn:
        return size
    try:
        decode(torn)
    except ValueError:
        os.ftruncate(file, size - len(torn))
        return size - len(torn)
    os.write(file, b"\n")  # whole but for its end
    return size + 1


def read_metrics(path: Path) -> list[dict[str, Value]]:
    """The records that count, by step: of several lines for one kind, name and step the last one.

    A run that went back to a checkpoint writes steps again, and its newer lines replace the older ones. A torn last
    line is passed over. Raises UserError for a file that is missing or broken before its end.
    """
    last: dict[tuple[Value, Value, Value], dict[str, Value]] = {}
    for record in read_lines(path):
        last[record["kind"], record.get("name", ""), record["step"]] = record
    return sorted(last.values(), key=lambda item: (item["step"], item["kind"] != "train"))


def read_lines(path: Path) -> Iterator[dict[str, Value]]:
    """Every record as it was written, those that a later attempt or a rollback replaced too. Raises as `read_metrics`."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); is it in the folder of a run?") from None
    with file:
        for number, line in enumerate(file, start=1):
            if line == b"\n":
                continue
            try:
                yield decode(line)
            except ValueError as error:
                if not line.endswith(b"\n"):  # its writer was killed, or is writing it now
                    return
                raise UserError(f"{path}:{number}: not a metrics line ({error}); remove the line to go on") from None
