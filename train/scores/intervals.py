"""Figures with bootstrap intervals. The weights of the resamples are drawn here, for comparisons too.

Shapes: N examples, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np

from train.scores.record import Score
from train.scores.tally import Tally, plain_figures

# 16 MB a float64 array of so many weights; a tally makes a handful of that size, so 1000 resamples of 100,000 examples
# stay below 200 MB instead of taking 800 MB for the weights alone.
_MOST_WEIGHTS = 2_000_000


def measure(tally: Tally, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0) -> dict[str, Score]:
    """Every figure with its percentile bootstrap interval over the examples.

    A resample draws N of the N examples with replacement; the interval lies between the (1 - confidence) / 2 and the
    (1 + confidence) / 2 quantile of the figure over the resamples (Efron and Tibshirani, An Introduction to the
    Bootstrap, 1993, chapter 13). Resamples where the figure is undefined are left out. There is no interval at
    resamples=0, of fewer than two examples, where the figure itself is undefined, and where more than half of the
    resamples are left out. The same seed and N give the same resamples for every tally.
    Raises UserError for a tally of no example, ValueError for settings out of range.
    """
    check_settings(resamples, confidence)
    values = plain_figures(tally)
    samples = resampled_figures(tally, resamples=resamples, seed=seed) if tally.num_examples > 1 else {}
    scores = {}
    for name, value in values.items():
        if not math.isfinite(value):
            scores[name] = Score(value=None, undefined=tally.undefined(name))
            continue
        low, high = interval(samples.get(name, np.empty(0)), confidence=confidence)
        scores[name] = Score(value=value, low=low, high=high)
    return scores


def check_settings(resamples: int, confidence: float) -> None:
    """Raises ValueError for a number of resamples below 0 or a confidence outside (0, 1)."""
    if resamples < 0:
        raise ValueError(f"resamples={resamples}: must be at least 0; 0 is: no interval")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: must lie between 0 and 1, such as 0.95")


def chunk_sizes(num_examples: int, resamples: int) -> Iterator[int]:
    """Numbers of resamples that are handled at once, `resamples` in sum."""
    most = max(1, _MOST_WEIGHTS // num_examples)
    for start in range(0, resamples, most):
        yield min(most, resamples - start)


def bootstrap_weights(num_examples: int, *, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each example was drawn into each resample: multinomial weights, in chunks [r, N]."""
    generator = np.random.default_rng(seed)
    for count in chunk_sizes(num_examples, resamples):
        weights_RN = np.empty((count, num_examples))
        for weights_N in weights_RN:
            # Five times as quick as Generator.multinomial, which draws N binomials.
            drawn = generator.integers(num_examples, size=num_examples)
            weights_N[:] = np.bincount(drawn, minlength=num_examples)
        yield weights_RN


def resampled_figures(tally: Tally, *, resamples: int, seed: int) -> dict[str, np.ndarray]:
    """Figure -> its values over the resamples [R]; nothing at resamples=0."""
    return joined(map(tally.figures, bootstrap_weights(tally.num_examples, resamples=resamples, seed=seed)))


def joined(chunks: Iterable[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Figure -> its values over all chunks."""
    found = list(chunks)
    return {name: np.concatenate([figures[name] for figures in found]) for name in found[0]} if found else {}


def interval(samples_R: np.ndarray, *, confidence: float) -> tuple[float, float] | tuple[None, None]:
    """The percentile interval of a figure's values over resamples; none where more than half are undefined."""
    defined = samples_R[np.isfinite(samples_R)]
    if not len(defined) or 2 * len(defined) < len(samples_R):
        return None, None
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
