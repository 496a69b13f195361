"""The figures of lm-eval's tasks, computed anew from their examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from conf.errors import UserError
from train.scores.record import Evaluation, Example
from train.scores.tally import Additive, Tally, ratio

OF_LOSSES = ("perplexity", "byte_perplexity", "bits_per_byte")
"""Figures that the examples' losses give: of an example, and of a byte."""
_HIGHEST_EXPONENT = 700.0  # exp(709.8) is the largest float64


@dataclass(frozen=True, kw_only=True)
class TaskFigures:
    """Means over the examples, each example's figure being in its own `scores`; and what follows from their losses."""

    means: tuple[str, ...]
    of_losses: tuple[str, ...] = ()

    def __call__(self, sums_RK: np.ndarray) -> dict[str, np.ndarray]:
        """Each figure [R], of sums [scores, loss, bytes, examples]."""
        loss_R, bytes_R, count_R = sums_RK[:, -3:].T
        by_example_R, by_byte_R = ratio(loss_R, count_R), ratio(loss_R, bytes_R)
        figures = {name: ratio(sums_RK[:, place], count_R) for place, name in enumerate(self.means)}
        values = {
            "perplexity": np.exp(np.minimum(by_example_R, _HIGHEST_EXPONENT)),
            "byte_perplexity": np.exp(np.minimum(by_byte_R, _HIGHEST_EXPONENT)),
            "bits_per_byte": by_byte_R / math.log(2),
        }
        return figures | {name: values[name] for name in self.of_losses}

    def undefined(self, name: str, sums_K: np.ndarray) -> str:
        """Only an example that has none makes a mean undefined."""
        return "an example has no finite score, or none has bytes"


def task_figure(source: str, name: str) -> str:
    """Its name among the scores of an evaluation: task/metric,filter. source: task, or task,filter."""
    task, comma, way = source.partition(",")
    return f"{task}/{name}{comma}{way}"


def harness_tallies(evaluation: Evaluation, examples: Sequence[Example]) -> dict[str, Tally]:
    """Source -> tally, of the tasks whose examples have any figure. Raises UserError where none has."""
    sources: dict[str, list[Example]] = {}
    for example in examples:
        sources.setdefault(example.source, []).append(example)
    found = {source: _tally(evaluation, source, every) for source, every in sources.items()}
    kept = {source: tally for source, tally in found.items() if tally is not None}
    if not kept:
        raise UserError("the examples have no scores of their own to be compared by")
    return kept


def _tally(evaluation: Evaluation, source: str, examples: Sequence[Example]) -> Tally | None:
    """Of the figures that all examples have; None where there is none."""
    means = tuple(name for name in examples[0].scores if all(name in example.scores for example in examples))
    of_losses = tuple(name for name in OF_LOSSES if task_figure(source, name) in evaluation.scores and name not in means)
    if any(example.loss is None for example in examples):
        of_losses = ()
    if not means and not of_losses:
        return None
    rows = [[*(example.scores[name] for name in means), example.loss or 0.0, example.target_bytes, 1.0] for example in examples]
    return Additive(rows_NK=np.array(rows, dtype=np.float64), function=TaskFigures(means=means, of_losses=of_losses))
