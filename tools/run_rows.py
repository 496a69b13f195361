"""What the page of a fine-tuning run tells of its rows: what became of them, and what the model wrote for held-out ones."""

from __future__ import annotations

import json
from pathlib import Path

from conf.errors import UserError
from data_pipeline.encoded_rows import read_encoded
from data_pipeline.row_report import RowReport
from tools.page import hidden, note, table
from train.groundwork.finetuning import ROWS_FOLDER
from train.metrics.jsonl import OUTPUTS_FOLDER

OUTPUTS_SHOWN = 50
PARTS = ("_precision", "_recall")  # of a figure that is in the table as a whole
LETTERS_SHOWN = 300  # of a text in the table


def rows_table(run_dir: Path) -> list[str]:
    """The rows that were read, left out, held out and packed."""
    try:
        report = read_encoded(run_dir / ROWS_FOLDER, verify="sizes").report
    except UserError as error:
        return [note(str(error))]
    head = ["split", "rows", "cut", "tokens", "of which learned", "sequences", "filled"]
    lines = [note(" | ".join(report.found)), table(head, _split_rows(report))]
    if report.dropped:
        dropped = [[drop.reason, f"{drop.count:,}", drop.first] for drop in report.dropped]
        lines.append(table(["left out", "rows", "the first"], dropped))
    if report.shared:
        lines.append(note(f"{report.shared:,} of the held-out rows are among the training rows as well."))
    return lines


def _split_rows(report: RowReport) -> list[list[str]]:
    return [
        [
            name,
            *(f"{count:,}" for count in (part.rows, part.cut, part.tokens, part.targets, part.sequences)),
            f"{100 * part.efficiency:.1f} %",
        ]
        for name, part in (("training", report.train), ("held out", report.validation))
        if part.rows
    ]


def outputs_table(run_dir: Path) -> list[str]:
    """What the model answered to held-out rows at the last evaluation, the first of them at once."""
    paths = sorted((run_dir / OUTPUTS_FOLDER).glob("step-*.jsonl"))
    if not paths:
        return [note("No evaluation has written any: scoring.max_rows says of how many rows.")]
    newest, broken = paths[-1], 0
    outputs = []
    for line in newest.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            outputs.append((*(str(entry[name]) for name in ("id", "input", "truth", "output")), dict(entry["scores"])))
        except (ValueError, KeyError, TypeError):
            broken += 1
    named = dict.fromkeys(name for *_, scores in outputs for name in scores)
    figures = [name for name in named if not name.endswith(PARTS)]
    head = ["row", "input", "truth", "output", *figures]
    rows = [
        [*map(_shortened, texts), *(_figure(scores.get(name)) for name in figures)]
        for *texts, scores in outputs[:OUTPUTS_SHOWN]
    ]
    parts = [note(f"Step {int(newest.stem.removeprefix('step-')):,}."), table(head, rows)]
    if len(rows) > 10:
        parts = [parts[0], table(head, rows[:10]), hidden(f"{len(rows) - 10:,} more", table(head, rows[10:]))]
    if left := len(outputs) - len(rows):
        parts.append(note(f"{left:,} more are in {newest}."))
    return [*parts, *([note(f"{broken:,} lines of {newest} are damaged.")] if broken else [])]


def _shortened(text: str) -> str:
    """Of a long text its end, which says what was asked."""
    return text if len(text) <= LETTERS_SHOWN else f"... {text[-LETTERS_SHOWN:]}"


def _figure(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-"
