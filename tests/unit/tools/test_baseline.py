"""The bigram model against the formula written out with dictionaries, and against the axioms of a distribution."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from tools.baseline import fit

VOCAB = 7
FIRST = np.array([0, 0, 0, 1, 1, 2, 3, 3, 3, 3])
SECOND = np.array([1, 1, 2, 0, 3, 2, 0, 0, 0, 4])


def by_hand(first: int, second: int, discount: float) -> float:
    pairs = Counter(zip(FIRST.tolist(), SECOND.tolist(), strict=True))
    followers, predecessors = defaultdict(set), defaultdict(set)
    for a, b in pairs:
        followers[a].add(b)
        predecessors[b].add(a)
    weights = [len(predecessors[b]) + 0.5 for b in range(VOCAB)]
    lower = weights[second] / sum(weights)
    total = sum(count for (a, _), count in pairs.items() if a == first)
    if total == 0:
        return lower
    kept = max(pairs[first, second] - discount, 0) / total
    return kept + discount * len(followers[first]) / total * lower


@pytest.mark.parametrize("discount", [0.3, 0.75])
def test_equals_the_formula(discount: float) -> None:
    model = fit(FIRST, SECOND, VOCAB)
    for a in range(VOCAB):
        for b in range(VOCAB):
            value = model.log_probability(np.array([a]), np.array([b]), discount)[0]
            assert value == pytest.approx(math.log(by_hand(a, b, discount)), abs=1e-12)


def test_sums_to_one_for_every_context() -> None:
    model = fit(FIRST, SECOND, VOCAB)
    for a in range(VOCAB):
        total = np.exp(model.log_probability(np.full(VOCAB, a), np.arange(VOCAB), 0.6)).sum()
        assert total == pytest.approx(1.0, abs=1e-12)
