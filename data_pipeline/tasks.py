"""Labelled rows: read from JSONL, CSV, TSV, Parquet or line-aligned text, each made a prompt and its truths."""

from __future__ import annotations

import csv
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.errors import UserError
from data_pipeline.io import BROKEN_ARCHIVE_ERRORS, bare_suffix, open_input, sha256_of
from data_pipeline.task_config import TaskConfig, TaskSource

FORMATS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".txt": "lines",
}  # fmt: skip
LINE_COLUMN, TARGET_COLUMN = "text", "target"
PREVIEW = 20
MOST_FIELD_CHARACTERS = 2**31 - 1
"""Of a CSV; the module's own bound of 131,072 is less than a book."""
ONE_A_LINE = "write one object a line, as by: jq -c '.[]' FILE"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One labelled row."""

    id: str
    """File and line or row number, from 1: the same for every model."""
    source: str
    """Name of its data."""
    prompt: str
    """What the model is given."""
    truths: tuple[str, ...]
    """What is right; none: there is no answer."""


def read_rows(task: TaskConfig, *, limit: int | None = None) -> list[Row]:
    """The rows of all sources, in order; of each source at most `limit`.

    Raises UserError for a file that cannot be read or is of another format, a column that is missing, a label outside the
    set, and a source without rows.
    """
    rows: list[Row] = []
    for source in task.data:
        before = len(rows)
        for place, values in itertools.islice(_records(task, source), limit):
            rows.append(_row(task, source, f"{Path(source.path).name}:{place}", values))
        if len(rows) == before:
            raise UserError(f"{source.path}: holds no row, so there is nothing to evaluate; give another file")
    return rows


def hash_of(source: TaskSource) -> str:
    """SHA-256 of the source's files. Raises UserError when one cannot be read."""
    try:
        digests = [sha256_of(Path(path)) for path in (source.path, source.targets) if path is not None]
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None
    return "-".join(digests)


def _row(task: TaskConfig, source: TaskSource, place: str, values: Mapping[str, Any]) -> Row:
    try:
        prompt = task.prompt_text.format_map(_Filled(values))
    except (KeyError, IndexError) as error:
        hint = _header_hint(task, source)
        raise UserError(f"{place}: task.prompt names {error}, which is no column; there are {_names(values)}{hint}") from None
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{place}: task.prompt cannot be filled in ({error}); a brace that means itself is doubled") from None
    truths = _truths(task.target, values, place)
    if task.kind == "classification":
        if len(truths) != 1:
            raise UserError(f"{place}: column {task.target} holds {len(truths)} labels; a row has exactly one")
        if truths[0] not in task.labels:
            raise UserError(
                f"{place}: label {truths[0]!r} is not among task.labels=[{', '.join(task.labels)}]; add it, or mend the row"
            )
    return Row(id=place, source=source.label, prompt=prompt, truths=truths)


class _Filled(dict[str, Any]):
    """Columns of a row for its prompt, where null would read `None`."""

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        if value is None:
            raise ValueError(f"column {name} is null; leave the row out, or give it a text")
        return value


def _header_hint(task: TaskConfig, source: TaskSource) -> str:
    is_table = _format_of(task, source) in ("csv", "tsv") and not task.columns
    return "; for a file without a header give task.columns=[...]" if is_table else ""


def _truths(path: str, values: Mapping[str, Any], place: str) -> tuple[str, ...]:
    found: Any = values
    for part in [path] if path in values else path.split("."):
        if not isinstance(found, Mapping) or part not in found:
            raise UserError(f"{place}: task.target={path} is no column; there are {_names(values)}")
        found = found[part]
    if found is None:
        return ()
    several = found if isinstance(found, list | tuple) else [found]
    if any(isinstance(one, list | dict) for one in several):
        kind = type(several[0]).__name__
        raise UserError(f"{place}: task.target={path} holds {kind}, not text; name a field inside: {path}.text")
    return tuple(str(one) for one in several)


def _names(values: Mapping[str, Any]) -> str:
    return ", ".join(map(str, list(values)[:PREVIEW])) or "none"


