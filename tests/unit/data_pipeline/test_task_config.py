"""Settings of a task: what is refused, and with what words; what the spelled-out signs of a command line become."""

from __future__ import annotations

import pytest

from conf.compose import compose, validate
from conf.errors import ConfigError
from data_pipeline.task_config import TaskConfig, TaskSource
from train.config.evaluation import EvaluationConfig

ROWS = {"data": (TaskSource(path="dev.jsonl"),), "prompt": "{text}"}
GENERATION = ROWS | {"kind": "generation", "metrics": ("bleu",)}
CLASSIFICATION = ROWS | {"kind": "classification", "labels": ("yes", "no")}
DIALOGUE = {"kind": "dialogue", "data": (TaskSource(path="chat.jsonl"),)}


def problems(settings: dict[str, object], **changes: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        task = TaskConfig(**settings | changes)  # type: ignore[arg-type]
        if found := task.evaluation_problems():
            raise ConfigError(found)
    return list(caught.value.problems)


@pytest.mark.parametrize(
    ("settings", "changes", "expected"),
    [
        ({}, {"context": 0}, "context=0: a window needs at least 2 tokens"),
        ({}, {"context": 1}, "context=1: a window needs at least 2 tokens, one to read and one to predict"),
        ({}, {"context": -5}, "context=-5"),
        ({}, {"stride": 0}, "stride=0: the window must move by at least 1 token"),
        ({}, {"context": 8, "stride": 9}, "stride=9: must not exceed context=8"),
        ({}, {"name": ""}, "name='': must be usable as a folder name"),
        ({}, {"name": "a/b"}, "name='a/b'"),
        ({}, {"name": ".hidden"}, "name='.hidden'"),
        ({}, {"tasks": ("arc",)}, "tasks=['arc']: only task=harness runs them"),
        ({}, {"num_fewshot": -1}, "num_fewshot=-1: must not be negative"),
        ({}, {"own_tasks": False}, "own_tasks=false: leaves no task without include"),
        ({}, {"data": (TaskSource(path="a/x.txt"), TaskSource(path="b/x.txt"))}, "data: the name x.txt occurs more than once"),
        ({"kind": "harness"}, {}, "tasks=[]: task=harness needs the names of tasks"),
        (GENERATION, {"data": ()}, "data=[]: needs files with rows"),
        (CLASSIFICATION, {"prompt": ""}, "prompt='': needs what the model is given"),
        (GENERATION, {"prompt": "Translate:"}, "prompt='Translate:': names no column"),
        (GENERATION, {"prompt": "{{text}}"}, "names no column"),
        (GENERATION, {"prompt": "{text"}, "a brace that is meant is doubled: {{"),
        (GENERATION, {"target": ""}, "target='': needs the column of the truth"),
        (GENERATION, {"fields": {"document": ""}}, "fields={'document': ''}: holds an empty name"),
        (GENERATION, {"source_language": "en", "target_language": "en"}, "target_language=en: is source_language as well"),
        (GENERATION, {"no_answer": ""}, "no_answer='': the model needs something to write"),
        (GENERATION, {"metrics": ()}, "metrics=[]: needs at least one of bleu, chrf"),
        (GENERATION, {"max_new_tokens": 0}, "max_new_tokens=0: must be at least 1"),
        (GENERATION, {"stop": ("a", "")}, "stop: holds an empty text"),
        (CLASSIFICATION, {"labels": ()}, "labels=[]: needs at least two"),
        (CLASSIFICATION, {"labels": ("yes",)}, "labels=['yes']: needs at least two"),
        (CLASSIFICATION, {"labels": ("yes", "no", "yes")}, "holds a label twice"),
        (CLASSIFICATION, {"labels": ("yes", "")}, "label_texts=['yes', '']: what the model would write must be different"),
        (CLASSIFICATION, {"label_texts": ("a",)}, "label_texts=['a']: needs one for each of the 2 labels"),
        (CLASSIFICATION, {"label_texts": ("a", "a")}, "label_texts=['a', 'a']: what the model would write must be different"),
        (CLASSIFICATION, {"label_texts": ("a", "")}, "none of them ''"),
        (CLASSIFICATION, {"labels": (), "label_texts": ("a", "b")}, "label_texts=['a', 'b']: need their labels"),
        (DIALOGUE, {"prompt": "{text}"}, "prompt: a chat template writes dialogues out; leave prompt out"),
        (DIALOGUE, {"target": "text"}, "target=text: a dialogue has its answers"),
        (DIALOGUE, {"labels": ("a", "b")}, "labels: a chat template"),
        (DIALOGUE, {"data": ()}, "data=[]: needs files with rows"),
        (DIALOGUE, {"kind": "preference"}, "kind=preference: is for finetune"),
    ],
    ids=lambda value: next(iter(value), "none") if isinstance(value, dict) else None,
)  # fmt: skip
def test_what_is_refused(settings: dict[str, object], changes: dict[str, object], expected: str) -> None:
    (problem,) = problems(settings, **changes)
    assert expected in problem


def test_all_is_told_at_once() -> None:
    assert len(problems({}, kind="classification", name="", stop=("",), context=1, stride=0)) == 5


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"path": ""}, "path='': needs a prepared corpus or a file"),
        ({"path": "a", "name": ""}, "name='': must be a name without a slash"),
        ({"path": "a", "name": "a/b"}, "name='a/b': must be a name without a slash"),
    ],
)
def test_a_source_that_is_refused(given: dict[str, str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TaskSource(**given)
    assert expected in str(caught.value)


@pytest.mark.parametrize(("path", "label"), [("a/b.txt", "b.txt"), ("a/b/", "b"), (".", "."), ("a/*.txt", "*.txt")])
def test_the_name_of_a_source(path: str, label: str) -> None:
    assert TaskSource(path=path).label == label
    assert TaskSource(path=path, name="c").label == "c"


def test_signs_that_a_command_line_spells_out() -> None:
    task = TaskConfig(**GENERATION | {"prompt": "{text}\\n\\t=", "stop": ("\\n\\n", "END"), "target_prefix": "\\n"})  # type: ignore[arg-type]
    assert (task.prompt_text, task.stop_texts, task.prefix_text) == ("{text}\n\t=", ("\n\n", "END"), "\n")


def test_what_a_model_would_write() -> None:
    assert TaskConfig(**CLASSIFICATION).texts_of_labels == (" yes", " no")  # type: ignore[arg-type]
    task = TaskConfig(**CLASSIFICATION | {"label_texts": ("good", "bad"), "target_prefix": ""})  # type: ignore[arg-type]
    assert task.texts_of_labels == ("good", "bad")


def test_what_finetune_finds_out_by_itself() -> None:
    for settings in (CLASSIFICATION | {"labels": (), "prompt": ""}, GENERATION | {"prompt": "", "metrics": ()}, DIALOGUE):
        TaskConfig(**settings)  # type: ignore[arg-type]
    task = validate(EvaluationConfig, compose("evaluate", ["task=summarisation", "checkpoint=a", "task.data=[{path: a}]",
        "task.fields={document: body.text}"])).task  # fmt: skip
    assert task.fields == {"document": "body.text"}


def test_labels_that_look_like_numbers() -> None:
    words = ["task=classification", "checkpoint=a", "task.data=[{path: a}]", "task.prompt='{text}'"]
    config = validate(EvaluationConfig, compose("evaluate", [*words, "task.labels=['0','1']"]))
    assert config.task.labels == ("0", "1")
    with pytest.raises(ConfigError, match=r"task.labels\[0\]=0: must be text; .*: \"task.labels=\['0', ...\]\""):
        validate(EvaluationConfig, compose("evaluate", [*words, "task.labels=[0,1]"]))


@pytest.mark.parametrize("field", ["text.__class__", "text[en].upper", "text!r", "text:>9999999"])
def test_a_prompt_names_columns_and_nothing_else(field: str) -> None:
    with pytest.raises(ConfigError, match="is more than a column, or a field within one: {column"):
        TaskConfig(kind="generation", data=(TaskSource(path="a.jsonl"),), prompt=f"{{{field}}}", metrics=("bleu",))
