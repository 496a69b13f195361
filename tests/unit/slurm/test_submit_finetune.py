"""`longhaul submit finetune`: its rows and its checkpoint are looked into first; on this machine it runs to its end."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from conf.compose import read_config
from conf.errors import UserError
from slurm.history import read_history
from slurm.lifecycle import CONFIG_FILE
from slurm.submission import read_submission
from slurm.submit import submit, sweep
from slurm.verbs import cancel, logs, resume, status
from tests.integration import finetuning
from tests.timeouts import scaled
from tests.unit.convert.checkpoints import write_checkpoint
from tests.unit.slurm.test_submit import words as pretrain_words
from train.config.runs import RUNS
from train.launch import get_ready
from train.outcome import read_outcome


@pytest.fixture
def words(corpus: Path, tmp_path: Path) -> list[str]:
    """Those of a short run whose checkpoint and rows lie in the working folder."""
    base = finetuning.base(tmp_path / "models/first", corpus)
    rows = finetuning.written_file(tmp_path)
    data = [f"task.data=[{{path: {rows}}}]", "data.sequence_length=32", "data.validation_fraction=0.2"]
    size = ["batch.sequences=8", "batch.micro_batch=2", "budget.epochs=null", "budget.steps=6", "evaluate.every_steps=3"]
    return ["finetune", f"checkpoint={base}", *data, *size, "scoring.max_rows=4", "monitor=quiet", "run.name=tuned"]


def test_a_run_is_kept_with_what_follows_from_its_rows(
    words: list[str], slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit([*words, "method=lora", "cluster=slurm_cpu", "nodes=2"]) == 0
    root = Path("runs/tuned")
    assert slurm.read_text() == f"sbatch --parsable {root.resolve()}/slurm/finetune.sbatch\n"
    shown = capsys.readouterr().out
    assert "rows of prompt and completion" in shown and "begins with" in shown and "first example" in shown
    assert "train.rank" in (root / "slurm/finetune.sbatch").read_text()
    config = (root / "slurm/config.yaml").read_text()
    assert "stage: finetune" in config and "processes: 2" in config and "steps: 6" in config
    assert read_submission(root).tasks == 2
    assert not (root / "rows").exists(), "its first job encodes them where it runs"


def test_a_dry_run_writes_nothing(words: list[str], slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit([*words, "cluster=slurm_gpu", "batch.sequences=16", "dry_run=true"]) == 0
    assert "#SBATCH --nodes=1" in capsys.readouterr().out
    assert not Path("runs").exists() and slurm.read_text() == ""


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["checkpoint=nowhere"], "nowhere"),
        (["task.data=[{path: gone.jsonl}]"], "gone.jsonl"),
        (["name=other"], "parts and name are not for finetune"),
        (["method.frozen=[nothing.*]"], "frozen=nothing.*: is no tensor of the model"),
        (["batch.sequences=6", "nodes=2"], "batch.sequences=6"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_what_does_not_fit_is_told_before_anything_is_written(
    words: list[str], slurm: Path, more: list[str], said: str
) -> None:
    with pytest.raises(UserError) as caught:
        submit([*words, "cluster=slurm_cpu", *more])
    assert said in str(caught.value)
    assert not Path("runs").exists() and slurm.read_text() == ""


@pytest.fixture
def behind(words: list[str], corpus: Path, slurm: Path, tmp_path: Path) -> list[str]:
    """Those of a run that begins with what a pretraining, which waits in the queue, has yet to write."""
    submit(pretrain_words(corpus))
    (tmp_path / "bin/queue").write_text("100|PENDING|Priority||N/A\n")
    return [*words, "checkpoint=runs/first", "after=[first]", "cluster=slurm_cpu"]


def test_a_run_behind_one_that_has_no_checkpoint_yet(
    behind: list[str], corpus: Path, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its rows are looked into at once; which checkpoint it begins with is found when it starts, and then stays."""
    assert submit(behind) == 0
    assert "--dependency=afterok:100" in slurm.read_text()
    shown = capsys.readouterr().out
    assert "rows of prompt and completion" in shown and "begins with      what runs/first has then" in shown
    unit = Path("runs/tuned")
    kept = read_config(RUNS, unit / CONFIG_FILE)
    assert kept.initial_checkpoint == "runs/first" and kept.model.hidden_size == 32
    with pytest.raises(UserError, match="initial_checkpoint=runs/first: holds no checkpoint"):
        get_ready(kept, elsewhere=True)
    first = write_checkpoint(Path("runs/first"), kept.model, corpus=corpus)
    config, _ = get_ready(kept, elsewhere=True)
    assert config.initial_checkpoint == str(first) and config.opening is False and (unit / "rows/rows.json").exists()
    assert config.model == kept.model


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["task.data=[{path: gone.jsonl}]"], "gone.jsonl"),
        (["method.frozen=[nothing.*]"], "frozen=nothing.*: is no tensor of the model"),
        (["batch.sequences=6", "nodes=2"], "batch.sequences=6"),
        (["data.sequence_length=4096"], "must not exceed model.max_positions"),
        (["checkpoint=runs/second"], "or to be that of a run in after=[NAME]; submit finetune once"),
        (["after=[]"], "runs/first: holds no checkpoint"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_what_does_not_fit_is_told_before_the_run_before_it_has_ended(behind: list[str], more: list[str], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        submit([*behind, *more])
    assert not Path("runs/tuned").exists()


def test_runs_one_behind_another(behind: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The second has no tokenizer before the first has ended, so the rows of the third are read when it begins."""
    submit(behind)
    (tmp_path / "bin/queue").write_text("101|PENDING|Dependency||N/A\n")
    capsys.readouterr()
    submit([*behind, "checkpoint=runs/tuned/best", "after=[tuned]", "run.name=third"])
    shown = capsys.readouterr().out
    assert "begins with      what runs/tuned/best has then" in shown and "there is no tokenizer yet" in shown
    assert read_config(RUNS, Path("runs/third") / CONFIG_FILE).initial_checkpoint == "runs/tuned/best"


def test_a_sweep_is_an_array(words: list[str], slurm: Path) -> None:
    sweep([*words, "optim.lr=1e-3,1e-2", "cluster=slurm_cpu"])
    assert "#SBATCH --array=0-1" in Path("runs/tuned/slurm/finetune.sbatch").read_text()
    assert "name: tuned/001" in Path("runs/tuned/001/slurm/config.yaml").read_text()


@pytest.fixture
def here(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The same words for this machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    yield [*words, "launch.device=cpu", "precision=fp32", "cluster=local", "cluster.preflight.enabled=false"]
    with suppress(UserError):  # where the test has not failed no job is left
        cancel(["run=tuned", "save=false"])


def wait(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + scaled(120)
    while not condition():
        assert time.monotonic() < deadline, f"{what}: {Path('runs/tuned/slurm/finetune.out').read_text()}"
        time.sleep(0.2)


@pytest.mark.further
def test_it_is_cancelled_resumed_and_finished(here: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    root, long = Path("runs/tuned"), ["budget.steps=100000", "checkpoint.every_steps=100000", "evaluate.every_steps=null"]
    assert submit([*here, *long]) == 0
    wait(lambda: (root / "metrics.jsonl").exists() and len((root / "metrics.jsonl").read_bytes()) > 999, "the first steps")
    cancel(["run=tuned"])
    wait(lambda: read_history(root).ends, "the end")
    (end,) = read_history(root).ends
    assert end.state == "stopped" and end.newest and (root / "rows/rows.json").exists()
    assert submit([*here, f"budget.steps={end.newest + 3}", "evaluate.every_steps=null"]) == 0
    wait(lambda: len(read_history(root).ends) == 2, "the second end")
    outcome = read_outcome(root, 2)
    assert outcome is not None and (outcome.state, outcome.step) == ("finished", end.newest + 3)
    assert list((root / "outputs").glob("*.jsonl")), "what the model writes at its end"
    capsys.readouterr()
    status([])
    shown = capsys.readouterr().out
    assert "tuned" in shown and "finished" in shown and f"{end.newest + 3}/{end.newest + 3}" in shown
    logs(["run=tuned", "follow=false"])
    assert f"step {end.newest + 3}" in capsys.readouterr().out
    resume(["run=tuned"])
    wait(lambda: "finished" in Path("runs/tuned/slurm/finetune.out").read_text(), "a resumed run that has nothing to do")
