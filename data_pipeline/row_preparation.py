"""From files with rows to a folder of encoded ones: read, hold some out, encode, pack, write."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from conf.errors import UserError
from conf.frozen import hashed_fields
from data_pipeline.chat import chat_template
from data_pipeline.dialogues import Message
from data_pipeline.encoded_rows import (
    FORMAT_VERSION,
    ROWS_FILE,
    EncodedRows,
    SplitContents,
    files_read,
    read_encoded,
    write_encoded,
)
from data_pipeline.io import read_json, sha256_of_texts
from data_pipeline.manifest import Split
from data_pipeline.packing import Packing, in_groups, one_each, pack, shuffled
from data_pipeline.preferences import ROWS_OF_A_PAIR, encode_pairs
from data_pipeline.records import BadRow, Fault
from data_pipeline.row_encoding import IGNORE, EncodedRow, RowEncoder, resolved_targets
from data_pipeline.row_report import RowReport, SplitReport, Tally
from data_pipeline.rows_config import RowsConfig
from data_pipeline.task_config import ROW_KINDS, TaskConfig, TaskSource
from data_pipeline.tasks import Row, hash_of, labelled_rows
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.verified import KnownHashes

CHUNK_ROWS = 1024
MOST_LABELS = 10_000
MADE_AS = 2
"""Raised where the same files and settings come to give other rows, or the same in another order."""
ALWAYS_LEFT_OUT = (str(Fault.NO_TARGET),)
"""Rows that are too long are counted, whatever becomes of bad ones."""
TASK_FIELDS = (
    "kind", "name", "format", "columns", "fields", "prompt", "target_prefix", "target", "source_language", "target_language",
    "no_answer", "labels",
)  # fmt: skip
"""What of a task decides its rows."""
ROWS_FIELDS = ("sequence_length", "packing", "targets", "validation_fraction", "template", "system")
"""What the fingerprint of rows was first made of, beside the task."""


def prepare_rows(
    task: TaskConfig,
    data: RowsConfig,
    *,
    tokenizer: Tokenizer,
    opening: Sequence[int],
    end_of_document: int,
    vocab_size: int,
    seed: int,
    folders: Sequence[Path],
) -> EncodedRows:
    """The encoded rows: those in one of the folders, when they are of the same data and settings, or else new ones in the last.

    opening: ids that the model has learned to find before a text. vocab_size: ids that it knows. seed: of what is held out.
    Raises UserError for data or settings that do not do, before anything is written, and for a folder that is damaged.
    """
    _check_settings(task, data)
    template = chat_template(tokenizer, data.template) if task.kind in ("dialogue", "preference") else None
    facts = [tokenizer.sha256, *map(str, (tuple(opening), end_of_document, seed)), template.text if template else ""]
    hashes = KnownHashes(file for folder in folders if data.verify != "full" for file in files_read(folder))
    fingerprint = _fingerprint(task, data, facts, hashes)
    for folder in folders:
        if _is_there(folder, fingerprint, data):
            # Those that are to be hashed in full will be by who puts them to use, and writes down that they were.
            encoded = read_encoded(folder, verify="sizes" if data.verify == "sizes" else "once")
            _check_ids(encoded, vocab_size, tokenizer)
            return encoded
    encoder = RowEncoder(
        tokenizer=tokenizer,
        kind=task.kind,
        targets=resolved_targets(task, data),
        sequence_length=data.sequence_length,
        opening=tuple(opening),
        end_of_document=end_of_document,
        no_answer=task.no_answer,
        system=data.system,
        template=template,
    )
    read = _Read(task)
    splits = _splits(task, data, read, seed=seed)
    _check_system(task, data, splits)
    if task.kind == "classification":
        _stop_at_bad_rows(data, read.tally)  # the labels are those of the good rows, so the bad ones come first
    labels = _labels(task, splits["train"]) if task.kind == "classification" else ()
    parts: dict[Split, _Part] = {}
    for split, rows in splits.items():
        if task.kind == "preference":
            parts[split] = _encode_pairs(encoder, rows, tally=read.tally, as_turns=data.template is not None)
        else:
            with_prompts = split == "validation" and task.kind == "dialogue"
            parts[split] = _encode(encoder, rows, labels, tally=read.tally, with_prompts=with_prompts)
    _stop_at_bad_rows(data, read.tally)
    _check_left(task, read.tally, parts)
    size = ROWS_OF_A_PAIR if task.kind == "preference" else 1
    contents = {split: _packed(part, data, size=size) for split, part in parts.items()}
    described = EncodedRows(
        folder=folders[-1],
        fingerprint=fingerprint,
        task=task.name,
        kind=task.kind,
        targets=encoder.targets,
        sequence_length=data.sequence_length,
        documents_per_sequence=max(part.packing.most_rows for part in contents.values()) + 1,
        labels=labels,
        opening=encoder.opening,
        end_of_document=end_of_document,
        endings=_endings(parts["train"].encoded, tokenizer) if task.kind != "classification" else (),
        no_answer=task.no_answer,
        template=template.text if template and any(row.messages for row in parts["train"].rows) else None,
        tokenizer_folder=tokenizer.folder.resolve(),
        tokenizer_sha256=tokenizer.sha256,
        settings={"task": dataclasses.asdict(task), "data": dataclasses.asdict(data), "seed": seed},
        report=_report(read, contents, data, size=size),
        read=tuple(hashes.given),
        max_token_id=_max_token_id(parts, is_language=task.kind != "classification"),
    )
    _check_ids(described, vocab_size, tokenizer)
    bytes_V = np.zeros(tokenizer.vocab_size, dtype=np.int32) if task.kind == "classification" else tokenizer.token_bytes()
    write_encoded(described, contents, bytes_V)
    return read_encoded(folders[-1], verify="sizes")


def _check_settings(task: TaskConfig, data: RowsConfig) -> None:
    if task.kind not in ROW_KINDS:
        raise UserError(f"task.kind={task.kind}: has no rows to learn from; give task={', task='.join(ROW_KINDS)}")
    fitting = {
        "dialogue": ("auto", "all", "assistant", "last_turn"),
        "generation": ("auto", "all", "completion"),
        "classification": ("auto",),
        "preference": ("auto", "completion"),
    }[task.kind]
    if data.targets not in fitting:
        raise UserError(f"data.targets={data.targets}: is not for task={task.kind}; give one of {', '.join(fitting)}")
    for name in ("template", "system"):
        if task.kind not in ("dialogue", "preference") and getattr(data, name) is not None:
            raise UserError(f"data.{name}: is for dialogues, this is task={task.kind}; leave it out, or give task=dialogue")


def _check_system(task: TaskConfig, data: RowsConfig, splits: dict[Split, list[Row]]) -> None:
    """Only the rows tell whether preferences are dialogues, or texts that a template makes dialogues."""
    if task.kind != "preference" or data.system is None or data.template is not None:
        return
    text = next((row for rows in splits.values() for row in rows if not row.messages), None)
    if text is not None:
        raise UserError(
            f"data.system={data.system!r}: is for dialogues, and {text.id} is a preference of texts; leave it out, or give "
            "data.template=chatml or another, which writes texts out as dialogues"
        )


def _fingerprint(task: TaskConfig, data: RowsConfig, facts: Sequence[str], hashes: KnownHashes) -> str:
    # Where rows are encoded at all, the good ones are: which those are follows from the rest.
    of_rows = hashed_fields(data, ROWS_FIELDS, without=("bad_rows", "verify"))
    settings = {name: getattr(task, name) for name in TASK_FIELDS} | of_rows
    sources = [(part, source) for part in ("data", "validation") for source in getattr(task, part)]
    read = [
        f"{part} {source.label} {Path(source.path).name} {source.split} {hash_of(source, format=task.format, hashes=hashes)}"
        for part, source in sources
    ]
    return sha256_of_texts([str(FORMAT_VERSION), f"made as {MADE_AS}", json.dumps(settings, sort_keys=True), *facts, *read])


def _is_there(folder: Path, fingerprint: str, data: RowsConfig) -> bool:
    """Whether the folder holds these rows; where bad ones are to stop, those without bad ones: reading anew tells which is."""
    path = folder / ROWS_FILE
    content = read_json(path) if path.is_file() else None
    if not isinstance(content, dict) or content.get("fingerprint") != fingerprint:
        return False
    dropped = content.get("report", {}).get("dropped", [])
    return data.bad_rows == "drop" or all(drop["reason"] in ALWAYS_LEFT_OUT for drop in dropped)


@dataclass
class _Read:
    """What comes out of the files."""

    task: TaskConfig
    count: int = 0
    shared: int = 0

    def __post_init__(self) -> None:
        self.tally, self.found = Tally(), list[str]()

    def rows(self, sources: Sequence[TaskSource]) -> list[Row]:
        """The rows of some sources; bad ones are counted."""
        kept: list[Row] = []
        for source in sources:
            before = self.count
            with _bar(f"reading {source.label}", None) as bar:
                for row in labelled_rows(self.task, source, tell=self.found.append):
                    bar.update()
                    self.count += 1
                    if isinstance(row, BadRow):
                        self.tally.add(row)
                    else:
                        kept.append(row)
            if self.count == before:
                raise UserError(f"{source.path}: holds no row; give another file")
        return kept


def _splits(task: TaskConfig, data: RowsConfig, read: _Read, *, seed: int) -> dict[Split, list[Row]]:
    """Training and held-out rows. Without files of their own, the held-out ones are chosen by what they say."""
    rows = read.rows(task.data)
    keys = [_key(task, row, seed) for row in rows]
    if task.validation:
        held_out = read.rows(task.validation)
        known = set(keys)
        read.shared = sum(_key(task, row, seed) in known for row in held_out)
        return {"train": rows, "validation": held_out}
    limit = int(data.validation_fraction * 2**64)
    chosen = {key for key in keys if key < limit}
    if data.validation_fraction and not chosen and len(set(keys)) > 1:
        chosen = {min(keys)}
    if task.kind == "classification" and not task.labels:  # a label that is only held out could never be learned
        learned = {row.truths for row, key in zip(rows, keys, strict=True) if key not in chosen}
        chosen -= {key for row, key in zip(rows, keys, strict=True) if row.truths not in learned}
    return {
        "train": [row for row, key in zip(rows, keys, strict=True) if key not in chosen],
        "validation": [row for row, key in zip(rows, keys, strict=True) if key in chosen],
    }


def _key(task: TaskConfig, row: Row, seed: int) -> int:
    """64 bits of what a row says, wherever it stands; of a classification its text alone, whatever its label, and of a
    preference what was asked, so that no question is in both splits with other answers."""
    asked = [row.prompt, *_turns_in_common(row)]
    said = [row.prompt, row.truths, row.messages, row.tools]
    if task.kind == "classification" or (task.kind == "preference" and any(asked)):
        said = asked
    data = json.dumps([seed, said], sort_keys=True).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _turns_in_common(row: Row) -> list[Message]:
    """Of a preference's dialogues: the turns before the answers."""
    others = row.rejected.messages if row.rejected else ()
    both = zip(row.messages, others, strict=False)
    return [turn for turn, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], both)]


