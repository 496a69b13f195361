"""ROUGE of summaries by rouge_score, with words of any script: its own tokenizer knows a-z and 0-9 and drops all others.

A figure is the mean over examples. An empty output, and an empty reference, score 0, as rouge_score has it; where all
references of all examples are empty the figures are undefined.

Shapes: N examples, R weightings, K = 14 statistics: twelve scores, the number of examples, that of examples with a reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import numpy as np

from conf.errors import UserError
from train.scores.tally import Additive, ratio
from train.scores.words import sentences, words

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
NAMES = tuple(name for kind in _TYPES for name in (kind, f"{kind}_precision", f"{kind}_recall"))


@dataclass(frozen=True, kw_only=True)
class RougeFigures:
    """rouge1, rouge2, rougeL, rougeLsum (F1), and precision and recall of each, 0 to 1."""

    stem: bool
    """Not needed for the sums; with it unequal, figures are not of the same kind."""

    def __call__(self, sums_RK: np.ndarray) -> dict[str, np.ndarray]:
        """Means over the examples [R]; nan where no example has a reference."""
        count_R = np.where(sums_RK[:, -1] > 0, sums_RK[:, -2], 0)
        return {name: ratio(sums_RK[:, place], count_R) for place, name in enumerate(NAMES)}

    def undefined(self, name: str, sums_K: np.ndarray) -> str:
        """There was nothing to match."""
        return "all references are empty"


def rouge(
    outputs: Sequence[str], references: Sequence[Sequence[str]], *, stem: bool = False, ids: Sequence[str] | None = None
) -> Additive:
    """Tally of ROUGE-1, -2, -L and -Lsum (Lin, ROUGE: A Package for Automatic Evaluation of Summaries, 2004).

    references: those of each example, from one up; of each figure the one with the best F1 counts. stem: Porter stemming of
    English words. Lsum takes lines as sentences, and splits a text of one line behind its sentences' ends.
    Raises UserError for an example without reference.
    """
    rows_NK = np.empty((len(outputs), len(NAMES) + 2))
    for number, (output, given) in enumerate(zip(outputs, references, strict=True)):
        if not given:
            raise UserError(
                f"example {ids[number] if ids else number}: has no reference, rouge needs at least one; mend the data, or "
                "choose other metrics"
            )
        scores = rouge_scores(output, given, stem=stem)
        rows_NK[number] = [*(scores[name] for name in NAMES), 1, any(words(text) for text in given)]
    return Additive(rows_NK=rows_NK, function=RougeFigures(stem=stem))


def rouge_scores(output: str, references: Sequence[str], *, stem: bool = False) -> dict[str, float]:
    """All figures of one example: of each the reference with the best F1."""
    lines = ["\n".join(sentences(text)) for text in (output, *references)]
    best = _scorer(stem).score_multi(lines[1:], lines[0])
    values = [value for kind in _TYPES for value in (best[kind].fmeasure, best[kind].precision, best[kind].recall)]
    return dict(zip(NAMES, map(float, values), strict=True))


@cache
def _scorer(stem: bool) -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(_TYPES), tokenizer=_Words(stem=stem))


class _Words:
    """What rouge_score calls a tokenizer."""

    def __init__(self, *, stem: bool) -> None:
        self._stem = lru_cache(maxsize=100_000)(_porter()) if stem else None

    def tokenize(self, text: str) -> list[str]:
        """Words of the text, stemmed if asked to."""
        if self._stem is None:
            return words(text)
        return [stem for word in words(text) for stem in (self._stem(word) if word.isascii() else (word,))]


def _porter() -> Callable[[str], list[str]]:
    """rouge_score's own stemming, which leaves words of up to three letters alone; a word -> its stem, or nothing."""
    from rouge_score.tokenizers import DefaultTokenizer

    return DefaultTokenizer(use_stemmer=True).tokenize
