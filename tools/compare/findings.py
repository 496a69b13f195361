"""All that a comparison finds, before it is written on the console or on a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tools.compare.costs import Cost, cost_of
from tools.compare.figures import Resampling
from tools.compare.scores import ScoreComparison, compare_scores
from tools.compare.settings import Row, origin_differences, setting_differences
from tools.compare.subjects import Subject
from tools.compare.words import verdict


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The subjects, the first of which the others are held against."""

    subjects: tuple[Subject, ...]
    resampling: Resampling
    scores: tuple[ScoreComparison, ...]
    """Of each but the first."""
    settings: tuple[Row, ...]
    """Settings that differ."""
    origins: tuple[Row, ...]
    """What else differs: data, tokenizer, commit, versions."""
    same: tuple[str, ...]
    """What of that is the same."""
    costs: tuple[Cost, ...]
    verdicts: tuple[str, ...]
    """Of each but the first, one sentence."""


def find(subjects: Sequence[Subject], resampling: Resampling) -> Findings:
    """Compare everything. Raises UserError for an evaluation, or a run's outcome, that is damaged."""
    first = subjects[0]
    costs = tuple(cost_of(subject) for subject in subjects)
    scores = tuple(compare_scores(first, other, resampling) for other in subjects[1:])
    origins, same = origin_differences(subjects)
    others = zip(subjects[1:], costs[1:], scores, strict=True)
    return Findings(
        subjects=tuple(subjects),
        resampling=resampling,
        scores=scores,
        settings=tuple(setting_differences(subjects)),
        origins=tuple(origins),
        same=tuple(same),
        costs=costs,
        verdicts=tuple(verdict((first, other), (costs[0], cost), found) for other, cost, found in others),
    )
