"""Scores held against each other: which evaluations belong together, what the tests say, and what is left out and why."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.tools.comparable import evaluate, labelled, run_folder, texts
from tools.compare.figures import Figure, Resampling
from tools.compare.scores import ScoreComparison, compare_scores
from tools.compare.subjects import Named, read_subjects
from tools.compare.words import compared_line, figure_cells, left_over_cells, legend, undefined_notes, verdict
from train.scores.comparison import Difference
from train.scores.record import Example, Score
from train.scores.settings import ScoreSettings

RESAMPLING = Resampling(resamples=1000, confidence=0.95, seed=0)
LAST = "checkpoints/step-00000020"


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    return run_folder(tmp_path / "first"), run_folder(tmp_path / "second")


def held_against(*folders: Path, kind: str = "run", resampling: Resampling = RESAMPLING) -> ScoreComparison:
    first, second = read_subjects([Named(kind=kind, path=str(folder)) for folder in folders])  # type: ignore[arg-type]
    return compare_scores(first, second, resampling)


def figures_of(scores: ScoreComparison) -> dict[str, Figure]:
    """Those of the only evaluation that both have."""
    (compared,) = scores.compared
    return {figure.name: figure for figure in compared.figures}


def test_identical_models_do_not_differ(runs: tuple[Path, Path]) -> None:
    for folder in runs:
        evaluate(folder / LAST, texts(3.0))
    for figure in figures_of(held_against(*runs)).values():
        assert (figure.difference.difference, figure.difference.low, figure.difference.high) == (0.0, 0.0, 0.0)
        assert figure.difference.p_value == figure.corrected == 1.0 and figure.verdict == ""


def test_a_clearly_better_model_is_told_as_better(runs: tuple[Path, Path]) -> None:
    for folder, mean in zip(runs, (3.0, 2.9), strict=True):
        evaluate(folder / LAST, texts(mean))
    scores = held_against(*runs)
    figures = figures_of(scores)
    assert set(figures) == {"loss", "perplexity", "bits_per_byte"}
    loss = figures["loss"]
    assert loss.difference.difference == pytest.approx(-0.1)
    assert loss.difference.p_value == pytest.approx(1 / 1001) and loss.corrected == pytest.approx(1 / 1001)
    assert {figure.corrected for figure in figures.values()} == {loss.corrected}, "three units of one test"
    assert loss.verdict == "better ***", "of a loss the lower one"
    assert loss.first.low < loss.first.value < loss.first.high
    backwards = figures_of(held_against(*reversed(runs)))["loss"]
    assert backwards.verdict == "worse ***" and backwards.difference.difference == pytest.approx(0.1)
    (compared,) = scores.compared
    assert compared_line(compared, RESAMPLING, ("A", "B")) == (
        "200 examples; A at step 20, B at step 20; p by paired randomisation, 1,000 resamples"
    )


def test_a_difference_within_chance_is_not_told_as_one(runs: tuple[Path, Path]) -> None:
    for folder, seed in zip(runs, (1, 2), strict=True):
        evaluate(folder / LAST, texts(3.0, seed=seed))
    figures = figures_of(held_against(*runs))
    assert figures["loss"].difference.p_value > 0.05 and not any(figure.verdict for figure in figures.values())


def test_labels_in_any_script_and_figures_of_single_labels(runs: tuple[Path, Path]) -> None:
    settings = ScoreSettings(labels=("负面", "正面<b>"))
    for folder, share in zip(runs, (0.6, 0.9), strict=True):
        evaluate(folder / LAST, labelled(share), kind="classification", settings=settings)
    figures = figures_of(held_against(*runs))
    assert figures["accuracy"].verdict == "better *" and figures["ece"].direction == figures["brier"].direction == -1
    assert figures["f1[正面<b>]"].is_detail and not figures["roc_auc"].is_detail
    assert not {"accuracy_micro", "f1_micro", "support[负面]"} & figures.keys()
    main = [figure for figure in figures.values() if not figure.is_detail]
    assert figures["accuracy"].corrected == pytest.approx(len(main) / 1001), "single labels are a family of their own"


def test_undefined_figures_have_their_reason(runs: tuple[Path, Path]) -> None:
    settings = ScoreSettings(labels=("yes", "no", "never"))
    for folder, share in zip(runs, (0.6, 0.9), strict=True):
        rows = [replace(example, probabilities=None) for example in labelled(share, labels=("yes", "no"))]
        evaluate(folder / LAST, rows, kind="classification", settings=settings)
    scores = held_against(*runs)
    figure = figures_of(scores)["recall[never]"]
    assert figure_cells(figure)[1:] == ["-", "-", "-", "-", "-", ""]
    assert "recall[never] of A is undefined: 'never' is the truth of no example" in undefined_notes(
        scores.compared[0], ("A", "B")
    )


def test_one_example_only(runs: tuple[Path, Path]) -> None:
    for folder, mean in zip(runs, (3.0, 2.0), strict=True):
        evaluate(folder / LAST, texts(mean, number=1))
    scores = held_against(*runs)
    loss = figures_of(scores)["loss"]
    assert loss.first.low is None and loss.verdict == "" and loss.difference.p_value > 0.5
    assert compared_line(scores.compared[0], RESAMPLING, ("A", "B")).startswith("1 example; ")
    assert "[" not in figure_cells(loss)[1]


def test_without_resamples_there_is_no_test(runs: tuple[Path, Path]) -> None:
    for folder, mean in zip(runs, (3.0, 2.0), strict=True):
        evaluate(folder / LAST, texts(mean))
    resampling = replace(RESAMPLING, resamples=0)
    scores = held_against(*runs, resampling=resampling)
    assert figures_of(scores)["loss"].difference.p_value is None
    assert "no test" in compared_line(scores.compared[0], resampling, ("A", "B"))
    assert "95 %" in legend(RESAMPLING) and "tests of one evaluation and one pair" in legend(RESAMPLING)


def test_too_few_resamples_to_be_sure_of_anything_are_told(runs: tuple[Path, Path]) -> None:
    for folder, mean in zip(runs, (3.0, 2.0), strict=True):
        evaluate(folder / LAST, texts(mean))
    scores = held_against(*runs, resampling=replace(RESAMPLING, resamples=10))
    assert scores.compared[0].notes == ("with 10 resamples no difference of 1 test can be sure; give resamples=20",)


def test_different_tokenizers_leave_bits_per_byte(tmp_path: Path) -> None:
    first, second = run_folder(tmp_path / "first"), run_folder(tmp_path / "second", tokenizer="u" * 64)
    evaluate(first / LAST, texts(3.0))
    evaluate(second / LAST, texts(2.9, tokens=55))
    scores = held_against(first, second)
    figures = figures_of(scores)
    for name in ("loss", "perplexity"):
        assert figures[name].difference.p_value is None and figures[name].difference.difference is None
        assert figures[name].first.value is not None
    assert figures["bits_per_byte"].corrected == figures["bits_per_byte"].difference.p_value < 0.05
    assert "different tokenizers" in scores.compared[0].notes[0]


def test_tasks_of_the_harness_are_means_of_their_examples(runs: tuple[Path, Path]) -> None:
    for folder, right in zip(runs, (40, 90), strict=True):
        rows = [
            Example(id=f"{place}", source=task, scores={"acc": float(place < right)} | ({"acc_norm": 1.0} if place else {}))
            for task in ("arc", "piqa")
            for place in range(100)
        ]
        evaluate(folder / LAST, rows, kind="harness", name="harness")
    figures = figures_of(held_against(*runs))
    assert set(figures) == {"arc/acc", "piqa/acc"}, "a figure that an example lacks is no mean of all"
    assert (figures["arc/acc"].first.value, figures["arc/acc"].second.value) == (0.4, 0.9)
    assert figures["arc/acc"].verdict == "better **" and not figures["arc/acc"].is_detail


def of_harness(folder: Path, examples: list[Example], figures: dict[str, float]) -> None:
    """An evaluation of lm-eval's tasks that says these figures."""
    path = evaluate(folder / LAST, examples, kind="harness", name="harness") / "evaluation.json"
    values = json.loads(path.read_text())
    values["scores"] = {name: {"value": value} for name, value in figures.items()}
    path.write_text(json.dumps(values))


