"""Checks of the loss: of the run's held-out text, and of a text that every machine has.

Shapes: S positions, T tokens.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator
from math import exp
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from data_pipeline.loader import IGNORE, Loader, MicroBatch
from data_pipeline.tokenizer import Tokenizer
from train.config.model import ModelConfig
from train.convert.proof.finding import LOSS_TOLERANCE, Figures, Finding
from train.convert.proof.ours import OurModel
from train.convert.proof.rows import pack, positions_at_once
from train.convert.proof.theirs import TheirModel
from train.model.transformer import Reading

Document: TypeAlias = tuple[Tensor, Tensor, Tensor]
TEXT_CHARACTERS = 4000
LONGEST_WINDOW = 1024


def prove_loss(ours: OurModel, theirs: TheirModel, loader: Loader, *, limit: int | None) -> Finding:
    """The loss of held-out text: ours packed as in training, theirs document by document."""
    count = loader.num_samples if limit is None else min(limit, loader.num_samples)
    reading = Reading(sequence_length=loader.sequence_length, document_mask=loader.document_mask)
    most = positions_at_once(ours.model)
    our_sum, their_sum, targets = 0.0, 0.0, 0
    with tqdm(total=count, desc="held-out loss", unit="sequence", disable=None) as bar:
        for numbers in _groups(count, max(1, most // loader.sequence_length)):
            batches = [loader.micro_batch([number]) for number in numbers]
            states = [(batch.tokens, batch.labels, batch.positions, batch.document_bounds) for batch in batches]
            our_sum += ours.loss(states, reading)
            documents = [document for batch in batches for document in _documents(batch)]
            their_sum += sum(theirs.loss(rows) for rows in pack(documents, most))
            targets += sum(batch.target_tokens for batch in batches)
            bar.update(len(batches))
    our_loss, their_loss = our_sum / targets, their_sum / targets
    difference = abs(our_loss - their_loss)
    problems = ()
    if not difference <= LOSS_TOLERANCE:
        problems = (f"held-out loss: ours {our_loss:.6f}, theirs {their_loss:.6f}, allowed is {LOSS_TOLERANCE:g}",)
    figures: Figures = {
        "longhaul": our_loss,
        "transformers": their_loss,
        "difference": difference,
        "tolerance": LOSS_TOLERANCE,
        "targets": targets,
        "sequences": count,
        "sequences_held_out": loader.num_samples,
    }
    return Finding(name="held_out_loss", figures=figures, problems=problems)


def prove_perplexity(ours: OurModel, theirs: TheirModel, model: ModelConfig, *, tokenizer_folder: Path) -> Finding:
    """The perplexity of the source of `argparse`, read by the checkpoint's tokenizer, in windows of at most the context."""
    ids = Tokenizer(tokenizer_folder).encode(inspect.getsource(argparse)[:TEXT_CHARACTERS])
    tokens_T = torch.tensor(ids)
    window = min(model.max_positions, LONGEST_WINDOW)
    pairs = zip(tokens_T[:-1].split(window), tokens_T[1:].split(window), strict=True)
    documents = [(tokens_S, torch.arange(len(tokens_S)), labels_S) for tokens_S, labels_S in pairs]
    our_sum, their_sum, targets = 0.0, 0.0, len(ids) - 1
    for rows in tqdm(list(pack(documents, positions_at_once(model))), desc="perplexity", unit="pass", disable=None):
        our_sum += ours.loss([rows.state], rows.reading)
        their_sum += theirs.loss(rows)
    relative = abs(exp(min((their_sum - our_sum) / targets, 700.0)) - 1)
    figures: Figures = {
        "text": f"the first {TEXT_CHARACTERS} characters of Python's argparse",
        "longhaul": _perplexity(our_sum / targets),
        "transformers": _perplexity(their_sum / targets),
        "relative_difference": relative,
        "tolerance": LOSS_TOLERANCE,
        "targets": targets,
    }
    problems = ()
    if not relative <= LOSS_TOLERANCE:
        ours_theirs = f"ours {figures['longhaul']:.6g}, theirs {figures['transformers']:.6g}"
        problems = (f"perplexity: {ours_theirs}, relative difference {relative:.3g}, allowed is {LOSS_TOLERANCE:g}",)
    return Finding(name="perplexity", figures=figures, problems=problems)


def _perplexity(loss: float) -> float:
    return exp(min(loss, 700.0))  # beyond it there is no float


def _groups(count: int, most: int) -> Iterator[tuple[int, ...]]:
    return (tuple(range(first, min(first + most, count))) for first in range(0, count, most))


def _documents(batch: MicroBatch) -> Iterator[Document]:
    """Each document of a micro-batch that has a target."""
    bounds = batch.document_bounds.unique().tolist()
    for start, end in zip(bounds, bounds[1:], strict=False):
        if (batch.labels[start:end] != IGNORE).any():
            yield batch.tokens[start:end], batch.positions[start:end], batch.labels[start:end]
