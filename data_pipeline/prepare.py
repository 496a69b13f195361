"""From documents to a prepared corpus, step by step: read, choose, tokenizer, encode, publish.

All work is done in `<output>.partial`, with a marker for whatever is finished, so a preparation that was killed goes on where
it stopped. The corpus is published by one rename; until then nothing at `output` has changed.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from conf.errors import UserError
from data_pipeline.config import PrepareConfig, TokenizerConfig
from data_pipeline.encode import TokenFormat, part_bytes, record_of, token_format, write_shards
from data_pipeline.engines import EngineName, choose_engine
from data_pipeline.inputs import Inputs, list_inputs
from data_pipeline.io import full_disk_is_users, read_json, readable_bytes, sync_folder, write_array, write_json
from data_pipeline.manifest import SPLITS, TOKEN_BYTES_FILE, Manifest, densest_windows, read_manifest
from data_pipeline.pool import run_tasks, usable_cores
from data_pipeline.selection import Selection, choose, funnel, sample_documents, texts_of, write_rejected
from data_pipeline.steps import TO_NOBODY, EncodeTask, ReadTask, Workspace, encode_step, read_step
from data_pipeline.summary import print_plan, print_summary
from data_pipeline.tokenizer import Tokenizer, adopt_tokenizer, train_tokenizer
from data_pipeline.workspace import (
    check_room,
    check_tokenizer_request,
    estimated_bytes,
    finished_corpus,
    locked,
    open_workspace,
    partial_folder,
    settings_of,
)

PROOF_BYTES = 2 * 2**20  # text on which the engines are compared


@dataclass(frozen=True, kw_only=True)
class TokenizerFacts:
    """What the tokenizer step found out; kept in the workspace for a restart."""

    form: TokenFormat
    """How tokens are stored."""
    eod_token: str
    """End-of-document, as text."""
    sha256: str
    """Hash of tokenizer.json."""
    engine: EngineName
    """Program that encodes."""
    megabytes_per_second: float
    """Its speed on one core."""


def prepare(config: PrepareConfig) -> Manifest | None:
    """Prepare a corpus, or do one phase of it, or say that it is already there. None after a dry run or an early phase.

    Raises UserError for whatever the user can mend: missing input, an unusable tokenizer, an output made with other settings,
    a full disk, a phase that comes before the one it needs.
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
    if config.phase in ("all", "read"):
        print_plan(config, inputs, workers=workers)
    if config.dry_run:
        return None
    check_room(output, inputs)
    start = time.perf_counter()
    with full_disk_is_users(output, estimated_bytes(inputs)), locked(output, shared=config.parts > 1):
        if (manifest := finished_corpus(config)) is not None:
            return manifest  # made by another process while this one looked for its input
        done = _do_phases(config, inputs, open_workspace(config, inputs), workers=workers)
    if done is None:
        part = f", part {config.part} of {config.parts}" if config.parts > 1 else ""
        print(f"phase {config.phase}{part}: done in {time.perf_counter() - start:.1f} s")
        return None
    manifest, megabytes_per_second = done
    print_summary(manifest, megabytes_per_second=megabytes_per_second, seconds=time.perf_counter() - start)
    return manifest


def _do_phases(config: PrepareConfig, inputs: Inputs, workspace: Workspace, *, workers: int) -> tuple[Manifest, float] | None:
    """Do the phases that were asked for; the corpus and the engine's MB/s when the last one was among them."""
    phase = config.phase
    if phase in ("all", "read"):
        _read(config, inputs, workspace, workers=workers)
    if phase == "read":
        return None
    _need(config, "read", [workspace.is_read(unit.number) for unit in inputs.units])
    selection = choose(config, inputs, workspace)
    if phase in ("encode", "publish"):
        _need(config, "choose", [workspace.tokenizer_marker.exists()])
    elif config.corpus.document_separator is not None and len(selection.sizes_N) <= inputs.num_files:
        print(f"note: no file holds corpus.document_separator={config.corpus.document_separator!r}: each is one document")
    facts = _tokenizer(config, workspace, selection)
    if phase == "choose":
        return None
    if phase in ("all", "encode"):
        _encode(config, workspace, selection, facts, workers=workers)
    if phase == "encode":
        return None
    _need(config, "encode", [workspace.encode_marker(unit).exists() for unit in range(selection.num_units)])
    return _publish(config, inputs, workspace, selection, facts), facts.megabytes_per_second


def _need(config: PrepareConfig, before: str, done: Sequence[bool]) -> None:
    """Raises UserError when the phase `before` has left a unit undone."""
    missing = done.count(False)
    if missing:
        raise UserError(
            f"phase={config.phase}: comes after phase={before}, of which {missing} of {len(done)} units are not done; "
            f"do that first"
        )


def _progress(what: str, total: int | None, *, done: int = 0) -> tqdm[Any]:
    return tqdm(total=total, initial=done, desc=what, unit="B", unit_scale=True, file=sys.stderr, dynamic_ncols=True)