def word_predictions(mean: float, *, score: str | None = None) -> tuple[list[Example], dict[str, float]]:
    """Examples of a task such as LAMBADA with a loss near `mean`, and lm-eval's perplexity of them.

    score: name under which the log-likelihood stands too.
    """
    rows = [
        replace(
            one, id=f"lambada:{place}", source="lambada", loss=one.loss / 50, scores={score: -one.loss / 50} if score else {}
        )
        for place, one in enumerate(texts(mean))
    ]
    return rows, {"lambada/perplexity": math.exp(sum(one.loss or 0.0 for one in rows) / len(rows))}


def test_the_perplexity_of_a_task_is_made_of_its_losses(tmp_path: Path) -> None:
    """Lower is better; and it is of an example, so that other tokenizers do not matter."""
    first, second = run_folder(tmp_path / "first"), run_folder(tmp_path / "second", tokenizer="u" * 64)
    for folder, mean in zip((first, second), (3.0, 2.5), strict=True):
        rows, stored = word_predictions(mean)
        of_harness(folder, rows, stored)
    scores = held_against(first, second)
    (perplexity,) = figures_of(scores).values()
    assert perplexity.name == "lambada/perplexity" and perplexity.verdict == "better ***"
    assert perplexity.difference.difference < 0 and scores.compared[0].notes == ()


