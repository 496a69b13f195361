"""Encoded rows in a folder: written once, whole or not at all, and mapped into memory by every rank. Torch-free.

Shape letters: N tokens of all rows, R rows, Q sequences, V ids.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conf.errors import UserError
from data_pipeline.config import Verify
from data_pipeline.io import (
    full_disk_is_users,
    json_lines,
    read_hashed_json,
    read_json,
    sha256_of,
    sync_folder,
    write_array,
    write_json,
)
from data_pipeline.manifest import Split
from data_pipeline.packing import Packing
from data_pipeline.row_encoding import EncodedRow
from data_pipeline.row_report import RowReport, report_from_json
from data_pipeline.tasks import Row
from data_pipeline.verified import FileList, FileRecord, HashedFile

FORMAT_VERSION = 1
ROWS_FILE = "rows.json"
TOKEN_BYTES_FILE = "token_bytes.npy"
ARRAYS = ("tokens", "labels", "row_starts", "order", "sequence_starts")


@dataclass(frozen=True)
class SplitArrays:
    """The rows of one split; those of one row lie side by side."""

    tokens_N: np.ndarray
    """int32: what the model reads."""
    labels_N: np.ndarray
    """int32: what it is to answer; -100 where nothing is learned."""
    row_starts_R1: np.ndarray
    """int64 [R + 1]: where each row begins in N, and the end."""
    packing: Packing
    """Which rows share a sequence."""


@dataclass(frozen=True, kw_only=True)
class EncodedRows:
    """All rows of a fine-tuning."""

    folder: Path
    """Where they lie."""
    fingerprint: str
    """Identity of the rows and of what decides how they are encoded and packed; the order of training has a seed besides."""
    task: str
    """Name of the task."""
    kind: str
    """TaskConfig.kind."""
    targets: str
    """Which tokens are learned: see RowsConfig.targets; auto is resolved."""
    sequence_length: int
    """Tokens of a sequence."""
    documents_per_sequence: int
    """Most rows of a sequence in either split, and one for padding."""
    labels: tuple[str, ...]
    """classification: the labels, in the order of their numbers."""
    opening: tuple[int, ...]
    """Ids before every row."""
    end_of_document: int
    """Id that ends an answer, and fills up sequences, where it has no label."""
    endings: tuple[int, ...]
    """Special tokens that end answers: at any of these, what the model writes is complete."""
    no_answer: str
    """What the model learns to write for a row without a truth."""
    template: str | None
    """dialogue: the chat template, which belongs beside the model."""
    tokenizer_folder: Path
    """Folder of the tokenizer."""
    tokenizer_sha256: str
    """Hash of its tokenizer.json."""
    settings: Mapping[str, Any]
    """The settings that made the rows."""
    report: RowReport
    """What became of the rows."""
    read: tuple[HashedFile, ...] = ()
    """The files that the rows were read from; none in what an older version has written."""
    max_token_id: int | None = None
    """Largest id that they hold or that is learned; None in what an older version has written."""

    def num_rows(self, split: Split) -> int:
        """Rows of a split."""
        return self._part(split).rows

    def num_sequences(self, split: Split) -> int:
        """Sequences of a split."""
        return self._part(split).sequences

    def _part(self, split: Split) -> Any:
        return self.report.train if split == "train" else self.report.validation

    def arrays(self, split: Split) -> SplitArrays:
        """The arrays of a split, mapped into memory."""
        found = {name: np.load(self.folder / f"{split}-{name}.npy", mmap_mode="r", allow_pickle=False) for name in ARRAYS}
        return SplitArrays(
            tokens_N=found["tokens"],
            labels_N=found["labels"],
            row_starts_R1=found["row_starts"],
            packing=Packing(order_R=found["order"], starts_Q1=found["sequence_starts"]),
        )

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of every id, int32 [V]; special tokens have none."""
        return np.load(self.folder / TOKEN_BYTES_FILE, mmap_mode="r", allow_pickle=False)

    def row_ids(self, split: Split) -> list[str]:
        """File and line of every row."""
        return [content["id"] for content in self._contents(split)]

    def validation_rows(self, limit: int | None = None) -> list[Row]:
        """The held-out rows as they were read, in order; the prompt of a dialogue is its text before the last answer.

        limit: no more than the first ones, and no others are read; null: all.
        """
        return [
            Row(**{**content, **{name: tuple(content[name]) for name in ("truths", "messages", "tools")}})
            for content in self._contents("validation", limit)
        ]

    def _contents(self, split: Split, limit: int | None = None) -> list[dict[str, Any]]:
        with (self.folder / f"{split}.jsonl").open(encoding="utf-8") as lines:
            return [json.loads(line) for line in itertools.islice(lines, limit)]


