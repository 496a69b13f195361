"""`longhaul finetune` as a person runs it: shown, refused, stopped, resumed, finished, called once more, measured."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from conf.errors import ConfigError
from tests.command import longhaul
from tests.integration import finetuning
from train.checkpoint.manifest import published, read_manifest
from train.checkpoint.settings import read_settings
from train.groundwork.finetuning import look_into
from train.initial import check_initial_model, configure
from train.plan import make_plan

pytestmark = pytest.mark.further


@pytest.fixture(scope="module")
def files(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and rows."""
    folder = tmp_path_factory.mktemp("finetune")
    return finetuning.base(folder, corpus), finetuning.labelled_file(folder)


def words_of(files: tuple[Path, Path], folder: Path, *more: str) -> list[str]:
    checkpoint, rows = files
    return [
        "finetune", f"checkpoint={checkpoint}", "task=classification", f"task.data=[{{path: {rows}}}]", "budget.steps=8",
        "data.sequence_length=64", "batch.sequences=4", "batch.micro_batch=2", "checkpoint.every_steps=4", "optim.lr=1e-3",
        "evaluate.every_steps=4", f"run.folder={folder}", "run.name=run", "launch.device=cpu", "monitor=quiet",
        "precision=fp32", *more,
    ]  # fmt: skip


def test_from_the_first_start_to_the_end(files: tuple[Path, Path], tmp_path: Path) -> None:
    shown = longhaul(*words_of(files, tmp_path, "launch.dry_run=true"))
    assert shown.returncode == 0 and "two labels" not in shown.stdout and not list(tmp_path.iterdir())
    assert "160 rows read: " in shown.stdout and "-> \N{MATHEMATICAL LEFT WHITE SQUARE BRACKET}" in shown.stdout

    stopped = longhaul(*words_of(files, tmp_path, "budget.stop_at_step=5"))
    assert stopped.returncode == 85, stopped.stderr
    assert f"begins with      {files[0]}: its model, weights and tokenizer, a fresh optimizer; a fresh head" in stopped.stdout
    kept = {path: path.read_bytes() for path in (tmp_path / "run" / "rows").iterdir()}
    refused = longhaul(*words_of(files, tmp_path, "data.packing=false"))
    assert refused.returncode == 93 and "data.packing=false: " in refused.stderr and "is fixed within a run" in refused.stderr
    assert {path: path.read_bytes() for path in (tmp_path / "run" / "rows").iterdir()} == kept
    finished = longhaul(*words_of(files, tmp_path))
    assert finished.returncode == 0 and "resuming from" in finished.stdout and "accuracy" in finished.stdout
    assert "or measure it (longhaul evaluate" in finished.stdout and "longhaul generate" not in finished.stdout
    again = longhaul(*words_of(files, tmp_path))
    assert again.returncode == 0 and "is finished: its budget of 8 steps is used up; nothing to do" in again.stdout

    run_dir = tmp_path / "run"
    assert json.loads((run_dir / "run.json").read_text())["verb"] == "finetune"
    assert (run_dir / "best").resolve() in [folder.resolve() for folder in published(run_dir / "checkpoints")]
    measured = longhaul(
        "evaluate", f"checkpoint={run_dir / 'best'}", "task=classification", f"task.data=[{{path: {files[1]}}}]",
        "wandb.mode=disabled", "resamples=20",
    )  # fmt: skip
    assert measured.returncode == 0 and "accuracy" in measured.stdout, measured.stderr
    text = run_dir.parent / "text.txt"
    text.write_text("a cat and a saw\n")
    words = ["evaluate", f"checkpoint={run_dir}", "task=language", f"task.data=[{{path: {text}}}]", "wandb.mode=disabled"]
    wrong = longhaul(*words)
    assert wrong.returncode == 93 and "tells labels apart" in wrong.stderr