def test_a_log_likelihood_that_is_called_a_perplexity_gets_no_verdict(runs: tuple[Path, Path]) -> None:
    """As evaluations of before have it: -2.5 against -3.0 looked like a worse perplexity."""
    for folder, mean in zip(runs, (3.0, 2.5), strict=True):
        rows, stored = word_predictions(mean, score="perplexity")
        of_harness(folder, rows, stored)
    scores = held_against(*runs)
    (perplexity,) = figures_of(scores).values()
    assert perplexity.first.value == pytest.approx(math.exp(3.0), rel=0.1) and perplexity.verdict == ""
    assert perplexity.difference.p_value is perplexity.difference.difference is None
    assert perplexity.difference.undefined == "the examples do not give what evaluation.json says"
    assert len(scores.compared[0].notes) == 2 and "its examples give lambada/perplexity -" in scores.compared[0].notes[0]


def test_figures_of_a_filter_have_their_names_in_the_evaluation(runs: tuple[Path, Path]) -> None:
    for folder in runs:
        rows = [Example(id=f"{place}", source="gsm8k,strict", scores={"exact_match": float(place % 2)}) for place in range(10)]
        of_harness(folder, rows, {"gsm8k/exact_match,strict": 0.25})
    scores = held_against(*runs)
    assert set(figures_of(scores)) == {"gsm8k/exact_match,strict"} and len(scores.compared[0].notes) == 2


def test_of_rouge_only_f1_is_tested(runs: tuple[Path, Path]) -> None:
    for folder, word in zip(runs, ("house", "tree"), strict=True):
        rows = [Example(id=f"{place}", truths=("a house here",), output=f"a {word} here") for place in range(20)]
        evaluate(folder / LAST, rows, kind="generation", settings=ScoreSettings(metrics=("rouge",)))
    assert set(figures_of(held_against(*runs))) == {"rouge1", "rouge2", "rougeL", "rougeLsum"}


def test_figures_of_sources_stand_behind_those_of_all(runs: tuple[Path, Path]) -> None:
    for folder, mean in zip(runs, (3.0, 2.0), strict=True):
        evaluate(folder / LAST, [replace(one, source="ab"[place % 2]) for place, one in enumerate(texts(mean))])
    figures = figures_of(held_against(*runs))
    assert [name for name in figures if figures[name].is_detail] == [
        f"{source}/{name}" for source in "ab" for name in ("loss", "perplexity", "bits_per_byte")
    ]
    assert figures["loss"].corrected == pytest.approx(1 / 1001) and figures["a/loss"].corrected == pytest.approx(2 / 1001)


def test_examples_in_another_order_are_the_same(runs: tuple[Path, Path]) -> None:
    evaluate(runs[0] / LAST, texts(3.0))
    evaluate(runs[1] / LAST, texts(3.0)[::-1])
    assert figures_of(held_against(*runs))["loss"].difference.high == 0.0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data": "b" * 64}, "other data: held (aaaaaaaa) and held (bbbbbbbb)"),
        (
            {"number": 100},
            "other examples: 200 and 100, of which 100 are the same; evaluate both with the same limit, context and stride",
        ),
        ({"data": f"{'a' * 64}:20"}, "other data: held (aaaaaaaa) and held (aaaaaaaa, the first 20)"),
        ({"kind": "generation", "settings": ScoreSettings(metrics=("chrf",))}, "another kind: language and generation"),
        ({"name": "books"}, "only A was evaluated on held (aaaaaaaa)"),
        ({"settings": ScoreSettings(bins=3)}, "scored otherwise: bins differ"),
    ],
)
def test_what_is_not_of_the_same_is_listed_with_the_reason(runs: tuple[Path, Path], changes: dict, reason: str) -> None:
    evaluate(runs[0] / LAST, texts(3.0))
    number = changes.pop("number", 200)
    evaluate(runs[1] / LAST, [replace(one, truths=("x",), output="x") for one in texts(2.0, number=number)], **changes)
    scores = held_against(*runs)
    assert not scores.compared and reason in scores.not_compared[0].reason
    assert left_over_cells(scores.not_compared[0])[1].startswith("loss 3.0")
    if "name" in changes:
        assert scores.not_compared[1].reason == "only B was evaluated on held (aaaaaaaa)"
        assert [subject.letter for subject in scores.lacking] == ["A", "B"]
        assert left_over_cells(scores.not_compared[1])[1] == "-"


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "cannot be read (No such file or directory)"), ("{", "damaged"), ("", "there is no example")]
)
def test_examples_that_cannot_be_read(runs: tuple[Path, Path], content: str | None, reason: str) -> None:
    for folder in runs:
        path = evaluate(folder / LAST, texts(3.0)) / "examples.jsonl"
    path.unlink()
    if content is not None:
        path.write_text(content)
        if not content:
            evaluated = runs[0] / "evaluations" / "step-00000020-language" / "examples.jsonl"
            evaluated.write_text("")
    scores = held_against(*runs)
    assert not scores.compared and reason in scores.not_compared[0].reason


