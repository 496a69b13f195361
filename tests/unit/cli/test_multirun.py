"""`-m`: every combination once, each in a process and, when training, in a folder of its own; signals reach the job once."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conf.compose import combinations
from conf.errors import ConfigError
from conf.sweep import with_names
from tests.timeouts import scaled
from tools.multirun import run_all


def test_combinations_in_order() -> None:
    assert combinations(["a=1,2", "b=x", "c=u,v"]) == [
        ["a=1", "b=x", "c=u"],
        ["a=1", "b=x", "c=v"],
        ["a=2", "b=x", "c=u"],
        ["a=2", "b=x", "c=v"],
    ]


def test_what_is_no_sweep_stays_one_value() -> None:
    words = ["a=[1,2]", "b={x: 1, y: 2}", "c='u,v'", "~d", "+e=1"]
    assert combinations(words) == [words]
    assert combinations([]) == [[]]


def test_ranges_and_choices() -> None:
    assert combinations(["a=range(1,4)"]) == [["a=1"], ["a=2"], ["a=3"]]
    assert combinations(["a=choice(x,[1,2])"]) == [["a=x"], ["a=[1,2]"]]


def test_words_that_cannot_be_read_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        combinations(["a", "b=[1", "c=1,2"])
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["a", "b=[1"]


@pytest.mark.parametrize(
    ("jobs", "names"),
    [
        ([["a=1"], ["a=2"]], ["sweep/000", "sweep/001"]),
        ([["a=1", "run.name=x"], ["a=2", "run.name=x"]], ["x/000", "x/001"]),
        ([["run.name=x"], ["run.name=y"]], ["x", "y"]),
        ([["run.name=x", "a=1"], ["run.name=y", "a=1"], ["run.name=x", "a=2"]], ["x/000", "y/001", "x/002"]),
        ([["run.name='a,b'", "a=1"], ["run.name='a,b'", "a=2"]], ["'a,b/000'", "'a,b/001'"]),
        ([["a=1", "++run.name=x"], ["a=2", "++run.name=x"]], ["x/000", "x/001"]),
    ],
)
def test_no_two_jobs_share_a_name(jobs: list[list[str]], names: list[str]) -> None:
    named = with_names(jobs)
    assert [[word.partition("=")[2] for word in job if "run.name=" in word] for job in named] == [[name] for name in names]
    others = [[word for word in job if "run.name=" not in word] for job in jobs]
    assert [[word for word in job if "run.name=" not in word] for job in named] == others


def test_one_job_needs_no_name() -> None:
    assert with_names([["a=1"]]) == [["a=1"]]


def test_one_process_for_each_job(capfd: pytest.CaptureFixture) -> None:
    code = run_all("plan", ["budget.steps=1000", "parallel.zero=7,8", "data.sources=[{path: /no/such}]"], None)
    captured = capfd.readouterr()
    assert code == 93
    assert [line for line in captured.out.splitlines() if line.startswith("job ")] == [
        "job 1 of 2: longhaul plan budget.steps=1000 parallel.zero=7 data.sources=[{path: /no/such}]",
        "job 2 of 2: longhaul plan budget.steps=1000 parallel.zero=8 data.sources=[{path: /no/such}]",
    ]
    assert "0 of 2 jobs ended with exit code 0; codes: [93, 93]" in captured.out
    assert "parallel.zero=7: must be" in captured.err and "parallel.zero=8: must be" in captured.err


def test_config_dir_reaches_the_jobs(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    assert run_all("plan", ["budget.steps=1000"], f"{tmp_path}/no") == 93
    assert f"--config-dir={tmp_path}/no: no such folder" in capfd.readouterr().err


JOB = """
import json, os, signal, sys, time
seen = []
def note(number, frame):
    seen.append(number)
signal.signal(signal.SIGINT, note)
print("ready", os.getpid(), flush=True)
deadline = time.monotonic() + 20
while not seen and time.monotonic() < deadline:
    time.sleep(0.01)
time.sleep(0.3)  # a second signal would come now
print(json.dumps(seen), flush=True)
sys.exit(85)
"""
SWEEP = """
import signal, sys
from tools import multirun
signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored here, as in a shell's background job
real = multirun.subprocess.Popen
multirun.subprocess.Popen = lambda command, **settings: real([sys.executable, "-c", sys.argv[1]], **settings)
sys.exit(multirun.run_all("plan", ["a=1,2,3"], None))
"""


@pytest.mark.parametrize("whole_group", [True, False], ids=["as from a terminal", "to the sweep alone"])
def test_interrupt_reaches_the_job_once_and_ends_the_sweep(whole_group: bool) -> None:
    """A second interrupt kills a run instead of letting it save, so the job must see exactly one."""
    command = [sys.executable, "-P", "-c", SWEEP, JOB]
    sweep = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0)
    while not sweep.stdout.readline().startswith("ready"):
        assert sweep.poll() is None
    time.sleep(0.1)
    (subprocess.os.killpg if whole_group else subprocess.os.kill)(sweep.pid, signal.SIGINT)
    out, _ = sweep.communicate(timeout=scaled(30))
    assert json.loads(out.splitlines()[0]) == [signal.SIGINT]
    assert "SIGINT: 2 of 3 jobs were not started" in out
    assert sweep.returncode == 85
