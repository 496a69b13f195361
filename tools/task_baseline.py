"""`longhaul task-baseline`: what simple means reach on a task's held-out rows, so that a fine-tuned model's figures mean
something. They read the rows that the model reads, and are scored as it is.

classification  majority  the commonest label of the training rows, always
                tfidf     logistic regression on TF-IDF of words and pairs of words; of some strengths of its penalty the one
                          that is best on a held-back tenth of the training rows
generation      frequent  the commonest answer of the training rows, always
                copied    the first line of a column, `copy`, names in it written as words (get_file_size -> get file size)
                nearest   the answer of the training row whose prompt is most alike by TF-IDF
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from conf.errors import ConfigError, UserError
from data_pipeline.io import write_json
from data_pipeline.records import BadRow
from data_pipeline.task_config import TaskConfig, TaskSource
from data_pipeline.tasks import Row, hash_of, labelled_rows
from train.evaluate.checks import score_settings
from train.scores.intervals import measure
from train.scores.record import Example, Kind, Score
from train.scores.sheet import tallies

HELD_BACK = 10  # every so-manieth training row is set aside to choose the strength of the penalty
STRENGTHS = (1.0, 10.0, 100.0)  # of scikit-learn's C, the inverse of the penalty
CHUNK_ROWS = 256  # of a product with all training rows
SHOWN = {
    "classification": ("accuracy", "f1_macro", "mcc"),
    "generation": ("rouge1", "rouge2", "rougeL", "exact_match", "f1", "bleu", "chrf", "ter"),
}


@dataclass(frozen=True, kw_only=True)
class TaskBaselineConfig:
    task: TaskConfig = field(default_factory=TaskConfig)
    """As for finetune: `data` are the rows to learn from, `validation` those that are scored."""
    copy: str | None = None
    """generation: column whose first line is one of the answers tried; null: none is."""
    resamples: int = 1000
    """Resamples of the scored rows that the confidence intervals are taken from; 0: no intervals."""
    confidence: float = 0.95
    """Share of such intervals that hold the true figure."""
    seed: int = 0
    """Seed of the resamples."""
    out: str | None = None
    """JSON file for all figures; null: none is written."""

    def __post_init__(self) -> None:
        problems = []
        if self.task.kind not in ("classification", "generation"):
            problems.append(f"task.kind={self.task.kind}: has no simple means here; choose classification or generation")
        elif not self.task.validation:
            problems.append("task.validation=[]: needs the rows to score; give 'task.validation=[{path: dev.jsonl}]'")
        if self.task.kind == "generation" and not self.task.metrics:
            problems.append("task.metrics=[]: needs at least one of bleu, chrf, ter, rouge, answers")
        if self.copy is not None and (not self.copy or self.task.kind != "generation"):
            problems.append(f"copy={self.copy!r}: is a column for task.kind=generation; null copies none")
        if self.resamples < 0:
            problems.append(f"resamples={self.resamples}: must not be negative; 0 makes no intervals")
        if not 0 < self.confidence < 1:
            problems.append(f"confidence={self.confidence}: must lie between 0 and 1, such as 0.95")
        if self.seed < 0:
            problems.append(f"seed={self.seed}: must not be negative")
        if self.out == "":
            problems.append("out='': needs a file; null writes none")
        if problems:
            raise ConfigError(problems)


def run(config: TaskBaselineConfig) -> int:
    """Fit, score, print a line for each figure, and write them where that is asked for. Returns 0.

    Raises UserError for rows that cannot be read, and a file that cannot be written.
    """
    task = config.task
    train, scored = rows_of(task, task.data), rows_of(task, task.validation)
    outputs, facts = _label(train, scored) if task.kind == "classification" else _answer(config, train, scored)
    if task.kind == "classification":
        task = replace(task, labels=task.labels or tuple(sorted({row.truths[0] for row in train})))
        _check_labels(task, scored)
    kind: Kind = "classification" if task.kind == "classification" else "generation"
    settings = score_settings(replace(task, label_texts=()))
    how = {"resamples": config.resamples, "confidence": config.confidence, "seed": config.seed}
    scores = {name: measure(tallies(kind, _examples(scored, texts), settings)[""], **how) for name, texts in outputs.items()}
    decided = ", ".join(f"{key}: {value}" for key, value in facts.items())
    print(f"{len(train):,} rows to learn from, {len(scored):,} to score; {decided}", *_lines(kind, scores), sep="\n")
    if config.out is not None:
        _write(Path(config.out), config, facts, scores)
    return 0


def rows_of(task: TaskConfig, sources: Sequence[TaskSource]) -> list[Row]:
    """The rows of some sources. Raises UserError for one that cannot be read, or of which nothing comes."""
    rows = []
    for source in sources:
        for row in labelled_rows(task, source):
            if isinstance(row, BadRow):
                raise row
            rows.append(row)
    if not rows:
        raise UserError(f"{', '.join(source.path for source in sources)}: holds no row; give another file")
    return rows


def _check_labels(task: TaskConfig, scored: Sequence[Row]) -> None:
    unknown = sorted({row.truths[0] for row in scored} - set(task.labels))
    if unknown:
        raise UserError(f"task.validation: label {unknown[0]!r} is none of the training rows ({', '.join(task.labels[:20])})")


def _examples(rows: Sequence[Row], outputs: Sequence[str]) -> list[Example]:
    return [
        Example(id=row.id, source=row.source, truths=row.truths, output=output)
        for row, output in zip(rows, outputs, strict=True)
    ]


# --- labels

Found = tuple[dict[str, list[str]], dict[str, Any]]
"""Name of a means -> its answers; and what was decided on the way."""


def _label(train: Sequence[Row], scored: Sequence[Row]) -> Found:
    truths = [row.truths[0] for row in train]
    majority = commonest(truths)
    predicted, strength = tfidf_labels([row.prompt for row in train], truths, [row.prompt for row in scored])
    return {"majority": [majority] * len(scored), "tfidf": predicted}, {"majority": majority, "tfidf_c": strength}


def commonest(texts: Sequence[str]) -> str:
    """The text that is there most often; of several the first in the alphabet."""
    counts = Counter(texts)
    return min(counts, key=lambda text: (-counts[text], text))


def tfidf_labels(texts: Sequence[str], labels: Sequence[str], asked: Sequence[str]) -> tuple[list[str], float]:
    """Label of each of the texts asked for, and the strength that was chosen. Raises UserError for a single label."""
    from sklearn.linear_model import LogisticRegression

    if len(set(labels)) < 2:
        raise UserError(f"task.data: all rows have the label {labels[0]!r}; a classification needs two")

    def fitted(places: Sequence[int], strength: float) -> tuple[Any, Any]:
        vectorizer = _vectorizer()
        inputs = vectorizer.fit_transform([texts[place] for place in places])
        model = LogisticRegression(C=strength, max_iter=1000, tol=1e-3)  # as good as at 1e-4, in half the time
        return vectorizer, model.fit(inputs, [labels[place] for place in places])

    kept = [place for place in range(len(texts)) if place % HELD_BACK]
    back = [place for place in range(len(texts)) if not place % HELD_BACK]
    strength = STRENGTHS[1]
    if len({labels[place] for place in kept}) > 1:

        def hits(strength: float) -> int:
            vectorizer, model = fitted(kept, strength)
            predicted = model.predict(vectorizer.transform([texts[place] for place in back]))
            return sum(label == labels[place] for label, place in zip(predicted, back, strict=True))

        strength = max(STRENGTHS, key=hits)
    vectorizer, model = fitted(range(len(texts)), strength)
    return [str(label) for label in model.predict(vectorizer.transform(asked))], strength


def _vectorizer() -> Any:
    """Words of one sign count too: in source text they are names."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\w+")


