"""Whether probabilities can be believed: expected calibration error, Brier score, reliability curve. Owns the check that what
is called probabilities is a distribution over the labels.

Shapes: N examples, C labels, B bins of confidence, R weightings, K = 3B + 2 statistics: count, confidence and hits of each bin,
then the squared error and the number of examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from conf.errors import UserError
from train.scores.tally import Additive, SparseRows, once, ratio

# Softmax in float32 over a million labels is off by less than 1e-5.
_TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class CalibrationFigures:
    """ece and brier."""

    bins: int

    def __call__(self, sums_RK: np.ndarray) -> dict[str, np.ndarray]:
        """Both figures [R]; nan without examples."""
        count_RB, confidence_RB, hits_RB = np.split(sums_RK[:, :-2], 3, axis=1)
        total_R = count_RB.sum(axis=1)
        gaps_R = np.abs(hits_RB - confidence_RB).sum(axis=1)
        return {"ece": ratio(gaps_R, total_R), "brier": ratio(sums_RK[:, -2], sums_RK[:, -1])}

    def undefined(self, name: str, sums_K: np.ndarray) -> str:
        """Without examples there is no figure."""
        return "there is no example"


def calibration(truths_N: np.ndarray, probabilities_NC: np.ndarray, *, bins: int = 15) -> Additive:
    """Tally of ece and brier.

    truths_N: place of each truth among the labels. ece: expected calibration error of the likeliest label in `bins` equal
    bins, each with its upper edge: the mean distance between confidence and accuracy of a bin, by its examples (Guo et al.,
    On Calibration of Modern Neural Networks, 2017). brier: mean over examples of the squared errors summed over all labels,
    0 to 2 (Brier, 1950); of two labels it is twice what the convention of the positive label alone gives, such as
    scikit-learn's. Raises ValueError for bins below 1.
    """
    if bins < 1:
        raise ValueError(f"bins={bins}: a reliability curve needs at least 1; 15 is usual")
    places = np.arange(len(truths_N))
    likeliest_N = probabilities_NC.argmax(axis=1)
    confidence_N = probabilities_NC[places, likeliest_N]
    # By comparison with the edges: 0.7 * 10 is 7.000000000000001 and would fall into the bin above.
    upper_B = np.arange(1, bins + 1) / bins
    bin_N = np.minimum(np.searchsorted(upper_B, confidence_N, side="left"), bins - 1)
    expected_NC = np.zeros_like(probabilities_NC)
    expected_NC[places, truths_N] = 1
    error_N = ((probabilities_NC - expected_NC) ** 2).sum(axis=1)
    ones_N = np.ones(len(truths_N))
    hits_N = (likeliest_N == truths_N).astype(np.float64)
    at_end_N = np.full(len(truths_N), 3 * bins)
    rows = SparseRows(
        columns_NJ=np.stack([bin_N, bins + bin_N, 2 * bins + bin_N, at_end_N, at_end_N + 1], axis=1),
        values_NJ=np.stack([ones_N, confidence_N, hits_N, error_N, ones_N], axis=1),
        num_columns=3 * bins + 2,
    )
    return Additive(rows_NK=rows, function=CalibrationFigures(bins=bins))


def reliability(truths_N: np.ndarray, probabilities_NC: np.ndarray, *, bins: int = 15) -> list[dict[str, float]]:
    """Points of the reliability curve: low, high, confidence, accuracy and count of each bin that has examples."""
    tally = calibration(truths_N, probabilities_NC, bins=bins)
    count_B, confidence_B, hits_B = np.split(tally.sums(once(tally))[0, :-2], 3)
    return [
        {
            "low": place / bins,
            "high": (place + 1) / bins,
            "confidence": float(confidence_B[place] / count_B[place]),
            "accuracy": float(hits_B[place] / count_B[place]),
            "count": float(count_B[place]),
        }
        for place in np.flatnonzero(count_B).tolist()
    ]


def probability_rows(
    labels: Sequence[str], probabilities: Sequence[Mapping[str, float]], *, ids: Sequence[str] | None = None
) -> np.ndarray:
    """Probabilities in the order of the labels [N, C]. ids: names of the examples in errors; None: their numbers.

    Raises UserError for one whose labels are others, that has a value below 0 or not finite, or whose sum is not 1 to 1e-4.
    """
    wanted = set(labels)
    rows_NC = np.empty((len(probabilities), len(labels)))
    for number, given in enumerate(probabilities):
        name = ids[number] if ids else number
        if given.keys() != wanted:
            raise UserError(
                f"example {name}: probabilities of {', '.join(map(repr, given)) or 'nothing'}, the labels are "
                f"{', '.join(map(repr, labels))}; give one for each label and no other"
            )
        rows_NC[number] = [given[label] for label in labels]
        low, total = rows_NC[number].min(), rows_NC[number].sum()
        # Written so that nan, which compares false, is an error too.
        if not (low >= 0 and abs(total - 1) <= _TOLERANCE):
            raise UserError(
                f"example {name}: probabilities {rows_NC[number].tolist()} are no distribution: each must be at least 0 and "
                f"their sum 1, got {total:g}; give the softmax of the scores"
            )
    return rows_NC
