"""Files with rows, as columns: JSONL, CSV, TSV, Parquet, line-aligned text, data sets of the `datasets` library.

A row that cannot be read comes out as a BadRow, for the caller to raise or to count; a file that cannot be read raises.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from conf.errors import UserError
from data_pipeline.hub import dataset_identity, named_rows, saved_folder
from data_pipeline.io import BROKEN_ARCHIVE_ERRORS, bare_suffix, open_input, sha256_of_texts
from data_pipeline.task_config import TaskSource
from data_pipeline.verified import KnownHashes

FORMATS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".txt": "lines",
}  # fmt: skip
LINE_COLUMN, TARGET_COLUMN = "text", "target"
MOST_FIELD_CHARACTERS = 2**31 - 1
"""Of a CSV; the module's own bound of 131,072 is less than a book."""
ONE_A_LINE = "write one object a line, as by: jq -c '.[]' FILE"


class Fault(StrEnum):
    """Why a row is of no use."""

    ENCODING = "not UTF-8"
    FORMAT = "no row of its format"
    COLUMN = "missing column"
    VALUE = "wrong kind of value"
    EMPTY = "empty answer"
    LABEL = "unknown label"
    TEMPLATE = "chat template fails"
    SPECIAL = "spells a special token"
    NO_TARGET = "no target left"


class BadRow(UserError):
    """One row that cannot be used."""

    def __init__(self, fault: Fault, text: str, *, line: str = "") -> None:
        """line: of the file, with what is no text in it as surrogates; its quotes may matter to the rows around it."""
        self.fault, self.line = fault, line
        super().__init__(text)


@dataclass(frozen=True, kw_only=True)
class Record:
    """One row of a file."""

    id: str
    """File and line or row number, from 1."""
    values: Mapping[str, Any]
    """Its columns."""


