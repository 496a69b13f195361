"""How the subjects' settings differ, and what else they were made of: only what is not the same everywhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from conf.compose import to_plain
from conf.schema import shown
from tools.compare.subjects import Subject
from train.config.changes import kind_of, leaves
from train.config.imported import ImportedConfig

CLASSES = ("model", "data", "optimisation", "layout", "free")
MEANING = {
    "model": "what is trained",
    "data": "what is read, and in which order",
    "optimisation": "how it is trained, and for how long",
    "layout": "how the work is spread and carried out; the numbers agree but for rounding",
    "free": "names, cadence and monitoring; nothing of it changes the model",
}
FIXED = {"model": "model", "data": "data", "task": "data", "opening": "data"}
"""Sections that no run may change, and the class of each."""
NOTHING = "-"  # stands where a subject has no such setting


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing that differs: its value for each subject, as text."""

    name: str
    values: tuple[str, ...]
    kind: str = ""
    """One of CLASSES, for a setting."""


def class_of(field: str) -> str:
    """Which of CLASSES a dotted field belongs to."""
    if field.startswith(("data.sources", "task.data", "task.validation", "run.seed")):
        return "data"  # to a resumed run the place of a corpus is free; the seed decides the order
    if field in ("launch.processes", "launch.device"):
        return "layout"
    if field == "initial_checkpoint" or field.startswith("origin."):
        return "model"
    kind = kind_of(field)
    if kind == "fixed":
        return FIXED.get(field.partition(".")[0], "optimisation")
    return "optimisation" if kind == "adjustable" else kind


def setting_differences(subjects: Sequence[Subject]) -> list[Row]:
    """The settings that are not the same everywhere, in the order of CLASSES.

    Where one was imported there are no settings of a training to hold against each other, so only the model's are.
    """
    trees = [_flat(to_plain(subject.settings)) for subject in subjects]
    if any(isinstance(subject.settings, ImportedConfig) for subject in subjects):
        trees = [{name: value for name, value in tree.items() if name.startswith("model.")} for tree in trees]
    rows = []
    for name in dict.fromkeys(name for tree in trees for name in tree):
        values = [tree.get(name, NOTHING) for tree in trees]
        if any(value != values[0] for value in values):
            told = tuple(value if isinstance(value, str) else _text(value) for value in values)
            rows.append(Row(name=name, values=told, kind=class_of(name.partition("[")[0])))
    return sorted(rows, key=lambda row: CLASSES.index(row.kind))


def _flat(tree: Any) -> dict[str, Any]:
    """Dotted name -> leaf, the entries of a list of mappings by their number: data.sources[0].path."""
    found: dict[str, Any] = {}
    for name, value in leaves(tree).items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            for number, item in enumerate(value):
                found |= leaves(item, f"{name}[{number}]")
        else:
            found[name] = value
    return found


def _text(value: Any) -> str:
    """As one would write it on the command line, whole: what differs may be at the end."""
    return shown(value) if value is None or isinstance(value, bool) else str(value)


def origin_differences(subjects: Sequence[Subject]) -> tuple[list[Row], list[str]]:
    """(what else differs: data, tokenizer, commit, versions; names of what was looked at and is the same)."""
    columns = [_origins(subject) for subject in subjects]
    rows, same = [], []
    for name in dict.fromkeys(name for column in columns for name in column):
        values = tuple(column.get(name) or "unknown" for column in columns)
        if len(set(values)) > 1:
            rows.append(Row(name=name, values=values))
        elif values[0] != "unknown":
            same.append(name)
    return rows, same


def _origins(subject: Subject) -> dict[str, str | None]:
    record, settings = subject.record, subject.settings
    commit = record.get("git_commit")
    fingerprint, tokenizer = subject.data_fingerprint, subject.tokenizer_hash
    created = record.get("created")
    found = {
        "data fingerprint": fingerprint and fingerprint[:16],
        "tokenizer": tokenizer and tokenizer[:16],
        "git commit": commit and commit[:12] + ("-dirty" if str(commit).endswith("-dirty") else ""),
        "begun": None if created is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(created)),
    }
    if isinstance(settings, ImportedConfig):
        found["imported from"] = settings.origin.source
    return found | {str(name): str(version) for name, version in dict(record.get("versions") or {}).items()}
