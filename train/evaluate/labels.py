"""Labelled rows under a model that tells labels apart: what it reads of each, and the label that it finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from conf.errors import UserError
from data_pipeline.tasks import Row
from train.evaluate.engines import Engines
from train.inference.classify import Ids
from train.inference.text_model import TextModel
from train.scores.record import Example


def inputs_of(rows: Sequence[Row], text: TextModel, *, length: int) -> list[list[int]]:
    """What the model reads of each row, `length` tokens at most; of one that is too long the end.

    Raises UserError for a row without text.
    """
    room = length - len(text.opening)
    found = text.tokenizer.encode_all([row.prompt for row in rows])
    for row, ids in zip(rows, found, strict=True):
        if not row.prompt.strip() or not ids:
            raise UserError(f"{row.id}: its text is empty, so it has no label to tell; leave the row out")
    return [[*text.opening, *ids[-room:]] for ids in found]


def tell_labels(
    rows: Sequence[Row], inputs: Sequence[Ids], engines: Engines, *, progress: Callable[[int], None]
) -> list[Example]:
    """The label of each row, with the probabilities of all; all ranks together."""
    found = engines.classifier.classify(inputs, progress=progress)
    labels = engines.text.model.labels
    return [
        _example(row, ids, np.array(scores, dtype=np.float64), labels)
        for row, ids, scores in zip(rows, inputs, found, strict=True)
    ]


def _example(row: Row, ids: Ids, log_probability_N: np.ndarray, labels: Sequence[str]) -> Example:
    probability_N = np.exp(log_probability_N)
    return Example(
        id=row.id,
        source=row.source,
        input=row.prompt,
        truths=row.truths,
        output=labels[int(log_probability_N.argmax())],
        probabilities=dict(zip(labels, (probability_N / probability_N.sum()).tolist(), strict=True)),
        loss=float(-log_probability_N[labels.index(row.truths[0])]),
        input_tokens=len(ids),
        target_tokens=1,
        target_bytes=0,
    )
