"""Bootstrap intervals: how often they hold the truth, against scipy, and when there is none."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from conf.errors import UserError
from tests.unit.scores.cases import Rare, classified
from train.scores import intervals
from train.scores.classification import classification
from train.scores.intervals import bootstrap_weights, interval, measure
from train.scores.language import language
from train.scores.ranking import roc_auc
from train.scores.tally import Additive


def mean_tally(values: np.ndarray) -> Additive:
    """Its loss is the mean of the values."""
    return language(values, np.ones(len(values)), np.ones(len(values)))


def test_the_interval_of_a_mean_covers_the_truth_as_often_as_it_says() -> None:
    """300 samples of 80 values from a skewed distribution of mean 2; the expected coverage is a little below 95%."""
    generator = np.random.default_rng(4)
    covered = 0
    for seed in range(300):
        score = measure(mean_tally(generator.gamma(4.0, 0.5, size=80)), resamples=300, seed=seed)["loss"]
        assert score.low < score.value < score.high
        covered += score.low <= 2.0 <= score.high
    assert 0.92 <= covered / 300 <= 0.98


def test_the_interval_is_scipys() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=100)
    ours = measure(mean_tally(values), resamples=5000, confidence=0.9)["loss"]
    theirs = stats.bootstrap((values,), np.mean, n_resamples=5000, confidence_level=0.9, method="percentile", rng=1)
    assert ours.value == pytest.approx(values.mean())
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.02)


def test_a_higher_confidence_is_wider_and_the_seed_decides() -> None:
    tally = mean_tally(np.random.default_rng(0).random(50))
    usual, wide = measure(tally)["loss"], measure(tally, confidence=0.99)["loss"]
    assert wide.low < usual.low < usual.high < wide.high
    assert measure(tally)["loss"] == usual != measure(tally, seed=1)["loss"]


def test_weights_are_multinomial() -> None:
    weights = np.concatenate(list(bootstrap_weights(5, resamples=4000, seed=0)))
    assert weights.shape == (4000, 5) and (weights.sum(axis=1) == 5).all()
    np.testing.assert_allclose(weights.mean(axis=0), 1, atol=0.05)
    np.testing.assert_allclose(weights.var(axis=0), 4 / 5, atol=0.08)
    assert np.corrcoef(weights[:, 0], weights[:, 1])[0, 1] == pytest.approx(-1 / 4, abs=0.05)


def test_many_examples_are_resampled_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same figures, and never more weights at once than the limit."""
    case = classified(0, num_examples=50, num_labels=2)
    tally = roc_auc(case.labels, case.truths_N, case.probabilities_NC)
    whole = measure(tally, resamples=100)
    monkeypatch.setattr(intervals, "_MOST_WEIGHTS", 350)
    sizes = [weights_RN.size for weights_RN in bootstrap_weights(50, resamples=100, seed=0)]
    assert len(sizes) == 15 and max(sizes) == 350 and sum(sizes) == 5000
    assert measure(tally, resamples=100) == whole
    monkeypatch.setattr(intervals, "_MOST_WEIGHTS", 10)
    assert measure(tally, resamples=100) == whole, "more examples than the limit: one resample at once"


def test_no_interval_without_resamples_and_of_one_example() -> None:
    for score in (measure(mean_tally(np.arange(9.0)), resamples=0)["loss"], measure(mean_tally(np.array([4.0])))["loss"]):
        assert score.value == 4.0 and score.low is None and score.high is None and score.undefined is None


def test_an_undefined_figure_says_why() -> None:
    score = measure(language([1.0, 2.0], [3, 4], [0, 0]))["bits_per_byte"]
    assert score.value is None and score.low is None and score.undefined == "there are no target bytes"


def test_resamples_where_a_figure_is_undefined_are_left_out() -> None:
    """ "b" is predicted in one of ten examples, so about a third of the resamples have no precision of it."""
    tally = classification(("a", "b"), ["a"] * 4 + ["b"] * 6, ["a"] * 9 + ["b"])
    score = measure(tally)["precision[b]"]
    assert (score.value, score.low, score.high) == (1.0, 1.0, 1.0)


def test_no_interval_where_more_than_half_of_the_resamples_are_undefined() -> None:
    half = np.array([math.nan, math.nan, 1.0, 3.0])
    assert interval(half, confidence=0.5) == (1.5, 2.5)
    assert interval(np.append(half, math.nan), confidence=0.5) == (None, None)
    assert interval(np.empty(0), confidence=0.5) == (None, None)

    digits = np.array([[1.0, 0], [10, 0], [100, 0], [1000, 0], [10_000, 1]])
    score = measure(Additive(rows_NK=digits, function=Rare(where=(11_111,))))["rare"]
    assert score.value == 1.0 and score.low is None and score.high is None, "only a resample with each example once has it"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resamples": -1}, "resamples=-1: must be at least 0"),
        ({"confidence": 0.0}, "confidence=0.0: must lie between"),
        ({"confidence": 1.0}, "confidence=1.0: must lie between"),
    ],
)
def test_settings_out_of_range(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(mean_tally(np.ones(3)), **settings)


def test_no_example_to_measure() -> None:
    with pytest.raises(UserError, match="no example"):
        measure(mean_tally(np.empty(0)))
