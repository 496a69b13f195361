"""Which files there are to read, and how they are cut into units of work. Reads no document.

The units depend on the files alone, never on the number of workers: so the result does not either.
"""

from __future__ import annotations

import dataclasses
import glob
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from conf.errors import UserError
from data_pipeline.config import CorpusConfig
from data_pipeline.document import Rejection, Rule
from data_pipeline.io import COMPRESSED_SUFFIXES, sha256_of_texts

STDLIB = "stdlib:"
# Source code, with the prose that lies beside it.
SOURCE_SUFFIXES = (
    ".c .cc .cpp .cs .css .cu .cuh .go .h .hpp .html .java .jl .js .json .jsx .kt .lua .m .md .php .pl .proto .ps1 .py .pyi "
    ".r .rb .rs .rst .scala .sh .sql .swift .toml .ts .tsx .txt .vue .yaml .yml .zig"
)
USUAL_SUFFIXES = {
    "text": (".txt", ".text", ".md"),
    "jsonl": (".jsonl", ".ndjson"),
    "parquet": (".parquet",),
    "source_tree": tuple(SOURCE_SUFFIXES.split()),
}
UNITS_WANTED = 256  # enough for the last worker to finish soon after the others
UNIT_BYTES_RANGE = (4 * 2**20, 256 * 2**20)  # smaller units cost more than they balance; larger ones are too much to redo


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One file to read."""

    path: str
    """Where it lies."""
    id: str
    """Its name within the corpus: what document ids begin with."""
    size: int
    """Bytes on disk."""
    modified_ns: int
    """Time of its last change, in nanoseconds."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A piece of work: some files in a row, or one shard of a data set."""

    number: int
    """Place in the order of all units."""
    files: tuple[InputFile, ...] = ()
    """Files to read, in order."""
    dataset: str | None = None
    """Name or folder of the hf data set; None: read `files`."""
    dataset_shard: int = 0
    """Which shard of the data set."""
    dataset_shards: int = 1
    """Shards that the data set is cut into."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything that a corpus will be read from."""

    units: tuple[Unit, ...]
    """The work, in order."""
    rejected: tuple[Rejection, ...]
    """Files and folders that cannot even be looked at."""

    @property
    def num_files(self) -> int:
        """Files to read."""
        return sum(len(unit.files) for unit in self.units)

    @property
    def total_bytes(self) -> int:
        """Bytes on disk of all files; 0 for an hf data set."""
        return sum(file.size for unit in self.units for file in unit.files)

    @property
    def fingerprint(self) -> str:
        """Hash over names, sizes and times: whether the input is still what an interrupted preparation began with."""
        return sha256_of_texts(str(dataclasses.astuple(unit)) for unit in self.units)


def list_inputs(corpus: CorpusConfig) -> Inputs:
    """Find the input of a corpus.

    Raises UserError for a path or a pattern that leads to nothing, and when there is no file to read at all.
    """
    if corpus.reader == "hf":
        from data_pipeline.hub import dataset_units

        return Inputs(units=dataset_units(corpus), rejected=())
    suffixes = tuple(corpus.suffixes) or USUAL_SUFFIXES[corpus.reader]
    files: dict[str, InputFile] = {}
    rejected: list[Rejection] = []
    for given in corpus.paths:
        for root in _roots(given):
            prefix = corpus.name if len(corpus.paths) == 1 else f"{corpus.name}/{given.strip('/')}"
            for path in _files_below(root, corpus.exclude, suffixes, rejected):
                relative = path.name if path == root else path.relative_to(root).as_posix()
                _take(path, f"{prefix}/{relative}", files, rejected)
    if not files:
        more = f"; {len(rejected)} could not be read, the first: {rejected[0].reason}" if rejected else ""
        raise UserError(
            f"corpus {corpus.name}: no file ending in {' '.join(suffixes)} in {', '.join(corpus.paths)}{more}. "
            "Check corpus.paths, corpus.suffixes and corpus.exclude"
        )
    return Inputs(units=_cut(list(files.values())), rejected=tuple(rejected))


def _roots(given: str) -> list[Path]:
    """Files and folders that one entry of `paths` stands for."""
    if given == STDLIB:
        return [Path(sysconfig.get_path("stdlib"))]
    path = Path(given).expanduser()
    if path.exists() or path.is_symlink():
        return [path]
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))  # noqa: PTH207  (pathlib's takes no absolute one)
    if not found:
        kind = "pattern matches no file" if glob.has_magic(given) else "no such file or folder"
        raise UserError(f"corpus.paths: {given}: {kind}; check the path")
    return found


def _files_below(root: Path, exclude: Sequence[str], suffixes: Sequence[str], rejected: list[Rejection]) -> Iterator[Path]:
    """The wanted files of a folder and those below it, in order of their names; `root` itself if it is a file."""
    if not root.is_dir():
        yield root  # named by the user, so taken whatever its ending
        return

    def set_aside(error: OSError) -> None:
        rejected.append(Rejection(id=str(error.filename), rule=Rule.UNREADABLE, reason=f"folder: {error.strerror}"))

    seen: set[tuple[int, int]] = set()
    endings = tuple(suffix + packed for suffix in suffixes for packed in ("", *COMPRESSED_SUFFIXES))
    for folder, folders, names in os.walk(root, onerror=set_aside, followlinks=True):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in seen:  # a link that leads back up
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not _excluded(name, exclude))
        for name in sorted(names):
            if name.endswith(endings) and not _excluded(name, exclude):
                yield Path(folder, name)


def _excluded(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _take(path: Path, name: str, files: dict[str, InputFile], rejected: list[Rejection]) -> None:
    """Add a file, once however many paths lead to it; what is no regular file is set aside: a pipe would block for ever."""
    name = os.fsencode(name).decode(errors="backslashreplace")  # a name that is not UTF-8 still gets an id that is text
    try:
        status = path.stat()
    except OSError as error:
        rejected.append(Rejection(id=name, rule=Rule.UNREADABLE, reason=f"{path}: {error.strerror}"))
        return
    if not path.is_file():
        rejected.append(Rejection(id=name, rule=Rule.UNREADABLE, reason=f"{path}: not a regular file"))
        return
    real = os.path.realpath(path)
    files.setdefault(real, InputFile(path=str(path), id=name, size=status.st_size, modified_ns=status.st_mtime_ns))


def _cut(files: list[InputFile]) -> tuple[Unit, ...]:
    """Group neighbouring files into units of about equal size."""
    least, most = UNIT_BYTES_RANGE
    target = min(max(sum(file.size for file in files) // UNITS_WANTED, least), most)
    groups: list[list[InputFile]] = [[]]
    filled = 0
    for file in files:
        if groups[-1] and filled + file.size > target:
            groups.append([])
            filled = 0
        groups[-1].append(file)
        filled += file.size
    return tuple(Unit(number=number, files=tuple(group)) for number, group in enumerate(groups))
