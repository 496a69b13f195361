"""Which figures an evaluation has: from its examples and settings to tallies, curves, signatures and figures of one example."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from conf.errors import UserError
from train.scores.answers import answer_scores, answers
from train.scores.calibration import calibration, probability_rows, reliability
from train.scores.classification import classification, label_places
from train.scores.language import language
from train.scores.ranking import roc_auc
from train.scores.record import Example, Kind
from train.scores.rouge import rouge, rouge_scores
from train.scores.settings import ScoreSettings
from train.scores.tally import Tally, Together
from train.scores.translation import sentence_figure, signature, translation


def check_libraries(settings: ScoreSettings) -> None:
    """Raises UserError where a metric needs what is not installed: before the model has written for hours."""
    for figures in settings.translations:
        figures.scorer()


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


def signatures(kind: Kind, examples: Sequence[Example], settings: ScoreSettings) -> dict[str, str]:
    """Figure -> how exactly it was computed; of a generation, for those that can be computed in more than one way."""
    if kind != "generation":
        return {}
    references = [example.truths for example in examples]
    found = {figures.name: signature(figures, references) for figures in settings.translations}
    if "rouge" in settings.metrics:
        found["rouge"] = f"words:unicode|stem:{'porter' if settings.stem else 'no'}|references:best|split:lines-or-sentences"
    if "answers" in settings.metrics:
        found["exact_match"] = found["f1"] = f"normalization:{settings.answer_normalization}|truths:best"
    return found


def example_scores(kind: Kind, example: Example, settings: ScoreSettings) -> dict[str, float]:
    """Figures of one example alone, for examples.jsonl; their mean need not be the figure of the corpus.

    language: loss in nats per target. classification: correct, 1 or 0. generation: sentence_bleu, sentence_chrf, ...;
    rouge1, ...; exact_match and f1; loss where there is one. What is undefined is left out.
    """
    if kind == "language":
        return _loss_per_target(example, _loss(example))
    if kind == "classification":
        return {"correct": float(example.output == _truth(example))}
    scores = {} if example.loss is None else _loss_per_target(example, example.loss)
    for figures in settings.translations:
        scores |= sentence_figure(figures, example.output, example.truths)
    if "rouge" in settings.metrics and example.truths:
        scores |= rouge_scores(example.output, example.truths, stem=settings.stem)
    if "answers" in settings.metrics:
        scores |= answer_scores(example.output, example.truths, normalization=settings.answer_normalization)
    return scores


def _loss_per_target(example: Example, loss: float) -> dict[str, float]:
    return {"loss": loss / example.target_tokens} if example.target_tokens and math.isfinite(loss) else {}


def _places_by_source(examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """Source -> places of its examples; nothing where all are of one. Examples of no named source are in none of these."""
    places: dict[str, list[int]] = {}
    for place, example in enumerate(examples):
        places.setdefault(example.source, []).append(place)
    return {source: np.array(found) for source, found in places.items() if source} if len(places) > 1 else {}


def _parts(kind: Kind, examples: Sequence[Example], settings: ScoreSettings) -> list[Tally]:
    if not examples:
        raise UserError("there is no example to score: figures need at least one; give data that has some")
    if kind == "language":
        return [_language(examples)]
    if kind == "classification":
        return _classification(examples, settings)
    if kind == "generation":
        return _generation(examples, settings)
    raise UserError(f"kind={kind}: its figures are made elsewhere; language, classification and generation are scored here")


def _language(examples: Sequence[Example], *, lacking: bool = False) -> Tally:
    """`lacking`: an example may have no loss, such as a question without an answer; it adds nothing."""
    there = [not lacking or example.loss is not None for example in examples]
    losses = [_loss(item) if is_there else 0.0 for item, is_there in zip(examples, there, strict=True)]
    tokens = [item.target_tokens if is_there else 0 for item, is_there in zip(examples, there, strict=True)]
    return language(
        losses, tokens, [item.target_bytes if is_there else 0 for item, is_there in zip(examples, there, strict=True)]
    )


def _classification(examples: Sequence[Example], settings: ScoreSettings) -> list[Tally]:
    labels, truths = _labels(examples, settings), [_truth(example) for example in examples]
    outputs, ids = [example.output for example in examples], [example.id for example in examples]
    parts: list[Tally] = [classification(labels, truths, outputs, ids=ids, positive=settings.positive)]
    if _have_probabilities(examples):
        _, truths_N, probabilities_NC = _probabilities(examples, settings)
        parts.append(roc_auc(labels, truths_N, probabilities_NC, positive=settings.positive))
        parts.append(calibration(truths_N, probabilities_NC, bins=settings.bins))
    return parts


def _generation(examples: Sequence[Example], settings: ScoreSettings) -> list[Tally]:
    outputs, truths = [example.output for example in examples], [example.truths for example in examples]
    ids = [example.id for example in examples]
    parts: list[Tally] = [translation(figures, outputs, truths, ids=ids) for figures in settings.translations]
    if "rouge" in settings.metrics:
        parts.append(rouge(outputs, truths, stem=settings.stem, ids=ids))
    if "answers" in settings.metrics:
        parts.append(answers(outputs, truths, normalization=settings.answer_normalization))
    if any(example.loss is not None for example in examples):
        parts.append(_language(examples, lacking=True))
    if not parts:
        raise UserError("metrics=[]: examples without loss need at least one metric, such as chrf; choose what to score")
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
