"""Tasks of lm-eval on a tiny model: what its examples hold, and what is told of a task that is damaged."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from conf.errors import UserError
from data_pipeline.task_config import TaskConfig
from tests.unit.evaluate.subjects import engines_of, subject_in
from train.config.evaluation import EvaluationConfig
from train.evaluate.engines import Engines
from train.evaluate.subject import Subject
from train.harness.run import Outcome, run_tasks
from train.harness.tasks import is_ours
from train.parallel import single_process
from train.scores.record import Example

TEXTS = ["a man walks", "the dog is here again\nand again", "no one sees it at all", "über die Brücke zu gehen", "x"]
CHOICES = [["yes", "not at all"], ["a cat", "no"], ["no", "where it is"], ["gehen", "ja"], ["x", "x y z"]]
TASKS: dict[str, dict[str, Any]] = {
    "word": {
        "output_type": "loglikelihood", "doc_to_text": "{{text}}", "doc_to_target": " {{choices[1]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "whole": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "choice": {
        "output_type": "multiple_choice", "doc_to_text": "{{text}}", "doc_to_choice": "{{choices}}", "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}, {"metric": "f1"}],
    },
    "named": {
        "output_type": "multiple_choice", "doc_to_text": "{{text}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{choices[answer]}}", "metric_list": [{"metric": "acc"}, {"metric": "acc_mutual_info"}],
    },
    "contexts": {  # as winogrande: the choices are the contexts, and one continuation stands behind all
        "output_type": "multiple_choice", "doc_to_text": "answer", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{text}}", "metric_list": [{"metric": "acc"}],
    },
    "written": {
        "output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 5}, "metric_list": [{"metric": "exact_match"}],
    },
}  # fmt: skip


def write_task(folder: Path, name: str, **task: Any) -> None:
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, "test_split": "test", **data, **task}))


def write_rows(folder: Path) -> None:
    rows = [
        {"text": text, "choices": choices, "answer": place % 2}
        for place, (text, choices) in enumerate(zip(TEXTS, CHOICES, strict=True))
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Subject, Engines]:
    subject = subject_in(tmp_path_factory.mktemp("model"))
    return subject, engines_of(subject)


def outcome_of(model: tuple[Subject, Engines], include: Path, *names: str, own_tasks: bool = False, **more: Any) -> Outcome:
    task = TaskConfig(kind="harness", name="harness", tasks=names, include=str(include), own_tasks=own_tasks, **more)
    return run_tasks(EvaluationConfig(checkpoint="x", task=task, resamples=20), *model, single_process())


@pytest.fixture(scope="module")
def outcome(model: tuple[Subject, Engines], tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("tasks")
    write_rows(folder)
    for name, task in TASKS.items():
        write_task(folder, name, **task)
    return outcome_of(model, folder, *TASKS)


def of_task(outcome: Outcome, name: str) -> list[Example]:
    found = [example for example in outcome.examples if example.source == name]
    assert len(found) == len(TEXTS)
    return found


def test_a_score_of_examples_is_one_whose_mean_is_the_figure(outcome: Outcome) -> None:
    """lm-eval's samples hold a log-likelihood under the name of perplexity, of which more is better."""
    kept = {}
    for name in TASKS:
        examples = of_task(outcome, name)
        kept[name] = set(examples[0].scores)
        for metric in kept[name]:
            value = outcome.scores[f"{name}/{metric}"].value
            assert np.mean([one.scores[metric] for one in examples]) == pytest.approx(value), (name, metric)
    assert kept == {
        "word": {"acc"}, "whole": set(), "choice": {"acc", "acc_norm"}, "named": {"acc", "acc_mutual_info"},
        "contexts": {"acc"}, "written": {"exact_match"},
    }  # fmt: skip


def test_losses_and_lengths_give_its_figures_of_likelihood(outcome: Outcome) -> None:
    losses = [one.loss for one in of_task(outcome, "word")]
    assert min(losses) > 0 and math.exp(np.mean(losses)) == pytest.approx(outcome.scores["word/perplexity"].value)
    whole = of_task(outcome, "whole")
    assert [one.target_bytes for one in whole] == [len(text.encode()) for text in TEXTS]
    bits = sum(one.loss for one in whole) / math.log(2) / sum(one.target_bytes for one in whole)
    assert bits == pytest.approx(outcome.scores["whole/bits_per_byte"].value)


def test_tokens_are_the_models(outcome: Outcome, model: tuple[Subject, Engines]) -> None:
    encode = model[0].tokenizer.encode
    for one, text, choices in zip(of_task(outcome, "word"), TEXTS, CHOICES, strict=True):
        # lm-eval encodes context and target together; the tiny tokenizer makes the same of both apart
        assert one.input_tokens + one.target_tokens == len(encode(f"{text} {choices[1]}"))
        assert one.target_bytes == len(f" {choices[1]}".encode()) and one.target_tokens
    for one, text in zip(of_task(outcome, "whole"), TEXTS, strict=True):
        assert one.target_tokens == one.input_tokens == len(encode(text)), "read from the sign before it on"
    for one, text in zip(of_task(outcome, "written"), TEXTS, strict=True):
        assert one.input_tokens == len(encode(text)) and one.loss is None and 0 <= one.output_tokens <= 5


