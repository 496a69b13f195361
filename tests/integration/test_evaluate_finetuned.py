"""`longhaul evaluate checkpoint=RUN` of a fine-tuned run, without a task: what it has learned, on the rows that it held out."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.encoded_rows import read_encoded
from data_pipeline.task_config import TaskConfig, TaskSource
from tests.dist import run_ranks
from tests.integration import finetuning
from tools.cli import main
from train.config.finetune import FinetuneConfig
from train.config.training import OptimConfig
from train.launch import prepare_folder
from train.scores.record import Evaluation, read_evaluation

pytestmark = pytest.mark.further

PLAIN = ("device=cpu", "dtype=fp32", "wandb.mode=disabled", "resamples=20")
STEPS = 12
TALKS = [
    {"messages": [{"role": "user", "content": word}, {"role": "assistant", "content": f"{word}\n{word}"}]}
    for number in range(12)
    for word in (f"{one} {number}" for one in finetuning.ANIMALS)
]


@pytest.fixture(scope="module")
def base(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finetuning.base(tmp_path_factory.mktemp("base"), corpus)


def finished(run_dir: Path, config: FinetuneConfig) -> Path:
    config = finetuning.ready(replace(config, optim=OptimConfig(lr=2e-2, weight_decay=0.0)), run_dir)
    prepare_folder(run_dir, replace(config, launch=replace(config.launch, processes=1)))
    assert run_ranks(finetuning.attempt, 1, config, str(run_dir), 1) == [("finished", STEPS)]
    return run_dir


@pytest.fixture(scope="module")
def labelled(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of columns with names of their own; its held-out rows are a share of one file."""
    folder = tmp_path_factory.mktemp("labelled")
    rows = finetuning.labelled_file(folder)
    rows.write_text(rows.read_text().replace('"text"', '"words"').replace('"label"', '"thing"'))
    config = finetuning.settings(base, rows, steps=STEPS)
    return finished(folder / "run", replace(config, task=replace(config.task, fields={"sentence": "words", "label": "thing"})))


