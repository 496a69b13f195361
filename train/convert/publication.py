"""A folder that appears whole or not at all: made under another name, renamed when its content is complete.

What was interrupted is gone on with, by the same command.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal, TextIO, TypeAlias

from conf.errors import UserError
from train.checkpoint.manifest import sync_folder

REPORT = "conversion_report.json"
"""Marks a folder as a conversion, so that `overwrite` never removes anything else."""
UNFINISHED = ".unfinished-conversion"
"""Marks a folder as ours while it is being filled; holds what it is made from, and is locked by who fills it."""


Format: TypeAlias = Literal["hf", "checkpoint", "adapter"]
"""What a conversion makes."""


class Unfinished(UserError):
    """A conversion that cannot end now; the weight files that are whole are kept, and the same command goes on behind them."""


class Publication:
    """Context whose value is the folder to fill, `<out>.partial`; without an error it becomes `out` at the end.

    After a UserError, such as a failed proof, nothing is left; after Unfinished, or any other end, the weight files that are
    whole are kept, and found in the folder by the next one who makes it from the same `source`.
    Raises UserError when `out` exists, unless `overwrite` is set and it is an earlier conversion of the same format.
    """

    def __init__(self, out: Path, format: Format, *, overwrite: bool, source: Mapping[str, object]) -> None:
        self.out, self.format = out, format
        self.partial = out.with_name(f"{out.name}.partial")
        self._replaced = out.with_name(f"{out.name}.replaced")
        self._overwrite = overwrite
        self._source = json.dumps(dict(source), sort_keys=True)
        self._marker: TextIO | None = None

    def __enter__(self) -> Path:
        self._check_out()
        if self._replaced.exists() and not (self._replaced / REPORT).is_file():
            raise UserError(f"{self._replaced}: exists and is no earlier conversion; move it away, its name is needed")
        if self.partial.exists() and not (self.partial / UNFINISHED).is_file():
            raise UserError(f"{self.partial}: exists and is no unfinished conversion; move it away, its name is needed")
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            self._marker = (self.partial / UNFINISHED).open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(f"out={self.out}: {self.partial} cannot be made ({error.strerror})") from None
        self._claim(self._marker)
        try:
            self._check_out()  # again: who held the folder before may have published since
        except UserError:
            self._leave(keep=False)
            raise
        return self.partial

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self._leave(keep=not issubclass(kind, UserError) or issubclass(kind, Unfinished))
            return
        try:
            self._check_out()
        except UserError as error:
            self._leave(keep=True)
            raise Unfinished(f"{error}; it was not there before, and what was made lies in {self.partial}") from None
        sync_folder(self.partial)
        if self.out.exists():
            if self._replaced.exists():  # of a conversion that was ended between the two renames below
                shutil.rmtree(self._replaced)
            self.out.rename(self._replaced)
        self.partial.rename(self.out)
        (self.out / UNFINISHED).unlink()
        sync_folder(self.out)
        sync_folder(self.out.parent)
        self._marker.close()
        if self._replaced.exists():
            shutil.rmtree(self._replaced)

    def _claim(self, marker: TextIO) -> None:
        """Lock the folder, and clear it of all but the weight files that are whole and of the same source."""
        try:
            fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            marker.close()
            raise UserError(f"{self.partial}: is being filled by another process; wait for it, or give another out") from None
        marker.seek(0)
        same = marker.read() == self._source
        for path in self.partial.iterdir():
            if path.name != UNFINISHED and not (same and path.suffix == ".safetensors"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        marker.truncate(0)
        marker.write(self._source)
        marker.flush()

    def _leave(self, *, keep: bool) -> None:
        if not keep or not any(self.partial.glob("*.safetensors")):
            shutil.rmtree(self.partial)
        self._marker.close()

    def _check_out(self) -> None:
        if not os.path.lexists(self.out):
            return
        if self.out.is_symlink():
            raise UserError(f"out={self.out}: is a link; give the folder that it leads to, or another name")
        if not self._overwrite:
            raise UserError(f"out={self.out}: exists; give another name, or overwrite=true to replace an earlier conversion")
        if _format_of(self.out) != self.format:
            raise UserError(
                f"out={self.out}: is no earlier conversion of this kind (no {REPORT} says so); overwrite=true leaves it alone"
            )


def check_apart(out: Path, source: Path) -> None:
    """Raise UserError when a conversion would write into what it reads, or over it."""
    here, there = out.expanduser().resolve(), source.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise UserError(f"out={out}: is what is read, or lies within it, or around it ({source}); give another folder")


def _format_of(folder: Path) -> str | None:
    try:
        return json.loads((folder / REPORT).read_text(encoding="utf-8")).get("format")
    except (OSError, ValueError, AttributeError):
        return None


def check_room(folder: Path, needed_bytes: int) -> None:
    """Raise Unfinished when the file system of `folder` lacks room for so much."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise Unfinished(
            f"{folder}: needs {needed_bytes / 1e6:,.0f} MB, and its file system has {free / 1e6:,.0f} MB free; make room, or "
            f"give another out"
        )
