"""The supervisor with real processes: small Python ranks that exit, crash, hang, save and leave children behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conf.errors import UserError
from tests.timeouts import scaled
from train.outcome import Outcome, attempt_folder, last_attempt, read_outcome
from train.supervisor import supervise

REPOSITORY = Path(__file__).resolve().parents[3]

# What every rank script starts with: its rank, its folder, and a file that says it is ready for signals.
RANK_HEAD = """
import json, os, signal, socket, subprocess, sys, time
from pathlib import Path
rank, run = int(os.environ["RANK"]), Path(os.environ["RUN"])
attempt = int(os.environ["LONGHAUL_ATTEMPT"])
def ready(): (run / f"ready-{attempt}-{rank}").write_text(str(os.getpid()))
def outcome(state, reason="said so"):
    folder = run / "logs" / f"attempt-{attempt:02d}"
    (folder / "outcome.json").write_text(json.dumps(
        {"attempt": attempt, "state": state, "reason": reason, "next": "n", "step": 7, "time": 1.0, "host": "h"}))
"""

SUPERVISOR = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # both may be ignored here, as under nohup
signal.signal(signal.SIGINT, signal.default_int_handler)
from train.supervisor import Restarts, supervise
run = Path(sys.argv[1])
sys.exit(supervise([sys.executable, "-S", str(run / "rank.py")], processes=int(sys.argv[2]), run_dir=run,
                   restarts=Restarts(most=int(sys.argv[3]), backoff_seconds=0.05, progress=lambda: list(run.glob("saved-*"))),
                   grace_seconds=0.5, leave_seconds=1.0))
"""


class Launch:
    """A supervisor in a process of its own."""

    def __init__(self, run: Path, body: str, *, processes: int = 2, max_restarts: int = 0) -> None:
        (run / "rank.py").write_text(RANK_HEAD + textwrap.dedent(body))
        environment = {**os.environ, "RUN": str(run), "PYTHONPATH": str(REPOSITORY)}
        environment.pop("OMP_NUM_THREADS", None)
        self.run = run
        self.process = subprocess.Popen(
            [sys.executable, "-c", SUPERVISOR, str(run), str(processes), str(max_restarts)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait_ready(self, *names: str) -> list[int]:
        """Process ids in the files `names`, once all are there."""
        wait_until(lambda: all((self.run / name).exists() and (self.run / name).read_text() for name in names))
        return [int((self.run / name).read_text()) for name in names]

    def result(self, timeout_seconds: float = 10.0) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=scaled(timeout_seconds))
        return self.process.returncode, out, err

    def outcome(self, attempt: int = 1) -> Outcome:
        outcome = read_outcome(self.run, attempt)
        assert outcome is not None
        return outcome


def wait_until(condition: Callable[[], bool], timeout_seconds: float = 10.0) -> None:
    deadline = time.monotonic() + scaled(timeout_seconds)
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launch]]:
    started: list[Launch] = []

    def start(body: str, **options: int) -> Launch:
        started.append(Launch(tmp_path, body, **options))
        return started[-1]

    yield start
    for item in started:
        item.process.kill()
        item.process.communicate()


@pytest.mark.parametrize(
    ("code", "expected", "state"),
    [(0, 0, "finished"), (85, 85, "stopped"), (93, 93, "refused"), (7, 1, "crashed")],
)
def test_exit_codes_decide_without_a_record(launch: Callable[..., Launch], code: int, expected: int, state: str) -> None:
    run = launch(f"sys.exit({code})")
    assert run.result()[0] == expected
    outcome = run.outcome()
    assert outcome.state == state
    assert outcome.rank_codes == {"0": code, "1": code} or state == "crashed"


def test_the_record_decides_over_mixed_codes(launch: Callable[..., Launch]) -> None:
    run = launch("""
        if rank == 0:
            outcome("stopped", "time limit"); sys.exit(85)
        os.kill(os.getpid(), signal.SIGKILL) if (time.sleep(0.3) or True) else None
    """)
    assert run.result()[0] == 85
    assert run.outcome().reason == "time limit"
    assert run.outcome().step == 7
    assert run.outcome().rank_codes == {"0": 85, "1": -signal.SIGKILL}


def test_a_finished_run_that_fails_while_leaving_is_finished(launch: Callable[..., Launch]) -> None:
    run = launch("outcome('finished') if rank == 0 else time.sleep(0.3); os.abort()")
    assert run.result()[0] == 0


def test_an_unreadable_record_leaves_the_decision_to_the_codes(launch: Callable[..., Launch]) -> None:
    run = launch("(run / 'logs' / 'attempt-01' / 'outcome.json').write_text('{'); sys.exit(85)")
    code, _, err = run.result()
    assert code == 85
    assert "not valid JSON" in err


