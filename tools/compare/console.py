"""The comparison as text: tables in columns that fit a terminal, wide characters counted as two."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Sequence

from tools.compare.costs import cost_rows
from tools.compare.figures import Resampling
from tools.compare.findings import Findings
from tools.compare.scores import LACKING, NOTHING_IN_COMMON, ScoreComparison, evaluate_command
from tools.compare.words import compared_line, figure_cells, figure_head, left_over_cells, legend, undefined_notes

WIDTH = 120
NOTES_SHOWN = 6  # reasons why figures are undefined; a task with many labels can have hundreds
_LEAST = 8  # columns are not cut below this
_GAP = "  "


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = False, indent: str = "") -> list[str]:
    """Lines of a table; where it is too wide, the widest columns are cut. numbers: all but the first column to the right."""
    table = [[" ".join(cell.split()) for cell in row] for row in (head, *rows)]
    widths = [max(map(columns_of, column)) for column in zip(*table, strict=True)]
    room = WIDTH - len(indent) - len(_GAP) * (len(widths) - 1)
    while sum(widths) > room and max(widths) > _LEAST:
        widths[widths.index(max(widths))] -= 1
    lines = []
    for row in table:
        cells = [
            _placed(cell, width, right=numbers and place > 0)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append((indent + _GAP.join(cells)).rstrip())
    return lines


def columns_of(text: str) -> int:
    """Columns of a terminal that the text takes."""
    return sum(_width(character) for character in text)


def _width(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def cut(text: str, columns: int) -> str:
    """The text, or its beginning, three dots and its end, where paths and names differ most."""
    if columns_of(text) <= columns:
        return text
    head = _fitting(text, (columns - 3) // 2)
    tail = _fitting(text[::-1], columns - 3 - columns_of(head))[::-1]
    return f"{head}...{tail}"


def _fitting(text: str, columns: int) -> str:
    """As much of the beginning as fits."""
    kept = ""
    for character in text:
        columns -= _width(character)
        if columns < 0:
            break
        kept += character
    return kept


def _placed(text: str, width: int, *, right: bool) -> str:
    text = cut(text, width)
    filling = " " * (width - columns_of(text))
    return filling + text if right else text + filling


def written(findings: Findings) -> list[str]:
    """The whole comparison, line by line."""
    head = ["", *(subject.letter for subject in findings.subjects)]
    lines = aligned(["", "name", "folder"], [[one.letter, one.name, str(one.folder)] for one in findings.subjects])[1:]
    for scores in findings.scores:
        lines += ["", *_scores(scores, findings.resampling)]
    if any(scores.compared for scores in findings.scores):
        lines += ["", *_wrapped(legend(findings.resampling), "  ", "  ")]
    lines += ["", "Settings that differ"]
    settings = [[row.kind, row.name, *row.values] for row in findings.settings]
    lines += aligned(["", *head], settings, indent="  ") if settings else ["  none"]
    lines += ["", "Made of"]
    if findings.origins:
        lines += aligned(head, [[row.name, *row.values] for row in findings.origins], indent="  ")
    if findings.same:
        lines += _wrapped(f"the same: {', '.join(findings.same)}", "  ", "  ")
    lines += ["", "Cost", *aligned(head, cost_rows(findings.costs), numbers=True, indent="  "), ""]
    for verdict in findings.verdicts:
        lines += _wrapped(verdict, "", "  ")
    return lines


def _scores(scores: ScoreComparison, resampling: Resampling) -> list[str]:
    """One table for each evaluation that both have, and a list of what is left over."""
    letters = (scores.first.letter, scores.second.letter)
    lines = [f"Scores of {scores.second.label} against {scores.first.label}"]
    for compared in scores.compared:
        shown = [figure for figure in compared.figures if not figure.is_detail] or list(compared.figures)
        lines.append(f"  {compared.title}")
        lines += _wrapped(compared_line(compared, resampling, letters))
        cells = [figure_cells(figure) for figure in shown]
        lines += aligned(figure_head(scores.first, scores.second), cells, numbers=True, indent="    ")
        left_out = len(compared.figures) - len(shown)
        notes = [*compared.notes, *undefined_notes(compared, letters)[:NOTES_SHOWN]]
        notes += [f"{left_out:,} figures of single labels or sources are on the page"] if left_out else []
        lines += [line for note in notes for line in _wrapped(f"note: {note}")]
    if not scores.compared:
        lines += [f"    {NOTHING_IN_COMMON}", *(f"      {evaluate_command(one)}" for one in (scores.first, scores.second))]
    for left in scores.not_compared:
        title, first, second, reason = left_over_cells(left)
        lines += _wrapped(f"not compared: {title}: {reason}; {letters[0]}: {first}; {letters[1]}: {second}")
    if scores.compared:
        lines += [f"    {LACKING.format(one.letter)} {evaluate_command(one)} task=..." for one in scores.lacking]
    return lines


def _wrapped(text: str, first: str = "    ", later: str = "      ") -> list[str]:
    """Paths and hyphenated words stay whole, so that they can be copied."""
    whole = {"break_on_hyphens": False, "break_long_words": False}
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=later, **whole)
