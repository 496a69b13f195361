"""`longhaul compare`: what it is given, what it tells, and its page in a real browser."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from conf.compose import write_config
from conf.errors import ConfigError, UserError
from data_pipeline.rows_config import RowsConfig
from data_pipeline.task_config import TaskConfig, TaskSource
from tests.timeouts import scaled
from tests.unit.tools.comparable import TINY, evaluate, imported, labelled, run_folder, texts
from tests.unit.tools.test_report import CHROMIUM, opened
from tools.cli import EXIT_USER_ERROR, main
from tools.compare.console import WIDTH, aligned, columns_of
from tools.compare.settings import class_of
from tools.compare.subjects import Named, read_subjects
from tools.compare.verb import CompareConfig, run
from train.config.adapter import LoraConfig
from train.config.changes import leaves
from train.config.finetune import FinetuneConfig
from train.config.method import MethodConfig
from train.config.training import BatchConfig, BudgetConfig, EvaluateConfig, OptimConfig, RunConfig
from train.model.cost import num_parameters
from train.scores.settings import ScoreSettings


def compared(tmp_path: Path, capsys: pytest.CaptureFixture, *words: str) -> tuple[str, str]:
    """What the command says for these words, and the text of its page; without curves."""
    out = tmp_path / "out"
    assert main(["compare", *words, f"out={out}", "curves=false", "resamples=200"]) == 0
    text = capsys.readouterr().out
    wide = [line for line in text.splitlines() if columns_of(line) > WIDTH]
    assert all(line.startswith("page ") or "longhaul evaluate" in line for line in wide), "only what is copied stays whole"
    return text, (out / "index.html").read_text(encoding="utf-8")


def row_of(text: str, name: str) -> str:
    """The line of a table that begins with `name`."""
    return next(line for line in text.splitlines() if line.strip().startswith(f"{name} "))


# --- what is given


def test_words_are_gathered_in_their_order(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    first, second = run_folder(tmp_path / "first"), run_folder(tmp_path / "se,cond")
    text, _ = compared(tmp_path, capsys, f"run={second}", f"checkpoint={first}/checkpoints/step-00000010", f"run={first}")
    assert [line.split()[0] for line in text.splitlines()[:3]] == ["A", "B", "C"]
    assert "se,cond" in text.splitlines()[0] and "first step 10" in text.splitlines()[1]
    assert "C first against A se,cond: " in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing is given, and two or more are compared; give run=runs/A run=runs/B"),
        (["run={}/first"], "only run={}/first is given"),
        (["run={}/first"] * 9, "9 are given, and a chart can tell 8 apart; leave some out"),
        (["run={}/first", "run={}/gone"], "run={}/gone: no such folder; give the folder of a run"),
        (["run={}/first", "run={}"], "run={}: holds no config.yaml, so it is no run; give the folder of a run"),
        (["run={}/first", "run="], "run=: needs a folder"),
        (
            ["run={}/first", "run={}/first/checkpoints/step-00000010"],
            "is no run; if it is a checkpoint, give checkpoint={}/first/checkpoints/step-00000010",
        ),
        (["run={}/first", "checkpoint={}/gone"], "checkpoint={}/gone: no such folder; give the folder of a run or of one of"),
        (["run={}/first", "checkpoint={}"], "checkpoint={}: holds no checkpoint; give the folder of a run or"),
        (["run={}/first", "run={}/../{}/first/"], "is the same as run={}/first, which is given too; name another run"),
        (["run={}/first", "checkpoint={}/first"], "checkpoint={}/first: is the same as run={}/first, which is given too"),
    ],
)
def test_what_cannot_be_compared_is_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture, words: list[str], message: str
) -> None:
    run_folder(tmp_path / "first")
    (tmp_path / tmp_path.name).symlink_to(tmp_path)
    given = [word.replace("{}/../{}", f"{tmp_path}/{tmp_path.name}").replace("{}", str(tmp_path)) for word in words]
    assert main(["compare", *given]) == EXIT_USER_ERROR
    said = capsys.readouterr().err
    assert message.replace("{}", str(tmp_path)) in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"resamples": -1}, "resamples=-1: must not be negative"),
        ({"confidence": 1.0}, "confidence=1.0: must lie between 0 and 1"),
        ({"seed": -1}, "seed=-1: must not be negative"),
        ({"out": ""}, "out='': needs a folder"),
    ],
)
def test_settings_are_checked(settings: dict, problem: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)):
        CompareConfig(**settings)


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    named = tuple(Named(kind="run", path=str(run_folder(tmp_path / name))) for name in ("first", "second"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"out=.*file/page: .* cannot be written \(Not a directory\)"):
        run(CompareConfig(subjects=named, out=str(tmp_path / "file" / "page")))


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_run_json(tmp_path: Path, content: str) -> None:
    (run_folder(tmp_path / "first") / "run.json").write_text(content)
    run_folder(tmp_path / "second")
    with pytest.raises(UserError, match=r"run\.json: .*; put back what the run wrote, or remove it"):
        read_subjects([Named(kind="run", path=str(tmp_path / name)) for name in ("second", "first")])


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    subjects = read_subjects([Named(kind="run", path=str(run_folder(tmp_path / place / "same"))) for place in ("x", "y")])
    assert [subject.name for subject in subjects] == [str(tmp_path / place / "same") for place in ("x", "y")]


def test_the_page_lies_in_a_folder_named_after_both(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_folder(Path("runs/first")), run_folder(Path("runs/二 号"))
    assert main(["compare", "checkpoint=runs/first/checkpoints/step-00000010", "run=runs/二 号", "curves=false"]) == 0
    assert "page  compare/first-step-10-vs-二-号/index.html" in capsys.readouterr().out
    assert Path("compare/first-step-10-vs-二-号/index.html").is_file()


# --- what is told


@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_that_has_hardly_begun(tmp_path: Path, capsys: pytest.CaptureFixture, steps: int) -> None:
    first, second = run_folder(tmp_path / "first"), run_folder(tmp_path / "second", steps=steps)
    text, _ = compared(tmp_path, capsys, f"run={first}", f"run={second}")
    assert "They have no evaluation in common" in text and f"longhaul evaluate checkpoint={second}" in text
    assert row_of(text, "steps").split() == ["steps", "20", str(steps) if steps else "-"]


def test_a_run_that_is_writing_now(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    first, second = run_folder(tmp_path / "first"), run_folder(tmp_path / "second", loss=4.0)
    with (second / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "train", "step": 21, "lo')
    text, _ = compared(tmp_path, capsys, f"run={first}", f"run={second}")
    assert "running, or cut off" in row_of(text, "state")
    assert "best held-out loss 3.2000, 1.0000 better than 4.2000" in " ".join(text.split())


def test_costs_of_a_checkpoint_are_those_up_to_its_step(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    first = run_folder(tmp_path / "first")
    text, _ = compared(tmp_path, capsys, f"run={first}", f"checkpoint={first}/checkpoints/step-00000010")
    assert row_of(text, "steps").split()[1:] == ["20", "10"]
    assert row_of(text, "tokens").split()[1:] == ["1,280", "640"]
    assert row_of(text, "time of steps").split()[3:] == ["20s", "10s"]
    assert row_of(text, "CPU-hours").split()[1:] == ["0.0111", "0.00556"], "20 and 10 seconds of 2 ranks"
    assert row_of(text, "held-out loss, best").split()[3:] == ["4.2000", "at", "20", "4.7000", "at", "10"]
    assert "as many parameters and took 0.5 x the tokens, 0.5 x the FLOPs, 0.5 x the CPU-hours" in " ".join(text.split())


def test_a_run_with_adapters_has_them_among_its_parameters_and_costs_less(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    first, second = run_folder(tmp_path / "first"), run_folder(tmp_path / "second")
    whole = num_parameters(TINY)
    text, _ = compared(tmp_path, capsys, f"run={first}", f"run={second}")
    assert "of which trained" not in text
    method = MethodConfig(lora=LoraConfig(rank=2, targets=("blocks.*.mlp.up",)))
    config = FinetuneConfig(
        run=RunConfig(name="second"),
        model=TINY,
        initial_checkpoint="gone",
        task=TaskConfig(kind="dialogue", name="lesson", data=(TaskSource(path="rows.jsonl"),)),
        data=RowsConfig(sequence_length=64),
        budget=BudgetConfig(steps=99),
        evaluate=EvaluateConfig(probes=()),
        method=method,
    )
    write_config(config, second / "config.yaml")
    text, _ = compared(tmp_path, capsys, f"run={first}", f"run={second}")
    beside = 2 * 2 * (32 + 64)
    assert row_of(text, "parameters").split()[1:] == [f"{whole:,}", f"{whole + beside:,}"]
    assert row_of(text, "of which trained").split()[3:] == [f"{whole:,}", str(beside)]
    costs = [float(cost) for cost in row_of(text, "FLOPs, attention in full").split()[4:]]
    assert 0.5 < costs[1] / costs[0] < 0.8


def test_settings_that_differ_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    first = run_folder(tmp_path / "first")
    changed = {"model": replace(TINY, num_layers=3), "optim": OptimConfig(lr=0.5), "batch": BatchConfig(micro_batch=2)}
    second = run_folder(tmp_path / "second", **changed)
    text, page = compared(tmp_path, capsys, f"run={first}", f"run={second}")
    listed = text[text.index("Settings that differ") : text.index("Made of")].split("\n")[2:]
    rows = [line.split() for line in listed if line]
    assert ["model", "model.num_layers", "2", "3"] in rows and ["layout", "batch.micro_batch", "8", "2"] in rows
    assert [row[0] for row in rows] == ["model", "data", "optimisation", "layout", "free"], rows
    assert rows[1][1] == "data.sources[0].path"
    assert "model.hidden_size" not in text and "optim.lr" in page
    assert "the same: data fingerprint, tokenizer, git commit, begun, torch" in text


def test_every_setting_has_its_class(tmp_path: Path) -> None:
    from conf.compose import to_plain

    subject, _ = read_subjects([Named(kind="run", path=str(run_folder(tmp_path / name))) for name in ("first", "second")])
    assert {class_of(name) for name in leaves(to_plain(subject.settings))} == {
        "model",
        "data",
        "optimisation",
        "layout",
        "free",
    }
    assert class_of("run.seed") == class_of("data.sources") == "data" and class_of("launch.processes") == "layout"


def test_an_imported_checkpoint_and_a_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    first, second = imported(tmp_path / "tiny"), run_folder(tmp_path / "second", model=replace(TINY, num_layers=3))
    evaluate(first, texts(3.0))
    evaluate(second / "checkpoints" / "step-00000020", texts(2.0))
    text, _ = compared(tmp_path, capsys, f"checkpoint={first}", f"run={second}")
    assert "imported from" in text and "models/Tiny" in text
    assert "model.num_layers" in text and "optim.lr" not in text, "there is no training to hold the run's against"
    assert row_of(text, "tokens").split()[1:] == ["-", "1,280"]
    assert "better" in row_of(text, "loss")


def test_other_data_and_other_tokenizers_are_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    first, second = run_folder(tmp_path / "first"), run_folder(tmp_path / "second", tokenizer="u" * 64, data="e" * 64)
    text, _ = compared(tmp_path, capsys, f"run={first}", f"run={second}")
    assert row_of(text, "tokenizer").split()[1:] == ["t" * 16, "u" * 16]
    assert row_of(text, "data fingerprint").split()[2:] == ["d" * 16, "e" * 16]
    assert "their held-out losses are not of the same text" in " ".join(text.split())


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    folders = [run_folder(tmp_path / name) for name in ("first", "second")]
    for folder, mean in zip(folders, (3.0, 2.0), strict=True):
        evaluate(folder / "checkpoints" / "step-00000020", texts(mean))
    words = [f"run={folder}" for folder in folders]
    code = f"""
