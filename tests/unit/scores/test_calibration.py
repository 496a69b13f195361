"""ROC-AUC, calibration error, Brier score and reliability against scikit-learn, lm-eval and plain loops."""

from __future__ import annotations

import lm_eval.api.metrics as harness
import numpy as np
import pytest
from sklearn import metrics as sklearn

from conf.errors import UserError
from tests.unit.scores.cases import Classified, classified
from train.scores.calibration import calibration, probability_rows, reliability
from train.scores.intervals import measure
from train.scores.ranking import roc_auc
from train.scores.tally import plain_figures


def _auc(case: Classified, **settings: str) -> float:
    return plain_figures(roc_auc(case.labels, case.truths_N, case.probabilities_NC, **settings))["roc_auc"]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_labels", [2, 3, 6])
def test_roc_auc_is_scikit_learns(seed: int, num_labels: int) -> None:
    """Probabilities are rounded, so that many are equal."""
    case = classified(seed, num_examples=80, num_labels=num_labels)
    scores = case.probabilities_NC[:, 1] if num_labels == 2 else case.probabilities_NC
    expected = sklearn.roc_auc_score(case.truths_N, scores, multi_class="ovr", average="macro")
    assert _auc(case) == pytest.approx(expected, abs=1e-12)


def test_weighted_roc_auc_is_scikit_learns() -> None:
    case = classified(0, num_examples=80, num_labels=2)
    weights_RN = np.random.default_rng(0).random((3, 80))
    found = roc_auc(case.labels, case.truths_N, case.probabilities_NC).figures(weights_RN)["roc_auc"]
    for weights_N, area in zip(weights_RN, found, strict=True):
        expected = sklearn.roc_auc_score(case.truths_N, case.probabilities_NC[:, 1], sample_weight=weights_N)
        assert area == pytest.approx(expected, abs=1e-9)


def test_roc_auc_by_hand() -> None:
    """Of four pairs two are in order, one is reversed, one is a tie."""
    scores = np.array([0.1, 0.5, 0.5, 0.3])
    case = Classified(labels=("a", "b"), truths_N=np.array([0, 0, 1, 1]), probabilities_NC=np.stack([1 - scores, scores], 1))
    assert _auc(case) == 2.5 / 4
    assert _auc(case, positive="a") == _auc(case), "of the other label the order and the truths are both reversed"


def test_the_positive_label_of_roc_auc() -> None:
    """By its own probability: where the two do not sum to 1 exactly, as after rounding, the choice matters."""
    case = Classified(labels=("a", "b"), truths_N=np.array([0, 1]), probabilities_NC=np.array([[0.4, 0.6], [0.4, 0.59995]]))
    assert (_auc(case), _auc(case, positive="a")) == (0.0, 0.5)
    with pytest.raises(UserError, match="positive='c'"):
        _auc(case, positive="c")


@pytest.mark.parametrize(
    ("labels", "truths", "reason"),
    [
        ("ab", [0, 0, 0], "the truth is the same for all examples"),
        ("ab", [1, 1, 1], "the truth is the same for all examples"),
        ("abc", [1, 1, 1], "'a' is the truth of no example"),
        ("abc", [0, 1, 1], "'c' is the truth of no example"),
        ("a", [0, 0, 0], "the truth is the same for all examples"),
    ],
)
def test_undefined_roc_auc(labels: str, truths: list[int], reason: str) -> None:
    probabilities = np.full((3, len(labels)), 1 / len(labels))
    score = measure(roc_auc(tuple(labels), np.array(truths), probabilities), resamples=20)["roc_auc"]
    assert score.value is None and score.undefined == reason


# --- calibration


def _bins_by_hand(case: Classified, bins: int) -> list[list[tuple[float, bool]]]:
    """(confidence, whether right) of the examples of each bin (low, high]."""
    found: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    for truth, row in zip(case.truths_N, case.probabilities_NC, strict=True):
        confidence, label = max(row), int(np.argmax(row))
        place = next(number for number in range(bins) if confidence <= (number + 1) / bins or number == bins - 1)
        found[place].append((confidence, label == truth))
    return found


