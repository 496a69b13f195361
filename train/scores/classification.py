"""Figures of predicted labels against true ones: accuracy, precision, recall, F1, and Matthews' coefficient. Which of them are
undefined when is decided here, and by nobody else; what depends on probabilities is in ranking.py and calibration.py.

Undefined, with the reason:
  precision[label]  the label was never predicted            recall[label]  it is the truth of no example
  f1[label]         neither; one of the two makes it 0       mcc            all truths, or all predictions, are the same
In averages over labels an undefined value counts as 0, as with scikit-learn's zero_division=0, so that no average is undefined
and all equal scikit-learn's over the declared labels. scikit-learn says 0 of all four above; a 0 that was measured and one that
was not should not look the same.

Shapes: N examples, C labels, R weightings, K = 3C statistics: truths, predictions and hits of each label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from conf.errors import UserError
from train.scores.tally import Additive, SparseRows, ratio


@dataclass(frozen=True, kw_only=True)
class ClassificationFigures:
    """Figures of a confusion matrix, from its margins and its diagonal."""

    labels: tuple[str, ...]
    positive: str | None
    """Label whose precision, recall and f1 are the task's own; None where there is none, as with three labels."""

    def __call__(self, sums_RK: np.ndarray) -> dict[str, np.ndarray]:
        """accuracy, mcc, {precision, recall, f1}_{micro, macro, weighted}, {precision, recall, f1, support}[label], and
        precision, recall and f1 of the positive label where there is one."""
        truths_RC, predicted_RC, hits_RC = np.split(sums_RK, 3, axis=1)
        total_R, hits_R = truths_RC.sum(axis=1), hits_RC.sum(axis=1)
        of_label_RC = {
            "precision": ratio(hits_RC, predicted_RC),
            "recall": ratio(hits_RC, truths_RC),
            "f1": ratio(2 * hits_RC, truths_RC + predicted_RC),
        }
        figures = {"accuracy": ratio(hits_R, total_R), "mcc": _matthews(truths_RC, predicted_RC, hits_R)}
        for name, values_RC in of_label_RC.items():
            counted_RC = np.nan_to_num(values_RC)
            # Every example has one truth and one prediction, so what is right of the predicted is what is found of the true.
            figures[f"{name}_micro"] = figures["accuracy"]
            figures[f"{name}_macro"] = np.where(total_R == 0, np.nan, counted_RC.mean(axis=1))
            figures[f"{name}_weighted"] = ratio((counted_RC * truths_RC).sum(axis=1), total_R)
        if self.positive is not None:
            place = self.labels.index(self.positive)
            figures |= {name: values_RC[:, place] for name, values_RC in of_label_RC.items()}
        for place, label in enumerate(self.labels):
            figures |= {f"{name}[{label}]": values_RC[:, place] for name, values_RC in of_label_RC.items()}
            figures[f"support[{label}]"] = truths_RC[:, place]
        return figures

    def undefined(self, name: str, sums_K: np.ndarray) -> str:
        """What is missing."""
        truths_C, predicted_C, _ = np.split(sums_K, 3)
        if name == "mcc":
            side = "truth" if np.count_nonzero(truths_C) < 2 else "prediction"
            return f"the {side} is the same for all examples"
        figure, _, rest = name.partition("[")
        label = rest.removesuffix("]") or self.positive
        if figure == "precision":
            return f"{label!r} was never predicted"
        if figure == "recall":
            return f"{label!r} is the truth of no example"
        return f"{label!r} was never predicted and is the truth of no example"


def _matthews(truths_RC: np.ndarray, predicted_RC: np.ndarray, hits_R: np.ndarray) -> np.ndarray:
    """Matthews' coefficient for any number of labels (Gorodkin, Comparing two K-category assignments, 2004)."""
    total_R = truths_RC.sum(axis=1)
    covariance_R = hits_R * total_R - (truths_RC * predicted_RC).sum(axis=1)
    spread_of_truths_R = total_R**2 - (truths_RC**2).sum(axis=1)
    spread_of_predictions_R = total_R**2 - (predicted_RC**2).sum(axis=1)
    # Two roots, since the product of the two overflows the 53 bits that hold it exactly at 10,000 examples.
    return ratio(covariance_R, np.sqrt(spread_of_truths_R) * np.sqrt(spread_of_predictions_R))


def classification(
    labels: Sequence[str],
    truths: Sequence[str],
    predictions: Sequence[str],
    *,
    ids: Sequence[str] | None = None,
    positive: str | None = None,
) -> Additive:
    """Tally of the figures of predicted labels.

    labels: all there are, in their order. ids: names of the examples in errors; None: their numbers. positive: of two
    labels the one that is looked for; None: the second. Raises UserError for a label outside the set, and for no example.
    """
    truths_N, predicted_N = _pairs(labels, truths, predictions, ids=ids)
    columns = np.stack([truths_N, len(labels) + predicted_N, 2 * len(labels) + truths_N], axis=1)
    hits = (truths_N == predicted_N).astype(np.float64)
    values = np.stack([np.ones(len(hits)), np.ones(len(hits)), hits], axis=1)
    rows = SparseRows(columns_NJ=columns, values_NJ=values, num_columns=3 * len(labels))
    function = ClassificationFigures(labels=tuple(labels), positive=positive_label(labels, positive))
    return Additive(rows_NK=rows, function=function)


def confusion(
    labels: Sequence[str], truths: Sequence[str], predictions: Sequence[str], *, ids: Sequence[str] | None = None
) -> np.ndarray:
    """Number of examples of each truth (row) and prediction (column) [C, C]. Raises UserError as `classification` does."""
    truths_N, predicted_N = _pairs(labels, truths, predictions, ids=ids)
    cells = np.bincount(truths_N * len(labels) + predicted_N, minlength=len(labels) ** 2)
    return cells.reshape(len(labels), len(labels))


def _pairs(
    labels: Sequence[str], truths: Sequence[str], predictions: Sequence[str], *, ids: Sequence[str] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Places of the truths and of the predictions among the labels [N]."""
    assert len(truths) == len(predictions), f"{len(truths)} truths, {len(predictions)} predictions"
    return label_places(labels, truths, ids=ids, what="truth"), label_places(labels, predictions, ids=ids, what="prediction")


def label_places(labels: Sequence[str], values: Sequence[str], *, ids: Sequence[str] | None, what: str) -> np.ndarray:
    """Place of each value among the labels [N]. what: name of the values in errors.

    Raises UserError for a value that is no label, a label that is given twice, and for no value.
    """
    places = {label: place for place, label in enumerate(labels)}
    if len(places) < len(labels):
        twice = next(label for label in labels if list(labels).count(label) > 1)
        raise UserError(f"labels has {twice!r} twice: labels must differ; name each once")
    if not len(values):
        raise UserError("there is no example to score: figures need at least one; give data that has some")
    found = [places.get(value, -1) for value in values]
    if -1 in found:
        number = found.index(-1)
        raise UserError(
            f"example {ids[number] if ids else number}: {what} {values[number]!r} is not among the labels "
            f"{', '.join(map(repr, labels))}; mend the example or give all labels"
        )
    return np.array(found, dtype=np.int64)


def positive_label(labels: Sequence[str], positive: str | None) -> str | None:
    """The label that is looked for: of two labels `positive` or the second, of more none unless given.

    Raises UserError for one that is no label.
    """
    if positive is None:
        return labels[1] if len(labels) == 2 else None
    if positive not in labels:
        raise UserError(f"positive={positive!r} is not among the labels {', '.join(map(repr, labels))}; give one of them")
    return positive
