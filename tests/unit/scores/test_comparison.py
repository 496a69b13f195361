"""Differences of two models: p-values against exact tests, their distribution when nothing differs, intervals, and errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest
from scipy import stats

from conf.errors import UserError
from tests.unit.scores.cases import Rare, classified, every_tally, texts
from tests.unit.scores.test_intervals import mean_tally
from train.scores.answers import answers
from train.scores.calibration import calibration
from train.scores.classification import classification
from train.scores.comparison import adjusted, compare
from train.scores.language import language
from train.scores.ranking import roc_auc
from train.scores.tally import Additive, Together, plain_figures
from train.scores.translation import translation, translation_figures


def _near(p_value: float, exact: float, *, trials: int) -> None:
    """Within four standard errors of a Monte-Carlo estimate."""
    assert p_value == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / trials) + 1 / trials)


@pytest.mark.parametrize(("only_first", "only_second"), [(3, 9), (5, 6), (2, 14), (0, 0)])
def test_accuracy_is_tested_as_by_mcnemar(only_first: int, only_second: int) -> None:
    """The exact test: of the examples that one model alone gets right, each is equally likely to be either's."""
    truths = ["a"] * 60
    right, wrong = "a", "b"
    first = [right] * only_first + [wrong] * only_second + [right] * (60 - only_first - only_second)
    second = [wrong] * only_first + [right] * only_second + [right] * (60 - only_first - only_second)
    models = [classification(("a", "b"), truths, outputs) for outputs in (first, second)]
    found = compare(*models, resamples=10_000)["accuracy"]
    assert found.difference == pytest.approx((only_second - only_first) / 60) and found.test == "randomization"
    discordant = only_first + only_second
    exact = stats.binomtest(only_first, discordant).pvalue if discordant else 1.0
    _near(found.p_value, exact, trials=10_000)