def _records(task: TaskConfig, source: TaskSource) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line or row number from 1, columns) of a source."""
    path = Path(source.path)
    kind = _format_of(task, source)
    if source.targets is not None and kind != "lines":
        raise UserError(f"{path}: targets={source.targets} is for format=lines, this is {kind}; leave it out")
    try:
        if kind == "parquet":
            yield from _parquet(path)
        elif kind == "lines":
            yield from _lines(path, source.targets)
        elif kind == "jsonl":
            yield from _jsonl(path)
        else:
            yield from _table(path, _tsv_fields(path) if kind == "tsv" else _csv_fields(path), task.columns)
    except BROKEN_ARCHIVE_ERRORS as error:  # gzip's own is an OSError as well
        raise UserError(f"{path}: is a damaged archive ({error})") from None
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else " ".join(str(error).split())  # pyarrow's run over lines
        raise UserError(f"{error.filename or path}: cannot be read ({reason})") from None


def _format_of(task: TaskConfig, source: TaskSource) -> str:
    suffix = bare_suffix(Path(source.path))
    kind = FORMATS.get(suffix, "lines" if source.targets else None) if task.format == "auto" else task.format
    if kind is None:
        raise UserError(
            f"{source.path}: its ending {suffix or '(none)'} tells no format; give task.format=jsonl, csv, tsv, parquet or "
            "lines; the truths of line-aligned text are a second file: task.data=[{path: a.de, targets: a.en}]"
        )
    return kind


def _text_lines(path: Path) -> Iterator[tuple[int, str]]:
    with open_input(path) as stream:
        for number, line in enumerate(stream, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}:{number}: is not UTF-8 ({error.reason} at byte {error.start} of the line)") from None
            if "\0" in text:
                raise UserError(f"{path}:{number}: holds NUL bytes, so it is no text file; task.format tells another format")
            yield number, text.removesuffix("\n").removesuffix("\r")


def _jsonl(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in _text_lines(path):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            way_out = ONE_A_LINE if line.strip() in ("[", "{") else "task.format tells another format"
            raise UserError(f"{path}:{number}: is not JSON ({error}); {way_out}") from None
        if not isinstance(values, dict):
            raise UserError(f"{path}:{number}: is {type(values).__name__}, not an object with columns; {ONE_A_LINE}")
        yield number, values


def _csv_fields(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line on which it ends, fields) of each row; a quoted field may run over several lines."""
    csv.field_size_limit(MOST_FIELD_CHARACTERS)
    reader = csv.reader((f"{line}\n" for _, line in _text_lines(path)), strict=True)
    try:
        for fields in reader:
            yield reader.line_num, fields
    except csv.Error as error:
        raise UserError(
            f"{path}:{reader.line_num}: is no row of a CSV file ({error}); task.format tells another format"
        ) from None


def _tsv_fields(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, fields) of each row; quotes are letters like others."""
    for number, line in _text_lines(path):
        yield number, line.split("\t") if line else []


def _table(
    path: Path, rows: Iterator[tuple[int, list[str]]], columns: tuple[str, ...]
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    names = list(columns)
    for number, fields in rows:
        if not names:
            names = fields
            if len(set(names)) < len(names):
                raise UserError(f"{path}: its header names a column twice ({', '.join(names)}); give task.columns=[...]")
            continue
        if not fields:
            continue
        if len(fields) != len(names):
            way_out = "" if columns else "; for a file without a header give task.columns=[...]"
            raise UserError(f"{path}:{number}: has {len(fields)} fields, the columns are {', '.join(names)}{way_out}")
        yield number, dict(zip(names, fields, strict=True))


def _lines(path: Path, targets: str | None) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if targets is None:
        for number, line in _text_lines(path):
            yield number, {LINE_COLUMN: line}
        return
    left, right = list(_text_lines(path)), list(_text_lines(Path(targets)))
    if len(left) != len(right):
        raise UserError(f"{path}: has {len(left)} lines, {targets} has {len(right)}; line-aligned files have as many")
    for (number, line), (_, target) in zip(left, right, strict=True):
        yield number, {LINE_COLUMN: line, TARGET_COLUMN: target}


def _parquet(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    from data_pipeline.readers import parquet_rows

    yield from enumerate(parquet_rows(path), start=1)
