"""ROUGE against rouge_score on ASCII text, on text of other scripts, and what is empty."""

from __future__ import annotations

import random
import string

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from conf.errors import UserError
from tests.unit.scores.cases import SENTENCES, texts
from train.scores.intervals import measure
from train.scores.rouge import NAMES, rouge, rouge_scores
from train.scores.tally import plain_figures

TYPES = ["rouge1", "rouge2", "rougeL", "rougeLsum"]


def _theirs(output: str, references: list[str], *, stem: bool = False) -> dict[str, float]:
    best = RougeScorer(TYPES, use_stemmer=stem).score_multi(references, output)
    pairs = (("", "fmeasure"), ("_precision", "precision"), ("_recall", "recall"))
    return {f"{kind}{suffix}": getattr(best[kind], field) for kind in TYPES for suffix, field in pairs}


def _ascii_text(generator: random.Random) -> str:
    """Lines of words that repeat, with stems, digits, underscores and punctuation of all sorts."""
    vocabulary = ["running", "runs", "Cats", "cat's", "x_1", "3.14", "flies", "DIED", "an", "relational", "agreed", "a-b"]
    lines = []
    for _ in range(generator.randint(2, 4)):
        words = (generator.choice(vocabulary) + generator.choice(["", "", *string.punctuation]) for _ in range(8))
        lines.append(" ".join(words))
    return "\n".join(lines)


@pytest.mark.parametrize("stem", [False, True])
def test_ascii_figures_are_rouge_scores_own(stem: bool) -> None:
    generator = random.Random(0)
    outputs = [_ascii_text(generator) for _ in range(25)]
    references = [[_ascii_text(generator) for _ in range(generator.randint(1, 3))] for _ in outputs]
    expected = [_theirs(output, given, stem=stem) for output, given in zip(outputs, references, strict=True)]
    for output, given, scores in zip(outputs, references, expected, strict=True):
        assert rouge_scores(output, given, stem=stem) == scores
    figures = plain_figures(rouge(outputs, references, stem=stem))
    assert figures == pytest.approx({name: np.mean([scores[name] for scores in expected]) for name in NAMES}, abs=1e-12)


def test_stemming_matters_and_leaves_other_scripts_alone() -> None:
    assert rouge_scores("he runs", ["he running"], stem=True)["rouge1"] == 1.0
    assert rouge_scores("he runs", ["he running"])["rouge1"] == 0.5
    assert rouge_scores("кошки", ["кошками"], stem=True)["rouge1"] == 0.0
    assert rouge_scores("кошки", ["кошки"], stem=True)["rouge1"] == 1.0
    assert rouge_scores("naïves runs", ["naïves run"], stem=True)["rouge1"] == 1.0


@pytest.mark.parametrize("language", sorted(SENTENCES))
def test_the_same_text_scores_1_in_every_script(language: str) -> None:
    text = SENTENCES[language]
    assert rouge_scores(text, [text]) == dict.fromkeys(NAMES, 1.0)
    outputs, references = texts(0, num_examples=10, language=language)
    figures = plain_figures(rouge(outputs, [[text] for text in references]))
    assert all(0.2 < figures[name] < 1 for name in TYPES)


def test_chinese_by_hand() -> None:
    """Characters: 4 of 5 found, 4 of 4 right; pairs 2 of 4 and 2 of 3."""
    scores = rouge_scores("我爱北京！", ["我很爱北京。"])
    assert (scores["rouge1_recall"], scores["rouge1_precision"]) == (4 / 5, 1.0)
    assert (scores["rouge2_recall"], scores["rouge2_precision"]) == (2 / 4, 2 / 3)
    assert scores["rougeL"] == pytest.approx(2 * 0.8 / 1.8)


def test_text_of_one_line_is_split_into_sentences_for_lsum() -> None:
    """rouge_score takes it for one sentence; lm-eval and others split before they call it."""
    output, reference = "The dog ran. The cat sat down.", "The cat sat. The dog ran off. Nobody cared"
    by_hand = _theirs("The dog ran.\nThe cat sat down.", ["The cat sat.\nThe dog ran off.\nNobody cared"])
    scores = rouge_scores(output, [reference])
    assert scores == by_hand
    assert scores["rougeLsum"] > scores["rougeL"]
    chinese = rouge_scores("狗跑了。猫坐下了。", ["猫坐下了！狗跑了！"])
    assert chinese["rougeLsum"] == 1.0 > chinese["rougeL"]


def test_the_best_reference_counts_for_each_figure() -> None:
    """One shares more words, the other a longer sequence."""
    references = ["d c b a e", "a b c x y"]
    scores, each = rouge_scores("a b c d e", references), [rouge_scores("a b c d e", [given]) for given in references]
    assert scores["rouge1"] == each[0]["rouge1"] == 1.0 > each[1]["rouge1"]
    assert scores["rougeL"] == each[1]["rougeL"] == 0.6 > each[0]["rougeL"]


def test_precision_and_recall_are_of_the_reference_with_the_best_f1() -> None:
    scores = rouge_scores("a b", ["a", "a b c d e f g h"])
    assert (scores["rouge1_precision"], scores["rouge1_recall"]) == (0.5, 1.0), "not the precision of 1 of the other"


def test_empty_texts() -> None:
    """0, as rouge_score has it, unless there is no reference with a word in the whole corpus."""
    nothing = dict.fromkeys(NAMES, 0.0)
    for output, reference in (("", "a cat"), ("a", ""), ("", ""), ("!", "?")):
        assert rouge_scores(output, [reference]) == _theirs(output, [reference]) == nothing
    assert plain_figures(rouge(["a", "", "b"], [["a"], ["a"], [""]]))["rouge1"] == pytest.approx(1 / 3)
    for score in measure(rouge(["a", ""], [["", "..."], [""]]), resamples=10).values():
        assert score.value is None and score.undefined == "all references are empty"
    assert plain_figures(rouge(["a"], [["", "a"]]))["rouge1"] == 1.0, "one reference with words is enough"


def test_no_reference_at_all() -> None:
    with pytest.raises(UserError, match="example b7: has no reference, rouge needs at least one"):
        rouge(["a", "b"], [["a"], []], ids=["b6", "b7"])
    with pytest.raises(UserError, match="example 0: has no reference"):
        rouge(["a"], [[]])
