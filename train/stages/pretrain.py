"""Pretraining: samples of prepared corpora."""

from __future__ import annotations

from data_pipeline.facts import inspect_sources
from data_pipeline.loader import Loader
from train.attempt import Attempt
from train.checkpoint.store import CheckpointStore
from train.config.pretrain import PretrainConfig
from train.engine import Engine
from train.held_out import Evaluator
from train.initial import check_initial, initial_folder
from train.metrics import Metrics, NullMetrics
from train.model.transformer import Reading
from train.parallel import ParallelContext
from train.stages.training import Material


def material(config: PretrainConfig, context: ParallelContext, attempt: Attempt, metrics: Metrics | NullMetrics) -> Material:
    """What a pretraining run reads, is measured by and begins with."""
    corpus = context.read_once(lambda: inspect_sources(config.data))
    split = {"seed": config.run.seed, "vocab_size": config.model.vocab_size, "manifests": corpus.manifests}

    def examiner(engine: Engine) -> Evaluator | None:
        if config.evaluate.max_samples == 0:
            return None
        evaluator = Evaluator(config, context=context, engine=engine, loader=Loader(config.data, split="validation", **split))
        for reason in evaluator.missing:
            metrics.alert("probe left out", f"{reason}; leave it out of evaluate.probes to be told no more")
        return evaluator

    def begin(engine: Engine, store: CheckpointStore) -> None:
        if config.initial_checkpoint is None:
            engine.initialise(config.model, config.run.seed)
            return
        check_initial(config, corpus)  # a job that waited for it was not checked when it was submitted
        store.load_weights(engine, initial_folder(config.initial_checkpoint))

    return Material(
        reading=Reading(sequence_length=config.data.sequence_length, document_mask=config.data.document_mask),
        loader=Loader(config.data, split="train", pin=context.device.type == "cuda", **split),
        examiner=examiner,
        begin=begin,
        tokenizer_folder=corpus.tokenizer_path,
        fingerprint=corpus.fingerprint,
    )
