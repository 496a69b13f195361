"""Random labels, probabilities and texts for the tests of scores, and one tally of each kind over them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from train.scores.answers import answers
from train.scores.calibration import calibration
from train.scores.classification import classification
from train.scores.language import language
from train.scores.ranking import roc_auc
from train.scores.rouge import rouge
from train.scores.tally import Tally, Together
from train.scores.translation import translation, translation_figures

SENTENCES = {
    "en": "The quick brown fox didn't jump over 3.14 lazy dogs, or did it? Nobody knows. The end of it all",
    "zh": "敏捷的棕色狐狸跳过了懒狗。没有人知道为什么！第2章到此结束",
    "ru": "Быстрая лиса не перепрыгнула через ленивую собаку. Никто не знает почему! Конец главы",
    "ja": "すばやい茶色のキツネがラーメンを食べる。だれも知らない！東京タワーの下で終わり",
    "hi": "तेज़ भूरी लोमड़ी आलसी कुत्ते के ऊपर कूदती है। कोई नहीं जानता क्यों। कहानी समाप्त",
    "th": "สุนัขจิ้งจอกสีน้ำตาลกระโดดข้ามสุนัขขี้เกียจ ไม่มีใครรู้ว่าทำไม",
    "ar": "الثعلب البني السريع يقفز فوق الكلب الكسول. لا أحد يعرف لماذا؟ النهاية",
}


@dataclass(frozen=True, kw_only=True)
class Classified:
    """A random classification; probabilities lean towards the truth."""

    labels: tuple[str, ...]
    truths_N: np.ndarray
    probabilities_NC: np.ndarray

    @property
    def truths(self) -> list[str]:
        return [self.labels[place] for place in self.truths_N]

    @property
    def predicted_N(self) -> np.ndarray:
        return self.probabilities_NC.argmax(axis=1)

    @property
    def predictions(self) -> list[str]:
        return [self.labels[place] for place in self.predicted_N]

    def at(self, places: np.ndarray) -> Classified:
        """The examples at these places."""
        return replace(self, truths_N=self.truths_N[places], probabilities_NC=self.probabilities_NC[places])


def classified(seed: int, *, num_examples: int, num_labels: int) -> Classified:
    """Probabilities of two places, so that some are equal."""
    generator = np.random.default_rng(seed)
    truths_N = generator.integers(num_labels, size=num_examples)
    scores_NC = generator.random((num_examples, num_labels))
    scores_NC[np.arange(num_examples), truths_N] += 0.4
    probabilities_NC = np.floor(scores_NC / scores_NC.sum(axis=1, keepdims=True) * 100) / 100
    probabilities_NC[:, -1] = 1 - probabilities_NC[:, :-1].sum(axis=1)
    labels = tuple("abcdefghij"[:num_labels])
    return Classified(labels=labels, truths_N=truths_N, probabilities_NC=probabilities_NC)


@dataclass(frozen=True, kw_only=True)
class Rare:
    """The sum of the second statistic, defined only where that of the first is one of `where`."""

    where: tuple[float, ...]

    def __call__(self, sums_RK: np.ndarray) -> dict[str, np.ndarray]:
        return {"rare": np.where(np.isin(sums_RK[:, 0], self.where), sums_RK[:, 1], np.nan)}

    def undefined(self, name: str, sums_K: np.ndarray) -> str:
        return "it is rare"


def texts(seed: int, *, num_examples: int, language: str = "en", empty: float = 0.0) -> tuple[list[str], list[str]]:
    """Outputs and references: parts of one text, and what is left of them after some words have moved or gone."""
    generator = np.random.default_rng(seed)
    text = SENTENCES[language]
    units = text.split() if " " in text and language != "th" else list(text)
    blank = " " if " " in text and language != "th" else ""
    outputs, references = [], []
    for _ in range(num_examples):
        start = generator.integers(len(units) // 2)
        length = generator.integers(4, len(units) // 2)
        reference = units[start : start + length]
        output = [unit for unit in reference if generator.random() > 0.2]
        if generator.random() < 0.5:
            output = output[len(output) // 2 :] + output[: len(output) // 2]
        outputs.append("" if generator.random() < empty else blank.join(output))
        references.append("" if generator.random() < empty else blank.join(reference))
    return outputs, references


def every_tally(places: np.ndarray, *, seed: int = 0) -> Tally:
    """All figures there are, of examples out of 40. seed: another model on the same data."""
    case = classified(seed, num_examples=40, num_labels=3).at(places)
    two = classified(seed, num_examples=40, num_labels=2).at(places)
    generator = np.random.default_rng(seed)
    losses, targets = generator.random(40) * 50, generator.integers(1, 60, size=40)
    outputs, references = texts(seed, num_examples=40)
    outputs = [outputs[place] for place in places]
    several = [(references[place], references[place - 1]) for place in places]
    ways = [translation_figures(name) for name in ("bleu", "chrf", "chrf++", "ter")]
    truths = [() if place % 4 == 0 else several[number] for number, place in enumerate(places)]
    return Together(
        parts=(
            Together(
                parts=(
                    classification(case.labels, case.truths, case.predictions),
                    calibration(case.truths_N, case.probabilities_NC, bins=5),
                )
            ),
            roc_auc(two.labels, two.truths_N, two.probabilities_NC),
            language(losses[places], targets[places], 4 * targets[places]),
            *(translation(way, outputs, several) for way in ways),
            rouge(outputs, several),
            answers(outputs, truths),
        )
    )
