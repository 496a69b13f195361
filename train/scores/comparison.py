"""Whether one model is better than another on the same examples: the difference of every figure, its interval, its p-value.

Shapes: N examples, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from conf.errors import UserError
from train.scores.intervals import bootstrap_weights, check_settings, chunk_sizes, interval, joined
from train.scores.tally import Additive, Tally, Together, once, plain_figures

Test = Literal["randomization", "bootstrap"]

# Sums in another order differ in their last bits; without some slack a difference as large as the observed one would at
# times count as smaller, and of a discrete figure such as accuracy many are exactly as large.
_SLACK = 1e-10
_NONE = np.empty(0)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How much higher a figure is for the second model than for the first, or why that cannot be said."""

    first: float | None
    second: float | None
    difference: float | None
    """second - first."""
    low: float | None = None
    high: float | None = None
    """The interval of the difference; None: none."""
    p_value: float | None = None
    """Two-sided; None: no test."""
    test: Test | None = None
    """Which test gave the p-value."""
    undefined: str | None = None
    """Why `difference` is None, as the end of a sentence."""


def compare(
    first: Tally, second: Tally, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> dict[str, Difference]:
    """The difference of every figure that both have; both are of the same examples in the same order.

    The interval is the percentile interval of the paired bootstrap: both models are weighted alike (Efron and Tibshirani,
    1993, chapter 13). The p-value is of the hypothesis that the models are alike. For figures of sums by paired
    approximate randomisation: the outputs of each example change places with probability 1/2, and p = (1 + number of
    trials with |difference| at least as large as observed) / (1 + trials) (Noreen, Computer-Intensive Methods for Testing
    Hypotheses, 1989). For others, ROC-AUC, by the paired bootstrap: as before with the resampled differences moved so
    that their middle is 0 (Efron and Tibshirani, chapter 16). Trials where the figure is undefined are left out; where
    these are more than half there is no test. resamples=0: neither interval nor test.
    Raises UserError for different numbers of examples, none, or no figure in common, ValueError for settings out of range.
    """
    check_settings(resamples, confidence)
    if first.num_examples != second.num_examples:
        raise UserError(
            f"the first model has {first.num_examples} examples and the second {second.num_examples}: a comparison is of the "
            "same examples in the same order; evaluate both on the same data"
        )
    values, others = plain_figures(first), plain_figures(second)
    names = [name for name in values if name in others]
    if not names:
        raise UserError(
            f"the first model has {', '.join(values)} and the second {', '.join(others)}: no figure is in both; compare "
            "evaluations of one task"
        )
    resampled = _resampled_differences(first, second, resamples=resamples, seed=seed)
    randomized = _randomized_differences(first, second, resamples=resamples, seed=seed)
    differences = {}
    for name in names:
        before, after = _number(values[name]), _number(others[name])
        if before is None:
            reason = f"of the first model {first.undefined(name)}"
            differences[name] = Difference(first=None, second=after, difference=None, undefined=reason)
        elif after is None:
            reason = f"of the second model {second.undefined(name)}"
            differences[name] = Difference(first=before, second=None, difference=None, undefined=reason)
        else:
            low, high = interval(resampled.get(name, _NONE), confidence=confidence)
            # Under the hypothesis the resampled differences lie around 0 and not around the observed one.
            null = randomized.get(name, resampled.get(name, _NONE) - (after - before))
            p_value = _p_value(null, observed=after - before, scale=max(abs(before), abs(after)))
            test: Test | None = None if p_value is None else "randomization" if name in randomized else "bootstrap"
            differences[name] = Difference(
                first=before, second=after, difference=after - before, low=low, high=high, p_value=p_value, test=test
            )
    return differences


def adjusted(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """p-values of several figures, corrected for their number, so that the chance of any false alarm among them stays below
    the level (Holm, A simple sequentially rejective multiple test procedure, 1979). None stays None and does not count.
    """
    known = sorted((value, name) for name, value in p_values.items() if value is not None)
    corrected: dict[str, float | None] = dict.fromkeys(p_values)
    highest = 0.0
    for place, (value, name) in enumerate(known):
        highest = max(highest, min(1.0, value * (len(known) - place)))
        corrected[name] = highest
    return corrected


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _resampled_differences(first: Tally, second: Tally, *, resamples: int, seed: int) -> dict[str, np.ndarray]:
    """Figure -> second - first over the paired bootstrap [R]; nothing of fewer than two examples, where none differs."""
    found = []
    if first.num_examples > 1:
        for weights_RN in bootstrap_weights(first.num_examples, resamples=resamples, seed=seed):
            found.append(_minus(second.figures(weights_RN), first.figures(weights_RN)))
    return joined(found)


def _randomized_differences(first: Tally, second: Tally, *, resamples: int, seed: int) -> dict[str, np.ndarray]:
    """Figure -> second - first over trials where the outputs of random examples change places [R], of figures of sums."""
    generator = np.random.default_rng(seed)
    pairs = _additive_pairs(first, second)
    totals = [one.sums(once(one)) + other.sums(once(other)) for one, other in pairs]
    found = []
    for count in chunk_sizes(first.num_examples, resamples if pairs else 0):
        change_RN = generator.integers(2, size=(count, first.num_examples)).astype(np.float64)
        differences: dict[str, np.ndarray] = {}
        for (one, other), total in zip(pairs, totals, strict=True):
            mixed_RK = one.sums(1 - change_RN) + other.sums(change_RN)
            differences |= _minus(one.function(total - mixed_RK), one.function(mixed_RK))
        found.append(differences)
    return joined(found)


def _additive_pairs(first: Tally, second: Tally) -> list[tuple[Additive, Additive]]:
    """Parts of both that have figures of sums and compute the same from them."""
    others = [part for part in _parts(second) if isinstance(part, Additive)]
    return [
        (part, other)
        for part in _parts(first)
        if isinstance(part, Additive)
        for other in others
        if other.function == part.function
    ]


def _parts(tally: Tally) -> tuple[Tally, ...]:
    return tuple(inner for part in tally.parts for inner in _parts(part)) if isinstance(tally, Together) else (tally,)


def _minus(figures: dict[str, np.ndarray], less: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: values - less[name] for name, values in figures.items() if name in less}


def _p_value(null_R: np.ndarray, *, observed: float, scale: float) -> float | None:
    """Share of differences at least as far from 0 as the observed one; None where more than half are undefined."""
    defined = null_R[np.isfinite(null_R)]
    if not len(defined) or 2 * len(defined) < len(null_R):
        return None
    as_far = int(np.count_nonzero(np.abs(defined) >= abs(observed) - _SLACK * scale))
    return (1 + as_far) / (1 + len(defined))