def test_a_score_that_its_examples_do_not_give_is_told(runs: tuple[Path, Path]) -> None:
    for folder in runs:
        path = evaluate(folder / LAST, texts(3.0)) / "evaluation.json"
    values = json.loads(path.read_text())
    values["scores"]["loss"]["value"] = 1.0
    path.write_text(json.dumps(values))
    scores = held_against(*runs)
    (note,) = scores.compared[0].notes
    assert f"{path.parent}: its examples give loss" in note and "it says 1; so they are not compared by it" in note
    figures = figures_of(scores)
    assert figures["loss"].second.value == 1.0 and figure_cells(figures["loss"])[3:] == ["-", "-", "-", ""]
    assert figures["bits_per_byte"].corrected == 1.0, "the others still are"


def test_other_settings_of_the_evaluation_are_told(runs: tuple[Path, Path]) -> None:
    evaluate(runs[0] / LAST, texts(3.0), task={"kind": "language", "context": 64, "data": []})
    evaluate(runs[1] / LAST, texts(3.0), task={"kind": "language", "context": 32, "data": [{"path": "x"}]}, out="elsewhere")
    assert held_against(*runs).compared[0].notes == ("evaluated with other settings: task.context 64 and 32",)


def test_of_several_evaluations_those_made_alike_are_taken(runs: tuple[Path, Path]) -> None:
    evaluate(runs[0] / LAST, texts(3.0))
    evaluate(runs[1] / LAST, texts(2.0))
    evaluate(runs[1] / LAST, texts(9.0, number=10), folder="step-00000020-language-2", limit=10)  # a quick look since
    assert figures_of(held_against(*runs))["loss"].second.value == pytest.approx(2.0, abs=0.2)


def test_a_run_stands_for_its_newest_evaluated_checkpoint(runs: tuple[Path, Path]) -> None:
    for folder in runs:
        evaluate(folder / "checkpoints/step-00000010", texts(4.0))
    evaluate(runs[1] / LAST, texts(2.0))
    (compared,) = held_against(*runs).compared
    assert compared.steps == (10, 20)
    at_ten = held_against(*(folder / "checkpoints/step-00000010" for folder in runs), kind="checkpoint")
    assert at_ten.compared[0].steps == (10, 10) and figures_of(at_ten)["loss"].difference.difference == 0


def test_an_evaluation_of_a_step_that_was_trained_again_is_not_the_checkpoints(runs: tuple[Path, Path]) -> None:
    for folder in runs:
        evaluate(folder / LAST, texts(3.0), model={"hash": "0" * 64} if folder is runs[1] else None)
    scores = held_against(*(folder / LAST for folder in runs), kind="checkpoint")
    assert not scores.compared and "only A was evaluated" in scores.not_compared[0].reason


@pytest.mark.parametrize(
    ("score", "cell"),
    [
        (Score(value=0.81234, low=0.80123, high=0.82345), "0.812 [0.801, 0.823]"),
        (Score(value=35.4, low=34.1, high=36.9), "35.4 [34.1, 36.9]"),
        (Score(value=1234567.0), "1.235e+06"),
        (Score(value=0.5, low=0.5, high=0.5), "0.5000 [0.5000, 0.5000]"),
        (Score(value=None, undefined="x"), "-"),
    ],
)
def test_figures_have_as_many_digits_as_they_are_sure_of(score: Score, cell: str) -> None:
    difference = Difference(first=None, second=None, difference=None)
    assert figure_cells(Figure(name="f", first=score, second=score, difference=difference))[1] == cell


def test_a_verdict_counts_what_was_tested(runs: tuple[Path, Path]) -> None:
    from tools.compare.costs import cost_of

    for folder, mean in zip(runs, (3.0, 2.0), strict=True):
        evaluate(folder / LAST, texts(mean))
    first, second = read_subjects([Named(kind="run", path=str(folder)) for folder in runs])
    text = verdict((first, second), (cost_of(first), cost_of(second)), compare_scores(first, second, RESAMPLING))
    assert text == (
        "B second against A first: best held-out loss 4.2000, the same as 4.2000; of 1 test 1 better, 0 worse, "
        "0 not told apart; it has as many parameters and took as many tokens, as many FLOPs, as many CPU-hours."
    )