@dataclass(frozen=True, kw_only=True)
class RecordReader:
    """How the files of a task are read."""

    format: str = "auto"
    """See TaskConfig.format."""
    columns: Sequence[str] = ()
    """See TaskConfig.columns."""

    def read(self, source: TaskSource) -> Iterator[Record | BadRow]:
        """The rows of a source, in order. Raises UserError for a file that cannot be read or is of another format."""
        path, kind = Path(source.path), self.kind_of(source)
        if source.targets is not None and kind != "lines":
            raise UserError(f"{path}: targets={source.targets} is for format=lines, this is {kind}; leave it out")
        try:
            for number, values in self._numbered(kind, source):
                yield values if isinstance(values, BadRow) else Record(id=f"{path.name}:{number}", values=values)
        except BROKEN_ARCHIVE_ERRORS as error:  # gzip's own is an OSError as well
            raise UserError(f"{path}: is a damaged archive ({error})") from None
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else " ".join(str(error).split())  # pyarrow's run over lines
            raise UserError(f"{error.filename or path}: cannot be read ({reason})") from None

    def kind_of(self, source: TaskSource) -> str:
        """The format of a source. Raises UserError when nothing tells it."""
        if self.format != "auto":
            return self.format
        if saved_folder(source.path):
            return "dataset"
        suffix = bare_suffix(Path(source.path))
        kind = FORMATS.get(suffix, "lines" if source.targets else None)
        if kind is None:
            raise UserError(
                f"{source.path}: its ending {suffix or '(none)'} tells no format; give task.format=jsonl, csv, tsv, parquet, "
                "lines or dataset; the truths of line-aligned text are a second file: task.data=[{path: a.de, targets: a.en}]"
            )
        return kind

    def hash_of(self, source: TaskSource, hashes: KnownHashes) -> str:
        """Identity of the source's contents. Raises UserError when one of its files cannot be read."""
        folder = Path(source.path)
        if self.format in ("auto", "dataset") and saved_folder(source.path):
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            return sha256_of_texts(text for path in files for text in (str(path.relative_to(folder)), _sha256(path, hashes)))
        if self.format == "dataset":
            return dataset_identity(source.path, config=source.config, split=source.split, revision=source.revision)
        return "-".join(_sha256(Path(path), hashes) for path in (source.path, source.targets) if path is not None)

    def _numbered(self, kind: str, source: TaskSource) -> Iterator[tuple[int, Mapping[str, Any] | BadRow]]:
        path = Path(source.path)
        if kind == "dataset":
            rows = named_rows(source.path, config=source.config, split=source.split, revision=source.revision)
            yield from enumerate(rows, start=1)
        elif kind == "parquet":
            from data_pipeline.readers import parquet_rows

            yield from enumerate(parquet_rows(path), start=1)
        elif kind == "lines":
            yield from self._lines(path, source.targets)
        elif kind == "jsonl":
            yield from self._jsonl(path)
        else:
            yield from self._table(path, self._tsv_fields(path) if kind == "tsv" else self._csv_fields(path))

    def _text_lines(self, path: Path) -> Iterator[tuple[int, str | BadRow]]:
        with open_input(path) as stream:
            for number, line in enumerate(stream, start=1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    where = f"{path}:{number}: is not UTF-8 ({error.reason} at byte {error.start} of the line)"
                    yield number, BadRow(Fault.ENCODING, where, line=line.decode(errors="surrogateescape").rstrip("\r\n"))
                    continue
                if "\0" in text:
                    where = f"{path}:{number}: holds NUL bytes, so it is no text file; task.format tells another format"
                    yield number, BadRow(Fault.ENCODING, where)
                    continue
                yield number, text.removesuffix("\n").removesuffix("\r")

    def _jsonl(self, path: Path) -> Iterator[tuple[int, Mapping[str, Any] | BadRow]]:
        for number, line in self._text_lines(path):
            if isinstance(line, BadRow) or line.strip():
                yield number, line if isinstance(line, BadRow) else _json_object(line, f"{path}:{number}")

    def _csv_fields(self, path: Path) -> Iterator[tuple[int, list[str] | BadRow]]:
        """(line on which it ends, fields) of each row; a quoted field may run over several lines."""
        csv.field_size_limit(MOST_FIELD_CHARACTERS)
        bad: list[BadRow] = []

        def lines() -> Iterator[str]:
            for _, line in self._text_lines(path):
                if isinstance(line, BadRow):
                    bad.append(line)
                yield f"{line.line if isinstance(line, BadRow) else line}\n"

        reader = csv.reader(lines(), strict=True)
        while True:
            try:
                fields: list[str] | BadRow = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                where = f"{path}:{reader.line_num}: is no row of a CSV file ({error}); task.format tells another format"
                fields = BadRow(Fault.FORMAT, where)
            if bad:  # a line of this row, which may have run over several
                fields = bad[0]
                bad.clear()
            yield reader.line_num, fields

    def _tsv_fields(self, path: Path) -> Iterator[tuple[int, list[str] | BadRow]]:
        """(line, fields) of each row; quotes are letters like others."""
        for number, line in self._text_lines(path):
            yield number, line if isinstance(line, BadRow) else line.split("\t") if line else []

    def _table(
        self, path: Path, rows: Iterator[tuple[int, list[str] | BadRow]]
    ) -> Iterator[tuple[int, Mapping[str, Any] | BadRow]]:
        names = list(self.columns)
        for number, fields in rows:
            if isinstance(fields, BadRow):
                if not names:
                    raise fields  # a header that cannot be read
                yield number, fields
            elif not names:
                names = fields
                if len(set(names)) < len(names):
                    raise UserError(f"{path}: its header names a column twice ({', '.join(names)}); give task.columns=[...]")
            elif fields and len(fields) != len(names):
                way_out = "" if self.columns else "; for a file without a header give task.columns=[...]"
                text = f"{path}:{number}: has {len(fields)} fields, the columns are {', '.join(names)}{way_out}"
                yield number, BadRow(Fault.FORMAT, text)
            elif fields:
                yield number, dict(zip(names, fields, strict=True))

    def _lines(self, path: Path, targets: str | None) -> Iterator[tuple[int, Mapping[str, Any] | BadRow]]:
        if targets is None:
            for number, line in self._text_lines(path):
                yield number, line if isinstance(line, BadRow) else {LINE_COLUMN: line}
            return
        left, right = list(self._text_lines(path)), list(self._text_lines(Path(targets)))
        if len(left) != len(right):
            raise UserError(f"{path}: has {len(left)} lines, {targets} has {len(right)}; line-aligned files have as many")
        for (number, line), (_, target) in zip(left, right, strict=True):
            if isinstance(line, BadRow):
                yield number, line
            elif isinstance(target, BadRow):
                yield number, target
            else:
                yield number, {LINE_COLUMN: line, TARGET_COLUMN: target}


def _json_object(line: str, where: str) -> Mapping[str, Any] | BadRow:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError also of a whole number with thousands of digits
        way_out = ONE_A_LINE if line.strip() in ("[", "{") else "task.format tells another format"
        return BadRow(Fault.FORMAT, f"{where}: is not JSON ({error}); {way_out}")
    if not isinstance(values, dict):
        return BadRow(Fault.FORMAT, f"{where}: is {type(values).__name__}, not an object with columns; {ONE_A_LINE}")
    return values


def _sha256(path: Path, hashes: KnownHashes) -> str:
    try:
        return hashes.sha256_of(path)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None
