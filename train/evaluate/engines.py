"""A model in memory, ready to score texts, to write, or to tell labels apart."""

from __future__ import annotations

from functools import cached_property

from train.inference.batched import BatchGenerator
from train.inference.classify import Classifier
from train.inference.likelihood import LikelihoodScorer
from train.inference.text_model import TextModel
from train.model.transformer import Decoder
from train.parallel import ParallelContext

BATCH_TOKENS = {"cpu": 1024, "cuda": 65_536}
"""A CPU is quickest while the activations of a batch stay in its cache (EXPERIMENTS.md)."""


class Engines:
    """A model in memory, which may be one that trains, and what it is asked through."""

    def __init__(self, decoder: Decoder, text: TextModel, context: ParallelContext, *, batch_tokens: int | None = None) -> None:
        """`batch_tokens`: tokens that run together; None: what suits the device."""
        self.decoder, self.text, self.context = decoder, text, context
        self.batch_tokens = batch_tokens or BATCH_TOKENS[context.device.type]

    @cached_property
    def scorer(self) -> LikelihoodScorer:
        """Says how likely texts are."""
        return LikelihoodScorer(self.decoder, self.text.model, context=self.context, batch_tokens=self.batch_tokens)

    @cached_property
    def generator(self) -> BatchGenerator:
        """Continues texts."""
        return BatchGenerator(
            self.decoder,
            self.text.model,
            context=self.context,
            batch_tokens=self.batch_tokens,
            num_known_ids=self.text.known_ids,
        )

    @cached_property
    def classifier(self) -> Classifier:
        """Tells the model's labels apart."""
        return Classifier(self.decoder, self.text.model, context=self.context, batch_tokens=self.batch_tokens)