@pytest.fixture(scope="module")
def written(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a prompt of its own; its held-out rows are a file."""
    folder = tmp_path_factory.mktemp("written")
    train, dev = finetuning.written_file(folder), finetuning.written_file(folder, rows=12, seed=1)
    task = TaskConfig(
        kind="generation",
        name="last",
        data=(TaskSource(path=str(train)),),
        validation=(TaskSource(path=str(dev)),),
        prompt="Last of {prompt}",
        target="completion",
        metrics=("rouge", "chrf"),
        max_new_tokens=5,
    )
    config = finetuning.settings(base, train, kind="generation", steps=STEPS)
    return finished(folder / "run", replace(config, task=task))


def evaluated(out: Path, *words: str) -> Evaluation:
    assert main(["evaluate", f"out={out}", *PLAIN, *words]) == 0
    return read_evaluation(out)


def same(one: Evaluation, other: Evaluation) -> None:
    """In all that was found and decided, but where it is kept."""
    assert (one.name, one.kind, one.scores, one.counts) == (other.name, other.kind, other.scores, other.counts)
    assert [replace(example) for example in one.examples()] == list(other.examples())


def last_figures(run_dir: Path) -> dict[str, float]:
    """What the run itself has found at its last step."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "task/loss" in line or any(name.startswith("task/") for name in line)][-1]


def test_labels_are_measured_as_when_all_is_spelled_out(labelled: Path, tmp_path: Path, capsys: Any) -> None:
    found = evaluated(tmp_path / "out", f"checkpoint={labelled}")
    said = capsys.readouterr().err
    kept = read_encoded(labelled / "rows").validation_rows()
    assert f"classification: {len(kept)} rows of labelled-0.jsonl, held out in {labelled / 'rows'}" in said
    assert [example.id for example in found.examples()] == [row.id for row in kept]

    task = ["task=classification", "task.fields={sentence: words, label: thing}", "task.labels=[animal,tool]", "task.stop=[]"]
    spelled = evaluated(tmp_path / "spelled", f"checkpoint={labelled}", *task, f"task.data=[{{path: {labelled / 'rows'}}}]")
    same(found, spelled)
    assert found.data == spelled.data

    chosen = {row.id for row in kept}
    lines = (labelled.parent / "labelled-0.jsonl").read_text().splitlines()
    dev = tmp_path / "labelled-0.jsonl"
    dev.write_text("".join(f"{line}\n" for number, line in enumerate(lines, 1) if f"labelled-0.jsonl:{number}" in chosen))
    of_file = evaluated(tmp_path / "file", f"checkpoint={labelled}", *task, f"task.data=[{{path: {dev}}}]")
    assert of_file.scores == found.scores
    assert found.scores["accuracy"].value == pytest.approx(last_figures(labelled)["task/accuracy"])


def test_a_long_text_is_cut_as_in_training(labelled: Path, tmp_path: Path) -> None:
    dev = tmp_path / "dev.jsonl"
    dev.write_text(json.dumps({"words": f"cat {'a b ' * 60}", "thing": "animal"}) + "\n")
    found = evaluated(tmp_path / "out", f"checkpoint={labelled}", f"task.data=[{{path: {dev}}}]")
    assert [example.input_tokens for example in found.examples()] == [32], "of the 160 that the model could read"


def test_a_blank_text_is_told_before_weights_are_read(
    labelled: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("train.stages.evaluate.load_engines")
    dev = tmp_path / "dev.jsonl"
    dev.write_text("".join(json.dumps({"words": text, "thing": "animal"}) + "\n" for text in ("cat", "", " ")))
    assert main(["evaluate", f"checkpoint={labelled}", f"task.data=[{{path: {dev}}}]", *PLAIN]) == 93
    assert "dev.jsonl:2: its text is empty, so it has no label to tell; leave the row out" in capsys.readouterr().err


def test_the_settings_that_are_kept_are_those_that_worked(labelled: Path, written: Path, tmp_path: Path) -> None:
    task = evaluated(tmp_path / "labels", f"checkpoint={labelled}", "limit=3").config["task"]
    assert task["kind"] == "classification" and task["labels"] == ["animal", "tool"]
    assert task["fields"] == {"sentence": "words", "label": "thing"} and task["validation"] == []
    assert [source["path"] for source in task["data"]] == [str(labelled / "rows")]
    task = evaluated(tmp_path / "written", f"checkpoint={written}", "limit=3").config["task"]
    assert (task["name"], task["prompt"], task["target"]) == ("last", "Last of {prompt}", "completion")
    assert (task["metrics"], task["max_new_tokens"], task["stop"]) == (["rouge", "chrf"], 5, [])


def test_outputs_are_measured_as_when_all_is_spelled_out(written: Path, tmp_path: Path) -> None:
    found = evaluated(tmp_path / "out", f"checkpoint={written}")
    dev = written.parent / "written-1.jsonl"
    words = ["task=generation", "task.name=last", "task.prompt=Last of {prompt}", "task.target=completion"]
    words += ["task.metrics=[rouge,chrf]", "task.max_new_tokens=5", "task.stop=[]", f"task.data=[{{path: {dev}}}]"]
    same(found, evaluated(tmp_path / "spelled", f"checkpoint={written}", *words))
    assert found.counts["examples"] == 12 and {"rougeL", "chrf", "loss"} <= set(found.scores)
    examples = [example.output for example in found.examples()][:8]  # as many as the run itself writes
    outputs = [json.loads(line)["output"] for line in (written / f"outputs/step-{STEPS:08d}.jsonl").read_text().splitlines()]
    assert examples == outputs


def test_what_is_given_wins(written: Path, tmp_path: Path) -> None:
    dev = finetuning.written_file(tmp_path, rows=5, seed=2)
    found = evaluated(tmp_path / "out", f"checkpoint={written}", f"task.data=[{{path: {dev}}}]", "task.max_new_tokens=2")
    assert [source["name"] for source in found.data] == ["written-2.jsonl"] and found.counts["examples"] == 5
    assert found.name == "last" and all(example.input.startswith("Last of ") for example in found.examples())
    assert max(example.output_tokens for example in found.examples()) <= 2
    other = evaluated(tmp_path / "other", f"checkpoint={written}", "task=language", f"task.data=[{{path: {dev}}}]",
                      "task.text_field=prompt")  # fmt: skip
    assert other.kind == other.name == "language" and other.config["task"]["prompt"] == ""


def test_dialogues_are_answered_by_their_template(base: Path, tmp_path: Path, capsys: Any) -> None:
    rows, dev = tmp_path / "chats.jsonl", tmp_path / "dev.jsonl"
    rows.write_text("".join(f"{json.dumps(talk)}\n" for talk in TALKS))
    config = finetuning.settings(base, rows, kind="dialogue", steps=STEPS)
    config = replace(config, data=replace(config.data, sequence_length=64, template="plain", system="Say it twice."))
    run_dir = finished(tmp_path / "run", config)
    found = evaluated(tmp_path / "out", f"checkpoint={run_dir}")
    assert found.kind == "generation" and found.name == "dialogue" and found.config["task"]["system"] == "Say it twice."
    assert found.scores["rougeL"].value is not None and found.config["scores"]["metrics"] == ["rouge"]
    kept = list(found.examples())
    outputs = [json.loads(line)["output"] for line in (run_dir / f"outputs/step-{STEPS:08d}.jsonl").read_text().splitlines()]
    assert [example.output for example in kept[: len(outputs)]] == outputs
    assert [example.input for example in kept] == [row.prompt for row in read_encoded(run_dir / "rows").validation_rows()]
    numbers = [int(example.id.partition(":")[2]) for example in kept]
    dev.write_text("".join(f"{json.dumps(TALKS[number - 1])}\n" for number in numbers))
    of_file = list(evaluated(tmp_path / "file", f"checkpoint={run_dir}", f"task.data=[{{path: {dev}}}]").examples())
    assert [(one.input, one.output) for one in of_file] == [(one.input, one.output) for one in kept]
    assert "Say it twice." in of_file[0].input
    dev.write_text(json.dumps({"messages": [{"role": "user", "content": "a<|endoftext|>b"}, TALKS[0]["messages"][1]]}) + "\n")
    assert main(["evaluate", f"checkpoint={run_dir}", f"task.data=[{{path: {dev}}}]", *PLAIN]) == 93
    assert "dev.jsonl:1: spells the special token <|endoftext|>" in capsys.readouterr().err


def test_where_nothing_was_held_out(labelled: Path, written: Path, tmp_path: Path, capsys: Any) -> None:
    """It is never measured on what it has learned from without being told to."""

    def refused(*words: str) -> str:
        assert main(["evaluate", *words, *PLAIN]) == 93
        return capsys.readouterr().err

    alone = tmp_path / "alone"
    shutil.copytree(labelled / "checkpoints", alone)
    (checkpoint,) = alone.glob("step-*12")
    assert "rows is not there, where its run kept the rows that it held out; give task.data=" in refused(
        f"checkpoint={checkpoint}"
    )
    moved = tmp_path / "moved"
    shutil.copytree(labelled, moved)
    shutil.rmtree(moved / "rows")
    shutil.copytree(written / "rows", moved / "rows")
    assert "rows holds other rows than the checkpoint was trained with" in refused(f"checkpoint={moved}")
    said = refused(f"checkpoint={labelled}", f"task.data=[{{path: {written / 'rows'}}}]")
    assert "is not among task.labels=[animal, tool]" in said


def test_without_held_out_rows_and_with_preferences(base: Path, tmp_path: Path, capsys: Any) -> None:
    rows = finetuning.labelled_file(tmp_path, rows=40)
    config = finetuning.settings(base, rows, steps=STEPS)
    run_dir = finished(tmp_path / "run", replace(config, data=replace(config.data, validation_fraction=0.0)))
    assert main(["evaluate", f"checkpoint={run_dir}", *PLAIN]) == 93
    assert "task.data=[]: its run held out no rows; give task.data=[{path: FILE}]" in capsys.readouterr().err
    assert evaluated(tmp_path / "out", f"checkpoint={run_dir}", f"task.data=[{{path: {rows}}}]").counts["examples"] == 40
    pairs = finetuning.settings(base, finetuning.pairs_file(tmp_path), kind="preference", steps=STEPS)
    preferring = finished(tmp_path / "pairs", pairs)
    assert main(["evaluate", f"checkpoint={preferring}", *PLAIN]) == 93
    assert "has learned preferences, whose figures its run has measured" in capsys.readouterr().err