def _labels(task: TaskConfig, rows: Sequence[Row]) -> tuple[str, ...]:
    """Those of the task, or of the rows, in order: whole numbers as numbers."""
    if task.labels:
        return task.labels
    found = {row.truths[0] for row in rows}
    if not 2 <= len(found) <= MOST_LABELS:
        shown = ", ".join(sorted(found)[:5])
        raise UserError(
            f"task.data: its rows have {len(found)} labels ({shown}); a classification needs 2 to {MOST_LABELS:,}: check which "
            "column is the label, by task.fields={label: COLUMN}"
        )
    return tuple(sorted(found, key=int if all(re.fullmatch(r"-?\d+", label) for label in found) else None))


@dataclass(frozen=True)
class _Part:
    """The rows of one split that are used, and what they became."""

    rows: list[Row]
    encoded: list[EncodedRow]


def _encode(
    encoder: RowEncoder, rows: Sequence[Row], labels: Sequence[str], *, tally: Tally, with_prompts: bool = False
) -> _Part:
    """with_prompts: give each dialogue the text that a model is to go on from, for its outputs to be scored."""
    part = _Part([], [])
    with _bar("encoding", len(rows)) as bar:
        for first in range(0, len(rows), CHUNK_ROWS):
            chunk = rows[first : first + CHUNK_ROWS]
            for row, made in zip(chunk, encoder.encode(chunk, labels), strict=True):
                try:
                    if isinstance(made, BadRow):
                        raise made
                    part.rows.append(dataclasses.replace(row, prompt=encoder.asked(row)) if with_prompts else row)
                    part.encoded.append(made)
                except BadRow as bad:
                    tally.add(bad)
            bar.update(len(chunk))
    return part


