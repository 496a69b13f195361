"""Likelihood of text: loss, perplexity and bits per byte, all from three sums."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from train.scores.tally import Additive, ratio

# exp(709.8) is the largest float64; a model that is lost altogether still has a perplexity that JSON can hold.
_HIGHEST_EXPONENT = 700.0


@dataclass(frozen=True, kw_only=True)
class LanguageFigures:
    """loss (nats per target), perplexity (exp of it, at most exp(700)) and bits_per_byte, of [loss, targets, bytes]."""

    def __call__(self, sums_RK: np.ndarray) -> dict[str, np.ndarray]:
        """The three figures [R]; nan without targets, without bytes, and where a loss is nan."""
        nats_R, targets_R, bytes_R = sums_RK.T
        loss_R = ratio(nats_R, targets_R)
        perplexity_R = np.exp(np.minimum(loss_R, _HIGHEST_EXPONENT))
        return {"loss": loss_R, "perplexity": perplexity_R, "bits_per_byte": ratio(nats_R / math.log(2), bytes_R)}

    def undefined(self, name: str, sums_K: np.ndarray) -> str:
        """What is missing."""
        if not math.isfinite(sums_K[0]):
            return "the loss of at least one example is not finite"
        return "there are no target bytes" if name == "bits_per_byte" else "there are no targets"


def language(losses: Sequence[float], target_tokens: Sequence[int], target_bytes: Sequence[int]) -> Additive:
    """Tally of loss, perplexity and bits_per_byte.

    losses: nats, summed over the targets of each example. target_tokens: how many targets each has. target_bytes: UTF-8
    bytes of the targets' text. Texts are weighted by their length, as in one long text.
    """
    rows = np.array([losses, target_tokens, target_bytes], dtype=np.float64).T
    # Infinity times a weight of 0 would be nan all the same, but with a warning.
    rows[~np.isfinite(rows[:, 0]), 0] = np.nan
    return Additive(rows_NK=rows, function=LanguageFigures())
