"""What becomes of every document that was read, and the record of it: kept for training, held out, a copy, or set aside.

Decisions are pure functions of the units' hashes and sizes, so they are made anew after an interruption and come out the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from conf.errors import UserError
from data_pipeline.config import PrepareConfig
from data_pipeline.dedup import choose_held_out, first_occurrences
from data_pipeline.document import Rejection, Rule
from data_pipeline.inputs import Inputs
from data_pipeline.io import json_lines, read_json_lines
from data_pipeline.manifest import FunnelRow
from data_pipeline.sampler import key_of, mix
from data_pipeline.steps import TO_NOBODY, TO_TRAIN, TO_VALIDATION, Workspace, read_counts, read_documents

ItemT = TypeVar("ItemT")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What becomes of every document that was read; N documents over all units, in order."""

    sizes_N: np.ndarray
    """UTF-8 bytes, int64 [N]."""
    fate_N: np.ndarray
    """TO_TRAIN, TO_VALIDATION or TO_NOBODY, uint8 [N]."""
    first_N: np.ndarray
    """Number of the first document with the same text, int64 [N]."""
    score_N: np.ndarray
    """A keyed hash of the text, uint64 [N]: lower comes first into the tokenizer's training text."""
    unit_starts: np.ndarray
    """Number of each unit's first document, and N, int64."""

    @property
    def num_units(self) -> int:
        """Units that the documents came from."""
        return len(self.unit_starts) - 1

    def of_unit(self, unit: int) -> slice:
        """The documents of a unit."""
        return slice(int(self.unit_starts[unit]), int(self.unit_starts[unit + 1]))

    def bytes_where(self, chosen_N: np.ndarray) -> int:
        """Text bytes of the chosen documents (a mask or numbers)."""
        return int(self.sizes_N[chosen_N].sum())


def choose(config: PrepareConfig, inputs: Inputs, workspace: Workspace) -> Selection:
    """Decide about duplicates and held-out documents. Pure, and quick: it is done anew after an interruption."""
    tables = [np.load(workspace.sizes(unit.number), allow_pickle=False) for unit in inputs.units]
    table_N3 = np.concatenate(tables)
    hashes_N2, sizes_N = table_N3[:, :2], table_N3[:, 2].astype(np.int64)
    if not len(sizes_N):
        raise UserError(_nothing_left(config, inputs, workspace))
    number_N = np.arange(len(sizes_N))
    first_N = first_occurrences(hashes_N2) if config.deduplicate else number_N
    held_out_N = choose_held_out(hashes_N2, config.held_out_fraction, seed=config.seed)
    fate_N = np.where(held_out_N, TO_VALIDATION, TO_TRAIN).astype(np.uint8)
    fate_N[first_N != number_N] = TO_NOBODY
    if not (fate_N == TO_TRAIN).any():
        raise UserError(
            f"held_out_fraction={config.held_out_fraction}: all {len(sizes_N)} documents would be held out and none is left to "
            "train on; lower it"
        )
    return Selection(
        sizes_N=sizes_N,
        fate_N=fate_N,
        first_N=first_N,
        score_N=mix(hashes_N2[:, 1] ^ np.uint64(key_of("tokenizer sample", config.seed))),
        unit_starts=np.cumsum([0, *(len(table) for table in tables)], dtype=np.int64),
    )


def _nothing_left(config: PrepareConfig, inputs: Inputs, workspace: Workspace) -> str:
    """Why no document could be used."""
    counts: Counter[str] = Counter(str(item.rule) for item in inputs.rejected)
    example = inputs.rejected[0].reason if inputs.rejected else "the files hold no document"
    for unit in inputs.units:
        counts.update({rule: count["documents"] for rule, count in read_counts(workspace, unit.number)["rejected"].items()})
        first = next(read_json_lines(workspace.rejected(unit.number)), None)
        example = first["reason"] if first else example
    reasons = ", ".join(f"{count} {rule}" for rule, count in counts.most_common()) or "none found"
    return (
        f"corpus {config.corpus.name}: not one document could be used ({reasons}), for example: {example}. Check "
        f"corpus.reader={config.corpus.reader}, corpus.paths and corpus.text_field; then remove {workspace.folder}"
    )