def test_a_mean_is_tested_as_by_scipys_exact_permutations() -> None:
    generator = np.random.default_rng(3)
    first = generator.normal(size=11)
    second = first + generator.normal(0.4, 0.8, size=11)
    exact = stats.permutation_test(
        (second - first,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    found = compare(mean_tally(first), mean_tally(second), resamples=10_000)["loss"]
    assert 0.02 < exact.pvalue < 0.9
    _near(found.p_value, exact.pvalue, trials=10_000)


def test_translations_are_tested_as_by_sacrebleu() -> None:
    first, references = texts(0, num_examples=60)
    second = [text if place % 3 else reference for place, (text, reference) in enumerate(zip(first, references, strict=True))]
    second[1::6] = [text[: len(text) // 2] for text in second[1::6]]
    _, theirs = PairedTest(
        [("first", first), ("second", second)], {"BLEU": BLEU(), "chrF2": CHRF()}, [references], n_samples=1000
    )()
    for name, key in (("bleu", "BLEU"), ("chrf", "chrF2")):
        figures = translation_figures(name)
        models = [translation(figures, outputs, [[text] for text in references]) for outputs in (first, second)]
        found = compare(*models, resamples=1000)[name]
        assert found.first == theirs[key][0].score and found.second == theirs[key][1].score
        assert found.p_value == pytest.approx(theirs[key][1].p_value, abs=0.06)


def _p_values(test: str) -> np.ndarray:
    """Of 300 comparisons of two models that differ by chance alone."""
    found = []
    for seed in range(300):
        generator = np.random.default_rng(seed)
        if test == "randomization":
            models = [mean_tally(generator.gamma(2.0, size=40)) for _ in range(2)]
        else:
            truths_N = generator.integers(2, size=60)
            scores = [np.clip(truths_N * 0.2 + generator.random(60) * 0.8, 0, 1) for _ in range(2)]
            models = [roc_auc(("a", "b"), truths_N, np.stack([1 - score, score], axis=1)) for score in scores]
        difference = next(iter(compare(*models, resamples=199, seed=seed).values()))
        assert difference.test == test
        found.append(difference.p_value)
    return np.array(found)


@pytest.mark.parametrize("test", ["randomization", "bootstrap"])
def test_p_values_are_uniform_where_nothing_differs(test: str) -> None:
    p_values = _p_values(test)
    assert 0.02 <= (p_values <= 0.05).mean() <= 0.085
    assert 0.43 <= p_values.mean() <= 0.57
    if test == "randomization":
        assert stats.kstest(p_values, "uniform").pvalue > 0.01


def test_an_interval_is_paired() -> None:
    """The models differ by 1 on hard and on easy examples alike; unpaired, the interval would be wider by far."""
    generator = np.random.default_rng(0)
    hardness = generator.normal(scale=10, size=50)
    first, second = hardness + generator.normal(scale=0.1, size=50), hardness + 1
    found = compare(mean_tally(first), mean_tally(second))["loss"]
    expected = stats.bootstrap((second - first,), np.mean, n_resamples=2000, method="percentile", rng=0).confidence_interval
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=0.005)
    assert 0.9 < found.low < found.difference < found.high < 1.1 and found.p_value == pytest.approx(1 / 1001)
    back = compare(mean_tally(second), mean_tally(first))["loss"]
    assert back.difference == -found.difference and (back.low, back.high) == (-found.high, -found.low)
    assert back.p_value == found.p_value


def test_every_figure_has_a_test_of_the_right_kind() -> None:
    first, second = every_tally(np.arange(40)), every_tally(np.arange(40), seed=1)
    found = compare(first, second, resamples=50)
    assert found.keys() == plain_figures(first).keys()
    assert {name for name, difference in found.items() if difference.test == "bootstrap"} == {"roc_auc"}
    for difference in found.values():
        assert difference.difference == pytest.approx(difference.second - difference.first)
        assert 0 < difference.p_value <= 1 and isinstance(difference.p_value, float)


def test_a_model_does_not_differ_from_itself() -> None:
    tally = every_tally(np.arange(40))
    for difference in compare(tally, tally, resamples=30).values():
        assert (difference.difference, difference.low, difference.high, difference.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_figures_that_are_computed_differently_are_not_mixed() -> None:
    """Outputs scored with other bins cannot change places; the bootstrap needs no more than the figures."""
    case = classified(0, num_examples=40, num_labels=2)
    models = [calibration(case.truths_N, case.probabilities_NC, bins=bins) for bins in (5, 6)]
    assert {difference.test for difference in compare(*models, resamples=30).values()} == {"bootstrap"}


def test_neither_interval_nor_test_without_resamples() -> None:
    found = compare(mean_tally(np.arange(5.0)), mean_tally(np.ones(5)), resamples=0)["loss"]
    assert found.difference == -1.0 and found.low is None and found.p_value is None and found.test is None


def test_one_example() -> None:
    found = compare(mean_tally(np.array([1.0])), mean_tally(np.array([2.0])))["loss"]
    assert found.difference == 1.0 and found.low is None and found.p_value == 1.0, "changing places gives the same distance"
    models = [calibration(np.array([0]), np.array([[0.8, 0.2]]), bins=bins) for bins in (2, 3)]
    assert compare(*models)["ece"].p_value is None, "a resample of one example is that example"


@pytest.mark.parametrize("is_first", [True, False])
def test_an_undefined_figure_says_of_which_model(is_first: bool) -> None:
    models = [language([1.0, 2.0], [1, 1], [2, 2]), language([1.0, math.nan], [1, 1], [2, 2])]
    found = compare(*(reversed(models) if is_first else models), resamples=20)["loss"]
    assert found.difference is None and found.p_value is None and found.test is None
    assert found.undefined == f"of the {'first' if is_first else 'second'} model the loss of at least one example is not finite"
    assert (found.first, found.second) == ((None, 1.5) if is_first else (1.5, None))


def test_no_test_where_most_trials_are_undefined() -> None:
    """The sum of the first statistic tells which examples changed places; only none and all leave the figure defined."""
    digits = np.array([1.0, 10, 100, 1000, 10_000])
    models = [np.stack([factor * digits, np.full(5, factor)], axis=1) for factor in (1.0, 2.0)]
    first, second = (Additive(rows_NK=rows, function=Rare(where=(11_111, 22_222))) for rows in models)
    found = compare(first, second)["rare"]
    assert (found.first, found.second, found.difference) == (5.0, 10.0, 5.0)
    assert (found.p_value, found.test, found.low) == (None, None, None)


def test_trials_where_a_figure_is_undefined_are_left_out() -> None:
    """Each model predicts "b" once, elsewhere: half of the trials leave one without, in the others they differ as much."""
    outputs = [["b", "a", "a", "a"], ["a", "b", "a", "a"]]
    models = [classification(("a", "b"), ["b", "a", "a", "a"], output) for output in outputs]
    found = compare(*models, resamples=401)["precision[b]"]
    assert (found.first, found.second) == (1.0, 0.0) and found.p_value in (1.0, None)


def test_figures_of_one_model_alone_are_left_out() -> None:
    common = mean_tally(np.arange(3.0))
    first = Together(parts=(common, answers(["x"] * 3, [("x",)] * 3)))
    assert set(compare(first, common, resamples=5)) == {"loss", "perplexity", "bits_per_byte"}


def test_errors() -> None:
    with pytest.raises(UserError, match="has 3 examples and the second 4: a comparison is of the same examples"):
        compare(mean_tally(np.ones(3)), mean_tally(np.ones(4)))
    with pytest.raises(UserError, match="no example"):
        compare(mean_tally(np.empty(0)), mean_tally(np.empty(0)))
    with pytest.raises(UserError, match="exact_match, f1: no figure is in both"):
        compare(mean_tally(np.ones(1)), answers(["x"], [("x",)]))
    with pytest.raises(ValueError, match="resamples=-1"):
        compare(mean_tally(np.ones(3)), mean_tally(np.ones(3)), resamples=-1)


def test_holms_correction() -> None:
    """By hand: 0.01 * 4, then 0.02 * 3, 0.04 * 2, and the last at least as large as the one before."""
    found = adjusted({"last": 0.04, "first": 0.01, "none": None, "third": 0.04, "second": 0.02})
    assert found == {"last": 0.08, "first": 0.04, "none": None, "third": 0.08, "second": 0.06}
    assert list(found) == ["last", "first", "none", "third", "second"]
    assert adjusted({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}
    assert adjusted({}) == {}
