"""Fine-tuning: labelled rows, the task's own figures, and the weights of a checkpoint to begin with."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from data_pipeline.encoded_rows import EncodedRows
from data_pipeline.manifest import Split
from data_pipeline.pair_loader import PairLoader
from data_pipeline.row_loader import RowLoader
from train.attempt import Attempt
from train.checkpoint.manifest import MANIFEST, file_facts
from train.checkpoint.reader import CheckpointReader
from train.checkpoint.store import CheckpointStore
from train.config.finetune import FinetuneConfig
from train.engine import Engine
from train.evaluate.examiner import TaskExaminer
from train.evaluate.preferences import PreferenceExaminer
from train.groundwork.finetuning import base_of, kept_rows
from train.held_out import Evaluator
from train.initial import check_initial_model, head_changes, initial_folder
from train.metrics import Metrics, NullMetrics
from train.model.transformer import Reading
from train.parallel import ParallelContext
from train.reference import Identity, Reference, begun_with, compute_references, hash_of_model
from train.stages.training import Material


def material(config: FinetuneConfig, context: ParallelContext, attempt: Attempt, metrics: Metrics | NullMetrics) -> Material:
    """What a fine-tuning run reads, is measured by and begins with."""
    # Those that are to be hashed in full were, by who has started the ranks.
    verify = "sizes" if config.data.verify == "sizes" else "once"
    rows = context.read_once(lambda: kept_rows(attempt.run_dir, verify=verify))
    common = {
        "sequence_length": config.sequence_length,
        "seed": config.run.seed,
        "vocab_size": config.model.vocab_size,
    }

    if config.pairs is not None:
        return _of_pairs(config, context, attempt, rows=rows, common=common)

    def examiner(engine: Engine) -> TaskExaminer | None:
        if config.evaluate.max_samples == 0 or not rows.num_rows("validation"):
            return None
        held_out = Evaluator(config, context=context, engine=engine, loader=RowLoader(rows, split="validation", **common))
        return TaskExaminer(config, context=context, engine=engine, held_out=held_out, rows=rows)

    return Material(
        reading=Reading(sequence_length=config.sequence_length, document_mask=True),
        loader=RowLoader(rows, split="train", pin=context.device.type == "cuda", **common),
        examiner=examiner,
        begin=partial(_begin, config),
        tokenizer_folder=rows.tokenizer_folder,
        fingerprint=rows.fingerprint,
        base=base_of(config, attempt.run_dir),
    )


def _begin(config: FinetuneConfig, engine: Engine, store: CheckpointStore) -> None:
    check_initial_model(config)
    folder = initial_folder(config.initial_checkpoint)
    heads = head_changes(CheckpointReader(folder).model, config.model)
    store.load_weights(engine, folder, new=heads.new, left_out=heads.left_out)


def _of_pairs(
    config: FinetuneConfig, context: ParallelContext, attempt: Attempt, *, rows: EncodedRows, common: dict[str, int]
) -> Material:
    """Of a run that learns preferences: pairs of rows, and what the model that it begins with thinks of each."""
    loaders: dict[Split, PairLoader] = {
        "train": PairLoader(rows, split="train", pin=context.device.type == "cuda", **common),
    }
    if config.evaluate.max_samples != 0 and rows.num_rows("validation"):
        loaders["validation"] = PairLoader(rows, split="validation", **common)

    def prepare(engine: Engine, store: CheckpointStore) -> None:
        first = (base_of(config, attempt.run_dir) or Path(config.initial_checkpoint)) / MANIFEST
        base = file_facts(first).sha256 if first.is_file() else begun_with(attempt.run_dir)
        identity = Identity(rows=rows.fingerprint, base=base, model=hash_of_model(config.model), precision=config.precision)
        reference = Reference(identity=identity, run_dir=attempt.run_dir, elsewhere=config.preference.reference)

        def compute() -> dict[Split, np.ndarray]:
            _begin(config, engine, store)
            alive = partial(attempt.watchdog.phase, "evaluate")
            found = compute_references(loaders, engine, context, micro_batch=config.batch.micro_batch, before_batch=alive)
            attempt.watchdog.phase("start-up")
            return found

        reference.give(loaders, compute, context)

    def examiner(engine: Engine) -> PreferenceExaminer | None:
        held_out = loaders.get("validation")
        return held_out and PreferenceExaminer(config, context=context, engine=engine, loader=held_out)

    return Material(
        reading=Reading(sequence_length=config.sequence_length, document_mask=True),
        loader=loaders["train"],
        examiner=examiner,
        begin=partial(_begin, config),
        tokenizer_folder=rows.tokenizer_folder,
        fingerprint=rows.fingerprint,
        base=base_of(config, attempt.run_dir),
        prepare=prepare,
    )
