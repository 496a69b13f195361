"""How examples are scored: the settings of all kinds of evaluation, and their checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from conf.errors import UserError
from train.scores.answers import Normalization
from train.scores.classification import positive_label
from train.scores.translation import TranslationFigures, TranslationName, translation_figures
from train.scores.words import language_code

MetricName = TranslationName | Literal["rouge", "answers"]
METRICS: tuple[str, ...] = (*get_args(TranslationName), "rouge", "answers")


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """How examples are scored; each kind of evaluation reads the fields that concern it."""

    labels: tuple[str, ...] | None = None
    """Of a classification: all labels in their order; None: those of the first probabilities, or the truths as they come."""
    positive: str | None = None
    """Of a classification: the label that is looked for; None: of two labels the second."""
    bins: int = 15
    """Of a classification with probabilities: bins of confidence."""
    metrics: tuple[MetricName, ...] = ()
    """Of a generation: what is scored; (): only the likelihood of the examples that have one."""
    language: str | None = None
    """Of a generation: language of the outputs, such as zh; chooses tokenize and normalization. None: one with blanks."""
    tokenize: str | None = None
    """BLEU's tokenizer, one of sacrebleu's; None: by the language."""
    normalization: Normalization | None = None
    """Of answers; None: characters in Chinese and Japanese, otherwise squad."""
    stem: bool = False
    """Whether ROUGE compares stems of English words."""

    def __post_init__(self) -> None:
        if self.labels is not None:
            if not self.labels or len(set(self.labels)) < len(self.labels):
                raise UserError(f"labels={list(self.labels)}: must be at least one, all different; name each label once")
            positive_label(self.labels, self.positive)
        if self.bins < 1:
            raise UserError(f"bins={self.bins}: a reliability curve needs at least 1; 15 is usual")
        if unknown := [name for name in self.metrics if name not in METRICS]:
            raise UserError(f"metrics: {unknown[0]!r} is none; choose from {', '.join(METRICS)}")
        if len(set(self.metrics)) < len(self.metrics):
            raise UserError(f"metrics={list(self.metrics)}: must differ; name each once")
        if self.normalization not in (None, *get_args(Normalization)):
            choices = " or ".join(get_args(Normalization))
            raise UserError(f"normalization={self.normalization!r}: must be {choices}; leave it out to go by the language")
        if self.stem and language_code(self.language) not in ("", "en"):
            raise UserError(f"stem=true needs English, got language={self.language}; use stem=false")
        # Made for its checks: the tokenizer, and the language's words.
        for name in ("bleu", *self.metrics):
            if name in get_args(TranslationName):
                translation_figures(name, language=self.language, tokenize=self.tokenize)

    @property
    def answer_normalization(self) -> Normalization:
        """`normalization`, or the one of the language."""
        return self.normalization or ("characters" if language_code(self.language) in ("zh", "ja") else "squad")

    @property
    def translations(self) -> tuple[TranslationFigures, ...]:
        """The metrics that are sacrebleu's."""
        chosen = (name for name in self.metrics if name in get_args(TranslationName))
        return tuple(translation_figures(name, language=self.language, tokenize=self.tokenize) for name in chosen)