@pytest.mark.parametrize("bins", [1, 4, 10, 15])
@pytest.mark.parametrize("num_labels", [2, 5])
def test_calibration_error_and_reliability_by_hand(bins: int, num_labels: int) -> None:
    case = classified(bins, num_examples=70, num_labels=num_labels)
    filled = [(place, items) for place, items in enumerate(_bins_by_hand(case, bins)) if items]
    expected = [
        {
            "low": place / bins,
            "high": (place + 1) / bins,
            "confidence": pytest.approx(np.mean([confidence for confidence, _ in items])),
            "accuracy": pytest.approx(np.mean([right for _, right in items])),
            "count": len(items),
        }
        for place, items in filled
    ]
    found = reliability(case.truths_N, case.probabilities_NC, bins=bins)
    assert found == expected
    error = sum(len(items) / 70 * abs(np.mean([c for c, _ in items]) - np.mean([r for _, r in items])) for _, items in filled)
    assert plain_figures(calibration(case.truths_N, case.probabilities_NC, bins=bins))["ece"] == pytest.approx(error, abs=1e-12)


def test_a_confidence_on_an_edge_is_in_the_bin_below() -> None:
    """0.7 * 10 is 7.000000000000001; certainty is in the last bin, and the sum of three tenths in the fourth."""
    confidences = np.array([0.7, 1.0, 0.1 + 0.2 + 0.4, 1.0 + 1e-9])
    points = reliability(np.zeros(4, dtype=int), np.stack([confidences, 1 - confidences], axis=1), bins=10)
    assert [(point["high"], point["count"]) for point in points] == [(0.7, 1), (0.8, 1), (1.0, 2)]


@pytest.mark.parametrize("num_labels", [2, 5])
def test_brier_score_is_lm_evals_and_scikit_learns(num_labels: int) -> None:
    case = classified(2, num_examples=50, num_labels=num_labels)
    brier = plain_figures(calibration(case.truths_N, case.probabilities_NC))["brier"]
    items = list(zip(case.truths_N, case.probabilities_NC, strict=True))
    assert brier == pytest.approx(harness.brier_score(items), abs=1e-12)
    if num_labels == 2:
        assert brier == pytest.approx(2 * sklearn.brier_score_loss(case.truths_N, case.probabilities_NC[:, 1]), abs=1e-12)
    else:
        assert brier == pytest.approx(sklearn.brier_score_loss(case.truths_N, case.probabilities_NC), abs=1e-12)


def test_calibration_without_weight_and_bins() -> None:
    tally = calibration(np.array([0]), np.array([[1.0, 0.0]]))
    assert all(np.isnan(values[0]) for values in tally.figures(np.zeros((1, 1))).values())
    assert tally.function.undefined("ece", np.zeros(47)) == "there is no example"
    with pytest.raises(ValueError, match="bins=0"):
        calibration(np.array([0]), np.array([[1.0, 0.0]]), bins=0)


def test_probabilities_come_in_the_order_of_the_labels() -> None:
    rows = probability_rows(("a", "b"), [{"a": 0.25, "b": 0.75}, {"b": 0.00004, "a": 1.0}])
    np.testing.assert_array_equal(rows, [[0.25, 0.75], [1.0, 0.00004]])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"a": 1.0}, "example x7: probabilities of 'a', the labels are 'a', 'b'; give one for each"),
        ({"a": 0.5, "b": 0.2, "c": 0.3}, "probabilities of 'a', 'b', 'c', the labels"),
        ({"a": 0.5, "b": 0.6}, r"example x7: .* their sum 1, got 1.1; give the softmax"),
        ({"a": 1.2, "b": -0.2}, "each must be at least 0"),
        ({"a": float("nan"), "b": 1.0}, "are no distribution"),
        ({"a": float("inf"), "b": 0.0}, "are no distribution"),
        ({}, "probabilities of nothing, the labels"),
    ],
)
def test_what_is_no_distribution(given: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        probability_rows(("a", "b"), [{"a": 0.5, "b": 0.5}, given], ids=["x6", "x7"])
    with pytest.raises(UserError, match="example 0: "):
        probability_rows(("a", "b"), [given])