# --- answers


def _answer(config: TaskBaselineConfig, train: Sequence[Row], scored: Sequence[Row]) -> Found:
    truths = [row.truths[0] if row.truths else config.task.no_answer for row in train]
    frequent = commonest(truths)
    outputs = {"frequent": [frequent] * len(scored)}
    if config.copy is not None:
        copied = rows_of(replace(config.task, prompt=f"{{{config.copy}}}"), config.task.validation)
        outputs["copied"] = [as_words(row.prompt) for row in copied]
    outputs["nearest"] = nearest([row.prompt for row in train], truths, [row.prompt for row in scored])
    return outputs, {"frequent": frequent}


def as_words(text: str) -> str:
    """The first line that is not blank, names in it as words: getFileSize and get_file_size -> get file size."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    parted = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", line).replace("_", " ")
    return " ".join(parted.split()).lower() if parted != line else line


def nearest(texts: Sequence[str], answers: Sequence[str], asked: Sequence[str]) -> list[str]:
    """For each text asked for the answer of the text that is most alike, by the cosine of TF-IDF; of several the first."""
    vectorizer = _vectorizer()
    known = vectorizer.fit_transform(texts).T.tocsr()
    found: list[str] = []
    for start in range(0, len(asked), CHUNK_ROWS):
        alike = vectorizer.transform(asked[start : start + CHUNK_ROWS]) @ known
        found += [answers[place] for place in np.asarray(alike.argmax(axis=1)).ravel()]
    return found


# --- what is left behind


def _lines(kind: Kind, scores: dict[str, dict[str, Score]]) -> list[str]:
    lines = [f"{'':<10} {'figure':<12} {'value':>7}  interval"]
    for name, figures in scores.items():
        for figure in SHOWN[kind]:
            score = figures.get(figure)
            if score is None:
                continue
            interval = "" if score.low is None else f"[{score.low:.4f}, {score.high:.4f}]"
            value = "-" if score.value is None else f"{score.value:.4f}"
            lines.append(f"{name:<10} {figure:<12} {value:>7}  {interval or score.undefined or ''}".rstrip())
    return lines


def _write(path: Path, config: TaskBaselineConfig, facts: dict[str, Any], scores: dict[str, dict[str, Score]]) -> None:
    sources = [(part, source) for part in ("data", "validation") for source in getattr(config.task, part)]
    report = {
        "task": config.task.name,
        "data": [
            {"part": part, "path": source.path, "hash": hash_of(source, format=config.task.format)} for part, source in sources
        ],
        "facts": facts,
        "scores": {name: {figure: asdict(score) for figure, score in of.items()} for name, of in scores.items()},
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, report)
    except OSError as error:
        raise UserError(f"out={path}: cannot be written ({error.strerror})") from None
