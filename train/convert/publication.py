"""A folder that appears whole or not at all: made under another name, renamed when its content is complete."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import TracebackType

from conf.errors import UserError
from train.checkpoint.manifest import sync_folder

REPORT = "conversion_report.json"
"""Marks a folder as an export, so that `overwrite` never removes anything else."""
UNFINISHED = ".unfinished-export"
"""Marks a folder as ours while it is being filled."""


class Publication:
    """Context whose value is the folder to fill, `<out>.partial`; without an error it becomes `out` at the end.

    Raises UserError when `out` exists, unless `overwrite` is set and it is an earlier export.
    """

    def __init__(self, out: Path, *, overwrite: bool) -> None:
        self.out = out
        self.partial = out.with_name(f"{out.name}.partial")
        self._replaced = out.with_name(f"{out.name}.replaced")
        self._overwrite = overwrite

    def __enter__(self) -> Path:
        if os.path.lexists(self.out):
            self._check_replaceable()
        if self.partial.exists():
            if not (self.partial / UNFINISHED).is_file():
                raise UserError(f"{self.partial}: exists and is no unfinished export; move it away, its name is needed")
            shutil.rmtree(self.partial)
        if self._replaced.exists() and not (self._replaced / REPORT).is_file():
            raise UserError(f"{self._replaced}: exists and is no earlier export; move it away, its name is needed")
        try:
            self.partial.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"out={self.out}: {self.partial} cannot be made ({error.strerror})") from None
        (self.partial / UNFINISHED).touch()
        return self.partial

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            shutil.rmtree(self.partial)
            return
        (self.partial / UNFINISHED).unlink()
        sync_folder(self.partial)
        if self.out.exists():
            if self._replaced.exists():  # of an export that was ended between the two renames below
                shutil.rmtree(self._replaced)
            self.out.rename(self._replaced)
        self.partial.rename(self.out)
        sync_folder(self.out.parent)
        if self._replaced.exists():
            shutil.rmtree(self._replaced)

    def _check_replaceable(self) -> None:
        if not self._overwrite:
            raise UserError(f"out={self.out}: exists; give another name, or overwrite=true to replace an earlier export")
        if not (self.out / REPORT).is_file():
            raise UserError(f"out={self.out}: is no earlier export (it lacks {REPORT}), so overwrite=true leaves it alone")
