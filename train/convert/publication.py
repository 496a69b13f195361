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
from typing import TextIO

from conf.errors import UserError
from train.checkpoint.manifest import sync_folder

REPORT = "conversion_report.json"
"""Marks a folder as a conversion, so that `overwrite` never removes anything else."""
UNFINISHED = ".unfinished-conversion"
"""Marks a folder as ours while it is being filled; holds what it is made from, and is locked by who fills it."""


class Publication:
    """Context whose value is the folder to fill, `<out>.partial`; without an error it becomes `out` at the end.

    After a UserError, such as a failed proof, nothing is left; after any other end the weight files that are whole are kept,
    and found in the folder by the next one who makes it from the same `source`.
    Raises UserError when `out` exists, unless `overwrite` is set and it is an earlier conversion.
    """

    def __init__(self, out: Path, *, overwrite: bool, source: Mapping[str, object]) -> None:
        self.out = out
        self.partial = out.with_name(f"{out.name}.partial")
        self._replaced = out.with_name(f"{out.name}.replaced")
        self._overwrite = overwrite
        self._source = json.dumps(dict(source), sort_keys=True)
        self._marker: TextIO | None = None

    def __enter__(self) -> Path:
        if os.path.lexists(self.out):
            self._check_replaceable()
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
        return self.partial

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            if issubclass(kind, UserError):
                shutil.rmtree(self.partial)
            self._marker.close()
            return
        (self.partial / UNFINISHED).unlink()
        sync_folder(self.partial)
        if self.out.exists():
            if self._replaced.exists():  # of a conversion that was ended between the two renames below
                shutil.rmtree(self._replaced)
            self.out.rename(self._replaced)
        self.partial.rename(self.out)
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

    def _check_replaceable(self) -> None:
        if not self._overwrite:
            raise UserError(f"out={self.out}: exists; give another name, or overwrite=true to replace an earlier conversion")
        if not (self.out / REPORT).is_file():
            raise UserError(f"out={self.out}: is no earlier conversion (it lacks {REPORT}), so overwrite=true leaves it alone")


def check_room(folder: Path, needed_bytes: int) -> None:
    """Raise UserError when the file system of `folder`, which may not exist yet, lacks room for so much."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        raise UserError(
            f"out={folder}: needs {needed_bytes / 1e9:,.1f} GB, and {place} has {free / 1e9:,.1f} GB free; make room, or give "
            f"another out"
        )
