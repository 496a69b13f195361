"""Ranks that are copies of a command: each of them may fail, be slow or be killed, and none outlives the others."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.timeouts import scaled

BEGIN = """
import os, sys, time
from pathlib import Path
from conf.errors import UserError
from train import companions
from train.companions import ranks

def is_companion():
    return os.environ.get("RANK", "0") != "0"

def fail(error):
    if is_companion():
        print("told to fail", error, file=sys.stderr)
        os._exit(93)

def pids(folder=sys.argv[1]):
    (Path(folder) / str(os.getpid())).touch()
"""


def command(program: str, folder: Path) -> list[str]:
    return [sys.executable, "-P", "-c", BEGIN + program, str(folder)]


def run(program: str, folder: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    """What came of it, and the seconds that it took, most of which go into importing torch, twice."""
    started = time.monotonic()
    done = subprocess.run(command(program, folder), capture_output=True, text=True, check=False, timeout=scaled(100))
    return done, time.monotonic() - started


def alive(folder: Path) -> list[str]:
    """Which of the processes that left their number in the folder there still are."""
    return [path.name for path in folder.iterdir() if _state(path.name) not in ("", "Z")]


def _state(pid: str) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


def wait_until_gone(folder: Path) -> None:
    deadline = time.monotonic() + scaled(5.0)
    while alive(folder):
        assert time.monotonic() < deadline, "a companion has outlived rank 0"
        time.sleep(0.05)


def test_they_share_the_work_twice_and_leave_no_trace(tmp_path: Path) -> None:
    program = """
before = dict(os.environ)
for number in range(2):
    with ranks(3, "cpu") as context:
        pids()
        print(context.sum_over_ranks([context.rank + 1])[0], context.world_size, flush=True)
    print("companion" if is_companion() else "first", dict(os.environ) == before, flush=True)
"""
    done, _ = run(program, tmp_path)
    assert done.returncode == 0 and done.stdout == "6 3\nfirst True\n" * 2, done.stderr
    assert len(list(tmp_path.iterdir())) == 5 and not alive(tmp_path)


def test_one_that_fails_is_heard_where_a_collective_breaks(tmp_path: Path) -> None:
    program = """
try:
    with ranks(2, "cpu") as context:
        pids()
        context.barrier()
        fail("in the middle")
        context.barrier()
except UserError as error:
    sys.exit(f"user: {error}")
"""
    done, _ = run(program, tmp_path)
    assert done.stderr == "user: rank 1 of 2 ended with code 93:\ntold to fail in the middle\n", done.stderr
    assert done.returncode == 1 and not alive(tmp_path)


@pytest.mark.further
@pytest.mark.parametrize(
    ("how", "said"),
    [("fail('alone')", "ended with code 93:\ntold to fail alone"), ("is_companion() and os.kill(os.getpid(), 9)", "SIGKILL")],
)
def test_one_that_fails_is_heard_where_the_first_rank_hears_nothing(how: str, said: str, tmp_path: Path) -> None:
    """As in a collective of NCCL, which waits on; the other companion goes too."""
    program = f"""
companions._GRACE_SECONDS = 1.0
with ranks(3, "cpu") as context:
    pids()
    context.barrier()
    if context.rank == 1:
        {how}
    import ctypes
    ctypes.CDLL(None).sleep(90)
"""
    done, seconds = run(program, tmp_path)
    assert done.returncode == 93 and done.stderr.startswith("longhaul: rank 1 of 3 ") and said in done.stderr, done.stderr
    assert seconds < scaled(60)
    wait_until_gone(tmp_path)


@pytest.mark.further
def test_one_that_never_joins_ends_the_wait(tmp_path: Path) -> None:
    done, seconds = run("pids()\nfail('before it joined')\nwith ranks(2, 'cpu'): print('unreachable')", tmp_path)
    assert done.returncode == 93 and "told to fail before it joined" in done.stderr and not done.stdout, done.stderr
    assert seconds < scaled(60) and not alive(tmp_path)


@pytest.mark.further
def test_what_is_done_is_not_undone_by_those_that_leave_badly(tmp_path: Path) -> None:
    program = """
companions._LEAVING_SECONDS = 1.0
with ranks(3, "cpu") as context:
    pids()
    context.barrier()
    if context.rank == 1:
        time.sleep(90)
    if context.rank == 2:
        os._exit(7)
print("kept")
"""
    done, _ = run(program, tmp_path)
    assert (done.returncode, done.stdout) == (0, "kept\n"), done.stderr
    assert not alive(tmp_path)


@pytest.mark.further
def test_one_that_has_nothing_left_to_do_may_leave_first(tmp_path: Path) -> None:
    program = """
companions._GRACE_SECONDS = 0.2
with ranks(2, "cpu") as context:
    pids()
    if not is_companion():
        time.sleep(1.5)
print("kept")
"""
    done, _ = run(program, tmp_path)
    assert (done.returncode, done.stdout) == (0, "kept\n"), done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="needs the parent-death signal of Linux")
@pytest.mark.parametrize(
    ("number", "before"),
    [
        pytest.param(signal.SIGKILL, "pids() or is_companion() and time.sleep(90)", id="while it waits for them"),
        pytest.param(signal.SIGTERM, "", id="at work"),
    ],
)
def test_none_outlives_a_first_rank_that_is_killed(number: int, before: str, tmp_path: Path) -> None:
    program = f"""
{before}
with ranks(2, "cpu") as context:
    pids()
    context.barrier()
    time.sleep(90)
"""
    with subprocess.Popen(command(program, tmp_path), stderr=subprocess.DEVNULL) as process:
        while len(alive(tmp_path)) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(scaled(10.0)) == -number
    wait_until_gone(tmp_path)
