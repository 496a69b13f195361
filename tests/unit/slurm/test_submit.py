"""`longhaul submit` and the verbs around it, with this machine as the cluster, and with a Slurm that only takes notes."""

from __future__ import annotations

import json
import secrets
import subprocess
import time
from pathlib import Path

import pytest

from conf.errors import ConfigError, UserError
from slurm.history import Begin, End, Resume, add_event, read_history
from slurm.submission import read_submission
from slurm.submit import submit, sweep
from slurm.verbs import cancel, logs, resume, status, table
from tests.integration.runs import WORDS
from tests.timeouts import scaled
from tools.cli import VERBS
from train.outcome import Outcome, attempt_folder, write_outcome

GIVEN = [word for word in WORDS if not word.startswith(("launch.", "precision="))]


def words(corpus: Path, *more: str, name: str = "first", site: str = "slurm_cpu") -> list[str]:
    return ["pretrain", *GIVEN, f"data.sources=[{{path: {corpus}}}]", f"run.name={name}", f"cluster={site}", *more]


def test_a_run_is_kept_with_all_it_needs(corpus: Path, slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit(words(corpus, "nodes=2")) == 0
    root = Path("runs/first")
    assert slurm.read_text() == f"sbatch --parsable {root.resolve()}/slurm/pretrain.sbatch\n"
    told = capsys.readouterr().out
    assert "job 100" in told and "ZeRO 1, fp32 (auto: bf16 on nodes whose CPUs multiply it)" in told
    assert (root / "slurm/code/train/rank.py").exists() and (root / "slurm/code/slurm/job.sbatch.j2").exists()
    assert not list((root / "slurm/code").rglob("__pycache__"))
    assert "torch==" in (root / "slurm/environment.txt").read_text()
    config = (root / "slurm/config.yaml").read_text()
    assert "processes: 2" in config and "device: cpu" in config and "vocab_size: 300" in config
    assert "precision: auto" in config  # the ranks settle it where they run, not the login node
    submission = read_submission(root)
    assert (submission.tasks, submission.stages[0].jobs) == (2, ("100",))


def test_no_secret_is_kept(corpus: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = secrets.token_hex()
    monkeypatch.setenv("WANDB_API_KEY", secret)
    submit(words(corpus))
    kept = [path for path in Path("runs").rglob("*") if path.is_file()]
    assert len(kept) > 50 and not [path for path in kept if secret.encode() in path.read_bytes()]


def test_a_submission_from_within_a_job_leaves_its_bindings_behind(
    corpus: Path, slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CPU_BIND", "quiet,mask_cpu:0x1")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm/mine.conf")
    (tmp_path / "bin/sbatch").write_text(f"#!/bin/bash\nenv | grep ^SLURM_ > {tmp_path}/environment\necho 7\n")
    submit(words(corpus))
    assert (tmp_path / "environment").read_text() == "SLURM_CONF=/etc/slurm/mine.conf\n"


def test_a_dry_run_writes_nothing(corpus: Path, slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit(words(corpus, "dry_run=true")) == 0
    assert "#SBATCH --nodes=1" in capsys.readouterr().out
    assert not Path("runs").exists() and slurm.read_text() == ""


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["model.num_heads=7"], "model.num_heads=7"),
        (["nodes=0"], "nodes=0: must be at least 1"),
        (["cluster=nowhere"], "cluster=nowhere: no such option"),
        (["cluster.partion=x"], "cluster.partion: unknown key. Did you mean cluster.partition?"),
        (["launch.processes=3"], "launch.processes=3: nodes=1 with 1 ranks each make 1"),
        (["launch.device=cuda"], "launch.device=cuda: cluster.gpus_per_node=0"),
        (["after=[nobody]"], "after=nobody: no such submission"),
        (["jobs=3"], "jobs=3: only a chain has several"),
        (["parts=2"], "parts and name are not for pretrain"),
        (["parallel.tensor=2"], "parallel.tensor=2"),
        (["run.name='a%b'"], "sbatch does not take"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_written(corpus: Path, slurm: Path, more: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        submit(words(corpus, *more))
    assert said in str(caught.value)
    assert not Path("runs").exists() and slurm.read_text() == ""


def test_a_verb_that_cannot_be_submitted(slurm: Path) -> None:
    with pytest.raises(UserError, match="pretrian: cannot be submitted. Did you mean pretrain"):
        submit(["pretrian"])


def test_a_machine_without_slurm(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="sbatch is not installed here"):
        submit(words(corpus))
    assert not Path("runs").exists()


def test_a_run_that_has_a_job_is_not_submitted_again(corpus: Path, slurm: Path, tmp_path: Path) -> None:
    submit(words(corpus))
    (tmp_path / "bin/queue").write_text("100|RUNNING|None|n1|2026-01-01T00:00:00\n")
    with pytest.raises(UserError, match="job 100 waits or runs already"):
        submit(words(corpus))
    with pytest.raises(UserError, match="job 100 waits or runs already"):
        resume(["run=first"])


def test_a_chain(corpus: Path, slurm: Path, tmp_path: Path) -> None:
    chain = ["cluster.restarts.how=chain", "jobs=3"]
    submit(words(corpus, *chain))
    submit(words(corpus, *chain, "cluster.restarts.chain_by=afterany", name="second"))
    behind = [line.split()[2] for line in slurm.read_text().splitlines() if "--dependency" in line]
    assert behind == ["--dependency=singleton"] * 2 + ["--dependency=afterany:103", "--dependency=afterany:104"]
    (tmp_path / "bin/queue").write_text("102|PENDING|Dependency||N/A\n")
    submit(words(corpus, *chain, "after=[first]", name="third"))
    last = slurm.read_text().splitlines()[-3:]
    assert all("--kill-on-invalid-dep=yes" in line for line in last), "none of them begins behind a failure"
    assert "--dependency=afterok:102,singleton" in last[1]
    assert read_submission(Path("runs/first")).stages[0].jobs == ("100", "101", "102")


def test_a_preparation_in_parts_is_two_arrays_and_two_jobs(slurm: Path) -> None:
    submit(["prepare", "output=data/made", "parts=4", "throttle=2", "cluster=slurm_cpu"])
    lines = [line.split() for line in slurm.read_text().splitlines()]
    assert [Path(line[-1]).stem for line in lines] == ["read", "choose", "encode", "publish"]
    assert [line[2:-1] for line in lines] == [
        [],
        ["--dependency=afterok:100", "--kill-on-invalid-dep=yes"],
        ["--dependency=afterok:101", "--kill-on-invalid-dep=yes"],
        ["--dependency=afterok:102", "--kill-on-invalid-dep=yes"],
    ]
    script = Path("runs/prepare-made/slurm/encode.sbatch").read_text()
    assert "#SBATCH --array=0-3%2" in script
    assert 'phase=encode part="$SLURM_ARRAY_TASK_ID" parts=4' in script


def test_one_behind_another(corpus: Path, slurm: Path, tmp_path: Path) -> None:
    submit(words(corpus))
    with pytest.raises(UserError, match="it is not finished, and has no job in the queue"):
        submit(["export", "checkpoint=runs/first", "after=[first]", "cluster=slurm_cpu"])
    (tmp_path / "bin/queue").write_text("100|PENDING|Priority||N/A\n")
    submit(["export", "checkpoint=runs/first", "after=[first]", "cluster=slurm_cpu"])
    assert "--dependency=afterok:100 --kill-on-invalid-dep=yes" in slurm.read_text()
    end = End(attempt=1, state="refused", reason="no memory", action="stop", newest=0)
    add_event(Path("runs/first"), end)
    with pytest.raises(UserError, match=r"after=first: it has failed \(.*no memory\)"):
        submit(["export", "checkpoint=runs/first", "after=[first]", "cluster=slurm_cpu", "name=again"])


def test_an_import_is_one_process_of_the_command_line(slurm: Path) -> None:
    submit(["import", "hf=models/some model", "out=imported/it", "cluster=slurm_cpu"])
    script = Path("runs/import-it/slurm/import.sbatch").read_text()
    assert "-m tools.cli import 'hf=models/some model' out=imported/it" in script
    with pytest.raises(UserError, match="parts=2: only prepare is done in parts"):
        submit(["import", "hf=models/it", "parts=2", "cluster=slurm_cpu"])
    with pytest.raises(ConfigError, match="shard_bytes=1: must be at least 1024"):
        submit(["import", "hf=models/it", "shard_bytes=1", "cluster=slurm_cpu"])


def test_what_was_submitted_before_a_failure_is_taken_back(slurm: Path, tmp_path: Path) -> None:
    (tmp_path / "bin/refuse").write_text("encode.sbatch")
    with pytest.raises(UserError, match="Invalid account"):
        submit(["prepare", "output=data/made", "parts=4", "cluster=slurm_cpu"])
    assert slurm.read_text().splitlines()[-1] == "scancel 100 101"


def test_a_sweep_is_an_array(corpus: Path, slurm: Path) -> None:
    sweep(words(corpus, "optim.lr=1e-3,1e-2", "optim.weight_decay=0,0.1", "throttle=3", name="wide"))
    root = Path("runs/wide")
    assert len(slurm.read_text().splitlines()) == 1
    assert "#SBATCH --array=0-3%3" in (root / "slurm/pretrain.sbatch").read_text()
    rates = [(root / f"{number:03d}/slurm/config.yaml").read_text().split("\n  lr: ")[1].split()[0] for number in range(4)]
    assert rates == ["0.001", "0.001", "0.01", "0.01"]


def test_resume_forgets_what_counted_against_a_run(corpus: Path, slurm: Path) -> None:
    submit(words(corpus))
    root = Path("runs/first")
    add_event(root, Begin(attempt=1, job="100", nodes=("n1",), newest=0))
    add_event(root, End(attempt=1, state="crashed", reason="it fell", action="stop", newest=0))
    (root / "slurm/CANCEL").touch()
    assert resume(["run=first"]) == 0
    history = read_history(root)
    assert isinstance(history.events[-1], Resume) and history.stopped is None
    assert not (root / "slurm/CANCEL").exists()
    assert read_submission(root).stages[0].jobs == ("101",)


def test_a_finished_run_may_be_given_more_to_do(
    corpus: Path, slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submit(words(corpus))
    root = Path("runs/first")
    add_event(root, Begin(attempt=1, job="100", nodes=("n1",), newest=0))
    add_event(root, End(attempt=1, state="finished", reason="used up", action="done", newest=16))
    (root / "slurm/CANCEL").touch()
    assert resume(["run=first"]) == 0
    assert len(slurm.read_text().splitlines()) == 1, "there is nothing to resume"
    submit(words(corpus, "budget.steps=32"))
    assert len(slurm.read_text().splitlines()) == 2
    assert not read_history(root).is_done and not (root / "slurm/CANCEL").exists()
    (tmp_path / "bin/queue").write_text("101|PENDING|Resources||N/A\n")
    capsys.readouterr()
    status([])
    assert "waiting  -" in capsys.readouterr().out


def test_resume_comes_behind_what_nobody_had_the_time_to_write(corpus: Path, slurm: Path) -> None:
    """The run was stopped on purpose, and its script killed before it could say so."""
    submit(words(corpus))
    root = Path("runs/first")
    add_event(root, Begin(attempt=1, job="100", nodes=("n1",), newest=0))
    write_outcome(root, Outcome(attempt=1, state="stopped", reason="the file STOP", next="", on_purpose=True))
    resume(["run=first"])
    history = read_history(root)
    assert isinstance(history.events[-1], Resume) and history.stopped is None and len(history.ends) == 1


@pytest.mark.parametrize("ended", ["TIMEOUT", "OUT_OF_MEMORY"])
def test_slurm_tells_how_a_job_ended_that_nobody_speaks_for(
    corpus: Path, slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ended: str
) -> None:
    submit(words(corpus))
    add_event(Path("runs/first"), Begin(attempt=1, job="100", nodes=("n1",), newest=0))
    (tmp_path / "bin/ended").write_text(ended)
    status([])
    assert f"longhaul resume goes on; Slurm says {ended} of job 100" in capsys.readouterr().out


def test_cancel_takes_what_waits_and_lets_the_rest_save(corpus: Path, slurm: Path, tmp_path: Path) -> None:
    submit(words(corpus, "cluster.restarts.how=chain", "jobs=2"))
    queue = tmp_path / "bin/queue"
    queue.write_text("100|RUNNING|None|n1|2026-01-01T00:00:00\n101|PENDING|Dependency||N/A\n")
    assert cancel(["run=first", "wait_seconds=0.2"]) == 0
    assert [line for line in slurm.read_text().splitlines() if line.startswith("scancel")] == [
        "scancel 101",
        "scancel --batch --signal=USR1 100",
        "scancel 100",
    ]
    queue.unlink()
    with pytest.raises(UserError, match="has no job"):
        cancel(["run=first"])


def test_status_of_every_kind(corpus: Path, slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("waits", "runs", "done", "fell", "gone", "lost", "behind"):
        submit(words(corpus, name=name))
    (tmp_path / "bin/queue").write_text(
        "100|PENDING|Resources||2026-11-26T08:00:00\n101|RUNNING|None|n[1-2]|2026-01-01T00:00:00\n"
    )
    begin = Begin(attempt=1, job="1", nodes=("n3",), newest=0)
    ends = {"done": ("finished", "used up", "done"), "fell": ("crashed", "out of memory", "stop")}
    for name, (state, reason, action) in ends.items():
        add_event(Path("runs") / name, begin)
        add_event(Path("runs") / name, End(attempt=1, state=state, reason=reason, action=action, newest=0))  # type: ignore[arg-type]
    add_event(Path("runs/lost"), begin)
    path = Path("runs/behind/slurm/submission.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"after": [str(Path("runs/fell").resolve())]}))
    step = {"kind": "train", "attempt": 1, "step": 4, "loss": 3.25, "tokens": 400, "time": time.time()}
    lines = [step | {"step": 2, "tokens": 200, "time": step["time"] - 4.0}, step]
    Path("runs/runs/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Path("runs/runs/config.yaml").write_text(Path("runs/runs/slurm/config.yaml").read_text())
    capsys.readouterr()
    assert status([]) == 0
    shown = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert {name: shown[name][1] for name in shown if name != "RUN"} == {
        "waits": "waiting", "runs": "running", "done": "finished", "fell": "stopped", "gone": "cancelled", "lost": "lost",
        "behind": "cancelled",
    }  # fmt: skip
    assert shown["runs"][2:6] == ["4/16", "3.2500", "50", "24s"] and "n[1-2]" in shown["runs"]
    assert "Resources, expected at 2026-11-26T08:00:00" in " ".join(shown["waits"])
    assert "memory" in shown["fell"] and "fell" in shown["behind"]


def test_a_queue_that_does_not_answer_does_not_make_runs_lost(
    corpus: Path, slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("waits", "runs"):
        submit(words(corpus, name=name))
    add_event(Path("runs/runs"), Begin(attempt=1, job="101", nodes=("n3",), newest=0))
    (tmp_path / "bin/squeue").write_text('#!/bin/bash\necho "slurm_load_jobs error: Socket timed out" >&2; exit 1\n')
    (Path("runs/torn/slurm")).mkdir(parents=True)
    Path("runs/torn/slurm/submission.json").write_text("{")
    capsys.readouterr()
    assert status([]) == 0
    shown = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert shown["runs"].split()[1] == "running?" and "Socket timed out" in shown["runs"]
    assert shown["waits"].split()[1] == "waiting?"
    assert shown["torn"].split()[1] == "unknown"


def test_status_without_runs(slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status([]) == 0
    assert "runs: no runs" in capsys.readouterr().out
    with pytest.raises(UserError, match="run=first: no such run below runs"):
        status(["run=first"])


def test_logs_show_the_end_of_a_rank(corpus: Path, slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    submit(words(corpus))
    with pytest.raises(UserError, match="nothing has begun yet"):
        logs(["run=first"])
    folder = attempt_folder(Path("runs/first"), 1)
    folder.mkdir(parents=True)
    for rank in (0, 1):
        (folder / f"rank-{rank:05d}.log").write_text("".join(f"rank {rank} line {line}\n" for line in range(9)))
    capsys.readouterr()
    assert logs(["run=first", "rank=1", "lines=2"]) == 0
    assert capsys.readouterr().out == "rank 1 line 7\nrank 1 line 8\n"
    with pytest.raises(UserError, match="rank=7: attempt 1 has no log of it; ranks 0 to 1 have one"):
        logs(["run=first", "rank=7"])


def test_this_machine_runs_the_same_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export of nothing: the script begins, runs, decides, and the reason is kept."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert submit(["export", "checkpoint=empty", "cluster=local"]) == 0
    root = Path("runs/export-empty")
    deadline = time.monotonic() + scaled(60)
    while not read_history(root).ends and time.monotonic() < deadline:
        time.sleep(0.1)
    (end,) = read_history(root).ends
    assert (end.state, end.action) == ("refused", "stop"), subprocess.run(["cat", root / "slurm/export.out"])
    assert "empty" in (root / "logs/attempt-01/rank-00000.log").read_text()


def test_a_table_is_aligned() -> None:
    assert table(("A", "LONG", "C"), [("aaa", "b", "c d")]) == "A    LONG  C\naaa  b     c d"


def test_wrong_words_of_the_verbs(slurm: Path) -> None:
    with pytest.raises(ConfigError, match="rank=-1: must not be negative"):
        logs(["run=first", "rank=-1"])
    with pytest.raises(ConfigError, match="give run="):
        cancel([])


@pytest.mark.parametrize("example", VERBS["submit"].examples)
def test_the_examples_of_the_help_are_understood(example: str) -> None:
    """Their words are of the submission or of the verb; runs and corpora that they name are not there."""
    import shlex

    from conf.compose import combinations, compose, validate
    from slurm.config import SubmitConfig
    from slurm.submit import _split

    given = [word for word in shlex.split(example)[2:] if word != "-m"]
    verb, mine, rest = _split(given)
    validate(SubmitConfig, compose("submit", mine))
    for job in combinations(rest):
        from tools.cli import load

        if verb == "finetune":  # its model is the checkpoint's
            job = [*(word.replace("checkpoint=", "initial_checkpoint=") for word in job)]
            job += ["+model=llama_tiny", "data.sequence_length=64"]
        validate(load(VERBS[verb].schema), compose(VERBS[verb].root, job))  # type: ignore[arg-type]
