"""Files that are what a list of hashes says: hashed in full once, known again by size, time of change and inode. Torch-free.

The record lies beside the list, or, where that folder cannot be written to, in a place of the caller's. It only saves work: one
that is missing, damaged, of another version or of another list is passed over, and the files are hashed again.
To prepare a corpus writes none: that hashes what it hands to the disk, the first start what lies there.

Inodes of NFS and Lustre are the server's, so that one record serves every node; where a mount numbers files by itself (some of
FUSE), or they were copied, they are hashed again. The device is not compared, as every node numbers its mounts by itself, nor
is the time of the last change of status, which a backup or another hard link changes. What this cannot see: a file that is
written in place with its size and time as they were, or within the tick of the server's clock (a second on some) in which it
was hashed; `full` hashes all.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_pipeline.config import Verify
from data_pipeline.io import readable_bytes, sha256_of, write_json
from data_pipeline.pool import usable_cores

FORMAT_VERSION = 1
RECORD_FILE = "verified.json"
MOST_THREADS = 16  # each holds a piece of 8 MiB; one core hashes 1.2 GB/s
TOLD_FROM_BYTES = 10**9  # about a second of hashing; a job's log has no progress bar

State = tuple[int, int, int]
"""Size, time of the last change in nanoseconds, inode."""


def state_of(path: Path) -> State:
    """What a file is known again by."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """One file of a list."""

    name: str
    """Path below the list's folder."""
    size: int
    """Bytes."""
    sha256: str
    """Hash of the content, hexadecimal."""


@dataclass(frozen=True, kw_only=True)
class HashedFile:
    """A file that is in no list, as it was when its hash was taken."""

    path: str
    """Where it lies, absolute."""
    state: State
    sha256: str

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> HashedFile:
        """Inverse of `dataclasses.asdict`. Raises KeyError, TypeError or ValueError for what is none."""
        size, time, inode = content["state"]
        return cls(path=str(content["path"]), state=(int(size), int(time), int(inode)), sha256=content["sha256"])


class KnownHashes:
    """Hashes of files; of one that is as it was when its hash was taken, that one."""

    def __init__(self, known: Iterable[HashedFile] = ()) -> None:
        self._known = {(file.path, file.state): file.sha256 for file in known}
        self.given: list[HashedFile] = []
        """What was asked for."""

    def sha256_of(self, path: Path) -> str:
        """Hash of a file in hexadecimal."""
        place, state = str(path.resolve()), state_of(path)
        digest = self._known.get((place, state)) or sha256_of(path)
        self.given.append(HashedFile(path=place, state=state, sha256=digest))
        return digest


@dataclass(frozen=True, kw_only=True)
class FileList:
    """A list of hashes, as it was read."""

    path: Path
    """The list itself; its files lie below its folder."""
    sha256: str
    """Hash of the list's own bytes."""

    def faults(self, files: Sequence[FileRecord], *, verify: Verify, remember: bool, fallback: Path | None = None) -> list[str]:
        """What is wrong with some of the list's files, in words; nothing when they are what the list says.

        verify: once: hash those that were not hashed before, or have changed since; full: all; sizes: none.
        remember: write down what was hashed. fallback: the record where the list's folder cannot be written to.
        """
        found = {file.name: self._state(file) for file in files}
        if faults := [state for state in found.values() if isinstance(state, str)]:
            return faults
        if verify == "sizes":
            return []
        states = {name: state for name, state in found.items() if not isinstance(state, str)}
        places = [self.path.with_name(RECORD_FILE), *([] if fallback is None else [fallback])]
        known = {entry for place in places for entry in self._recorded(place)}
        unknown = [file for file in files if verify == "full" or (file.name, states[file.name]) not in known]
        if not unknown:
            return []
        problems = self._hash_problems(unknown, verify)
        sound = {name: state for name, state in states.items() if name not in problems}
        if remember:
            others = {name: state for name, state in known if name not in states}
            self._record(places, others | sound, sound_only=bool(problems))
        return list(problems.values())

    def _state(self, file: FileRecord) -> State | str:
        path = self.path.parent / file.name
        try:
            found = state_of(path)
        except OSError as error:
            return f"{path}: cannot be read ({error.strerror}), though {self.path.name} lists it"
        if found[0] != file.size:
            sizes = f"holds {found[0]} bytes, {self.path.name} says {file.size} ({readable_bytes(file.size)})"
            return f"{path}: {sizes}: cut off or changed"
        return found

    def _hash_problems(self, files: Sequence[FileRecord], verify: Verify) -> dict[str, str]:
        """Name -> what is wrong, of those whose content is not what the list says."""
        total = sum(file.size for file in files)
        if total >= TOLD_FROM_BYTES:
            what = f"{readable_bytes(total)} of {self.path.parent} (verify={verify})"
            print(f"hashing          {what}", file=sys.stderr, flush=True)
        threads = max(4, min(MOST_THREADS, usable_cores()))  # hashlib lets go of the interpreter's lock
        with (
            tqdm(total=total, desc="hashing", unit="B", unit_scale=True, disable=None, leave=False) as bar,
            ThreadPoolExecutor(max_workers=threads) as pool,
        ):
            found = pool.map(lambda file: self._hash_problem(file, bar.update), files)
            return {file.name: problem for file, problem in zip(files, found, strict=True) if problem is not None}

    def _hash_problem(self, file: FileRecord, progress: Callable[[int], object]) -> str | None:
        path = self.path.parent / file.name
        try:
            digest = sha256_of(path, progress)
        except OSError as error:
            return f"{path}: cannot be read ({error.strerror}), though {self.path.name} lists it"
        if digest != file.sha256:
            return f"{path}: its content has changed: SHA-256 differs from the {file.sha256[:12]}... of {self.path.name}"
        return None

    def _recorded(self, place: Path) -> list[tuple[str, State]]:
        """Files that a record vouches for, as they were then; none where it is of no use."""
        try:
            content = json.loads(place.read_bytes())
            if (content["format_version"], content["list_sha256"]) != (FORMAT_VERSION, self.sha256):
                return []
            return [(str(name), (int(size), int(time), int(inode))) for name, (size, time, inode) in content["files"].items()]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return []

    def _record(self, places: Sequence[Path], entries: Mapping[str, State], *, sound_only: bool) -> None:
        """Write the record to the first place that takes it.

        sound_only: some files are damaged; what vouches for them is overwritten, and no record is made.
        """
        content = {"format_version": FORMAT_VERSION, "list_sha256": self.sha256, "files": entries}
        problems = []
        for place in places:
            try:
                if sound_only and not place.exists():
                    continue
                place.parent.mkdir(parents=True, exist_ok=True)
                write_json(place, content)
            except OSError as error:
                outcome = "still takes damaged files for sound: remove it" if sound_only else "nothing is remembered there"
                problems.append(f"note: {place}: cannot be written ({error.strerror}), {outcome}")
                continue
            if not sound_only:
                return
        for problem in problems:
            print(problem, file=sys.stderr, flush=True)
