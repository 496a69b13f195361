"""A model in memory, ready to score texts, to write, or to tell labels apart."""

from __future__ import annotations

from dataclasses import dataclass

from train.inference.batched import BatchGenerator
from train.inference.likelihood import LikelihoodScorer
from train.inference.text_model import TextModel
from train.model.transformer import Decoder
from train.parallel import ParallelContext

BATCH_TOKENS = {"cpu": 1024, "cuda": 65_536}
"""A CPU is quickest while the activations of a batch stay in its cache (EXPERIMENTS.md)."""


@dataclass(frozen=True, kw_only=True)
class Engines:
    """What a language model is asked through."""

    scorer: LikelihoodScorer
    generator: BatchGenerator

    @staticmethod
    def of(decoder: Decoder, text: TextModel, context: ParallelContext, *, batch_tokens: int | None = None) -> Engines:
        """Around a model in memory, which may be one that trains."""
        tokens = batch_tokens or BATCH_TOKENS[context.device.type]
        return Engines(
            scorer=LikelihoodScorer(decoder, text.model, context=context, batch_tokens=tokens),
            generator=BatchGenerator(decoder, text.model, context=context, batch_tokens=tokens, num_known_ids=text.known_ids),
        )
