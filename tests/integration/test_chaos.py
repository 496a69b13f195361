"""The campaign's own senses, on programs that only look like a run: what it must notice, and what it must not start."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import get_args

import psutil
import pytest

from conf.errors import ConfigError, UserError
from tests.integration.runs import WORDS
from tests.timeouts import scaled
from tools import watched_run
from tools.chaos import ChaosConfig, Struck, chaos, judge
from tools.chaos_faults import IN_SAVE, MEANING, Kind, Moment, Shape, Strike, plan_data_faults, plan_moments, reach
from tools.watched_run import UnexpectedEnd, WatchedRun

pytestmark = pytest.mark.further

SHAPE = Shape(processes=2, steps=120, samples=960, save_steps=tuple(range(5, 120, 5)))
LEAVES_A_CHILD = """
import subprocess, sys
subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"], start_new_session=True)
"""


def program(folder: Path, source: str) -> WatchedRun:
    return WatchedRun([sys.executable, "-S", "-c", source], folder / "run", patience_seconds=scaled(5.0))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched_run, "END_SECONDS", 0.3)


def test_a_process_that_stays_is_an_orphan_and_does_not_stay(tmp_path: Path, impatient: None) -> None:
    run = program(tmp_path, LEAVES_A_CHILD + "import time; time.sleep(60)")
    run.start()
    run.wait(lambda: len(run.supervisor.children()) == 1, "the child was there")
    child = run.supervisor.children()[0]
    run.kill_supervisor()
    assert len(run.orphans) == 1 and run.orphans[0].startswith(f"{child.pid}: ")
    assert psutil.wait_procs([child], timeout=scaled(2.0))[1] == []


def test_a_process_that_outlives_a_good_end_is_an_orphan(tmp_path: Path, impatient: None) -> None:
    run = program(tmp_path, LEAVES_A_CHILD)
    run.finish()
    assert len(run.orphans) == 1


def test_the_death_of_a_machine_leaves_nothing(tmp_path: Path) -> None:
    run = program(tmp_path, LEAVES_A_CHILD + "import time; time.sleep(60)")
    run.start()
    run.wait(lambda: len(run.supervisor.children()) == 1, "the child was there")
    child = run.supervisor.children()[0]
    run.kill_all()
    assert psutil.wait_procs([child], timeout=scaled(2.0))[1] == []
    assert run.orphans == []


def test_other_processes_are_left_alone(tmp_path: Path) -> None:
    run = program(tmp_path, "import time; time.sleep(60)")
    environment = {**os.environ, watched_run.MARK: "another campaign"}
    with subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"], env=environment) as stranger:
        run.start()
        run.kill_all()
        assert stranger.poll() is None
        stranger.kill()


@pytest.mark.parametrize(
    ("source", "said"), [("import sys; print('why'); sys.exit(93)", "exit code 93"), ("1", "exit code 0 before")]
)
def test_an_end_that_nobody_caused_is_told_with_the_log(tmp_path: Path, source: str, said: str) -> None:
    run = program(tmp_path, source)
    run.start()
    with pytest.raises(UnexpectedEnd, match=said) as caught:
        run.wait(lambda: False, "anything happened")
    assert ("  | why" in str(caught.value)) == ("why" in source)


def test_a_run_that_stands_still_is_given_up(tmp_path: Path) -> None:
    run = program(tmp_path, "import time; time.sleep(60)")
    run.patience_seconds = 0.2
    run.start()
    with pytest.raises(UnexpectedEnd, match="waited 0.2 s for a step"):
        run.wait(lambda: False, "a step")
    run.close()


def test_moments_are_seeded_and_rise() -> None:
    kinds = get_args(Kind)
    moments = plan_moments(30, kinds, SHAPE, seed=3)
    assert moments == plan_moments(30, kinds, SHAPE, seed=3) != plan_moments(30, kinds, SHAPE, seed=4)
    steps = [moment.step for moment in moments]
    assert steps == sorted(set(steps)) and len(steps) == 30 and steps[-1] < SHAPE.steps
    assert Counter(moment.kind for moment in moments) == dict.fromkeys(kinds, 2)
    assert all(moment.step in SHAPE.save_steps for moment in moments if moment.kind in IN_SAVE)
    assert set(MEANING) == set(kinds)


def test_bad_data_is_the_same_for_everybody_and_holds_a_divergence() -> None:
    data = plan_data_faults(SHAPE, divergence_steps=3, seed=5)
    assert data == plan_data_faults(SHAPE, divergence_steps=3, seed=5)
    bad_steps = {sample // 8 for sample in data.nan_samples}
    assert any({step, step + 1, step + 2} <= bad_steps for step in bad_steps)
    assert data.spike_samples


def strike_of(attempt: int, kind: Kind = "machine") -> Strike:
    return Strike(moment=Moment(step=5, kind=kind, fraction=0.0), attempt=attempt, time=1.0, step=5, newest=0)


@pytest.mark.parametrize(
    ("strikes", "said"),
    [
        ([strike_of(1), strike_of(2)], ["attempt 3 ended without a fault"]),
        ([strike_of(1), strike_of(2), strike_of(3, "slow_rank")], ["attempt 3 ended without a fault"]),
        ([strike_of(1), strike_of(3), strike_of(4)], ["attempt 2 ended without", "attempt 4 finished in spite of a fault"]),
        ([strike_of(1), strike_of(2, "stopped_rank"), strike_of(2, "hang"), strike_of(3)], []),
    ],
)
def test_an_attempt_that_no_fault_answers_for_fails_the_campaign(
    tmp_path: Path, strikes: list[Strike], said: list[str]
) -> None:
    """Of four attempts each but the last has to have its fault: a crash by itself must not hide behind a restart."""
    calm, hunted = program(tmp_path / "calm", ""), program(tmp_path / "hunted", "")
    (hunted.run_dir / "logs" / "attempt-04").mkdir(parents=True)
    (hunted.run_dir / "metrics.jsonl").write_bytes(b"")
    failures = judge(Struck(strikes=strikes, failures=[]), calm, hunted)
    about_attempts = [line for line in failures if line.startswith("attempt ")]
    assert len(about_attempts) == len(said)
    assert all(wanted in line for wanted, line in zip(said, about_attempts, strict=True))
    assert any("metrics.jsonl" in line for line in failures), "there is nothing to compare"


STARTS_AGAIN = """
import json, os, pathlib, time
run_dir = pathlib.Path("{run_dir}")
for attempt in (1, 2):
    (run_dir / "logs" / f"attempt-0{{attempt}}").mkdir(parents=True)
    with (run_dir / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps({{"kind": "train", "step": 9, "attempt": attempt}}) + "\\n")
    time.sleep(0.5)
