"""Which way a figure is better."""

from __future__ import annotations

from typing import Literal

LOWER_IS_BETTER = {
    "loss", "perplexity", "bits_per_byte", "ece", "brier", "ter", "word_perplexity", "byte_perplexity",
}  # fmt: skip
NEITHER_IS_BETTER = {"support", "length_ratio", "reward_rejected"}


def direction(name: str) -> Literal[-1, 0, 1]:
    """1: higher is better, -1: lower is, 0: neither. `name`: source/figure[label], or task/figure,filter of lm-eval."""
    base = name.rsplit("/", 1)[-1].partition("[")[0].partition(",")[0]
    return 0 if base in NEITHER_IS_BETTER else -1 if base in LOWER_IS_BETTER else 1
