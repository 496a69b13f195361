"""What a pretraining run reads: prepared corpora."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from conf.errors import UserError
from data_pipeline.facts import CorpusFacts, check_epochs, inspect_sources, verify_sources
from train.config.pretrain import PretrainConfig
from train.groundwork.findings import Findings
from train.initial import beginning, check_initial


def look_into(config: PretrainConfig) -> Findings[PretrainConfig]:
    """Read the manifests of the run's corpora.

    Raises UserError when one is missing or does not fit the others, or the vocabulary that was given is too small.
    """
    if config.initial_checkpoint is not None:
        begins = beginning(config.initial_checkpoint, Path(config.run.folder) / config.run.name)
        config = replace(config, initial_checkpoint=begins.first)
    facts = inspect_sources(config.data)
    config = replace(config, model=replace(config.model, vocab_size=_vocab_size(config, facts)))
    sources = ", ".join(str(source.path) for source in facts.sources)
    return Findings(
        config=config,
        fingerprint=facts.fingerprint,
        lines=(f"corpus           {facts.train_tokens:,} training tokens, {facts.validation_tokens:,} held out",),
        train_tokens=facts.train_tokens,
        other_data=lambda newest: (
            f"data.sources={sources}: {newest} was trained on other data (its content, weights or names differ), so its order "
            f"of samples cannot go on; give the data it had (a corpus that was renamed also needs name=OLD_NAME), or start "
            f"another run with run.name=..."
        ),
        begin=lambda: check_initial(config, facts),
        check_plan=lambda total_samples: check_epochs(config.data, facts, total_samples=total_samples),
        make_ready=lambda run_dir: verify_sources(config.data, facts.manifests, run_dir=run_dir),
    )


def _vocab_size(config: PretrainConfig, facts: CorpusFacts) -> int:
    vocab_size = config.model.vocab_size or facts.vocab_size
    # Published tokenizers may have special tokens beyond the rows of their model; text never becomes one of them.
    needed = facts.vocab_size if config.initial_checkpoint is None else facts.eod_id + 1
    if vocab_size < needed:
        raise UserError(
            f"model.vocab_size={vocab_size}: the corpus has token ids up to {facts.vocab_size - 1}; "
            f"give at least {facts.vocab_size}, or null to take the tokenizer's size"
        )
    return vocab_size