time.sleep(60)
"""


def test_a_fault_waits_for_the_attempt_behind_the_one_that_is_ending(tmp_path: Path) -> None:
    """A stopped rank holds its attempt up for seconds; the next fault must not be wasted on that one."""
    run = program(tmp_path, STARTS_AGAIN.format(run_dir=tmp_path / "run"))
    run.start()
    assert reach(run, Moment(step=9, kind="machine", fraction=0.0), later_than=0) == 1
    assert reach(run, Moment(step=9, kind="machine", fraction=0.0), later_than=1) == 2
    run.close()


def test_going_on_from_an_older_checkpoint_than_there_was_fails_the_campaign(tmp_path: Path) -> None:
    calm, hunted = program(tmp_path / "calm", ""), program(tmp_path / "hunted", "")
    (hunted.run_dir / "logs" / "attempt-02").mkdir(parents=True)
    lines = [{"kind": "train", "step": step, "attempt": attempt, "time": 0.0} for attempt, step in ((1, 9), (2, 6))]
    (hunted.run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    strikes = [Strike(moment=Moment(step=9, kind="rank", fraction=0.0), attempt=1, time=1.0, step=9, newest=8)]
    failures = judge(Struck(strikes=strikes, failures=[]), calm, hunted)
    assert "attempt 2 went on from step 5, there was a checkpoint of 8" in failures


def test_a_run_that_is_too_short_is_refused() -> None:
    short = Shape(processes=2, steps=10, samples=80, save_steps=(5,))
    with pytest.raises(UserError, match="the run has 10 steps, and 1 saves"):
        plan_moments(9, ("machine",), short, seed=0)
    with pytest.raises(UserError, match="for 3 faults within one"):
        plan_moments(3, ("rank_in_save",), short, seed=0)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"faults": 0}, "faults=0: must be at least 1"),
        ({"kinds": ()}, "kinds=\\[\\]: give at least one of machine"),
        ({"patience_seconds": 0.0}, "patience_seconds=0.0: must be above 0"),
    ],
)
def test_settings_that_make_no_campaign_are_refused(fields: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ChaosConfig(**fields)


def test_a_folder_that_exists_is_left_alone(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        chaos([f"folder={tmp_path}", "faults=2", f"data.sources=[{{path: {corpus}}}]", *WORDS])
    assert list(tmp_path.iterdir()) == []


def test_a_word_that_neither_knows_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="falts"):
        chaos([f"folder={tmp_path / 'new'}", "falts=2", f"data.sources=[{{path: {corpus}}}]", *WORDS])


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("watchdog.save_seconds=null", "watchdog.save_seconds=null: must be below patience_seconds=180"),
        ("watchdog.evaluate_seconds=180", "watchdog.evaluate_seconds=180: must be below patience_seconds=180"),
        ("patience_seconds=35", "watchdog.startup_seconds=40: must be below patience_seconds=35"),
    ],
)
def test_a_deadline_beyond_the_patience_is_refused(corpus: Path, tmp_path: Path, word: str, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        chaos([f"data.sources=[{{path: {corpus}}}]", f"folder={tmp_path / 'campaign'}", word])
    assert not (tmp_path / "campaign").exists()
