"""Which rows an evaluation reads: those of files, or those that a fine-tuning run has held out and kept. Torch-free."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from conf.errors import UserError
from data_pipeline.encoded_rows import ROWS_FILE, read_encoded
from data_pipeline.io import sha256_of
from data_pipeline.records import BadRow
from data_pipeline.task_config import TaskConfig, TaskSource
from data_pipeline.tasks import Row, hash_of, labelled_rows
from train.groundwork.finetuning import ROWS_FOLDER

Found: TypeAlias = tuple[str, str, str]
"""Name, path and hash of what rows were read of."""
KEPT_TEXT = "validation.jsonl"
OTHER_ROWS = "give task.data=[{path: FILE}], with rows that it has not learned from"


def held_out_by(run_dir: Path, *, fingerprint: str) -> TaskSource:
    """The rows that a run has held out. fingerprint: of all its rows, as its checkpoint says.

    Raises UserError where none are there, or they are not those of the checkpoint.
    """
    folder = run_dir / ROWS_FOLDER
    if not (folder / ROWS_FILE).is_file():
        raise UserError(f"task.data=[]: {folder} is not there, where its run kept the rows that it held out; {OTHER_ROWS}")
    kept = read_encoded(folder, verify="sizes")
    if kept.fingerprint != fingerprint:
        raise UserError(f"task.data=[]: {folder} holds other rows than the checkpoint was trained with; {OTHER_ROWS}")
    if not kept.num_rows("validation"):
        raise UserError(f"task.data=[]: its run held out no rows; {OTHER_ROWS}")
    return TaskSource(path=str(folder), split="validation")


def rows_of(task: TaskConfig, source: TaskSource, *, limit: int | None = None) -> Iterator[Row]:
    """The rows of one source, in order, no more than the first `limit`; prompt and columns may be left to be found.

    Raises UserError for a file that cannot be read or is of another format, a column that is missing, a label outside the
    set, and a source without rows.
    """
    is_empty = True
    rows = _kept_rows(task, source, limit) if _is_kept(source) else itertools.islice(labelled_rows(task, source), limit)
    for row in rows:
        if isinstance(row, BadRow):
            raise row
        is_empty = False
        yield row
    if is_empty:
        raise UserError(f"{source.path}: holds no row, so there is nothing to evaluate; give another file")


def read_rows(task: TaskConfig, *, limit: int | None) -> tuple[list[Row], list[Found]]:
    """The rows of all sources, of each at most `limit`, and what they were read of. Raises UserError as `rows_of` does."""
    rows: list[Row] = []
    found: list[Found] = []
    for source in task.data:
        read = list(rows_of(task, source, limit=limit))
        digest = sha256_of(Path(source.path) / KEPT_TEXT) if _is_kept(source) else hash_of(source, format=task.format)
        rows += read
        found += [(name, source.path, digest) for name in dict.fromkeys(row.source for row in read)]
    return rows, found


def words_of(task: TaskConfig, found: Sequence[Found]) -> str:
    """Which rows these are, for a person."""
    kept = [source.path for source in task.data if _is_kept(source)]
    return f"rows of {', '.join(name for name, _, _ in found)}" + (f", held out in {', '.join(kept)}" if kept else "")


def _is_kept(source: TaskSource) -> bool:
    return (Path(source.path) / ROWS_FILE).is_file()


def _kept_rows(task: TaskConfig, source: TaskSource, limit: int | None) -> list[Row]:
    kept = read_encoded(source.path, split="validation")
    if kept.kind == "preference":
        raise UserError(f"{source.path}: holds pairs of answers, which have no one truth; give rows of another task")
    rows = kept.validation_rows(limit)
    for row in rows:
        if task.kind == "classification" and row.truths[0] not in task.labels:
            known = ", ".join(task.labels)
            raise UserError(f"{row.id}: label {row.truths[0]!r} is not among task.labels=[{known}]; add it, or give other rows")
    return rows
