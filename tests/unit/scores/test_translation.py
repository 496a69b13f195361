"""BLEU, chrF and TER against sacrebleu and lm-eval, exactly; tokenizers by language; what is empty."""

from __future__ import annotations

from importlib.util import find_spec

import lm_eval.api.metrics as harness
import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF, TER

from conf.errors import UserError
from tests.unit.scores.cases import SENTENCES, texts
from train.scores.intervals import measure
from train.scores.tally import plain_figures
from train.scores.translation import (
    NAMES,
    TOKENIZERS,
    sentence_figure,
    signature,
    tokenizer_for,
    translation,
    translation_figures,
)

# Those that need no dictionary.
LANGUAGES = sorted(set(SENTENCES) - {"ja"})


def _theirs(name: str, language: str):
    """sacrebleu's metric, put together without our choices."""
    if name == "bleu":
        return BLEU(tokenize={"zh": "zh", "th": "char"}.get(language, "13a"))
    if name == "ter":
        return TER(normalized=True, asian_support=True) if language in ("zh", "ja") else TER()
    return CHRF(word_order=2 if name == "chrf++" else 0)


@pytest.mark.parametrize(
    ("name", "language"),
    [(name, language) for name in NAMES for language in LANGUAGES if (name, language) != ("ter", "th")],
)
def test_figures_are_sacrebleus_exactly(name: str, language: str) -> None:
    outputs, references = texts(0, num_examples=25, language=language, empty=0.1)
    theirs = _theirs(name, language)
    expected = theirs.corpus_score(outputs, [references]).score
    figures = translation_figures(name, language=language)
    tally = translation(figures, outputs, [[text] for text in references])
    assert plain_figures(tally) == {name: expected}
    assert 5 < expected < 95, "a figure at its end would prove little"
    assert signature(figures, [[text] for text in references]) == str(theirs.get_signature())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("language", ["en", "zh"])
def test_several_references_of_each(name: str, language: str) -> None:
    outputs, first = texts(0, num_examples=20, language=language)
    _, second = texts(1, num_examples=20, language=language)
    theirs = _theirs(name, language)
    figures = translation_figures(name, language=language)
    both = [list(pair) for pair in zip(first, second, strict=True)]
    assert plain_figures(translation(figures, outputs, both))[name] == theirs.corpus_score(outputs, [first, second]).score
    assert signature(figures, both) == str(theirs.get_signature())
    # Some have one: sacrebleu wants None in place of the other.
    some = [[pair[0]] if place % 3 else pair for place, pair in enumerate(both)]
    padded = [None if place % 3 else text for place, text in enumerate(second)]
    assert plain_figures(translation(figures, outputs, some))[name] == theirs.corpus_score(outputs, [first, padded]).score
    assert signature(figures, some) == str(theirs.get_signature()) and "nrefs:var" in signature(figures, some)


@pytest.mark.parametrize(("name", "function"), [("bleu", "bleu"), ("chrf", "chrf"), ("chrf++", "chrfpp"), ("ter", "ter")])
def test_figures_are_those_of_the_harness(name: str, function: str) -> None:
    outputs, references = texts(2, num_examples=20)
    tally = translation(translation_figures(name), outputs, [[text] for text in references])
    expected = getattr(harness, function)(list(zip(references, outputs, strict=True)))
    assert plain_figures(tally)[name] == pytest.approx(expected, abs=1e-9)


def test_the_interval_is_about_sacrebleus() -> None:
    outputs, references = texts(3, num_examples=80)
    theirs = BLEU().corpus_score(outputs, [references], n_bootstrap=1000)
    tally = translation(translation_figures("bleu"), outputs, [[text] for text in references])
    score = measure(tally, resamples=1000)["bleu"]
    assert score.value == theirs.score
    assert (score.high - score.low) / 2 == pytest.approx(theirs._ci, rel=0.15)


# --- what is empty


@pytest.mark.parametrize("name", NAMES)
def test_empty_texts(name: str) -> None:
    """An empty output is as bad as can be; an empty reference counts as sacrebleu counts it, unless there is no other."""
    figures = translation_figures(name)
    worst = 100.0 if name == "ter" else 0.0
    assert plain_figures(translation(figures, ["", ""], [["a cat"], ["b"]]))[name] == worst
    outputs, references = ["the cat sat on the mat", "spare", ""], ["the cat sat on a mat", "", ""]
    mixed = translation(figures, outputs, [[text] for text in references])
    assert plain_figures(mixed)[name] == _theirs(name, "en").corpus_score(outputs, [references]).score
    for outputs in (["", ""], ["a", "b"]):
        score = measure(translation(figures, outputs, [[""], [""]]), resamples=10)[name]
        assert score.value is None and score.undefined == "all references are empty"


