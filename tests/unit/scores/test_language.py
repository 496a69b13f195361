"""Loss, perplexity and bits per byte against the formulas of lm-eval, and where they are undefined."""

from __future__ import annotations

import math

import lm_eval.api.metrics as harness
import numpy as np
import pytest

from train.scores.intervals import measure
from train.scores.language import language
from train.scores.tally import plain_figures


def test_figures_are_of_all_text_as_one() -> None:
    """Not means of means: the second text is nine times as long."""
    figures = plain_figures(language([2.0, 6.0], [1, 9], [4, 30]))
    assert figures["loss"] == pytest.approx(0.8)
    assert figures["perplexity"] == pytest.approx(math.exp(0.8))
    assert figures["bits_per_byte"] == pytest.approx(8 / 34 / math.log(2))


def test_figures_are_those_of_the_harness() -> None:
    generator = np.random.default_rng(0)
    losses, targets = generator.random(30) * 40, generator.integers(1, 50, size=30)
    figures = plain_figures(language(losses, targets, 3 * targets))
    by_target = list(zip(-losses, targets, strict=True))
    by_byte = list(zip(-losses, 3 * targets, strict=True))
    assert figures["perplexity"] == pytest.approx(harness.weighted_perplexity(by_target), rel=1e-9)
    assert figures["bits_per_byte"] == pytest.approx(harness.bits_per_byte(by_byte), rel=1e-9)
    assert figures["loss"] == pytest.approx(-harness.weighted_mean(by_target), rel=1e-9)
    each = plain_figures(language(losses, np.ones(30), np.ones(30)))
    assert each["perplexity"] == pytest.approx(harness.perplexity(list(-losses)), rel=1e-9)


def test_a_perplexity_never_overflows() -> None:
    figures = plain_figures(language([1e9], [1], [1]))
    assert figures["perplexity"] == math.exp(700) and figures["loss"] == 1e9


@pytest.mark.parametrize(
    ("losses", "targets", "num_bytes", "undefined"),
    [
        ([0.0], [0], [0], {"loss": "no targets", "perplexity": "no targets", "bits_per_byte": "no target bytes"}),
        ([1.0], [2], [0], {"bits_per_byte": "no target bytes"}),
        ([1.0, math.nan], [2, 2], [4, 4], dict.fromkeys(("loss", "perplexity", "bits_per_byte"), "is not finite")),
        ([1.0, math.inf], [2, 2], [4, 4], dict.fromkeys(("loss", "perplexity", "bits_per_byte"), "is not finite")),
    ],
)
def test_undefined(losses: list[float], targets: list[int], num_bytes: list[int], undefined: dict[str, str]) -> None:
    scores = measure(language(losses, targets, num_bytes), resamples=20)
    assert {name for name, score in scores.items() if score.value is None} == set(undefined)
    for name, reason in undefined.items():
        assert reason in scores[name].undefined