def sample_documents(selection: Selection, limit_bytes: int | None) -> np.ndarray:
    """Numbers of training documents up to `limit_bytes` in all, at least one, drawn by the hash of their text; ascending."""
    candidates = np.flatnonzero(selection.fate_N == TO_TRAIN)
    if limit_bytes is None:
        return candidates
    by_score = candidates[np.argsort(selection.score_N[candidates], kind="stable")]
    before = np.cumsum(selection.sizes_N[by_score]) - selection.sizes_N[by_score]
    return np.sort(by_score[before < limit_bytes])


def texts_of(workspace: Workspace, selection: Selection, chosen: np.ndarray, *, limit_bytes: int | None) -> Iterator[str]:
    """The texts of the chosen documents, `limit_bytes` characters of each at most."""
    for _, document in _of_numbers(selection, chosen, lambda unit: read_documents(workspace, unit)):
        yield document.text[:limit_bytes]


def _of_numbers(
    selection: Selection, wanted: np.ndarray, read: Callable[[int], Iterator[ItemT]]
) -> Iterator[tuple[int, ItemT]]:
    """What `read` gives for the documents with these numbers, ascending; units that hold none of them are not opened."""
    for unit in range(selection.num_units):
        own = selection.of_unit(unit)
        chosen = set(wanted[np.searchsorted(wanted, own.start) : np.searchsorted(wanted, own.stop)].tolist())
        if chosen:
            for number, item in zip(range(own.start, own.stop), read(unit), strict=True):
                if number in chosen:
                    yield number, item


def write_rejected(inputs: Inputs, workspace: Workspace, selection: Selection) -> None:
    """Everything that was set aside, in one file: files, then unit by unit what was read in vain and the duplicates."""
    number_N = np.arange(len(selection.first_N))
    copies = np.flatnonzero(selection.first_N != number_N)
    named = np.union1d(copies, selection.first_N[copies])

    def ids_of(unit: int) -> Iterator[str]:
        if workspace.ids(unit).exists():
            return read_json_lines(workspace.ids(unit))
        return (document.id for document in read_documents(workspace, unit))  # an older version kept them there alone

    ids = dict(_of_numbers(selection, named, ids_of))
    with json_lines(workspace.corpus / "rejected.jsonl") as append:
        for item in inputs.rejected:
            append(item.as_record())
        for unit in range(selection.num_units):
            for record in read_json_lines(workspace.rejected(unit)):
                append(record)
            own = selection.of_unit(unit)
            for number in copies[np.searchsorted(copies, own.start) : np.searchsorted(copies, own.stop)].tolist():
                reason = f"exact_duplicate of {ids[int(selection.first_N[number])]}"
                size = int(selection.sizes_N[number])
                append(Rejection(id=ids[number], rule=Rule.EXACT_DUPLICATE, reason=reason, text_bytes=size).as_record())


def funnel(inputs: Inputs, workspace: Workspace, selection: Selection) -> tuple[FunnelRow, ...]:
    """What became of the documents; the first row is the sum of the others."""
    documents: Counter[str] = Counter(str(item.rule) for item in inputs.rejected)
    text_bytes: Counter[str] = Counter()
    for unit in inputs.units:
        for rule, count in read_counts(workspace, unit.number)["rejected"].items():
            documents[rule] += count["documents"]
            text_bytes[rule] += count["text_bytes"]
    rows = [
        FunnelRow(step=rule, documents=documents[rule], text_bytes=text_bytes[rule])
        for rule in map(str, Rule)
        if documents[rule]
    ]
    for step, fate in ((str(Rule.EXACT_DUPLICATE), TO_NOBODY), ("held out", TO_VALIDATION), ("train", TO_TRAIN)):
        mine_N = selection.fate_N == fate
        rows.append(FunnelRow(step=step, documents=int(mine_N.sum()), text_bytes=int(selection.sizes_N[mine_N].sum())))
    total = FunnelRow(
        step="found", documents=sum(row.documents for row in rows), text_bytes=sum(row.text_bytes for row in rows)
    )
    return (total, *rows)
