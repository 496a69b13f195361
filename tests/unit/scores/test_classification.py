"""Figures of labels against scikit-learn and lm-eval, and what is undefined."""

from __future__ import annotations

import warnings

import lm_eval.api.metrics as harness
import numpy as np
import pytest
from sklearn import metrics as sklearn

from conf.errors import UserError
from tests.unit.scores.cases import classified
from train.scores.classification import classification, confusion
from train.scores.intervals import measure
from train.scores.tally import plain_figures


@pytest.mark.parametrize("num_labels", [2, 3, 10])
@pytest.mark.parametrize("seed", range(3))
def test_figures_are_scikit_learns(num_labels: int, seed: int) -> None:
    case = classified(seed, num_examples=60, num_labels=num_labels)
    truths, predictions, labels = case.truths, case.predictions, list(case.labels)
    figures = plain_figures(classification(labels, truths, predictions))
    assert figures["accuracy"] == pytest.approx(sklearn.accuracy_score(truths, predictions), abs=1e-12)
    assert figures["mcc"] == pytest.approx(sklearn.matthews_corrcoef(truths, predictions), abs=1e-12)
    for average in ("micro", "macro", "weighted"):
        values = sklearn.precision_recall_fscore_support(truths, predictions, labels=labels, average=average, zero_division=0)[
            :3
        ]
        found = [figures[f"{name}_{average}"] for name in ("precision", "recall", "f1")]
        assert found == pytest.approx(values, abs=1e-12)
    each = sklearn.precision_recall_fscore_support(truths, predictions, labels=labels, zero_division=np.nan)
    for name, values in zip(("precision", "recall", "f1", "support"), each, strict=True):
        assert [figures[f"{name}[{label}]"] for label in labels] == pytest.approx(list(values), abs=1e-12, nan_ok=True)
    np.testing.assert_array_equal(
        confusion(labels, truths, predictions), sklearn.confusion_matrix(truths, predictions, labels=labels)
    )


def test_figures_are_those_of_the_harness() -> None:
    case = classified(5, num_examples=50, num_labels=2)
    items = list(zip(case.truths_N, case.predicted_N, strict=True))
    figures = plain_figures(classification(case.labels, case.truths, case.predictions))
    assert figures["f1"] == pytest.approx(harness.f1_score(items), abs=1e-9)
    assert figures["mcc"] == pytest.approx(harness.matthews_corrcoef(items), abs=1e-9)
    assert figures["accuracy"] == pytest.approx(harness.mean(list(case.truths_N == case.predicted_N)), abs=1e-9)


def test_the_positive_label_is_the_second_unless_another_is_named() -> None:
    case = classified(1, num_examples=50, num_labels=2)
    for positive, expected in ((None, "b"), ("a", "a")):
        figures = plain_figures(classification(case.labels, case.truths, case.predictions, positive=positive))
        assert figures["f1"] == sklearn.f1_score(case.truths, case.predictions, pos_label=expected)
        assert figures["precision"] == figures[f"precision[{expected}]"] and figures["recall"] == figures[f"recall[{expected}]"]
    three = classified(1, num_examples=50, num_labels=3)
    assert "f1" not in plain_figures(classification(three.labels, three.truths, three.predictions))
    assert "f1" in plain_figures(classification(three.labels, three.truths, three.predictions, positive="c"))


def test_a_label_that_does_not_occur_is_undefined_and_counts_as_0_in_averages() -> None:
    """ "b" is never predicted, "c" is never true, "d" is neither; scikit-learn says 0 of all and warns."""
    labels, truths, predictions = list("abcd"), list("aabb"), list("aaac")
    tally = classification(labels, truths, predictions)
    scores = measure(tally, resamples=0)
    assert scores["precision[b]"].undefined == "'b' was never predicted" and scores["recall[b]"].value == 0.0
    assert scores["f1[b]"].value == 0.0, "it has truths, all missed"
    assert scores["recall[c]"].undefined == "'c' is the truth of no example" and scores["precision[c]"].value == 0.0
    assert scores["f1[c]"].value == 0.0, "it has predictions, all wrong"
    assert scores["f1[d]"].undefined == "'d' was never predicted and is the truth of no example"
    assert scores["support[d]"].value == 0.0
    for average in ("macro", "weighted"):
        expected = sklearn.precision_recall_fscore_support(truths, predictions, labels=labels, average=average, zero_division=0)
        assert [scores[f"{name}_{average}"].value for name in ("precision", "recall", "f1")] == pytest.approx(expected[:3])


def test_the_positive_label_never_predicted() -> None:
    scores = measure(classification(("no", "yes"), ["no", "yes"], ["no", "no"]), resamples=0)
    assert scores["precision"].undefined == "'yes' was never predicted"
    assert (scores["recall"].value, scores["f1"].value) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("truths", "predictions", "reason"),
    [("aaa", "aba", "the truth is the same"), ("aba", "bbb", "the prediction is the same"), ("aaa", "aaa", "the truth is")],
)
def test_matthews_of_a_constant_is_undefined(truths: str, predictions: str, reason: str) -> None:
    """scikit-learn says 0, as of a model that guesses."""
    score = measure(classification("ab", list(truths), list(predictions)), resamples=50)["mcc"]
    assert score.value is None and score.undefined.startswith(reason)
    with warnings.catch_warnings(action="ignore"):
        assert sklearn.matthews_corrcoef(list(truths), list(predictions)) == 0.0


def test_matthews_of_many_examples_does_not_overflow() -> None:
    repeat = 25_000
    figures = plain_figures(classification("abc", list("abcabc") * repeat, list("abcbca") * repeat))
    assert figures["mcc"] == pytest.approx(sklearn.matthews_corrcoef(list("abcabc"), list("abcbca")), abs=1e-12)


def test_only_one_label() -> None:
    scores = measure(classification("a", ["a", "a"], ["a", "a"]), resamples=0)
    assert scores["accuracy"].value == scores["f1_macro"].value == 1.0 and scores["mcc"].value is None


@pytest.mark.parametrize("score", [classification, confusion])
def test_errors(score) -> None:
    with pytest.raises(UserError, match="example dev:2: truth 'x' is not among the labels 'a', 'b'; mend"):
        score("ab", ["a", "x"], ["a", "a"], ids=["dev:1", "dev:2"])
    with pytest.raises(UserError, match="example 0: prediction '' is not among the labels 'a', 'b'"):
        score("ab", ["a"], [""])
    with pytest.raises(UserError, match="no example"):
        score("ab", [], [])
    with pytest.raises(UserError, match="labels has 'a' twice"):
        score("aba", ["a"], ["a"])
    with pytest.raises(AssertionError, match="1 truths, 2 predictions"):
        score("ab", ["a"], ["a", "b"])


def test_a_positive_label_that_is_none() -> None:
    with pytest.raises(UserError, match="positive='c' is not among the labels 'a', 'b'"):
        classification("ab", ["a"], ["a"], positive="c")
