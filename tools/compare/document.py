"""The comparison as one page: nothing is loaded from outside."""

from __future__ import annotations

from collections.abc import Sequence

from tools.compare.costs import CONVENTIONS, cost_rows
from tools.compare.figures import Compared, Figure, Resampling
from tools.compare.findings import Findings
from tools.compare.scores import LACKING, NOTHING_IN_COMMON, ScoreComparison, evaluate_command
from tools.compare.settings import MEANING
from tools.compare.subjects import Subject
from tools.compare.words import compared_line, figure_cells, figure_head, left_over_cells, legend, undefined_notes
from tools.page import charts, hidden, note, page, section, table


def document(findings: Findings, drawn: Sequence[str] | None) -> str:
    """The page's text. drawn: the curves as SVG; None: they were not asked for."""
    subjects = findings.subjects
    title = " and ".join(subject.name for subject in subjects)
    return page(
        f"Comparison of {title}",
        f"Everything is held against {subjects[0].label}.",
        [
            table(["", "folder", "state", "step"], _subject_rows(findings), colours=_colours(subjects)),
            section("In short", *(note(verdict) for verdict in findings.verdicts), *_legend(findings)),
            *(part for one in findings.scores for part in _scores(one, findings.resampling)),
            section("Curves", _curves(drawn)),
            section("Cost", table(["", *_labels(subjects)], cost_rows(findings.costs)), note(CONVENTIONS)),
            section("Settings that differ", *_settings(findings)),
            section("Made of", *_origins(findings)),
        ],
    )


def _labels(subjects: Sequence[Subject]) -> list[str]:
    return [subject.label for subject in subjects]


def _colours(subjects: Sequence[Subject]) -> dict[str, str]:
    return {subject.label: subject.colour for subject in subjects}


def _subject_rows(findings: Findings) -> list[list[str]]:
    return [
        [subject.label, str(subject.folder), cost.state, "-" if subject.step is None else f"{subject.step:,}"]
        for subject, cost in zip(findings.subjects, findings.costs, strict=True)
    ]


def _legend(findings: Findings) -> list[str]:
    return [note(legend(findings.resampling))] if any(one.compared for one in findings.scores) else []


def _scores(scores: ScoreComparison, resampling: Resampling) -> list[str]:
    """A section for each evaluation that both have, and one for what is left over."""
    against = f"{scores.second.label} against {scores.first.label}"
    parts = [section(f"{against}: {one.title}", *_compared(one, scores, resampling)) for one in scores.compared]
    left: list[str] = []
    if not scores.compared:
        commands = [evaluate_command(one) for one in (scores.first, scores.second)]
        left.append(note(f"{NOTHING_IN_COMMON} {' and '.join(commands)}"))
    if scores.not_compared:
        head = ["", scores.first.letter, scores.second.letter, "why"]
        left.append(table(head, [left_over_cells(one) for one in scores.not_compared]))
    if scores.compared:
        left += [note(f"{LACKING.format(one.letter)} {evaluate_command(one)} task=...") for one in scores.lacking]
    return [*parts, *([section(f"{against}: not compared", *left)] if left else [])]


def _compared(compared: Compared, scores: ScoreComparison, resampling: Resampling) -> list[str]:
    letters = (scores.first.letter, scores.second.letter)
    main = [figure for figure in compared.figures if not figure.is_detail]
    details = [figure for figure in compared.figures if figure.is_detail]
    parts = [_table(main, scores)] if main else []
    if details:
        shown = _table(details, scores)
        parts.append(hidden(f"{len(details):,} figures of single labels or sources", shown) if main else shown)
    said = (compared_line(compared, resampling, letters), *compared.notes, *undefined_notes(compared, letters))
    return [*parts, *map(note, said)]


def _table(figures: Sequence[Figure], scores: ScoreComparison) -> str:
    return table(figure_head(scores.first, scores.second), [figure_cells(figure) for figure in figures])


def _curves(drawn: Sequence[str] | None) -> str:
    if drawn is None:
        return note("None were asked for (curves=false).")
    return charts(drawn) if drawn else note("No step has been recorded yet.")


def _settings(findings: Findings) -> list[str]:
    if not findings.settings:
        return [note("None.")]
    rows = [[row.name, row.kind, *row.values] for row in findings.settings]
    used = dict.fromkeys(row.kind for row in findings.settings)
    meaning = "; ".join(f"{kind}: {MEANING[kind]}" for kind in used)
    return [table(["setting", "what it decides", *_labels(findings.subjects)], rows), note(f"{meaning}.")]


def _origins(findings: Findings) -> list[str]:
    parts = []
    if findings.origins:
        parts.append(table(["", *_labels(findings.subjects)], [[row.name, *row.values] for row in findings.origins]))
    if findings.same:
        parts.append(note(f"The same: {', '.join(findings.same)}."))
    return parts
