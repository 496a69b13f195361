"""Which figures each kind of evaluation has, by source, and the errors of examples and settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from conf.errors import UserError
from tests.unit.scores.cases import classified, texts
from train.scores.comparison import compare
from train.scores.intervals import measure
from train.scores.record import Example
from train.scores.settings import METRICS, ScoreSettings
from train.scores.sheet import check_libraries, curves, example_scores, signatures, tallies
from train.scores.tally import plain_figures

USUAL = ScoreSettings()


def labelled(seed: int = 0, *, num_labels: int = 3, probabilities: bool = True) -> list[Example]:
    """A classification of 30 examples of two sources."""
    case = classified(seed, num_examples=30, num_labels=num_labels)
    rows = [dict(zip(case.labels, row, strict=True)) if probabilities else None for row in case.probabilities_NC.tolist()]
    return [
        Example(id=f"dev:{place}", source="ab"[place % 2], truths=(truth,), output=output, probabilities=row)
        for place, (truth, output, row) in enumerate(zip(case.truths, case.predictions, rows, strict=True))
    ]


def read(*, sources: Sequence[str] = "aab") -> list[Example]:
    """Three texts of 4 targets."""
    return [
        Example(id=f"text:{place}", source=source, loss=loss, target_tokens=4, target_bytes=9)
        for place, (loss, source) in enumerate(zip((3.0, 5.0, 1.0), sources, strict=True))
    ]


def written(language: str = "en", *, loss: float | None = None) -> list[Example]:
    outputs, references = texts(0, num_examples=12, language=language)
    return [
        Example(id=f"t:{place}", truths=(truth,), output=output, loss=loss, target_tokens=5, target_bytes=20)
        for place, (output, truth) in enumerate(zip(outputs, references, strict=True))
    ]


def test_language() -> None:
    found = tallies("language", read(), USUAL)
    assert set(found) == {"", "a", "b"}
    assert plain_figures(found[""])["loss"] == 9 / 12 and plain_figures(found["a"])["loss"] == 1.0
    assert plain_figures(found["b"])["bits_per_byte"] == pytest.approx(1 / 9 / math.log(2))
    assert curves("language", read(), USUAL) == signatures("language", read(), USUAL) == {}
    assert example_scores("language", read()[0], USUAL) == {"loss": 0.75}
    assert example_scores("language", replace(read()[0], target_tokens=0), USUAL) == {}
    assert example_scores("language", replace(read()[0], loss=math.nan), USUAL) == {}


@pytest.mark.parametrize(("sources", "names"), [("aaa", {""}), (["", "", ""], {""}), (["", "", "b"], {"", "b"})])
def test_one_source_is_all_together(sources: list[str], names: set[str]) -> None:
    """And no named source never hides the whole."""
    found = tallies("language", read(sources=sources), USUAL)
    assert set(found) == names and found[""].num_examples == 3


def test_classification() -> None:
    examples = labelled()
    found = tallies("classification", examples, USUAL)
    assert set(found) == {"", "a", "b"} and found["a"].num_examples == 15
    figures = plain_figures(found[""])
    assert {"accuracy", "mcc", "f1_macro", "f1[a]", "roc_auc", "ece", "brier"} < set(figures)
    # Each source alone is what its examples alone are.
    alone = tallies("classification", examples[1::2], replace(USUAL, labels=("a", "b", "c")))
    assert plain_figures(alone[""]) == plain_figures(found["b"])
    without = plain_figures(tallies("classification", labelled(probabilities=False), USUAL)[""])
    assert without["accuracy"] == figures["accuracy"] and "roc_auc" not in without and "ece" not in without
    scores = [example_scores("classification", example, USUAL)["correct"] for example in examples]
    assert np.mean(scores) == pytest.approx(figures["accuracy"]) and set(scores) == {0.0, 1.0}
    assert signatures("classification", examples, USUAL) == {}


def test_reliability_by_source() -> None:
    found = curves("classification", labelled(), replace(USUAL, bins=5))
    assert set(found) == {"reliability", "a/reliability", "b/reliability"}
    assert [sum(point["count"] for point in points) for points in found.values()] == [30, 15, 15]
    alone = curves("classification", labelled()[1::2], ScoreSettings(bins=5, labels=("a", "b", "c")))
    assert alone == {"reliability": found["b/reliability"]}
    assert curves("classification", labelled(probabilities=False), USUAL) == {}
    assert plain_figures(tallies("classification", labelled(), replace(USUAL, bins=1))[""])["ece"] == pytest.approx(
        abs(curves("classification", labelled(), replace(USUAL, bins=1))["reliability"][0]["confidence"] - _accuracy())
    )


def _accuracy() -> float:
    return plain_figures(tallies("classification", labelled(), USUAL)[""])["accuracy"]


def test_labels_as_set_or_of_the_probabilities_or_as_the_truths_come() -> None:
    def support(examples: list[Example], settings: ScoreSettings) -> list[str]:
        names = plain_figures(tallies("classification", examples, settings)[""])
        return [name for name in names if name.startswith("support")]

    plain = [Example(id=str(place), truths=(label,), output="no") for place, label in enumerate(("no", "yes"))]
    assert support(plain, USUAL) == ["support[no]", "support[yes]"]
    assert support(plain, replace(USUAL, labels=("yes", "no", "maybe"))) == ["support[yes]", "support[no]", "support[maybe]"]
    known = [replace(example, probabilities={"x": 0.0, "yes": 0.5, "no": 0.5}) for example in plain]
    assert support(known, USUAL) == ["support[x]", "support[yes]", "support[no]"]


def test_the_positive_label_is_passed_on() -> None:
    """Of precision, recall and f1, and of roc_auc: by whose probability, which matters where a sum is rounded."""
    rows = ({"no": 0.4, "yes": 0.6}, {"no": 0.4, "yes": 0.59995})
    pairs = zip(("no", "yes"), rows, strict=True)
    examples = [Example(id=truth, truths=(truth,), output="yes", probabilities=row) for truth, row in pairs]
    for positive, expected in ((None, (1.0, 0.0)), ("yes", (1.0, 0.0)), ("no", (0.0, 0.5))):
        figures = plain_figures(tallies("classification", examples, replace(USUAL, positive=positive))[""])
        assert (figures["recall"], figures["roc_auc"]) == expected


def test_generation_with_every_metric() -> None:
    settings = replace(USUAL, metrics=METRICS)
    tally = tallies("generation", written(), settings)[""]
    names = set(plain_figures(tally))
    assert {"bleu", "chrf", "chrf++", "ter", "rouge1", "rougeLsum_recall", "exact_match", "f1"} <= names
    assert "loss" not in names
    assert "loss" in plain_figures(tallies("generation", written(loss=3.0), settings)[""])
    some = plain_figures(tallies("generation", [*written(loss=3.0), written()[0]], settings)[""])
    assert some["loss"] == plain_figures(tallies("generation", written(loss=3.0), settings)[""])["loss"], "one lacks it"
    assert set(plain_figures(tallies("generation", written(loss=3.0), USUAL)[""])) == {"loss", "perplexity", "bits_per_byte"}
    assert set(signatures("generation", written(), settings)) == {"bleu", "chrf", "chrf++", "ter", "rouge", "exact_match", "f1"}
    scores = example_scores("generation", written(loss=3.0)[0], settings)
    assert set(scores) > {"sentence_bleu", "sentence_chrf", "sentence_chrf++", "sentence_ter", "rouge2", "exact_match", "loss"}
    assert scores["loss"] == 0.6
    assert curves("generation", written(), settings) == {}
    check_libraries(settings)


def test_the_language_chooses() -> None:
    settings = ScoreSettings(metrics=("bleu", "ter", "answers"), language="zh")
    found = signatures("generation", written("zh"), settings)
    assert "tok:zh" in found["bleu"] and "asian:yes" in found["ter"] and found["f1"] == "normalization:characters|truths:best"
    squad = replace(settings, normalization="squad", tokenize="char")
    found = signatures("generation", written("zh"), squad)
    assert "tok:char" in found["bleu"] and found["exact_match"] == "normalization:squad|truths:best"
    example = Example(id="1", truths=("北京大学",), output="北京")
    assert example_scores("generation", example, settings)["f1"] == pytest.approx(2 / 3)
    assert example_scores("generation", example, squad)["f1"] == 0.0
    for language, expected in (("zh", 2 / 3), ("ja", 2 / 3), ("en", 0.0)):
        local = ScoreSettings(metrics=("answers",), language=language)
        assert plain_figures(tallies("generation", [example], local)[""])["f1"] == pytest.approx(expected)
    for does_stem, expected in ((True, 1.0), (False, 0.0)):
        local = ScoreSettings(metrics=("rouge",), stem=does_stem)
        runs = Example(id="1", truths=("running",), output="runs")
        assert plain_figures(tallies("generation", [runs], local)[""])["rouge1"] == expected
        assert example_scores("generation", runs, local)["rouge1"] == expected
    stem = {name: signatures("generation", written(), ScoreSettings(metrics=("rouge",), stem=name))["rouge"] for name in (0, 1)}
    assert "stem:no" in stem[0] and "stem:porter" in stem[1]


def test_an_example_without_reference_has_no_scores_of_translation() -> None:
    """Its answer is that there is none."""
    example = Example(id="1", output="")
    scores = example_scores("generation", example, ScoreSettings(metrics=METRICS))
    assert scores == {"exact_match": 1.0, "f1": 1.0}


def test_a_sheet_is_measured_and_compared() -> None:
    settings = ScoreSettings(metrics=("chrf", "answers"))
    first = tallies("generation", written(), settings)[""]
    better = [replace(example, output=example.truths[0]) for example in written()]
    second = tallies("generation", better, settings)[""]
    assert measure(second, resamples=50)["chrf"].low == pytest.approx(100)
    found = compare(first, second, resamples=200)
    assert found["chrf"].difference > 5 and found["chrf"].p_value < 0.05 and found["chrf"].test == "randomization"


# --- errors


@pytest.mark.parametrize(
    ("kind", "examples", "settings", "message"),
    [
        ("language", [], USUAL, "no example to score"),
        ("language", [Example(id="x:1")], USUAL, "example x:1: has no loss"),
        ("classification", [Example(id="x:1", output="a")], USUAL, r"example x:1: 0 truths \[\]; .* exactly one"),
        ("classification", [Example(id="x:1", truths=("a", "b"), output="a")], USUAL, "x:1: 2 truths"),
        ("classification", [Example(id="x:1", truths=("a",), output="c")], USUAL, "x:1: prediction 'c' is not among"),
        ("classification", [*labelled(), replace(labelled()[0], probabilities=None)], USUAL, "dev:0: probabilities of nothing"),
        ("generation", written(), USUAL, "metrics=.*: examples without loss need at least one metric"),
        ("generation", [Example(id="x:1", output="a")], ScoreSettings(metrics=("rouge",)), "x:1: has no reference, rouge"),
        ("generation", [Example(id="x:1", output="a")], ScoreSettings(metrics=("ter",)), "x:1: has no reference, ter"),
        ("harness", written(), USUAL, "kind=harness: its figures are made elsewhere"),
    ],
)
def test_errors_of_examples(kind, examples: list[Example], settings: ScoreSettings, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tallies(kind, examples, settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": ()}, r"labels=\[\]: must be at least one"),
        ({"labels": ("a", "a")}, "all different"),
        ({"labels": ("a", "b"), "positive": "c"}, "positive='c' is not among the labels"),
        ({"bins": 0}, "bins=0"),
        ({"metrics": ("blue",)}, "metrics: 'blue' is none; choose from bleu, chrf"),
        ({"metrics": ("bleu", "bleu")}, "must differ"),
        ({"normalization": "none"}, "normalization='none': must be squad or characters"),
        ({"stem": True, "language": "ru"}, "stem=true needs English, got language=ru"),
        ({"tokenize": "spm"}, "tokenize='spm': must be one of"),
        ({"metrics": ("chrf", "ter"), "language": "th-TH"}, "language=th-TH: ter would take whole sentences"),
    ],
)
def test_errors_of_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ScoreSettings(**settings)


def test_a_library_that_is_missing_is_told_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    from sacrebleu.tokenizers import tokenizer_ja_mecab

    from train.scores import translation

    translation._scorer.cache_clear()
    monkeypatch.setattr(tokenizer_ja_mecab, "MeCab", None)
    with pytest.raises(UserError, match=r"pip install 'sacrebleu\[ja\]'"):
        check_libraries(ScoreSettings(metrics=("chrf", "bleu"), language="ja"))
    check_libraries(ScoreSettings(metrics=("chrf",), language="ja"))
