"""How the numbers of a comparison are written, on the console and on the page alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tools.compare.costs import Cost, HeldOut
from tools.compare.figures import LEVELS, Compared, Figure, Resampling
from tools.compare.overlays import have_one_tokenizer
from tools.compare.scores import NotCompared, ScoreComparison
from tools.compare.subjects import Subject
from train.scores.record import Score

MOST_FIGURES = 4  # of an evaluation that has no counterpart
NONE = "-"


def figure_head(first: Subject, second: Subject) -> list[str]:
    """Above the cells of `figure_cells`."""
    return ["figure", first.letter, second.letter, f"{second.letter} - {first.letter}", "p", "Holm", ""]


def figure_cells(figure: Figure) -> list[str]:
    """Name, both scores, the difference, its p-value as it is and corrected, and what it means."""
    difference = figure.difference
    change = NONE
    if difference.difference is not None:
        change = _with_interval(difference.difference, difference.low, difference.high, sign="+")
    values = [_score(figure.first), _score(figure.second), change]
    return [figure.name, *values, _p(difference.p_value), _p(figure.corrected), figure.verdict]


def undefined_notes(compared: Compared, letters: tuple[str, str]) -> list[str]:
    """Why figures have no value, or no difference."""
    notes = []
    for figure in compared.figures:
        for letter, score in zip(letters, (figure.first, figure.second), strict=True):
            if score.value is None:
                notes.append(f"{figure.name} of {letter} is undefined: {score.undefined or 'it is not finite'}")
    return notes


def _score(score: Score) -> str:
    return NONE if score.value is None else _with_interval(score.value, score.low, score.high)


def _with_interval(value: float, low: float | None, high: float | None, *, sign: str = "") -> str:
    if low is None or high is None:
        return _number(value, 4, sign)
    digits = _digits(high - low)
    return f"{_number(value, digits, sign)} [{_number(low, digits, sign)}, {_number(high, digits, sign)}]"


def _digits(width: float) -> int:
    """Decimals of a figure whose interval is so wide: two figures of the uncertainty, but not more than five decimals."""
    return 4 if width <= 0 or not math.isfinite(width) else max(0, min(5, 1 - math.floor(math.log10(width / 2))))


def _number(value: float, digits: int, sign: str) -> str:
    return f"{value:{sign}.3e}" if abs(value) >= 1e6 else f"{value:{sign},.{digits}f}"


def _p(value: float | None) -> str:
    return NONE if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def compared_line(compared: Compared, resampling: Resampling, letters: tuple[str, str]) -> str:
    """What was compared, and how."""
    steps = [f"{letter} at step {step:,}" for letter, step in zip(letters, compared.steps, strict=True) if step is not None]
    examples = "1 example" if compared.num_examples == 1 else f"{compared.num_examples:,} examples"
    test = f"p by {compared.tests}" if compared.tests else "no test"
    return "; ".join([examples, *([", ".join(steps)] if steps else []), f"{test}, {resampling.resamples:,} resamples"])


def legend(resampling: Resampling) -> str:
    """What brackets, p, Holm and stars mean."""
    stars = ", ".join(f"{stars} below {level:g}" for level, stars in reversed(LEVELS))
    return (
        f"In brackets: where the figure lies with a confidence of {100 * resampling.confidence:g} %, by a bootstrap over the "
        f"examples. p: chance of a difference as large between models that are alike. Holm: p corrected for the number of "
        f"tests of one evaluation and one pair, those of single labels and sources for theirs, loss, perplexity and bits per "
        f"byte being one; {stars}."
    )


def left_over_cells(left: NotCompared) -> list[str]:
    """Title, the first figures of both, and the reason."""
    return [left.title, _few(left.first), _few(left.second), left.reason]


def _few(scores: Mapping[str, Score]) -> str:
    if not scores:
        return NONE
    known = [f"{name} {_number(score.value, 4, '')}" for name, score in scores.items() if score.value is not None]
    return ", ".join(known[:MOST_FIGURES]) + (", ..." if len(known) > MOST_FIGURES else "")


def verdict(subjects: tuple[Subject, Subject], costs: tuple[Cost, Cost], scores: ScoreComparison | None) -> str:
    """What is better and by how much, and what it cost, each relative to the first."""
    first, second = subjects
    parts = [text for text in (_held_out(subjects, costs), _scored(scores), _paid(costs)) if text]
    return f"{second.label} against {first.label}: {'; '.join(parts)}."


def _held_out(subjects: tuple[Subject, Subject], costs: tuple[Cost, Cost]) -> str:
    common = [name for name in costs[0].held_out if name in costs[1].held_out]
    if not common:
        return ""
    prints = {subject.data_fingerprint for subject in subjects} - {None}
    if not have_one_tokenizer(subjects) or len(prints) > 1:
        return "their held-out losses are not of the same text"
    name = min(common)  # the one without a name is of all the text
    mine, theirs = (cost.held_out[name] for cost in costs)
    return f"best held-out loss{f' of {name}' if name else ''} {theirs.best:.4f}, {_against(theirs, mine)}"


def _against(theirs: HeldOut, mine: HeldOut) -> str:
    change = theirs.best - mine.best
    if change == 0:
        return f"the same as {mine.best:.4f}"
    return f"{abs(change):.4f} {'better' if change < 0 else 'worse'} than {mine.best:.4f}"


def _scored(scores: ScoreComparison | None) -> str:
    if scores is None or not scores.compared:
        return ""
    tested = {
        (place, figure.tested_as): figure
        for place, compared in enumerate(scores.compared)
        for figure in compared.figures
        if not figure.is_detail and figure.corrected is not None
    }
    better = sum(figure.verdict.startswith("better") for figure in tested.values())
    worse = sum(figure.verdict.startswith("worse") for figure in tested.values())
    tests = "1 test" if len(tested) == 1 else f"{len(tested)} tests"
    return f"of {tests} {better} better, {worse} worse, {len(tested) - better - worse} not told apart"


def _paid(costs: tuple[Cost, Cost]) -> str:
    mine, theirs = costs
    hours = f"{mine.device}-hours" if mine.device == theirs.device else "device-hours"
    pairs: Sequence[tuple[str, float | None, float | None]] = (
        ("parameters", mine.parameters, theirs.parameters),
        ("tokens", mine.tokens, theirs.tokens),
        ("FLOPs", mine.flops, theirs.flops),
        (hours, mine.device_seconds, theirs.device_seconds),
    )
    told = [
        f"as many {name}" if after == before else f"{after / before:.3g} x the {name}"
        for name, before, after in pairs
        if before and after is not None
    ]
    return f"it has {told[0]}" + (f" and took {', '.join(told[1:])}" if told[1:] else "")