import sys
from tools.cli import main
assert main(["compare", *{words}, "curves=false", {f"out={tmp_path / 'out'}"!r}]) == 0
assert not {{"torch", "safetensors", "transformers", "matplotlib"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, timeout=scaled(60))


def test_wide_characters_keep_the_columns() -> None:
    lines = aligned(["", "A"], [["准确率", "1"], ["loss", "22"]], numbers=True)
    assert [columns_of(line) for line in lines[1:]] == [columns_of("准确率") + 4] * 2
    long = aligned(["", "A"], [["正" * 100, "1"]])
    assert columns_of(long[1]) <= WIDTH and "..." in long[1]


def test_a_long_value_keeps_its_end() -> None:
    assert aligned(["", "A"], [["path", "/" + "x" * 200 + "/corpus"]])[1].endswith("xxx/corpus")


# --- the page


@pytest.mark.further
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    first, second = run_folder(tmp_path / "first"), run_folder(tmp_path / "second <b>", loss=4.0, tokenizer="u" * 64)
    settings = ScoreSettings(labels=("负面", "正面<b>"))
    for folder, share in ((first, 0.6), (second, 0.9)):
        evaluate(folder / "checkpoints" / "step-00000020", labelled(share), kind="classification", settings=settings)
    named = tuple(Named(kind="run", path=str(folder)) for folder in (first, second))
    out = tmp_path / "out"
    assert run(CompareConfig(subjects=named, out=str(out), resamples=1000)) == 0
    document, console, asked = opened(out / "index.html", tmp_path)
    assert console == [] and asked == set()
    names = {path.stem for path in out.glob("*.png")}
    assert document.count("<svg") == len(names) == 9
    assert {"loss_tokens", "loss", "loss_seconds_productive", "lr", "grad_norm", "tokens_per_second"} <= names
    assert sum("bits_per_byte" in name for name in names) == 1, "the two have different tokenizers"
    assert sum("probe_copying" in name for name in names) == 1
    assert "second &lt;b&gt;" in document and "正面&lt;b&gt;" in document and "better *" in document
    text = (out / "index.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', text) and "<script" not in text
    ids = re.findall(r'\bid="([^"]+)"', document)
    assert len(ids) == len(set(ids))


def test_a_damaged_evaluation_is_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folders = [run_folder(tmp_path / name) for name in ("first", "second")]
    made = [evaluate(folder / "checkpoints" / "step-00000020", texts(3.0)) for folder in folders]
    words = [f"run={folder}" for folder in folders]
    (path,) = made[1].glob("evaluation.json")
    whole = json.loads(path.read_text())
    for damaged in ("{", "[]", json.dumps(whole | {"data": [{"name": "x"}]})):
        path.write_text(damaged)
        assert main(["compare", *words]) == EXIT_USER_ERROR
        said = capsys.readouterr().err
        assert f"{path}: damaged" in said and "evaluate again" in said and "Traceback" not in said
