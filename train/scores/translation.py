"""BLEU, chrF and TER of a corpus, by sacrebleu. Owns the choice of its tokenizer by language.

The statistics of an example are those that sacrebleu's own tests of significance use, and the figure is what sacrebleu makes of
their sum: under weights of one exactly its corpus score. An empty output, and an empty reference among others, count as
sacrebleu counts them; where all references of a corpus are empty the figure is undefined (sacrebleu says 0, or 100 for TER).

Shapes: N examples, K statistics, R weightings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from conf.errors import UserError
from train.scores.tally import Additive
from train.scores.words import language_code

if TYPE_CHECKING:
    from sacrebleu.metrics.base import Metric

TranslationName = Literal["bleu", "chrf", "chrf++", "ter"]
NAMES: tuple[TranslationName, ...] = get_args(TranslationName)

# sacrebleu's others load a model from the internet, which the machines that train cannot reach.
TOKENIZERS = ("13a", "intl", "zh", "ja-mecab", "ko-mecab", "char", "none")
_TOKENIZER_OF = {"zh": "zh", "ja": "ja-mecab", "ko": "ko-mecab"} | dict.fromkeys(("th", "lo", "km", "my"), "char")
_EXTRA_OF = {"ja-mecab": "ja", "ko-mecab": "ko"}
# Where the statistics have the length of the references; 0 of it means that there was nothing to match.
_REFERENCE_LENGTH = 1


@dataclass(frozen=True, kw_only=True)
class TranslationFigures:
    """One figure, 0 to 100 (TER may be more), of sacrebleu's statistics. Equal where the figure is computed alike."""

    name: TranslationName
    tokenize: str = "13a"
    """BLEU's tokenizer."""
    unspaced: bool = False
    """Whether TER splits Chinese and Japanese into characters; without it a sentence is one word."""

    def __call__(self, sums_RK: np.ndarray) -> dict[str, np.ndarray]:
        """The figure of each sum [R]; nan where the references are empty."""
        compute = self.scorer()._compute_score_from_stats
        values = [compute(sums.tolist()).score if sums[_REFERENCE_LENGTH] > 0 else np.nan for sums in sums_RK]
        return {self.name: np.array(values)}

    def undefined(self, name: str, sums_K: np.ndarray) -> str:
        """There was nothing to match."""
        return "all references are empty"

    def scorer(self, *, of_a_sentence: bool = False) -> Metric:
        """sacrebleu's metric. Raises UserError where its tokenizer is not installed."""
        return _scorer(self, of_a_sentence)


@lru_cache(maxsize=16)
def _scorer(figures: TranslationFigures, of_a_sentence: bool) -> Metric:
    from sacrebleu.metrics import BLEU, CHRF, TER

    if figures.name == "ter":
        return TER(normalized=figures.unspaced, asian_support=figures.unspaced)
    if figures.name != "bleu":
        return CHRF(word_order=2 if figures.name == "chrf++" else 0)
    try:
        # A sentence has often no match of four words; orders that it does not reach are left out.
        return BLEU(tokenize=figures.tokenize, effective_order=of_a_sentence)
    except RuntimeError:
        raise UserError(
            f"tokenize={figures.tokenize}: its dictionary is not installed; pip install "
            f"'sacrebleu[{_EXTRA_OF[figures.tokenize]}]', or count characters with tokenize=char"
        ) from None


def tokenizer_for(language: str | None) -> str:
    """sacrebleu's tokenizer for BLEU in a language: zh, ja-mecab, ko-mecab; char for Thai, Lao, Khmer and Burmese, which put
    no blanks between words; otherwise 13a, the one of WMT. language: code such as zh, zh-CN, zho; None: 13a.
    """
    return _TOKENIZER_OF.get(language_code(language), "13a")


def translation_figures(
    name: TranslationName, *, language: str | None = None, tokenize: str | None = None
) -> TranslationFigures:
    """The figure that fits a language. tokenize: BLEU's tokenizer; None: `tokenizer_for` the language.

    Raises UserError for an unknown tokenizer, and for TER in a language whose words sacrebleu cannot tell.
    """
    if tokenize is not None and tokenize not in TOKENIZERS:
        raise UserError(f"tokenize={tokenize!r}: must be one of {', '.join(TOKENIZERS)}; leave it out to go by the language")
    if name == "bleu":
        return TranslationFigures(name=name, tokenize=tokenize or tokenizer_for(language))
    if name == "ter" and tokenizer_for(language) == "char":
        raise UserError(f"language={language}: ter would take whole sentences for words; use chrf, or bleu")
    return TranslationFigures(name=name, unspaced=name == "ter" and language_code(language) in ("zh", "ja"))


def translation(
    figures: TranslationFigures,
    outputs: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    ids: Sequence[str] | None = None,
) -> Additive:
    """Tally of one figure. references: those of each example, any number from one up.

    Raises UserError for an example without reference, and where the tokenizer is not installed.
    """
    if not all(references):
        number = next(number for number, given in enumerate(references) if not given)
        raise UserError(
            f"example {ids[number] if ids else number}: has no reference, {figures.name} needs at least one; mend the data, "
            "or choose other metrics"
        )
    streams = list(zip_longest(*references))  # filled up with None, which sacrebleu leaves out
    rows = figures.scorer()._extract_corpus_statistics(list(outputs), streams)
    return Additive(rows_NK=np.array(rows, dtype=np.float64), function=figures)


def signature(figures: TranslationFigures, references: Sequence[Sequence[str]]) -> str:
    """sacrebleu's signature: how the figure was computed, for whoever wants to compare with it."""
    scorer = figures.scorer()
    numbers = {len(given) for given in references}
    scorer.num_refs = numbers.pop() if len(numbers) == 1 else -1
    return str(scorer.get_signature())


def sentence_figure(figures: TranslationFigures, output: str, references: Sequence[str]) -> dict[str, float]:
    """sentence_bleu, sentence_chrf, ... of one example; nothing where it has no reference."""
    if not references:
        return {}
    scorer = figures.scorer(of_a_sentence=True)
    return {f"sentence_{figures.name}": scorer.sentence_score(output, list(references)).score}
