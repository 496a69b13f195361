"""Exact match and F1 against the definitions of SQuAD 1.1 and 2.0, written out here once more, and in Chinese and Japanese."""

from __future__ import annotations

import math
import random

import pytest

from train.scores.answers import answer_scores, answers
from train.scores.intervals import measure
from train.scores.tally import plain_figures

PUNCTUATION = set("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
WORDS = ["The", "cat", "a", "an", "Theatre", "the", "U.S.", "state-of-the-art", "ran", "10", "$5", "é", "été", "...", "cat's"]


def _normal(text: str) -> str:
    """SQuAD: lower case, without punctuation, without articles as whole words, single blanks; word by word."""
    bare = "".join(character for character in text.lower() if character not in PUNCTUATION)
    return " ".join(word for word in bare.split() if word not in ("a", "an", "the"))


def _f1(output: str, truth: str, *, version: int) -> float:
    words, expected = _normal(output).split(), _normal(truth).split()
    if version == 2 and (not words or not expected):
        return float(words == expected)
    left, shared = list(expected), 0
    for word in words:
        if word in left:
            left.remove(word)
            shared += 1
    if not shared:
        return 0.0
    precision, recall = shared / len(words), shared / len(expected)
    return 2 * precision * recall / (precision + recall)


def _squad(output: str, truths: list[str], *, version: int) -> tuple[float, float]:
    if version == 2:
        truths = [truth for truth in truths if _normal(truth)] or [""]
    matches = [float(_normal(output) == _normal(truth)) for truth in truths]
    return max(matches), max(_f1(output, truth, version=version) for truth in truths)


def _case(seed: int, *, no_answer: float) -> tuple[list[str], list[list[str]]]:
    generator = random.Random(seed)

    def text() -> str:
        return " ".join(generator.choice(WORDS) for _ in range(generator.randint(0, 4)))

    outputs = [text() for _ in range(200)]
    truths = [[] if generator.random() < no_answer else [text() for _ in range(generator.randint(1, 3))] for _ in outputs]
    for place, given in enumerate(truths):
        if given and generator.random() < 0.3:
            outputs[place] = generator.choice(given)
    return outputs, truths


def test_squad_2() -> None:
    outputs, truths = _case(0, no_answer=0.3)
    expected = [_squad(output, given, version=2) for output, given in zip(outputs, truths, strict=True)]
    for output, given, (match, f1) in zip(outputs, truths, expected, strict=True):
        assert answer_scores(output, given) == {"exact_match": match, "f1": pytest.approx(f1, abs=1e-12)}, (output, given)
    figures = plain_figures(answers(outputs, truths))
    # An answer is whatever the data gives one for; "..." normalises to nothing and is one, "" is none.
    groups = {"": [True] * 200, "HasAns_": [any(given) for given in truths], "NoAns_": [not any(given) for given in truths]}
    for prefix, members in groups.items():
        chosen = [scores for scores, is_member in zip(expected, members, strict=True) if is_member]
        for place, name in enumerate(("exact_match", "f1")):
            mean = math.fsum(scores[place] for scores in chosen) / len(chosen)
            assert figures[prefix + name] == pytest.approx(mean, abs=1e-12)
    assert len(figures) == 6


def test_squad_1() -> None:
    """The same but for texts that normalise to nothing, which 1.1 never has among its answers."""
    outputs, truths = _case(1, no_answer=0.0)
    pairs = [(out, given) for out, given in zip(outputs, truths, strict=True) if _normal(out) and all(map(_normal, given))]
    assert len(pairs) > 80
    expected = [_squad(output, given, version=1) for output, given in pairs]
    figures = plain_figures(answers([output for output, _ in pairs], [given for _, given in pairs]))
    assert set(figures) == {"exact_match", "f1"}, "no split where every question has an answer"
    assert figures["exact_match"] == pytest.approx(sum(match for match, _ in expected) / len(pairs), abs=1e-12)
    assert figures["f1"] == pytest.approx(math.fsum(f1 for _, f1 in expected) / len(pairs), abs=1e-12)


@pytest.mark.parametrize(
    ("output", "truths", "exact_match", "f1"),
    [
        ("the Cat!", ["cat"], 1, 1),
        ("black cat", ["cat", "a black cat sat"], 0, 0.8),
        ("cat cat", ["cat"], 0, 2 / 3),
        ("", [], 1, 1),
        ("the", [], 1, 1),
        ("cat", [], 0, 0),
        ("", ["cat"], 0, 0),
        ("", ["", ""], 1, 1),
        ("", ["the", "cat"], 0, 0),
        ("an", ["the"], 1, 1),
        ("北京大学", ["北京"], 0, 0),
    ],
)
def test_squad_by_hand(output: str, truths: list[str], exact_match: int, f1: float) -> None:
    assert answer_scores(output, truths) == {"exact_match": exact_match, "f1": pytest.approx(f1)}


@pytest.mark.parametrize(
    ("output", "truths", "exact_match", "f1"),
    [
        ("北京大学。", ["北京 大学"], 1, 1),
        ("北京大学", ["北京"], 0, 2 / 3),
        ("「東京タワー」", ["東京タワー"], 1, 1),
        ("東京", ["京都", "東京都"], 0, 0.8),
        ("iPhone 15", ["iphone15手机", "iphone 15 手机"], 0, 2 * 2 / (2 + 4)),
        ("！", [], 1, 1),
        ("", ["北"], 0, 0),
        ("the 北", ["北"], 0, 2 / 3),
        ("Москва!", ["москва"], 1, 1),
    ],
)
def test_characters_by_hand(output: str, truths: list[str], exact_match: int, f1: float) -> None:
    scores = answer_scores(output, truths, normalization="characters")
    assert scores == {"exact_match": exact_match, "f1": pytest.approx(f1)}


def test_a_split_without_members_is_undefined() -> None:
    scores = measure(answers(["", "x"], [[], [""]]), resamples=10)
    assert scores["NoAns_f1"].value == 0.5 and scores["HasAns_f1"].undefined == "no example has an answer"
    part = answers(["", "x"], [[], ["x"]])
    assert part.function.undefined("NoAns_f1", part.sums([[0.0, 1.0]])[0]) == "every example has an answer"