def _encode_pairs(encoder: RowEncoder, pairs: Sequence[Row], *, tally: Tally, as_turns: bool) -> _Part:
    part = _Part([], [])
    with _bar("encoding", len(pairs)) as bar:
        for first in range(0, len(pairs), CHUNK_ROWS):
            chunk = pairs[first : first + CHUNK_ROWS]
            for made in encode_pairs(encoder, chunk, as_turns=as_turns):
                if isinstance(made, BadRow):
                    tally.add(made)
                    continue
                part.rows.extend(row for row, _ in made)
                part.encoded.extend(encoded for _, encoded in made)
            bar.update(len(chunk))
    return part


def _stop_at_bad_rows(data: RowsConfig, tally: Tally) -> None:
    """Rows that are too long are always left out; for others the user decides."""
    bad = tally.dropped(but=ALWAYS_LEFT_OUT)
    first = tally.first(but=ALWAYS_LEFT_OUT)
    if first is None or data.bad_rows == "drop":
        return
    more = sum(drop.count for drop in bad) - 1
    kinds = ", ".join(f"{drop.count:,} {drop.reason}" for drop in bad)
    also = f", and {more:,} more rows are bad (in all {kinds})" if more else f" ({first.reason})"
    raise UserError(f"{first.first}{also}; mend them, or leave them out and have them counted: data.bad_rows=drop")


