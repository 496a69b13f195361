"""ROC-AUC: how well probabilities order the examples. Not a function of a sum, so a tally of its own.

Shapes: N examples, C labels, G groups of equal scores, R weightings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from train.scores.classification import positive_label
from train.scores.tally import ratio


@dataclass(frozen=True, kw_only=True, eq=False)
class RocAuc:
    """Area under the ROC curve: the chance that a random example of the class is scored above one that is none, ties half.

    Of several classes: the mean over each against the rest. It is the Mann-Whitney statistic with weights, over scores that
    were sorted once, with equal scores as one group (Hanley and McNeil, The meaning and use of the area under a ROC curve,
    1982).
    """

    num_examples: int
    classes: tuple[_OneAgainstRest, ...]

    def figures(self, weights_RN: np.ndarray) -> dict[str, np.ndarray]:
        """roc_auc [R]; nan where a class has no example, or has all."""
        areas_CR = np.stack([item.areas(weights_RN) for item in self.classes])
        return {"roc_auc": areas_CR.mean(axis=0)}

    def undefined(self, name: str) -> str:
        """The first class that cannot be told from the rest."""
        item = next(item for item in self.classes if item.is_positive_N.all() or not item.is_positive_N.any())
        if len(self.classes) == 1 or item.is_positive_N.all():
            return "the truth is the same for all examples"
        return f"{item.label!r} is the truth of no example"

    def selected(self, places_M: np.ndarray) -> RocAuc:
        """The tally of the examples at these places alone, in this order."""
        return RocAuc(num_examples=len(places_M), classes=tuple(item.selected(places_M) for item in self.classes))


@dataclass(frozen=True, kw_only=True, eq=False)
class _OneAgainstRest:
    """One class and its examples."""

    label: str
    is_positive_N: np.ndarray
    """Whether the truth is this class."""
    scores_N: np.ndarray

    @cached_property
    def order_N(self) -> np.ndarray:
        """Places of the examples, by rising score."""
        return np.argsort(self.scores_N, kind="stable")

    @cached_property
    def starts_G(self) -> np.ndarray:
        """Where in that order each group of equal scores begins."""
        return np.flatnonzero(np.diff(self.scores_N[self.order_N], prepend=-np.inf))

    def areas(self, weights_RN: np.ndarray) -> np.ndarray:
        """Area under the curve under each weighting [R]."""
        weights_RN, is_positive_N = weights_RN[:, self.order_N], self.is_positive_N[self.order_N]
        positive_RG = np.add.reduceat(weights_RN * is_positive_N, self.starts_G, axis=1)
        negative_RG = np.add.reduceat(weights_RN * ~is_positive_N, self.starts_G, axis=1)
        below_RG = np.cumsum(negative_RG, axis=1) - negative_RG / 2
        pairs_R = positive_RG.sum(axis=1) * negative_RG.sum(axis=1)
        return ratio((positive_RG * below_RG).sum(axis=1), pairs_R)

    def selected(self, places_M: np.ndarray) -> _OneAgainstRest:
        """The examples at these places alone."""
        return replace(self, is_positive_N=self.is_positive_N[places_M], scores_N=self.scores_N[places_M])


def roc_auc(
    labels: Sequence[str], truths_N: np.ndarray, probabilities_NC: np.ndarray, *, positive: str | None = None
) -> RocAuc:
    """Tally of roc_auc. truths_N: place of each truth among the labels. Two labels: by the probability of the positive one
    (None: the second); otherwise the macro average of one against the rest. Raises UserError for a positive that is no label.
    """
    if len(labels) == 2:
        wanted = [list(labels).index(positive_label(labels, positive))]
    else:
        wanted = list(range(len(labels)))
    classes = [
        _OneAgainstRest(label=labels[place], is_positive_N=truths_N == place, scores_N=probabilities_NC[:, place])
        for place in wanted
    ]
    return RocAuc(num_examples=len(truths_N), classes=tuple(classes))
