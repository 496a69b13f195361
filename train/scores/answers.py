"""Exact match and word F1 of short answers against any of several right ones.

Two normalisations. squad: as the official scripts of SQuAD 1.1 and 2.0 (Rajpurkar et al., 2016 and 2018): lower case, no ASCII
punctuation, no English articles, single blanks. characters: for Chinese and Japanese, as CMRC and JSQuAD count: no punctuation
of any script, each character of a script without blanks is a word, and so is each run of others.

What is empty: an example without truths has no answer, and "" is the output that says so. Truths that normalise to nothing are
passed over unless all do. Then, and for an empty output, both figures are 1 if both sides are empty and 0 otherwise. That is
SQuAD 2.0's rule; 1.1's script gives an F1 of 0 to two texts that both normalise to nothing, and knows no other difference.

Shapes: N examples, R weightings, K = 6 statistics: exact match, F1, the two where there is an answer, examples, with an answer.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from train.scores.tally import Additive, ratio
from train.scores.words import answer_words

Normalization = Literal["squad", "characters"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, kw_only=True)
class AnswerFigures:
    """exact_match and f1, 0 to 1; where there are questions without answer also HasAns_ and NoAns_ of both."""

    normalization: Normalization
    """Not needed for the sums; with it unequal, figures are not of the same kind."""
    is_split: bool
    """Whether any example has no answer."""

    def __call__(self, sums_RK: np.ndarray) -> dict[str, np.ndarray]:
        """Means over the examples [R]; nan over no example."""
        all_R2, has_R2, count_R, has_count_R = sums_RK[:, :2], sums_RK[:, 2:4], sums_RK[:, 4], sums_RK[:, 5]
        figures = {}
        for place, name in enumerate(("exact_match", "f1")):
            figures[name] = ratio(all_R2[:, place], count_R)
            if self.is_split:
                figures[f"HasAns_{name}"] = ratio(has_R2[:, place], has_count_R)
                figures[f"NoAns_{name}"] = ratio(all_R2[:, place] - has_R2[:, place], count_R - has_count_R)
        return figures

    def undefined(self, name: str, sums_K: np.ndarray) -> str:
        """Which examples there are none of."""
        return "no example has an answer" if name.startswith("HasAns_") else "every example has an answer"


def answers(outputs: Sequence[str], truths: Sequence[Sequence[str]], *, normalization: Normalization = "squad") -> Additive:
    """Tally of exact_match and f1. truths: the right answers of each example, of which the best counts; none: no answer."""
    scores = [answer_scores(output, given, normalization=normalization) for output, given in zip(outputs, truths, strict=True)]
    scores_N2 = np.array([[score["exact_match"], score["f1"]] for score in scores]).reshape(-1, 2)
    has_N1 = np.array([[float(_has_answer(given))] for given in truths]).reshape(-1, 1)
    rows_NK = np.concatenate([scores_N2, scores_N2 * has_N1, np.ones_like(has_N1), has_N1], axis=1)
    function = AnswerFigures(normalization=normalization, is_split=not has_N1.all())
    return Additive(rows_NK=rows_NK, function=function)


def answer_scores(output: str, truths: Sequence[str], *, normalization: Normalization = "squad") -> dict[str, float]:
    """exact_match and f1 of one example, each against the truth that suits it best."""
    given = normalized(output, normalization)
    expected = [found for truth in truths if (found := normalized(truth, normalization))] or [[]]
    return {
        "exact_match": float(max(truth == given for truth in expected)),
        "f1": max(_f1(given, truth) for truth in expected),
    }


def normalized(text: str, normalization: Normalization) -> list[str]:
    """Words that an answer is compared by."""
    if normalization == "characters":
        return answer_words(text)
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _has_answer(truths: Sequence[str]) -> bool:
    """Whether any truth has text; that "the" normalises to nothing does not make it no answer."""
    return any(truth.strip() for truth in truths)


def _f1(output: list[str], truth: list[str]) -> float:
    """Harmonic mean of precision and recall of the words, each counted as often as it occurs."""
    if not output or not truth:
        return float(output == truth)
    shared = sum((Counter(output) & Counter(truth)).values())
    return 2 * shared / (len(output) + len(truth))