def _check_left(task: TaskConfig, tally: Tally, parts: dict[Split, _Part]) -> None:
    needed: list[Split] = ["train", "validation"] if task.validation else ["train"]
    for split in needed:
        if not parts[split].rows:
            reasons = "; ".join(f"{drop.count:,} {drop.reason}, the first: {drop.first}" for drop in tally.dropped())
            name = "data" if split == "train" else "validation"
            raise UserError(f"task.{name}: no row is left of it ({reasons or 'all are held out'}); give other rows")


def _packed(part: _Part, data: RowsConfig, *, size: int) -> SplitContents:
    """size: rows that stay together."""
    lengths_G = np.array([len(row.inputs_N) for row in part.encoded], dtype=np.int64).reshape(-1, size).sum(axis=1)
    packing: Packing = pack(lengths_G, data.sequence_length) if data.packing else one_each(len(lengths_G))
    return SplitContents(rows=part.rows, encoded=part.encoded, packing=in_groups(shuffled(packing), size))


def _endings(encoded: Sequence[EncodedRow], tokenizer: Tokenizer) -> tuple[int, ...]:
    last = {int(row.labels_N[np.flatnonzero(row.labels_N != IGNORE)[-1]]) for row in encoded if not row.is_cut}
    return tuple(sorted(last & tokenizer.special_ids))


def _report(read: _Read, contents: dict[Split, SplitContents], data: RowsConfig, *, size: int) -> RowReport:
    def of(split: Split) -> SplitReport:
        encoded, sequences = contents[split].encoded, contents[split].packing.num_sequences
        return SplitReport(
            rows=len(encoded) // size,
            cut=sum(row.is_cut for row in encoded) // size,
            tokens=sum(len(row.inputs_N) for row in encoded),
            targets=sum(int((row.labels_N != IGNORE).sum()) for row in encoded),
            sequences=sequences,
            places=sequences * data.sequence_length,
        )

    return RowReport(
        found=tuple(read.found),
        read=read.count,
        dropped=read.tally.dropped(),
        train=of("train"),
        validation=of("validation"),
        shared=read.shared,
    )


def _max_token_id(parts: dict[Split, _Part], *, is_language: bool) -> int:
    rows = [row for part in parts.values() for row in part.encoded]
    most = max(int(row.inputs_N.max()) for row in rows)
    learned = max(int(row.labels_N.max()) for row in rows) if is_language else 0
    return max(most, learned)


def _check_ids(encoded: EncodedRows, vocab_size: int, tokenizer: Tokenizer) -> None:
    splits: list[Split] = ["train", "validation"]
    names = ("tokens_N",) if encoded.kind == "classification" else ("tokens_N", "labels_N")
    most = encoded.max_token_id
    if most is None:
        most = max(int(getattr(encoded.arrays(split), name).max(initial=0)) for split in splits for name in names)
    _refuse_beyond(most, vocab_size, tokenizer)


def _refuse_beyond(token_id: int, vocab_size: int, tokenizer: Tokenizer) -> None:
    if token_id >= vocab_size:
        text = tokenizer.backend.id_to_token(token_id)
        raise UserError(
            f"the rows hold token {token_id} ({text!r}), the model knows ids below {vocab_size}; take a chat template without "
            "that token, such as data.template=plain, or the tokenizer that the model was trained with"
        )


def _bar(words: str, total: int | None) -> tqdm:
    return tqdm(total=total, desc=words, unit="row", disable=None, file=sys.stderr, leave=False)