def files_read(folder: Path) -> list[HashedFile]:
    """The files that the rows of a folder were read from, which saves hashing them at every start; none where that cannot be
    told."""
    path = folder / ROWS_FILE
    try:
        return [HashedFile.from_json(file) for file in read_json(path).get("read", ())] if path.is_file() else []
    except (AttributeError, KeyError, TypeError, ValueError):
        return []


def read_encoded(
    folder: str | Path, *, verify: Verify = "once", remember: bool = False, split: Split | None = None
) -> EncodedRows:
    """Open what `prepare_rows` wrote. verify and remember: as in `verified.FileList.faults`. split: whose files are hashed, for
    who reads no others; None: all.

    Raises UserError for a folder that is missing, unfinished, of another version or damaged.
    """
    folder = Path(folder)
    path = folder / ROWS_FILE
    if not path.is_file():
        raise UserError(f"{folder}: holds no {ROWS_FILE}, so it has no encoded rows. {_remedy(folder)}")
    content, digest = read_hashed_json(path)
    version = content.pop("format_version", None) if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: format_version={version}, this Longhaul reads {FORMAT_VERSION}. {_remedy(folder)}")
    try:
        files = [FileRecord(**{**record, "name": Path(record["name"]).name}) for record in content.pop("files")]
        encoded = EncodedRows(
            **{
                **content,
                "folder": folder,
                "labels": tuple(content["labels"]),
                "opening": tuple(content["opening"]),
                "endings": tuple(content["endings"]),
                "tokenizer_folder": Path(content["tokenizer_folder"]),
                "report": report_from_json(content["report"]),
                "read": tuple(HashedFile.from_json(file) for file in content.get("read", ())),
            }
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}). {_remedy(folder)}") from None
    listed = FileList(path=path, sha256=digest)
    hashed = files if split is None else [file for file in files if file.name.startswith((f"{split}-", f"{split}."))]
    faults = listed.faults(files, verify="sizes", remember=False)
    if faults := faults or listed.faults(hashed, verify=verify, remember=remember):
        raise UserError(f"{'; '.join(faults)}. {_remedy(folder)}")
    return encoded


def _remedy(folder: Path) -> str:
    return f"Remove {folder} and start again: the rows are then encoded anew"


@dataclass(frozen=True, kw_only=True)
class SplitContents:
    """What is written of one split."""

    rows: Sequence[Row]
    encoded: Sequence[EncodedRow]
    packing: Packing


def write_encoded(described: EncodedRows, parts: Mapping[Split, SplitContents], token_bytes_V: np.ndarray) -> None:
    """Write a folder in place of what is there; it appears whole, or not at all. Raises UserError when the disk is full."""
    folder = described.folder
    made, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    for leftover in (made, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        with full_disk_is_users(folder):
            made.mkdir(parents=True)
            write_array(made / TOKEN_BYTES_FILE, token_bytes_V)
            for split, part in parts.items():
                _write_split(made, split, part)
            files = [
                FileRecord(name=path.name, size=path.stat().st_size, sha256=sha256_of(path)) for path in sorted(made.iterdir())
            ]
            content = dataclasses.asdict(described) | {"tokenizer_folder": str(described.tokenizer_folder)}
            del content["folder"]
            listed = [dataclasses.asdict(record) for record in files]
            write_json(made / ROWS_FILE, {"format_version": FORMAT_VERSION, **content, "files": listed})
            if folder.exists():
                folder.rename(old)
            made.rename(folder)
            sync_folder(folder.parent)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        for leftover in (made, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _write_split(folder: Path, split: Split, part: SplitContents) -> None:
    lengths = [len(row.inputs_N) for row in part.encoded]
    arrays = {
        "tokens": _joined(row.inputs_N for row in part.encoded),
        "labels": _joined(row.labels_N for row in part.encoded),
        "row_starts": np.cumsum([0, *lengths], dtype=np.int64),
        "order": part.packing.order_R,
        "sequence_starts": part.packing.starts_Q1,
    }
    for name in ARRAYS:
        write_array(folder / f"{split}-{name}.npy", arrays[name])
    with json_lines(folder / f"{split}.jsonl") as append:
        for row in part.rows:
            append(dataclasses.asdict(row) if split == "validation" else {"id": row.id, "source": row.source})


def _joined(arrays: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype=np.int32), *arrays])