def test_resamples_of_nothing_but_empty_references_are_left_out() -> None:
    score = measure(translation(translation_figures("ter"), ["a", "a", "a"], [["a"], ["a"], [""]]), resamples=200)["ter"]
    assert score.value == 50.0 and score.low == 0.0 and score.high is not None


def test_no_reference_at_all() -> None:
    with pytest.raises(UserError, match="example b7: has no reference, chrf needs at least one"):
        translation(translation_figures("chrf"), ["a", "b"], [["a"], []], ids=["b6", "b7"])
    with pytest.raises(UserError, match="example 0: has no reference"):
        translation(translation_figures("bleu"), ["a"], [()])
    assert sentence_figure(translation_figures("bleu"), "a", ()) == {}


# --- languages


@pytest.mark.parametrize(
    ("language", "tokenizer"),
    [
        *[(code, "zh") for code in ("zh", "zh-CN", "zh_Hans", "ZH", "zho", "cmn_Hans")],
        *[(code, "ja-mecab") for code in ("ja", "jpn", "ja-JP")],
        *[(code, "ko-mecab") for code in ("ko", "kor")],
        *[(code, "char") for code in ("th", "lo", "km", "my")],
        *[(code, "13a") for code in ("en", "de-AT", "ru", "hi", "xx", "", None)],
    ],
)
def test_the_tokenizer_of_a_language(language: str | None, tokenizer: str) -> None:
    assert tokenizer_for(language) == tokenizer
    assert translation_figures("bleu", language=language).tokenize == tokenizer
    assert translation_figures("bleu", language=language, tokenize="intl").tokenize == "intl"


def test_ter_splits_chinese_and_japanese() -> None:
    """Without it, a sentence of Chinese is one word and either right or wrong."""
    for language, output, reference in (("zh", "我爱北京", "我爱南京"), ("ja", "東京駅", "東京都")):
        tally = translation(translation_figures("ter", language=language), [output], [[reference]])
        assert plain_figures(tally)["ter"] == pytest.approx(100 / len(reference))
        assert plain_figures(translation(translation_figures("ter"), [output], [[reference]]))["ter"] == 100.0


@pytest.mark.parametrize(("language", "module"), [("ja", "MeCab"), ("ko", "mecab_ko")])
def test_japanese_and_korean_need_a_dictionary(language: str, module: str) -> None:
    figures = translation_figures("bleu", language=language)
    if find_spec(module) is None:
        message = rf"tokenize={language}-mecab: .*pip install 'sacrebleu\[{language}\]', or .* tokenize=char"
        with pytest.raises(UserError, match=message):
            translation(figures, ["東京"], [["東京"]])
    else:
        text = "東京タワーの下で友だちに会う"
        assert plain_figures(translation(figures, [text], [[text]]))["bleu"] == pytest.approx(100)
    outputs, references = texts(0, num_examples=10, language="ja")
    by_character = translation_figures("bleu", language=language, tokenize="char")
    expected = BLEU(tokenize="char").corpus_score(outputs, [references]).score
    assert plain_figures(translation(by_character, outputs, [[text] for text in references]))["bleu"] == expected > 10


def test_tokenizers_are_sacrebleus_and_no_other() -> None:
    assert set(TOKENIZERS) < set(BLEU.TOKENIZERS)
    with pytest.raises(UserError, match="tokenize='flores200': must be one of 13a, intl"):
        translation_figures("bleu", tokenize="flores200")


@pytest.mark.parametrize("language", ["th", "lo_LA", "km", "my"])
def test_ter_of_a_language_whose_words_it_cannot_tell(language: str) -> None:
    with pytest.raises(UserError, match=f"language={language}: ter would take whole sentences for words; use chrf"):
        translation_figures("ter", language=language)


def test_sentences_are_scored_on_their_own() -> None:
    output, references = "the cat sat", ["the cat sat down", "a cat sat"]
    assert sentence_figure(translation_figures("bleu"), output, references) == {
        "sentence_bleu": BLEU(effective_order=True).sentence_score(output, references).score
    }
    for name in ("chrf", "chrf++", "ter"):
        expected = _theirs(name, "en").sentence_score(output, references).score
        assert sentence_figure(translation_figures(name), output, references) == {f"sentence_{name}": expected}


def test_three_references_to_the_last_bits() -> None:
    """TER divides by their mean length; thirds are added in another order than sacrebleu's."""
    outputs, first = texts(0, num_examples=30)
    others = [texts(seed, num_examples=30)[1] for seed in (1, 2)]
    tally = translation(translation_figures("ter"), outputs, list(zip(first, *others, strict=True)))
    expected = TER().corpus_score(outputs, [first, *others]).score
    assert plain_figures(tally)["ter"] == pytest.approx(expected, rel=1e-12)
    assert np.asarray(tally.rows_NK).shape == (30, 2)
