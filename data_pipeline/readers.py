"""From files to documents. Every reader is a generator; what cannot be read comes out as a Rejection with its reason."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from conf.errors import UserError
from data_pipeline.config import CorpusConfig
from data_pipeline.document import Document, Rejection, Rule, Scalar
from data_pipeline.inputs import InputFile, Unit
from data_pipeline.io import BROKEN_ARCHIVE_ERRORS, CountedFile, open_input

Item = Document | Rejection
OnRead = Callable[[int], None]

PARQUET_BATCH_ROWS = 1024


def read_unit(corpus: CorpusConfig, unit: Unit, on_read: OnRead) -> Iterator[Item]:
    """The documents of one unit of work, in order; never fails for the sake of one file.

    `on_read` is told the bytes read from disk (from a data set: the bytes of its texts).
    """
    if unit.dataset is not None:
        yield from _read_dataset(corpus, unit, on_read)
        return
    read_file = {"text": _read_text, "source_tree": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet}[corpus.reader]
    for file in unit.files:
        try:
            yield from read_file(corpus, file, on_read)
        except BROKEN_ARCHIVE_ERRORS as error:
            yield Rejection(id=file.id, rule=Rule.BROKEN_FILE, reason=f"{file.path}: {error}")
        except OSError as error:
            yield Rejection(id=file.id, rule=Rule.UNREADABLE, reason=f"{file.path}: {error.strerror or error}")


def _read_text(corpus: CorpusConfig, file: InputFile, on_read: OnRead) -> Iterator[Item]:
    with open_input(Path(file.path), on_read) as stream:
        data = stream.read()
    if b"\0" in data and not corpus.encoding.lower().startswith(("utf-16", "utf_16", "utf-32", "utf_32")):
        yield Rejection(id=file.id, rule=Rule.BINARY, reason=f"{file.path}: holds NUL bytes")
        return
    try:
        text = _decode(data, corpus)
    except UnicodeDecodeError as error:
        reason = f"{file.path}: not {corpus.encoding}: {error.reason} at byte {error.start}"
        yield Rejection(id=file.id, rule=Rule.UNDECODABLE, reason=reason)
        return
    if corpus.document_separator is None:
        yield Document(id=file.id, source=file.path, text=text)
        return
    # A command line cannot hold a line end, so it is spelled out there.
    separator = corpus.document_separator.replace("\\n", "\n").replace("\\t", "\t")
    for number, part in enumerate(text.split(separator)):
        if part.strip():  # two separators in a row are a wider gap, not an empty document
            yield Document(id=f"{file.id}#{number}", source=file.path, text=part)


def _decode(data: bytes, corpus: CorpusConfig) -> str:
    if codecs.lookup(corpus.encoding).name == "utf-8":
        data = data.removeprefix(codecs.BOM_UTF8)
    return data.decode(corpus.encoding, errors="replace" if corpus.undecodable == "replace" else "strict")


def _read_jsonl(corpus: CorpusConfig, file: InputFile, on_read: OnRead) -> Iterator[Item]:
    with open_input(Path(file.path), on_read) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            place = f"{file.id}:{number}"
            try:
                record = json.loads(line)
            except UnicodeDecodeError as error:
                reason = f"not UTF-8: {error.reason} at byte {error.start} of the line"
                yield Rejection(id=place, rule=Rule.UNDECODABLE, reason=reason)
            except (json.JSONDecodeError, RecursionError) as error:
                yield Rejection(id=place, rule=Rule.BAD_RECORD, reason=f"not JSON: {error}")
            else:
                yield _from_record(corpus, record, place, source=file.path)


def _read_parquet(corpus: CorpusConfig, file: InputFile, on_read: OnRead) -> Iterator[Item]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(CountedFile(Path(file.path), on_read)) as table:
            columns = table.schema_arrow.names
            if corpus.text_field not in columns:
                reason = f"{file.path}: no column {corpus.text_field}; it has {', '.join(columns[:20])}"
                yield Rejection(id=file.id, rule=Rule.NO_TEXT, reason=reason)
                return
            for batch in table.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=[corpus.text_field]):
                for value in batch.column(0).to_pylist():
                    yield _from_record(corpus, {corpus.text_field: value}, f"{file.id}:{row}", source=file.path)
                    row += 1
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = f"{file.path}, near row {row}: {' '.join(str(error).split())}"
        yield Rejection(id=file.id, rule=Rule.BROKEN_FILE, reason=reason)


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """All columns of each row. Raises UserError for a file that is no whole Parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=PARQUET_BATCH_ROWS):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: cannot be read as Parquet ({' '.join(str(error).split())[:200]})") from None


def _read_dataset(corpus: CorpusConfig, unit: Unit, on_read: OnRead) -> Iterator[Item]:
    from data_pipeline.hub import dataset_rows

    shard = f"{corpus.name}/{unit.dataset}/{unit.dataset_shard}-of-{unit.dataset_shards}"
    for number, row in enumerate(dataset_rows(corpus, unit)):
        item = _from_record(corpus, row, f"{shard}:{number}", source=str(unit.dataset))
        on_read(len(item.text) if isinstance(item, Document) else 0)
        yield item


def _from_record(corpus: CorpusConfig, record: Any, place: str, *, source: str) -> Item:
    """A document from one JSON line or row."""
    if not isinstance(record, dict):
        return Rejection(id=place, rule=Rule.BAD_RECORD, reason=f"not a JSON object but {type(record).__name__}")
    if corpus.text_field not in record:
        names = ", ".join(list(record)[:20])
        return Rejection(id=place, rule=Rule.NO_TEXT, reason=f"no field {corpus.text_field}; it has {names}")
    text = record[corpus.text_field]
    if not isinstance(text, str):
        return Rejection(id=place, rule=Rule.NO_TEXT, reason=f"field {corpus.text_field} holds {type(text).__name__}, not text")
    metadata: dict[str, Scalar] = {
        name: value for name, value in record.items() if name != corpus.text_field and isinstance(value, Scalar)
    }
    return Document(id=place, source=source, text=text, metadata=metadata)
