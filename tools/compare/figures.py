"""The figures of one evaluation that two models have: scores, differences, tests, all computed anew from the examples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from conf.errors import UserError
from conf.schema import shown
from tools.compare.harness import harness_tallies, task_figure
from train.config.changes import leaves
from train.scores import rouge
from train.scores.comparison import Difference, adjusted, compare
from train.scores.direction import direction
from train.scores.intervals import measure
from train.scores.record import Evaluation, Example, Score
from train.scores.settings import ScoreSettings
from train.scores.sheet import tallies
from train.scores.tally import Tally

SAID_ALREADY = {"precision_micro", "recall_micro", "f1_micro"} | {
    name for name in rouge.NAMES if name.endswith(("_precision", "_recall"))
}
"""Of a classification these are the accuracy, and of ROUGE its F1 tells both; several names of one test would cost the others
their significance."""
OF_LIKELIHOOD = {"loss", "perplexity", "bits_per_byte", "word_perplexity", "byte_perplexity"}
"""Figures of one sum of losses: different units of one test, which is counted once."""
OF_TOKENS = {"loss", "perplexity"}
"""Figures of a token, which is another piece of text for another tokenizer."""
LEVELS = ((0.001, "***"), (0.01, "**"), (0.05, "*"))
EVALUATED_ALIKE = ("task.", "limit", "dtype")
"""Settings of an evaluation that decide its figures, by their beginning; where the data lie does not."""
AGREEMENT = 1e-6  # of a figure that is computed anew; sums in another order differ in the sixteenth digit


@dataclass(frozen=True, kw_only=True)
class Resampling:
    """How intervals and tests are made."""

    resamples: int
    confidence: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of both: their scores, the difference, and what may be made of it."""

    name: str
    first: Score
    second: Score
    difference: Difference
    is_detail: bool = False
    """Whether it is of one label alone, or of one source beside a figure of all."""
    corrected: float | None = None
    """p-value after Holm's correction for the tests of its family; None: no test."""

    @property
    def tested_as(self) -> str:
        """Name of the test; one for all figures of likelihood of the same source."""
        source, slash, base = self.name.rpartition("/")
        return f"{source}{slash}likelihood" if base.partition(",")[0] in OF_LIKELIHOOD else self.name

    @property
    def direction(self) -> Literal[-1, 0, 1]:
        """1: higher is better, -1: lower is, 0: neither."""
        return direction(self.name)

    @property
    def stars(self) -> str:
        """How sure the difference is, by the corrected p-value: see LEVELS."""
        return next((stars for level, stars in LEVELS if self.corrected is not None and self.corrected < level), "")

    @property
    def verdict(self) -> str:
        """better or worse with its stars; nothing where the difference may be chance."""
        if not self.stars or not self.difference.difference:
            return ""
        gain = self.difference.difference * self.direction
        return f"{'better' if gain > 0 else 'worse' if gain < 0 else 'differs'} {self.stars}"


@dataclass(frozen=True, kw_only=True)
class Compared:
    """An evaluation that both have."""

    title: str
    num_examples: int
    figures: tuple[Figure, ...]
    steps: tuple[int | None, int | None] = (None, None)
    """Steps of the two models, where they are of runs."""
    notes: tuple[str, ...] = ()

    @property
    def tests(self) -> str:
        """How the p-values were found."""
        names = {"randomization": "paired randomisation", "bootstrap": "paired bootstrap"}
        used = dict.fromkeys(figure.difference.test for figure in self.figures if figure.difference.test)
        return " and ".join(names[test] for test in used)


def title_of(evaluation: Evaluation) -> str:
    names = [str(entry["name"]) for entry in evaluation.data]
    shown_names = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    told = evaluation.name if evaluation.name == evaluation.kind else f"{evaluation.name} ({evaluation.kind})"
    return f"{told} on {shown_names}" if names else told


