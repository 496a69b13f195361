"""Every metric as a tally: weights are repetitions, sums of parts are sums of the whole, and undefined figures say why."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from conf.errors import UserError
from tests.timeouts import scaled
from tests.unit.scores.cases import classified, every_tally
from train.scores.classification import classification
from train.scores.language import language
from train.scores.tally import Additive, SparseRows, Together, plain_figures, ratio

ALL = np.arange(40)


def _assert_same(figures: dict[str, np.ndarray], others: dict[str, float], *, row: int = 0) -> None:
    assert figures.keys() == others.keys()
    for name, values in figures.items():
        assert values[row] == pytest.approx(others[name], abs=1e-9, nan_ok=True), name


def test_figures_are_what_they_should_be_many() -> None:
    names = set(plain_figures(every_tally(ALL)))
    assert {"accuracy", "mcc", "ece", "brier", "roc_auc", "loss", "bleu", "chrf", "chrf++", "ter", "rougeLsum"} < names
    assert {"exact_match", "HasAns_f1", "NoAns_exact_match", "f1[a]", "bits_per_byte"} < names


def test_a_weight_is_how_often_an_example_counts() -> None:
    """Of all metrics at once: with weights 0 to 3 the figures are those of the examples repeated so often."""
    weights_RN = np.random.default_rng(1).integers(4, size=(3, 40))
    figures = every_tally(ALL).figures(weights_RN.astype(np.float64))
    for row, weights_N in enumerate(weights_RN):
        _assert_same(figures, plain_figures(every_tally(np.repeat(ALL, weights_N))), row=row)


def test_selected_examples_are_a_tally_of_their_own() -> None:
    places = np.array([7, 3, 30, 8, 12, 12, 21])
    alone = every_tally(ALL).selected(places)
    assert alone.num_examples == 7
    _assert_same(alone.figures(np.ones((1, 7))), plain_figures(every_tally(places)))


def test_the_sums_of_two_halves_are_the_sum_of_the_whole() -> None:
    """What a reduction over data-parallel ranks would add."""
    parts = [every_tally(places).parts for places in (ALL, ALL[:13], ALL[13:])]
    additive = 0
    for whole, first, second in zip(*parts, strict=True):
        if isinstance(whole, Additive):
            sums = [tally.sums(np.ones((1, tally.num_examples))) for tally in (whole, first, second)]
            np.testing.assert_allclose(sums[0], sums[1] + sums[2], rtol=1e-12)
            additive += 1
    assert additive == 7


def test_sparse_rows_are_full_rows_without_the_zeros() -> None:
    generator = np.random.default_rng(0)
    columns = np.stack([generator.permutation(20)[:3] for _ in range(9)])
    sparse = SparseRows(columns_NJ=columns, values_NJ=generator.random((9, 3)), num_columns=20)
    full = np.zeros((9, 20))
    np.put_along_axis(full, columns, sparse.values_NJ, axis=1)
    weights_RN = generator.random((4, 9))
    np.testing.assert_allclose(sparse.sums(weights_RN), weights_RN @ full, rtol=1e-12)
    assert len(sparse[np.array([1, 2])]) == 2


def test_the_reason_comes_from_the_part_that_has_the_figure() -> None:
    case = classified(0, num_examples=4, num_labels=2)
    both = Together(parts=(classification(case.labels, ["a"] * 4, case.predictions), language([1.0] * 4, [2] * 4, [0] * 4)))
    assert both.undefined("bits_per_byte") == "there are no target bytes"
    assert both.undefined("mcc") == "the truth is the same for all examples"


def test_what_does_not_belong_together() -> None:
    part = language([1.0], [2], [3])
    with pytest.raises(AssertionError, match="of the same examples"):
        Together(parts=(part, language([1.0, 2.0], [2, 2], [3, 3])))
    with pytest.raises(AssertionError, match="two parts have"):
        plain_figures(Together(parts=(part, part)))


def test_no_example() -> None:
    with pytest.raises(UserError, match="no example to score"):
        plain_figures(language([], [], []))


def test_ratio() -> None:
    values = ratio(np.array([1.0, 0.0, 3.0]), np.array([2.0, 0.0, 0.0]))
    assert values[0] == 0.5 and np.isnan(values[1:]).all()


def test_the_package_is_quick_to_import() -> None:
    """Whoever prints a loss pays neither for torch nor for the libraries of metrics that are not asked for."""
    code = """
import sys
import train.scores.comparison, train.scores.intervals, train.scores.sheet
from train.scores.record import Example
train.scores.sheet.tallies("language", [Example(id="1", loss=1.0, target_tokens=1)], train.scores.sheet.ScoreSettings())
found = [name for name in ("torch", "sacrebleu", "rouge_score", "nltk", "regex", "sklearn", "scipy") if name in sys.modules]
sys.exit(", ".join(found) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=scaled(60))
    assert done.returncode == 0, done.stderr
