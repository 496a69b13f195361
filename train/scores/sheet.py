"""Which figures an evaluation has: from its examples and settings to tallies, curves, signatures and figures of one example."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from conf.errors import UserError
from train.scores.calibration import calibration, probability_rows, reliability
from train.scores.classification import classification, label_places, positive_label
from train.scores.language import language
from train.scores.ranking import roc_auc
from train.scores.record import Example, Kind
from train.scores.tally import Tally, Together


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """How examples are scored; each kind reads the fields that concern it."""

    labels: tuple[str, ...] | None = None
    """Of a classification: all labels in their order; None: those of the first example's probabilities, or of the truths."""
    positive: str | None = None
    """Of a classification: the label that is looked for; None: of two labels the second."""
    bins: int = 15
    """Of a classification with probabilities: bins of confidence."""

    def __post_init__(self) -> None:
        if self.labels is not None:
            if len(set(self.labels)) < max(1, len(self.labels)):
                raise UserError(f"labels={list(self.labels)}: must be at least one, all different; name each label once")
            positive_label(self.labels, self.positive)
        if self.bins < 1:
            raise UserError(f"bins={self.bins}: a reliability curve needs at least 1; 15 is usual")


def tallies(kind: Kind, examples: Sequence[Example], settings: ScoreSettings) -> dict[str, Tally]:
    """Tally of all figures of this kind of evaluation: under "" of all examples together, and where they are of several
    sources, of each source under its name. The reduction of figures, intervals and comparisons stand on these.

    Raises UserError for no example, and for one that lacks what its kind needs.
    """
    whole = Together(parts=tuple(_parts(kind, examples, settings)))
    places = _places_by_source(examples)
    return {"": whole} | {source: whole.selected(places_M) for source, places_M in places.items()}


def curves(kind: Kind, examples: Sequence[Example], settings: ScoreSettings) -> dict[str, list[dict[str, float]]]:
    """Of a classification with probabilities: reliability, and source/reliability where there are several sources."""
    if kind != "classification" or not _have_probabilities(examples):
        return {}
    labels, truths_N, probabilities_NC = _probabilities(examples, settings)
    found = {"reliability": reliability(truths_N, probabilities_NC, bins=settings.bins)}
    for source, places_M in _places_by_source(examples).items():
        points = reliability(truths_N[places_M], probabilities_NC[places_M], bins=settings.bins)
        found[f"{source}/reliability"] = points
    return found


def example_scores(kind: Kind, example: Example, settings: ScoreSettings) -> dict[str, float]:
    """Figures of one example alone, for examples.jsonl; their mean need not be the figure of the corpus.

    language: loss in nats per target. classification: correct, 1 or 0.
    """
    if kind == "language":
        is_defined = example.target_tokens > 0 and math.isfinite(_loss(example))
        return {"loss": _loss(example) / example.target_tokens} if is_defined else {}
    return {"correct": float(example.output == _truth(example))}


def _places_by_source(examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """Source -> places of its examples; nothing where all are of one."""
    places: dict[str, list[int]] = {}
    for place, example in enumerate(examples):
        places.setdefault(example.source, []).append(place)
    return {source: np.array(found) for source, found in places.items()} if len(places) > 1 else {}


def _parts(kind: Kind, examples: Sequence[Example], settings: ScoreSettings) -> list[Tally]:
    if not examples:
        raise UserError("there is no example to score: figures need at least one; give data that has some")
    if kind == "language":
        return [_language(examples)]
    return _classification(examples, settings)


def _language(examples: Sequence[Example]) -> Tally:
    losses = [_loss(example) for example in examples]
    return language(losses, [item.target_tokens for item in examples], [item.target_bytes for item in examples])


def _classification(examples: Sequence[Example], settings: ScoreSettings) -> list[Tally]:
    labels, truths = _labels(examples, settings), [_truth(example) for example in examples]
    outputs, ids = [example.output for example in examples], [example.id for example in examples]
    parts: list[Tally] = [classification(labels, truths, outputs, ids=ids, positive=settings.positive)]
    if _have_probabilities(examples):
        _, truths_N, probabilities_NC = _probabilities(examples, settings)
        parts.append(roc_auc(labels, truths_N, probabilities_NC, positive=settings.positive))
        parts.append(calibration(truths_N, probabilities_NC, bins=settings.bins))
    return parts


def _probabilities(examples: Sequence[Example], settings: ScoreSettings) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """Labels, places of the truths among them [N], and probabilities in their order [N, C]."""
    labels, ids = _labels(examples, settings), [example.id for example in examples]
    truths_N = label_places(labels, [_truth(example) for example in examples], ids=ids, what="truth")
    return labels, truths_N, probability_rows(labels, [example.probabilities or {} for example in examples], ids=ids)


def _have_probabilities(examples: Sequence[Example]) -> bool:
    """Whether any example has them; one that has none is then an error."""
    return any(example.probabilities is not None for example in examples)


def _labels(examples: Sequence[Example], settings: ScoreSettings) -> tuple[str, ...]:
    """All labels in their order: as set, as in the first probabilities, or as the truths come."""
    if settings.labels is not None:
        return settings.labels
    given = next((example.probabilities for example in examples if example.probabilities is not None), None)
    return tuple(given) if given else tuple(dict.fromkeys(_truth(example) for example in examples))


def _truth(example: Example) -> str:
    if len(example.truths) != 1:
        raise UserError(
            f"example {example.id}: {len(example.truths)} truths {list(example.truths)}; a classification has exactly one"
            " each; mend the data"
        )
    return example.truths[0]


def _loss(example: Example) -> float:
    if example.loss is None:
        raise UserError(f"example {example.id}: has no loss; figures of language need one for each; evaluate again")
    return example.loss