def compare_examples(one: Evaluation, other: Evaluation, resampling: Resampling) -> Compared:
    """Raises UserError, with the reason, where the two are not of the same examples or were not scored alike."""
    first, second = list(one.examples()), list(other.examples())
    second = _in_order_of(first, second)
    notes = [f"evaluated with other settings: {text}" for text in set_otherwise(one, other)]
    incomparable: set[str] = set()
    # lm-eval's figures are of texts: of an example, a word, a byte.
    if one.kind != "harness" and _tokenizers_differ(one, other) and any(example.loss is not None for example in first):
        incomparable = OF_TOKENS
        notes.append("different tokenizers: loss and perplexity are of tokens, so not comparable; bits per byte are")
        if any(mine.target_bytes != theirs.target_bytes for mine, theirs in zip(first, second, strict=True)):
            notes.append("the tokenizers cut the examples at other places, so their texts differ by some bytes")
    settings = _score_settings(one, other)
    mine, theirs = _tallies(one, first, settings), _tallies(other, second, settings)
    figures: list[Figure] = []
    for source in [source for source in mine if source in theirs]:
        is_part = bool(source) and "" in mine  # there is a figure of all sources too
        found = _figures(mine[source], theirs[source], resampling, incomparable=incomparable)
        name = task_figure if one.kind == "harness" else _figure_of
        figures += [
            replace(figure, name=name(source, figure.name), is_detail=is_part or "[" in figure.name) for figure in found
        ]
    figures, disagreements = _agreeing(figures, one, other)
    notes += [*_too_few_resamples(figures, resampling), *disagreements]
    return Compared(
        title=title_of(one),
        num_examples=len(first),
        figures=tuple(_corrected(figures)),
        steps=(one.model.get("step"), other.model.get("step")),
        notes=tuple(dict.fromkeys(notes)),
    )


def _in_order_of(first: Sequence[Example], second: Sequence[Example]) -> list[Example]:
    """The examples of `second` in the order of `first`. Raises UserError where they are not the same."""
    keys, others = [(one.source, one.id) for one in first], [(one.source, one.id) for one in second]
    if keys == others:
        return list(second)
    known, found = set(keys), dict(zip(others, second, strict=True))
    if known != set(others) or len(known) < len(keys) or len(found) < len(others):
        raise UserError(
            f"other examples: {len(keys):,} and {len(others):,}, of which {len(known & set(others)):,} are the same; evaluate "
            "both with the same limit, context and stride"
        )
    return [found[key] for key in keys]


def set_otherwise(one: Evaluation, other: Evaluation) -> list[str]:
    """The settings that decide figures and are not the same, with both values."""
    first, second = leaves(one.config), leaves(other.config)
    names = [name for name in dict.fromkeys([*first, *second]) if name.startswith(EVALUATED_ALIKE)]
    return [
        f"{name} {shown(first.get(name))} and {shown(second.get(name))}"
        for name in names
        if not name.startswith("task.data") and first.get(name) != second.get(name)
    ]


def _tokenizers_differ(one: Evaluation, other: Evaluation) -> bool:
    first, second = one.model.get("tokenizer"), other.model.get("tokenizer")
    return bool(first and second and first != second)


def _score_settings(one: Evaluation, other: Evaluation) -> ScoreSettings:
    """Raises UserError where the two were scored in different ways, or as this program does not know."""
    first, second = (_plain_settings(evaluation) for evaluation in (one, other))
    if first != second:
        names = [name for name in dict.fromkeys([*first, *second]) if first.get(name) != second.get(name)]
        raise UserError(f"scored otherwise: {', '.join(names)} differ; evaluate both with the same settings")
    try:
        return ScoreSettings(**{name: tuple(value) if isinstance(value, list) else value for name, value in first.items()})
    except TypeError as error:
        raise UserError(f"scored as this program does not know ({error}); evaluate both again") from None


def _plain_settings(evaluation: Evaluation) -> dict[str, Any]:
    found = evaluation.config.get("scores", {})
    return dict(found) if isinstance(found, Mapping) else {}