def test_ranks_find_their_places_in_the_environment(launch: Callable[..., Launch]) -> None:
    run = launch("(run / f'env-{rank}').write_text(json.dumps(dict(os.environ)))", processes=2)
    assert run.result()[0] == 0
    for rank in range(2):
        found = json.loads((run.run / f"env-{rank}").read_text())
        assert (found["RANK"], found["LOCAL_RANK"]) == (str(rank), str(rank))
        assert (found["WORLD_SIZE"], found["LOCAL_WORLD_SIZE"]) == ("2", "2")
        assert (found["MASTER_ADDR"], found["LONGHAUL_ATTEMPT"]) == ("127.0.0.1", "1")
        assert int(found["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2)
        assert ("LONGHAUL_STORE_FD" in found) == (rank == 0)


def test_rank_0_inherits_the_listening_rendezvous_port(launch: Callable[..., Launch]) -> None:
    run = launch("""
        address = ("127.0.0.1", int(os.environ["MASTER_PORT"]))
        if rank == 0:
            time.sleep(0.3)  # rank 1 connects before anyone accepts: the port is listening all the time
            store = socket.socket(fileno=int(os.environ["LONGHAUL_STORE_FD"]))
            assert store.getsockname() == address
            store.settimeout(5)
            assert store.accept()[0].recv(5) == b"hello"
        else:
            with socket.create_connection(address, timeout=5) as peer:
                peer.sendall(b"hello")
    """)
    code, out, err = run.result()
    assert code == 0, out + err


def test_logs_per_rank_and_rank_0_on_the_console(launch: Callable[..., Launch]) -> None:
    run = launch("print('out of', rank); print('error of', rank, file=sys.stderr)")
    _, out, _ = run.result()
    folder = attempt_folder(run.run, 1)
    for rank in range(2):
        text = (folder / f"rank-{rank:05d}.log").read_text()
        assert f"out of {rank}" in text and f"error of {rank}" in text
    assert "out of 0" in out and "error of 0" in out
    assert "of 1" not in out


def test_rank_0_is_shown_while_it_runs(launch: Callable[..., Launch]) -> None:
    run = launch("print('step 1'); ready(); time.sleep(30)", processes=1)
    assert run.process.stdout is not None
    assert run.process.stdout.readline() == "step 1\n"
    assert run.process.poll() is None


def test_one_crash_ends_the_others_within_a_second(launch: Callable[..., Launch]) -> None:
    run = launch("""
        ready()
        if rank == 1:
            for line in range(30): print("line", line)
            while not (run / "ready-1-0").exists(): time.sleep(0.01)
            sys.exit(3)
        time.sleep(60)
    """)
    run.wait_ready("ready-1-0", "ready-1-1")
    began = time.monotonic()
    code, out, err = run.result()
    assert time.monotonic() - began < 1.0
    assert code == 1
    assert "rank 1 exited with code 3" in err
    assert str(attempt_folder(run.run, 1) / "rank-00001.log") in err
    assert "| line 10\n" in err and "| line 29\n" in err and "| line 9\n" not in err
    assert run.outcome().rank_codes == {"0": -signal.SIGTERM, "1": 3}


def test_a_rank_that_ignores_sigterm_is_killed_after_the_grace(launch: Callable[..., Launch]) -> None:
    run = launch("""
        if rank == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            ready(); time.sleep(60)
        while not (run / "ready-1-0").exists(): time.sleep(0.01)
        sys.exit(3)
    """)
    assert run.result()[0] == 1
    assert run.outcome().rank_codes["0"] == -signal.SIGKILL


def test_a_rank_that_does_not_follow_the_others_is_ended(launch: Callable[..., Launch]) -> None:
    run = launch("sys.exit(85) if rank == 0 else time.sleep(60)")
    code, _, err = run.result()
    assert code == 85
    assert "ranks 1 did not follow within 1 s" in err


def test_a_crash_is_restarted_and_then_succeeds(launch: Callable[..., Launch]) -> None:
    run = launch("sys.exit(0 if attempt == 3 else 9)", max_restarts=2)
    code, _, err = run.result()
    assert code == 0
    assert [run.outcome(number).state for number in (1, 2, 3)] == ["crashed", "crashed", "finished"]
    assert "tries again" in run.outcome(1).next
    assert "restart 2 of 2" in err


def test_crashes_beyond_the_budget_end_the_run(launch: Callable[..., Launch]) -> None:
    run = launch("os.kill(os.getpid(), signal.SIGSEGV)", max_restarts=1)
    code, _, err = run.result()
    assert code == 1
    assert run.outcome(2).state == "crashed" and "tries again" not in run.outcome(2).next
    assert read_outcome(run.run, 3) is None
    assert "SIGSEGV" in err


@pytest.mark.parametrize("code", [85, 93])
def test_a_stop_or_a_refusal_is_not_restarted(launch: Callable[..., Launch], code: int) -> None:
    run = launch(f"sys.exit({code})", max_restarts=3)
    assert run.result()[0] == code
    assert read_outcome(run.run, 2) is None


STOPS_IN_GOOD_ORDER = """
    def stop(number, frame):
        (run / f"got-{rank}").write_text(signal.Signals(number).name)
        if rank == 0: outcome("stopped", "asked to")
        sys.exit(85)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1): signal.signal(number, stop)
    ready(); time.sleep(60)
"""


@pytest.mark.parametrize(
    ("sent", "received"),
    [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGINT"), ("SIGUSR1", "SIGUSR1"), ("SIGHUP", "SIGTERM")],
)
def test_signals_reach_every_rank(launch: Callable[..., Launch], sent: str, received: str) -> None:
    run = launch(STOPS_IN_GOOD_ORDER, max_restarts=2)
    run.wait_ready("ready-1-0", "ready-1-1")
    run.process.send_signal(signal.Signals[sent])
    assert run.result()[0] == 85
    assert [(run.run / f"got-{rank}").read_text() for rank in range(2)] == [received, received]
    assert run.outcome().reason == "asked to"


def test_a_stop_before_training_listens_is_resumable(launch: Callable[..., Launch]) -> None:
    run = launch("ready(); time.sleep(60)", max_restarts=2)
    run.wait_ready("ready-1-0", "ready-1-1")
    run.process.send_signal(signal.SIGTERM)
    assert run.result()[0] == 85
    assert "before training was ready" in run.outcome().reason


def test_no_restart_after_a_stop_that_failed(launch: Callable[..., Launch]) -> None:
    run = launch("signal.signal(signal.SIGTERM, lambda *_: os._exit(4)); ready(); time.sleep(60)", max_restarts=2)
    run.wait_ready("ready-1-0", "ready-1-1")
    run.process.send_signal(signal.SIGTERM)
    assert run.result()[0] == 1
    assert read_outcome(run.run, 2) is None


def test_a_stop_recorded_only_because_a_peer_crashed_is_a_crash(launch: Callable[..., Launch]) -> None:
    run = launch(
        """
        if attempt == 2: sys.exit(0)
        if rank == 0:
            signal.signal(signal.SIGTERM, lambda *_: (outcome("stopped"), sys.exit(85)))
            ready(); time.sleep(60)
        while not (run / "ready-1-0").exists(): time.sleep(0.01)
        sys.exit(3)
    """,
        max_restarts=1,
    )
    assert run.result()[0] == 0
    assert run.outcome(1).state == "crashed"
    assert run.outcome(1).step == 7


def test_a_second_interrupt_kills_at_once(launch: Callable[..., Launch]) -> None:
    run = launch(
        """
        signal.signal(signal.SIGINT, lambda *_: (run / f"heard-{rank}").write_text("1"))
        ready()
        while True: time.sleep(1)
    """,
        max_restarts=2,
    )
    run.wait_ready("ready-1-0", "ready-1-1")
    run.process.send_signal(signal.SIGINT)
    run.wait_ready("heard-0", "heard-1")
    assert run.process.poll() is None
    began = time.monotonic()
    run.process.send_signal(signal.SIGINT)
    assert run.result()[0] == 1
    assert time.monotonic() - began < 1.0
    assert "second interrupt" in run.outcome().reason


LEAVES_A_CHILD = """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    (run / f"child-{rank}").write_text(str(child.pid))
    ready()
"""


def test_no_orphan_survives_a_killed_supervisor(launch: Callable[..., Launch]) -> None:
    run = launch(LEAVES_A_CHILD + "\n    time.sleep(60)")
    pids = run.wait_ready("ready-1-0", "ready-1-1", "child-0", "child-1")
    run.process.kill()
    run.process.wait()
    wait_until(lambda: not any(alive(pid) for pid in pids), timeout_seconds=2.0)


def test_no_orphan_survives_a_rank_that_leaves(launch: Callable[..., Launch]) -> None:
    run = launch(LEAVES_A_CHILD)
    pids = run.wait_ready("child-0", "child-1")
    assert run.result()[0] == 0
    assert not any(alive(pid) for pid in pids)


def test_a_command_that_cannot_run_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rank 0 cannot be started: /no/such/program"):
        supervise(["/no/such/program"], processes=1, run_dir=tmp_path)
    with pytest.raises(UserError, match="launch.processes=0"):
        supervise(["true"], processes=0, run_dir=tmp_path)


def test_a_closed_console_does_not_end_the_run(launch: Callable[..., Launch]) -> None:
    run = launch(
        """
        ready()
        while not (run / "go").exists(): time.sleep(0.01)
        for line in range(100): print("x" * 1000)
    """,
        processes=1,
    )
    run.wait_ready("ready-1-0")
    assert run.process.stdout is not None
    run.process.stdout.close()
    (run.run / "go").touch()
    assert run.process.wait(timeout=scaled(10)) == 0
    assert len((attempt_folder(run.run, 1) / "rank-00000.log").read_text()) > 100_000


def test_a_console_nobody_reads_does_not_hold_the_watch(launch: Callable[..., Launch]) -> None:
    run = launch("print('x' * 300_000); sys.exit(5)", processes=1)
    assert run.process.wait(timeout=scaled(5)) == 1


def test_crashes_count_from_the_start_again_after_progress(launch: Callable[..., Launch]) -> None:
    """Two restarts in a row are allowed. The third attempt gets further before it crashes, so there are two more."""
    run = launch(
        """
        if attempt == 3:
            Path(os.environ["RUN"], "saved-1").touch()
        sys.exit(9)
        """,
        max_restarts=2,
        processes=1,
    )
    assert run.result()[0] == 1
    assert last_attempt(run.run) == 5