def _read(config: PrepareConfig, inputs: Inputs, workspace: Workspace, *, workers: int) -> None:
    """Read every unit that has no marker yet."""
    own = [unit for unit in inputs.units if unit.number % config.parts == config.part]
    todo = [unit for unit in own if not workspace.is_read(unit.number)]
    tasks = [
        ReadTask(workspace=workspace, corpus=config.corpus, unit=unit, min_document_bytes=config.min_document_bytes)
        for unit in todo
    ]
    left = sum(file.size for unit in todo for file in unit.files)
    total = sum(file.size for unit in own for file in unit.files)
    if tasks:
        with _progress("reading", total or None, done=total - left) as bar:
            run_tasks(read_step, tasks, workers=workers, bar=bar)


def _tokenizer(config: PrepareConfig, workspace: Workspace, selection: Selection) -> TokenizerFacts:
    """Train or copy the tokenizer and prove the engine, or take both from before an interruption."""
    marker = workspace.tokenizer_marker
    if marker.exists():
        content = read_json(marker)
        return TokenizerFacts(**{**content, "form": TokenFormat(**content["form"])})
    tokenizer = _make_tokenizer(config.tokenizer, workspace, selection)
    eod_id, eod_token = tokenizer.end_of_document(config.tokenizer.end_of_document)
    write_array(workspace.corpus / TOKEN_BYTES_FILE, tokenizer.token_bytes())
    proof = list(texts_of(workspace, selection, sample_documents(selection, PROOF_BYTES), limit_bytes=PROOF_BYTES))
    choice = choose_engine(tokenizer, config.tokenizer.engine, sample=proof)
    print(f"encoding with {choice.name}: {choice.reason}")
    facts = TokenizerFacts(
        form=token_format(tokenizer.vocab_size, eod_id),
        eod_token=eod_token,
        sha256=tokenizer.sha256,
        engine=choice.name,
        megabytes_per_second=choice.megabytes_per_second,
    )
    write_json(marker, dataclasses.asdict(facts))
    return facts


def _make_tokenizer(config: TokenizerConfig, workspace: Workspace, selection: Selection) -> Tokenizer:
    """Train one on a sample of the training documents, or copy the one that was named."""
    shutil.rmtree(workspace.tokenizer, ignore_errors=True)
    if config.path is not None:
        adopt_tokenizer(config.path, workspace.tokenizer)
        return Tokenizer(workspace.tokenizer)
    limit = config.training_bytes
    chosen = sample_documents(selection, limit)
    print(f"training a tokenizer of {config.vocab_size} ids on {readable_bytes(selection.bytes_where(chosen))}")
    train_tokenizer(config, texts_of(workspace, selection, chosen, limit_bytes=limit), workspace.tokenizer)
    tokenizer = Tokenizer(workspace.tokenizer)
    if tokenizer.vocab_size < config.vocab_size:
        print(
            f"note: the text gives only {tokenizer.vocab_size} of tokenizer.vocab_size={config.vocab_size} ids: no other pair "
            f"occurs min_frequency={config.min_frequency} times"
        )
    return tokenizer


def _encode(config: PrepareConfig, workspace: Workspace, selection: Selection, facts: TokenizerFacts, *, workers: int) -> None:
    """Encode every unit that has no marker yet."""
    tasks, left, total = [], 0, 0
    for unit in range(config.part, selection.num_units, config.parts):
        own = selection.of_unit(unit)
        size = int(selection.sizes_N[own][selection.fate_N[own] != TO_NOBODY].sum())
        total += size
        if not workspace.encode_marker(unit).exists():
            fate_N = selection.fate_N[own]
            tasks.append(EncodeTask(workspace=workspace, unit=unit, fate_N=fate_N, engine=facts.engine, form=facts.form))
            left += size
    if tasks:
        with _progress("encoding", total, done=total - left) as bar:
            run_tasks(encode_step, tasks, workers=workers, bar=bar)


def _publish(
    config: PrepareConfig, inputs: Inputs, workspace: Workspace, selection: Selection, facts: TokenizerFacts
) -> Manifest:
    """Join the parts to shards, write the manifest, and rename the whole to its place."""
    form = facts.form
    units = range(selection.num_units)
    write_rejected(inputs, workspace, selection)
    size = sum(part_bytes(workspace.part(unit, split)) for unit in units for split in SPLITS)
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
        eod_token=facts.eod_token,
        tokenizer_sha256=facts.sha256,
        tokenizer_files=tuple(record_of(workspace.corpus, name) for name in names),
        engine=facts.engine,
        shards=tuple(shards),
        funnel=funnel(inputs, workspace, selection),
        densest=densest,
        config=settings_of(config),
    )
    manifest.write()
    output = config.output_folder
    workspace.corpus.rename(output)
    sync_folder(output.resolve().parent)
    shutil.rmtree(workspace.folder)
    return read_manifest(output)