def test_a_sequence_is_no_longer_than_the_model_takes_unless_given(files: tuple[Path, Path]) -> None:
    words = [f"checkpoint={files[0]}", "task=classification", f"task.data=[{{path: {files[1]}}}]"]
    config = configure(words, stage="finetune")
    assert config.sequence_length == config.model.max_positions < 1024
    with pytest.raises(ConfigError, match="data.sequence_length=1024: must not exceed model.max_positions"):
        configure([*words, "data.sequence_length=1024"], stage="finetune")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["model.z_loss=0.01"], "model.z_loss=0.01: the loss of pairs has no z-loss; leave it out"),
        (["model.dropout=0.2"], "model.dropout=0.2: with task=preference the model has preference.dropout=0.0; leave it out"),
        (["model.dropout=0.2", "preference.dropout=0.1"], "or give preference.dropout=0.2"),
        (["model.dropout=0.2", "preference.dropout=null"], None),
        (["model.dropout=0.2", "preference.dropout=0.2"], None),
        (["model.z_loss=0"], None),
    ],
)
def test_what_pairs_do_not_have_is_not_taken_silently(files: tuple[Path, Path], words: list[str], told: str | None) -> None:
    words = [f"checkpoint={files[0]}", "task=preference", f"task.data=[{{path: {files[1]}}}]", *words]
    if told is None:
        configure(words, stage="finetune")
        return
    with pytest.raises(ConfigError, match=re.escape(told)):
        configure(words, stage="finetune")


def test_what_pairs_do_not_have_of_the_checkpoint_is_told(files: tuple[Path, Path]) -> None:
    words = [f"checkpoint={files[0]}", "task=preference", f"task.data=[{{path: {files[1]}}}]"]
    config = configure(words, stage="finetune")
    config = replace(config, model=replace(config.model, z_loss=0.0, dropout=0.0))
    theirs = read_settings(files[0], read_manifest(files[0]))
    changed = replace(theirs, model=replace(theirs.model, z_loss=1e-4, dropout=0.1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.initial.read_settings", lambda *_: changed)
        _, *lines = check_initial_model(config)
    assert [line.strip() for line in lines] == [
        "its z-loss of 0.0001 is off: the loss of pairs has none",
        "its dropout of 0.1 is 0 (preference.dropout)",
    ]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["data.validation_fraction=0", "evaluate.patience=3"], "evaluate.patience=3: no row is held out to measure"),
        (["data.validation_fraction=0", "scoring.metric=loss"], "scoring.metric=loss: no row is held out to measure"),
        (["task=generation", "task.prompt={text}", "task.target=label", "task.max_new_tokens=9000"],
         "task.max_new_tokens=9000: leaves no room for a prompt, as the model reads model.max_positions="),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_told_before_anything_starts(
    files: tuple[Path, Path], tmp_path: Path, words: list[str], told: str
) -> None:
    config = configure([*words_of(files, tmp_path)[1:], *words], stage="finetune")
    with pytest.raises(ConfigError) as refused:
        look_into(config)
    assert told in str(refused.value)


def test_epochs_are_those_of_the_rows_where_steps_grow(files: tuple[Path, Path], tmp_path: Path) -> None:
    ramp = ["batch.ramp_start=2", "batch.ramp_increment=2", "batch.ramp_samples=12", "budget.steps=null", "budget.epochs=2"]
    words = [word for word in words_of(files, tmp_path)[1:] if not word.startswith("budget.")]
    findings = look_into(configure([*words, *ramp], stage="finetune"))
    rows = findings.train_tokens // findings.config.sequence_length
    samples = make_plan(findings.config, 1).total_samples
    assert 2 * rows <= samples < 2 * rows + 4, (rows, samples)


@pytest.mark.parametrize(
    ("content", "words", "told"),
    [
        ('{"text": "a cat"}\n', [], "rows.jsonl:1: "),
        ('{"text": "a", "label": "x"}\n{"text": "", "label": "y"}\n', ["data.validation_fraction=0"], "its text is empty"),
        ('{"text": "a", "label": "x"}\n', ["data.validation_fraction=0"], "label"),
        ("not json\n", [], "is not JSON"),
        (None, ["task.data=[{path: nowhere.jsonl}]"], "nowhere.jsonl"),
        (None, ["checkpoint=nowhere"], "initial_checkpoint=nowhere: no such folder"),
        (None, ["task=language"], "task.kind=language: is measured, not learned"),
        (None, ["method=lora", "method.lora.targets=[blocks.*.nothing]"], "is no linear layer of the model"),
    ],
    ids=["no label", "empty", "one label", "no json", "no file", "no checkpoint", "no learning", "no layer"],
)
def test_what_does_not_do_is_told_before_anything_is_written(
    files: tuple[Path, Path], tmp_path: Path, content: str | None, words: list[str], told: str
) -> None:
    more = list(words)
    if content is not None:
        rows = tmp_path / "rows.jsonl"
        rows.write_text(content)
        more.append(f"task.data=[{{path: {rows}}}]")
    done = longhaul(*words_of(files, tmp_path / "runs", *more))
    assert done.returncode == 93 and told in done.stderr, done.stderr
    assert not (tmp_path / "runs").exists()