@pytest.mark.parametrize("name", ["choice", "named"])
def test_a_choice_is_told_by_its_text(outcome: Outcome, name: str) -> None:
    for number, (one, choices) in enumerate(zip(of_task(outcome, name), CHOICES, strict=True)):
        assert one.truths == (f" {choices[number % 2]}",) and one.output in [f" {text}" for text in choices]
        assert one.scores["acc"] == float(one.output in one.truths)
        assert one.loss > 0 and one.target_tokens and one.target_bytes == len(one.truths[0].encode())


def test_choices_may_lie_in_the_contexts(outcome: Outcome) -> None:
    for number, (one, choices, text) in enumerate(zip(of_task(outcome, "contexts"), CHOICES, TEXTS, strict=True)):
        assert one.truths == (choices[number % 2],) and one.scores["acc"] == float(one.output in one.truths)
        assert one.loss > 0 and one.target_bytes == len(f" {text}".encode())


# --- errors


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"metric_list": [{"metric": "acuracy", "aggregation": "mean", "higher_is_better": True}]},
            "bad.yaml.*metric acuracy: not known",
        ),
        ({"metric_list": [{"metric": "acuracy"}]}, "bad.yaml.*metric acuracy: not known to lm-eval; it has acc, "),
        ({"doc_to_text": "{{txt}}"}, "bad.yaml.*UndefinedError.*txt"),
        ({"doc_to_text": "{{text"}, "bad.yaml.*TemplateSyntaxError"),
        ({"output_type": "choices"}, "bad.yaml.*output_type 'choices'"),
        ({"test_split": "dev"}, "bad.yaml.*dev"),
        ({"dataset_kwargs": {"data_files": {"test": "nowhere.jsonl"}}}, "bad.yaml.*data cannot be read.*nowhere.jsonl"),
    ],
)
def test_a_damaged_task_is_told_in_one_line(
    model: tuple[Subject, Engines], tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    write_rows(tmp_path)
    write_task(tmp_path, "good", **TASKS["word"])
    write_task(tmp_path, "bad", **TASKS["choice"] | changes)
    with pytest.raises(UserError, match=f"^task.tasks=bad .*{words}") as told:
        outcome_of(model, tmp_path, "good", "bad")
    assert "\n" not in str(told.value)


def test_what_fails_only_in_a_later_row_is_told_too(model: tuple[Subject, Engines], tmp_path: Path) -> None:
    write_rows(tmp_path)
    write_task(tmp_path, "bad", **TASKS["word"] | {"doc_to_text": "{{1 // (text|length - 1)}}"})
    with pytest.raises(UserError, match="^task.tasks=bad: lm-eval cannot run it .ZeroDivisionError.*mend the task's file"):
        outcome_of(model, tmp_path, "bad")


def test_errors_of_our_own_stay_as_they_are(
    model: tuple[Subject, Engines], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path)
    write_task(tmp_path, "long", **TASKS["written"] | {"generation_kwargs": {"max_gen_toks": 5000}})
    with pytest.raises(UserError, match="^max_gen_toks=5000: leaves no room"):
        outcome_of(model, tmp_path, "long")

    def lost(*_: Any, **__: Any) -> None:
        raise RuntimeError("a collective lost its partner")

    monkeypatch.setattr(type(model[1].generator), "generate", lost)
    write_task(tmp_path, "written", **TASKS["written"])
    with pytest.raises(RuntimeError, match="lost its partner") as told:  # companions.py tells who was lost
        outcome_of(model, tmp_path, "written")
    assert not isinstance(told.value, UserError) and not is_ours(KeyError("of nobody"))


def test_tasks_that_are_not_there(model: tuple[Subject, Engines], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"task.include=.*/gone: no such folder; give the one"):
        outcome_of(model, tmp_path / "gone", "word")
    with pytest.raises(UserError, match=r"^task.tasks=word: no such task; .* holds no file \(\*.yaml\)"):
        outcome_of(model, tmp_path, "word")
    write_task(tmp_path, "word", **TASKS["word"])
    with pytest.raises(UserError, match="^task.tasks=wrod: no such task; there are 1: word$"):
        outcome_of(model, tmp_path, "wrod", "word")
    (tmp_path / "other.yaml").write_text("task: other\nmetric_list: [")
    (tmp_path / "third.yaml").write_text("task: third\ninclude: gone.yaml")
    with pytest.raises(UserError, match=r"other.yaml cannot be read \(ParserError.*third.yaml cannot be read .*gone.yaml"):
        outcome_of(model, tmp_path, "other")


def test_a_task_that_is_asked_for_twice(model: tuple[Subject, Engines], tmp_path: Path) -> None:
    write_rows(tmp_path)
    write_task(tmp_path, "word", **TASKS["word"])
    (tmp_path / "several.yaml").write_text(yaml.safe_dump({"group": "several", "task": ["word"]}))
    assert {one.source for one in outcome_of(model, tmp_path, "several").examples} == {"word"}
    with pytest.raises(UserError, match="^task.tasks=several, word: .*Duplicate task 'word'"):
        outcome_of(model, tmp_path, "several", "word")
