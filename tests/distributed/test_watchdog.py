"""A rank that stands still is noticed and named, whatever it does, and all ranks leave."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.timeouts import factor, scaled
from train.health.watchdog import lagging

RANK = """
import ctypes, os, signal, sys, time
from datetime import timedelta
from pathlib import Path
from train.config.watchdog import WatchdogConfig
from train.health.watchdog import Watchdog
folder, rank, what, factor = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], float(sys.argv[5])
config = WatchdogConfig(startup_seconds=30 * factor, step_seconds=factor, evaluate_seconds=4 * factor, grace_seconds=factor)
watchdog = Watchdog(
    config, folder=folder, rank=rank, world_size=2, leave=lambda said, _: (folder / "left.txt").write_text(f"{rank}: {said}")
)
import torch, torch.distributed as dist
store = dist.TCPStore("127.0.0.1", int(sys.argv[4]), 2, is_master=rank == 0, timeout=timedelta(seconds=20 * factor))
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=20 * factor))
watchdog.connect(store, ["first", "second"])
for step in range(4):
    watchdog.phase("data", step)
    time.sleep(0.3)
    watchdog.phase("forward", step)
    if step == 3 and what == "slow evaluation":
        watchdog.phase("evaluate", step)
        time.sleep(2.0 * factor)
        print("evaluated", flush=True)
    if step == 3 and rank == 1:
        if what == "sleep":
            time.sleep(60)
        if what == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        if what == "holding the interpreter":
            ctypes.PyDLL(None).sleep(60)
    dist.all_reduce(torch.zeros(1))
    watchdog.phase("update", step)
    watchdog.phase("log", step)
watchdog.close()
print("done", flush=True)
os._exit(0)
"""


def ranks_that(what: str, folder: Path) -> tuple[list[int | None], list[str]]:
    """Exit codes (None: it had to be killed) and output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(folder), str(rank), what, port, str(factor())],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    codes: list[int | None] = []
    patience_seconds = scaled(40.0)
    for rank in ranks:
        try:
            codes.append(rank.wait(patience_seconds))
            patience_seconds = scaled(5.0)  # ranks leave together
        except subprocess.TimeoutExpired:
            codes.append(None)
            rank.kill()
            rank.wait()
    return codes, [rank.stdout.read() for rank in ranks]


def test_a_rank_that_sleeps_while_the_other_waits_is_named(tmp_path: Path) -> None:
    codes, said = ranks_that("sleep", tmp_path)
    assert codes == [1, 1], said
    report = json.loads((tmp_path / "hang.json").read_text())
    assert report["lagging_ranks"] == [1]
    assert "hung: rank 1 on second lags, last seen in forward of step 3" in report["summary"]
    text = (tmp_path / "hang.txt").read_text()
    assert "time.sleep(60)" in text or 'File "<string>"' in text
    assert "all_reduce" in text, "the stack of the rank that waits is there too"
    assert (tmp_path / "left.txt").read_text()[3:].startswith("hung: rank 1")
    assert any(report["summary"] in output for output in said)


def test_a_rank_that_is_stopped_does_not_keep_the_others(tmp_path: Path) -> None:
    """The first rank serves the store; it is the second that is stopped here, and the first must leave by itself."""
    codes, said = ranks_that("stopped", tmp_path)
    assert codes == [1, None], said
    assert "rank 1 on second does not answer" in json.loads((tmp_path / "hang.json").read_text())["summary"]


def test_a_rank_whose_interpreter_is_held_up_leaves_its_stack(tmp_path: Path) -> None:
    codes, said = ranks_that("holding the interpreter", tmp_path)
    assert codes == [1, 1], said
    assert "rank 1 on second does not answer" in json.loads((tmp_path / "hang.json").read_text())["summary"]
    assert "Timeout" in (tmp_path / "stacks-rank-00001.txt").read_text()


def test_no_alarm_below_the_deadlines(tmp_path: Path) -> None:
    """Parts of a step of 0.3 s below a deadline of 1 s, and an evaluation of 2 s below its own of 4 s."""
    codes, said = ranks_that("slow evaluation", tmp_path)
    assert codes == [0, 0], said
    assert all(output.endswith("evaluated\ndone\n") for output in said)
    assert not (tmp_path / "hang.json").exists()


def report(rank: int, step: int, phase: str, waits: bool) -> dict:
    stack = 'File "/x/torch/distributed/distributed_c10d.py", line 1' if waits else 'File "/x/model.py", line 2'
    return {"rank": rank, "step": step, "phase": phase, "stacks": {"MainThread": stack}}


@pytest.mark.parametrize(
    ("reports", "expected"),
    [
        ([report(0, 5, "forward", True), report(1, 4, "log", False), report(2, 5, "data", False)], [1]),
        ([report(0, 5, "update", True), report(1, 5, "forward", False)], [1]),
        ([report(0, 5, "forward", True), report(1, 5, "forward", False), report(2, 5, "forward", True)], [1]),
        ([report(0, 5, "forward", True), report(1, 5, "forward", True)], [0, 1]),
    ],
)
def test_who_lags(reports: list[dict], expected: list[int]) -> None:
    assert lagging(reports) == expected