def _tallies(evaluation: Evaluation, examples: Sequence[Example], settings: ScoreSettings) -> dict[str, Tally]:
    """Source -> tally. The harness's tasks have figures of their own."""
    if evaluation.kind == "harness":
        return harness_tallies(evaluation, examples)
    return tallies(evaluation.kind, examples, settings)


def _figures(first: Tally, second: Tally, resampling: Resampling, *, incomparable: Iterable[str]) -> list[Figure]:
    """The figures of one source, or of all examples."""
    options = {"resamples": resampling.resamples, "confidence": resampling.confidence, "seed": resampling.seed}
    differences = compare(first, second, **options)
    mine, theirs = measure(first, **options), measure(second, **options)
    figures = []
    for name, difference in differences.items():
        if name in SAID_ALREADY or name.startswith("support["):
            continue
        if name in incomparable:
            reason = "a token is not the same text for both"
            difference = Difference(first=difference.first, second=difference.second, difference=None, undefined=reason)
        figures.append(Figure(name=name, first=mine[name], second=theirs[name], difference=difference))
    return figures


def _figure_of(source: str, name: str) -> str:
    return f"{source}/{name}" if source else name


def _corrected(figures: Sequence[Figure]) -> list[Figure]:
    """With Holm's correction: of the figures of all examples for the number of their tests, and of those of single labels or
    sources for theirs. Together they would drown the few that a task is judged by."""
    corrected: dict[tuple[bool, str], float | None] = {}
    for is_detail in (False, True):
        family: dict[str, float | None] = {}
        for figure in figures:
            p_value = figure.difference.p_value
            if figure.is_detail == is_detail and p_value is not None:
                # The units of a likelihood differ a little in their p; the highest stands for all.
                family[figure.tested_as] = max(p_value, family.get(figure.tested_as) or 0.0)
        corrected |= {(is_detail, test): value for test, value in adjusted(family).items()}
    return [
        figure
        if figure.difference.p_value is None
        else replace(figure, corrected=corrected[figure.is_detail, figure.tested_as])
        for figure in figures
    ]


def _too_few_resamples(figures: Sequence[Figure], resampling: Resampling) -> list[str]:
    """A p-value is never below 1 in the trials, which a correction for many tests may lift above every level."""
    tested = {(figure.is_detail, figure.tested_as) for figure in figures if figure.difference.p_value is not None}
    of_details = sum(is_detail for is_detail, _ in tested)
    most = max(of_details, len(tested) - of_details)
    needed = math.ceil(most / LEVELS[-1][0])
    if not most or resampling.resamples >= needed:
        return []
    tests = "1 test" if most == 1 else f"{most} tests"
    return [f"with {resampling.resamples:,} resamples no difference of {tests} can be sure; give resamples={needed}"]


def _agreeing(figures: Sequence[Figure], one: Evaluation, other: Evaluation) -> tuple[list[Figure], list[str]]:
    """The figures, those without a difference that the examples give otherwise than evaluation.json says; and a note of each.

    Either one of the files was changed, or the figure is not what is made of the examples: nothing can be said of it then.
    """
    kept, notes = [], []
    for figure in figures:
        stored = [evaluation.scores.get(figure.name) for evaluation in (one, other)]
        told = []
        for evaluation, says, again in zip((one, other), stored, (figure.first.value, figure.second.value), strict=True):
            if says is None or says.value is None or again is None:
                continue
            if not math.isclose(says.value, again, rel_tol=AGREEMENT, abs_tol=AGREEMENT):
                told.append(f"{evaluation.folder}: its examples give {figure.name} {again:.6g}, it says {says.value:.6g}")
        if told:
            reason = "the examples do not give what evaluation.json says"
            first, second = (says or again for says, again in zip(stored, (figure.first, figure.second), strict=True))
            difference = Difference(first=first.value, second=second.value, difference=None, undefined=reason)
            figure = replace(figure, first=first, second=second, difference=difference)
            told = [f"{text}; so they are not compared by it, evaluate again" for text in told]
        kept.append(figure)
        notes += told
    return kept, notes
