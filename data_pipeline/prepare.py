"""From documents to a prepared corpus, step by step: read, choose, tokenizer, encode, publish.

All work is done in `<output>.partial`, with a marker for whatever is finished, so a preparation that was killed goes on where it
stopped. The corpus is published by one rename; until then nothing at `output` has changed.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from conf.errors import UserError
from data_pipeline.config import PrepareConfig
from data_pipeline.dedup import choose_held_out, first_occurrences
from data_pipeline.document import Rejection, Rule
from data_pipeline.encode import TokenFormat, record_of, token_format, write_shards
from data_pipeline.engines import choose_engine
from data_pipeline.inputs import Inputs, list_inputs
from data_pipeline.io import full_disk_is_users, json_lines, read_json, read_json_lines, sync_folder, write_array, write_json
from data_pipeline.manifest import SPLITS, TOKEN_BYTES_FILE, FunnelRow, Manifest, densest_windows
from data_pipeline.pool import run_tasks, usable_cores
from data_pipeline.sampler import key_of, mix
from data_pipeline.steps import (
    TO_NOBODY, TO_TRAIN, TO_VALIDATION, EncodeTask, ReadTask, Workspace, encode_step, read_counts, read_documents, read_step,
)  # fmt: skip
from data_pipeline.summary import print_plan, print_summary
from data_pipeline.tokenizer import Tokenizer, adopt_tokenizer, train_tokenizer
from data_pipeline.workspace import (
    check_room, check_tokenizer_request, estimated_bytes, finished_corpus, locked, open_workspace, partial_folder, settings_of,
)  # fmt: skip

PROOF_BYTES = 2 * 2**20  # text on which the engines are compared


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

    def of_unit(self, unit: int) -> slice:
        """The documents of a unit."""
        return slice(int(self.unit_starts[unit]), int(self.unit_starts[unit + 1]))


def prepare(config: PrepareConfig) -> Manifest | None:
    """Prepare a corpus, or say that it is already there. None after a dry run.

    Raises UserError for whatever the user can mend: missing input, an unusable tokenizer, an output made with other settings,
    a full disk.
    """
    output = config.output_folder
    manifest = finished_corpus(config)
    if manifest is not None:
        print(
            f"{output}: already prepared with these settings ({manifest.num_tokens('train'):,} training tokens); nothing to do"
        )
        shutil.rmtree(partial_folder(output), ignore_errors=True)  # left if the last run was killed right after publishing
        return manifest
    check_tokenizer_request(config.tokenizer)
    inputs = list_inputs(config.corpus)
    workers = config.workers or usable_cores()
    print_plan(config, inputs, workers)
    if config.dry_run:
        return None
    check_room(output, inputs)
    start = time.perf_counter()
    with full_disk_is_users(output, estimated_bytes(inputs)), locked(output):
        workspace = open_workspace(config, inputs)
        _read(config, inputs, workspace, workers)
        selection = _choose(config, inputs, workspace)
        facts = _tokenizer(config, workspace, selection)
        form = token_format(facts["vocab_size"], facts["eod_id"])
        _encode(workspace, selection, form, facts["engine"], workers)
        manifest = _publish(config, inputs, workspace, selection, facts)
    print_summary(manifest, facts, seconds=time.perf_counter() - start)
    return manifest


def _progress(what: str, total: int | None, *, done: int = 0) -> tqdm[Any]:
    return tqdm(total=total, initial=done, desc=what, unit="B", unit_scale=True, file=sys.stderr, dynamic_ncols=True)


def _read(config: PrepareConfig, inputs: Inputs, workspace: Workspace, workers: int) -> None:
    """Read every unit that has no marker yet."""
    todo = [unit for unit in inputs.units if not workspace.read_marker(unit.number).exists()]
    tasks = [
        ReadTask(workspace=workspace, corpus=config.corpus, unit=unit, min_document_bytes=config.min_document_bytes)
        for unit in todo
    ]
    left = sum(file.size for unit in todo for file in unit.files)
    if tasks:
        with _progress("reading", inputs.total_bytes or None, done=inputs.total_bytes - left) as bar:
            run_tasks(read_step, tasks, workers=workers, bar=bar)


def _choose(config: PrepareConfig, inputs: Inputs, workspace: Workspace) -> Selection:
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


def _tokenizer(config: PrepareConfig, workspace: Workspace, selection: Selection) -> dict[str, Any]:
    """Train or copy the tokenizer, prove the engine; returns what tokenizer.json in the workspace keeps for a restart."""
    marker = workspace.folder / "tokenizer.json"
    if marker.exists():
        return read_json(marker)
    shutil.rmtree(workspace.tokenizer, ignore_errors=True)
    if config.tokenizer.path is None:
        limit = config.tokenizer.training_bytes
        chosen_N = _sample(selection, limit)
        print(f"training a tokenizer of {config.tokenizer.vocab_size} ids on {selection.sizes_N[chosen_N].sum() / 1e6:.1f} MB")
        train_tokenizer(config.tokenizer, _texts(workspace, selection, chosen_N, limit), workspace.tokenizer)
    else:
        adopt_tokenizer(config.tokenizer.path, workspace.tokenizer)
    tokenizer = Tokenizer(workspace.tokenizer)
    if config.tokenizer.path is None and tokenizer.vocab_size < config.tokenizer.vocab_size:
        print(
            f"note: the text gives only {tokenizer.vocab_size} of tokenizer.vocab_size={config.tokenizer.vocab_size} ids "
            f"(pairs seen at least min_frequency={config.tokenizer.min_frequency} times)"
        )
    eod_id, eod_token = tokenizer.end_of_document(config.tokenizer.end_of_document)
    if eod_id not in tokenizer.special_ids:
        raise UserError(
            f"tokenizer.end_of_document={eod_token!r}: an ordinary token, which text can spell, so documents would be cut at it; "
            f"give a special token, one of: {', '.join(tokenizer.special_texts[:20]) or '(there is none)'}"
        )
    write_array(workspace.corpus / TOKEN_BYTES_FILE, tokenizer.token_bytes())
    proof = list(_texts(workspace, selection, _sample(selection, PROOF_BYTES), PROOF_BYTES))
    choice = choose_engine(tokenizer, config.tokenizer.engine, proof)
    print(f"encoding with {choice.name}: {choice.reason}")
    facts = {
        "eod_id": eod_id,
        "eod_token": eod_token,
        "vocab_size": tokenizer.vocab_size,
        "sha256": tokenizer.sha256,
        "engine": choice.name,
        "engine_megabytes_per_second": choice.megabytes_per_second,
    }
    write_json(marker, facts)
    return facts


def _sample(selection: Selection, limit_bytes: int | None) -> np.ndarray:
    """Numbers of training documents up to `limit_bytes` in all, at least one, drawn by the hash of their text; ascending."""
    candidates = np.flatnonzero(selection.fate_N == TO_TRAIN)
    if limit_bytes is None:
        return candidates
    by_score = candidates[np.argsort(selection.score_N[candidates], kind="stable")]
    before = np.cumsum(selection.sizes_N[by_score]) - selection.sizes_N[by_score]
    return np.sort(by_score[before < limit_bytes])


def _texts(workspace: Workspace, selection: Selection, chosen: np.ndarray, limit_bytes: int | None) -> Iterator[str]:
    """The texts of the chosen documents, `limit_bytes` characters of each at most."""
    wanted = set(chosen.tolist())
    for unit in range(len(selection.unit_starts) - 1):
        numbers = range(int(selection.unit_starts[unit]), int(selection.unit_starts[unit + 1]))
        if not wanted.isdisjoint(numbers):
            for number, document in zip(numbers, read_documents(workspace, unit), strict=True):
                if number in wanted:
                    yield document.text[:limit_bytes]


def _encode(workspace: Workspace, selection: Selection, form: TokenFormat, engine: Any, workers: int) -> None:
    """Encode every unit that has no marker yet."""
    tasks, left = [], 0
    for unit in range(len(selection.unit_starts) - 1):
        if not workspace.encode_marker(unit).exists():
            own = selection.of_unit(unit)
            tasks.append(EncodeTask(workspace=workspace, unit=unit, fate_N=selection.fate_N[own], engine=engine, form=form))
            left += int(selection.sizes_N[own][selection.fate_N[own] != TO_NOBODY].sum())
    total = int(selection.sizes_N[selection.fate_N != TO_NOBODY].sum())
    if tasks:
        with _progress("encoding", total, done=total - left) as bar:
            run_tasks(encode_step, tasks, workers=workers, bar=bar)


def _publish(
    config: PrepareConfig, inputs: Inputs, workspace: Workspace, selection: Selection, facts: dict[str, Any]
) -> Manifest:
    """Join the parts to shards, write the manifest, and rename the whole to its place."""
    form = token_format(facts["vocab_size"], facts["eod_id"])
    units = range(len(selection.unit_starts) - 1)
    _write_rejected(inputs, workspace, selection)
    size = sum(
        workspace.part(unit, split).with_name(f"{unit:05d}.{split}.bin").stat().st_size for unit in units for split in SPLITS
    )
    shards, densest = [], {}
    with _progress("writing shards", size) as bar:
        for split in SPLITS:
            prefixes = [workspace.part(unit, split) for unit in units]
            written, tokens_N = write_shards(
                prefixes, workspace.corpus, split=split, form=form, shard_tokens=config.shard_tokens, progress=bar.update
            )
            shards += written
            densest[split] = densest_windows(tokens_N)
    names = [f"tokenizer/{path.name}" for path in sorted(workspace.tokenizer.iterdir())] + [TOKEN_BYTES_FILE, "rejected.jsonl"]
    manifest = Manifest(
        folder=workspace.corpus,
        name=config.corpus.name,
        dtype=form.dtype,
        vocab_size=form.vocab_size,
        eod_id=form.eod_id,
        eod_token=facts["eod_token"],
        tokenizer_sha256=facts["sha256"],
        tokenizer_files=tuple(record_of(workspace.corpus, name) for name in names),
        engine=facts["engine"],
        shards=tuple(shards),
        funnel=_funnel(inputs, workspace, selection),
        densest=densest,
        config=settings_of(config),
    )
    manifest.write()
    output = config.output_folder
    workspace.corpus.rename(output)
    sync_folder(output.resolve().parent)
    shutil.rmtree(workspace.folder)
    return finished_corpus(config) or manifest


def _write_rejected(inputs: Inputs, workspace: Workspace, selection: Selection) -> None:
    """Everything that was set aside, in one file: files, then unit by unit what was read in vain and the duplicates."""
    number_N = np.arange(len(selection.first_N))
    copies = np.flatnonzero(selection.first_N != number_N)
    ids = _ids_of(workspace, selection, set(copies.tolist()) | set(selection.first_N[copies].tolist()))
    with json_lines(workspace.corpus / "rejected.jsonl") as append:
        for item in inputs.rejected:
            append(item.as_record())
        for unit in range(len(selection.unit_starts) - 1):
            for record in read_json_lines(workspace.rejected(unit)):
                append(record)
            own = selection.of_unit(unit)
            for number in copies[np.searchsorted(copies, own.start) : np.searchsorted(copies, own.stop)].tolist():
                reason = f"exact_duplicate of {ids[int(selection.first_N[number])]}"
                size = int(selection.sizes_N[number])
                append(Rejection(id=ids[number], rule=Rule.EXACT_DUPLICATE, reason=reason, text_bytes=size).as_record())


def _ids_of(workspace: Workspace, selection: Selection, wanted: set[int]) -> dict[int, str]:
    """Ids of the documents with these numbers."""
    ids = {}
    for unit in range(len(selection.unit_starts) - 1):
        numbers = range(int(selection.unit_starts[unit]), int(selection.unit_starts[unit + 1]))
        if not wanted.isdisjoint(numbers):
            for number, document in zip(numbers, read_documents(workspace, unit), strict=True):
                if number in wanted:
                    ids[number] = document.id
    return ids


def _funnel(inputs: Inputs, workspace: Workspace, selection: Selection) -> tuple[FunnelRow, ...]:
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
