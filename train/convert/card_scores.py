"""The scores in a model card: a table for a person, and the `model-index` that the Hugging Face hub reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from conf.compose import as_yaml
from train.checkpoint.manifest import MANIFEST, file_facts
from train.checkpoint.reader import CheckpointReader
from train.config.imported import ImportedConfig
from train.scores import selection
from train.scores.record import Evaluation, Score

TASKS = {"classification": "text-classification"}
"""Kind of evaluation -> the hub's name of the task; of the others it is text-generation."""
METRICS = {"mcc": "matthews_correlation", "bleu": "sacrebleu"}
"""Our figures that the hub knows under another name; the others are called as they are."""

MOST_NAMES = 4  # of data that are listed together


def evaluations_of(reader: CheckpointReader) -> list[Evaluation]:
    """The newest evaluation of each task and data that was made of this checkpoint, by name.

    Raises UserError for one that is damaged.
    """
    home = selection.home_of(reader.path, imported=isinstance(reader.settings, ImportedConfig))
    digest = file_facts(reader.path / MANIFEST).sha256
    found = selection.of_checkpoint(home, manifest_hash=digest, step=reader.step)
    return sorted(selection.newest_of_each(found), key=lambda evaluation: evaluation.name)


def score_lines(evaluations: Sequence[Evaluation]) -> list[str]:
    """Markdown: a table for each evaluation. Figures of single labels are left out; there can be hundreds."""
    if not evaluations:
        return ["It was not evaluated."]
    lines: list[str] = []
    for evaluation in evaluations:
        share = evaluation.config.get("confidence", 0.95)
        head = ["figure", "value", f"{100 * share:g} % interval", "data", "examples"]
        lines += ["", f"### {_escaped(_title(evaluation))}", ""] if lines else [f"### {_escaped(_title(evaluation))}", ""]
        lines += [f"| {' | '.join(head)} |", "|---|---|---|---|---|"]
        for name, score in _shown(evaluation).items():
            data, examples = _data_of(evaluation, name)
            cells = [_escaped(name), *_values(score), _escaped(data), f"{examples:,}"]
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", "Intervals are taken over the examples: by a bootstrap, or from lm-eval's standard error."]


def model_index(name: str, evaluations: Sequence[Evaluation]) -> list[str]:
    """Lines of the metadata; none without a figure.

    What the data are called on the hub is not known here, so their type is `unknown`; their hash is the revision.
    """
    results = [result for evaluation in evaluations for result in _results(evaluation)]
    return as_yaml({"model-index": [{"name": name, "results": results}]}).splitlines() if results else []


def _results(evaluation: Evaluation) -> list[dict[str, Any]]:
    """One for each data set."""
    by_data: dict[str, list[dict[str, Any]]] = {}
    for name, score in _shown(evaluation).items():
        if score.value is not None and math.isfinite(score.value):
            figure = name.rsplit("/", 1)[-1]
            metric = {"type": METRICS.get(figure, figure), "value": score.value, "name": figure}
            by_data.setdefault(_data_of(evaluation, name)[0], []).append(metric)
    hashes = {str(entry["name"]): str(entry["hash"]) for entry in evaluation.data}
    task = {"type": TASKS.get(evaluation.kind, "text-generation"), "name": _title(evaluation)}
    return [
        {
            "task": task,
            "dataset": {"name": data, "type": "unknown", "revision": hashes.get(data, evaluation.data_hash)},
            "metrics": metrics,
        }
        for data, metrics in by_data.items()
    ]


def _title(evaluation: Evaluation) -> str:
    limit = evaluation.config.get("limit")
    return evaluation.name if limit is None else f"{evaluation.name}, the first {limit} of each source"


def _shown(evaluation: Evaluation) -> dict[str, Score]:
    return {name: score for name, score in evaluation.scores.items() if "[" not in name}


def _data_of(evaluation: Evaluation, figure: str) -> tuple[str, int]:
    """Name of the data that a figure is of, and the number of their examples: all, or one source's where it is named."""
    source = figure.rpartition("/")[0]
    entries = [entry for entry in evaluation.data if entry["name"] == source] or evaluation.data
    names = ", ".join(str(entry["name"]) for entry in entries) if len(entries) <= MOST_NAMES else f"{len(entries)} data sets"
    return names, sum(int(entry.get("examples", 0)) for entry in entries)


def _values(score: Score) -> tuple[str, str]:
    if score.value is None:
        return "-", _escaped(score.undefined or "undefined")
    return _number(
        score.value
    ), "-" if score.low is None or score.high is None else f"{_number(score.low)} to {_number(score.high)}"


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4e}"


def _escaped(text: str) -> str:
    """One line that is neither a cell's end nor HTML."""
    plain = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return plain.replace("|", "\\|")
