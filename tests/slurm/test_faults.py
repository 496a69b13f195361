"""What a cluster does to a run, and how the run goes on: each ends as it should, with the reason in `longhaul status`."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm.history import Begin
from slurm.submission import read_submission
from tests.slurm.conftest import Desk, nodes_of, settle, slowly
from tests.timeouts import scaled
from tools.exactness import differences
from train.outcome import read_outcome

pytestmark = pytest.mark.campaign(name="slurm")
LONG = ("budget.steps=100000", "checkpoint.every_steps=20", "evaluate.every_steps=null")
LIMITED_STEPS = 120  # of two seconds each


def reason_in_status(desk: Desk, name: str) -> str:
    text = desk.call("status", sites=False).text
    return next(line for line in text.splitlines() if line.startswith(f"{name} "))


def test_a_preempted_run_comes_back(desk: Desk) -> None:
    """A job of a partition with precedence takes all nodes: the run saves, is requeued once, and goes on behind it."""
    slowly(desk)
    unit = desk.submit("guest", "budget.steps=60", "checkpoint.every_steps=1000")
    desk.wait_for_step(unit, 10)
    script = desk.folder / "urgent.sh"
    script.write_text("#!/bin/bash\nsleep 3\n")
    desk.cluster.call("sbatch", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", str(script))
    desk.wait(lambda: len(desk.history(unit).ends) == 1, "the preemption")
    desk.cluster.mend()
    desk.wait_finished(unit)
    first, last = settle(desk, unit)
    assert (first.state, first.reason, first.action) == ("stopped", "received SIGTERM", "again")
    assert first.newest is not None and first.newest >= 10, "it saved where it was"
    assert desk.history(unit).events[2].restarts == 1, "requeued once"  # type: ignore[union-attr]
    assert last.state == "finished"


def test_scancel_saves_and_stays_cancelled(desk: Desk) -> None:
    slowly(desk)
    unit = desk.submit("given-up", *LONG, "checkpoint.every_steps=1000")
    desk.wait_for_step(unit, 5)
    (job,) = desk.cluster.queue()
    desk.cluster.call("scancel", job)
    (end,) = settle(desk, unit)
    assert (end.state, end.action) == ("stopped", "leave")
    assert end.newest is not None and end.newest >= 5
    assert desk.cluster.job_state(job) == "CANCELLED"
    assert "stopped" in reason_in_status(desk, "given-up") and "SIGTERM" in reason_in_status(desk, "given-up")


def test_longhaul_cancel_and_resume(desk: Desk) -> None:
    slowly(desk)
    unit = desk.submit("paused", "budget.steps=60", "checkpoint.every_steps=1000")
    desk.wait_for_step(unit, 5)
    refused = desk.submit_call("paused", "budget.steps=60")
    assert refused.code == 93 and "waits or runs already" in refused.text
    done = desk.call("cancel", "run=paused", sites=False)
    assert done.code == 0, done.text
    assert desk.cluster.queue() == []
    (end,) = desk.history(unit).ends
    assert (end.state, end.action) == ("stopped", "stop") and "cancelled by" in end.reason
    assert "cancelled by" in reason_in_status(desk, "paused")
    desk.cluster.mend()
    done = desk.call("resume", "run=paused", sites=False)
    assert done.code == 0, done.text
    desk.wait_finished(unit)
    outcome = read_outcome(unit, 2)
    assert outcome is not None and outcome.state == "finished"


def test_a_node_that_is_unfit(desk: Desk) -> None:
    """The check before the first step finds a full disk: the node is named, left out, and the job goes on without it."""
    desk.cluster.break_node("n2", "full_disk")
    unit = desk.submit("picky")
    desk.wait_finished(unit)
    first, last = settle(desk, unit)
    assert (first.state, first.suspects) == ("unfit", ("n2",)) and "0.0 GB of disk are free" in first.reason
    first_nodes, next_nodes = nodes_of(desk, unit)
    assert "n2" in first_nodes and "n2" not in next_nodes
    assert last.state == "finished"


def test_unfit_nodes_and_no_others(desk: Desk) -> None:
    for node in ("n1", "n2", "n3", "n4"):
        desk.cluster.break_node(node, "full_disk")
    unit = desk.submit("hopeless", "batch.micro_batch=1", nodes=4)
    (end,) = settle(desk, unit)
    assert (end.state, end.action) == ("unfit", "stop") and "cannot be left out" in end.reason
    assert "unfit" in reason_in_status(desk, "hopeless")


def test_a_rank_that_crashes_at_once_on_one_node(desk: Desk) -> None:
    desk.cluster.break_node("n2", "crash")
    unit = desk.submit("sick")
    desk.wait_finished(unit)
    first, last = settle(desk, unit)
    assert (first.state, first.suspects) == ("crashed", ("n2",))
    assert "rank 1 on n2: RuntimeError: the device fell off the bus" in first.reason
    first_nodes, next_nodes = nodes_of(desk, unit)
    assert "n2" in first_nodes and "n2" not in next_nodes
    assert last.state == "finished"


def test_a_run_that_gets_nowhere_stops_with_a_report(desk: Desk) -> None:
    """All ranks fall by the same error: no node's fault. After three attempts without a checkpoint nobody tries again."""
    for node in ("n1", "n2", "n3", "n4"):
        desk.cluster.break_node(node, "crash")
    unit = desk.submit("doomed", "cluster.preflight.enabled=false")
    ends = settle(desk, unit)
    assert [end.action for end in ends] == ["again", "again", "stop"]
    assert all(end.suspects == () for end in ends)
    assert "3 attempts in a row have left no newer checkpoint" in ends[-1].reason
    report = (unit / "slurm/stopped.txt").read_text()
    assert report.count("the device fell off the bus") >= 3 and "longhaul resume run=doomed" in report
    assert "3 attempts in a row" in reason_in_status(desk, "doomed")


def test_what_comes_after_a_failure_is_cancelled(desk: Desk) -> None:
    """A run that is refused on its node: what was to come after it is taken out of the queue, and says why."""
    corpus = ["corpus=text", "corpus.paths=[nowhere.txt]", "output=data/none"]
    done = desk.call("submit", "prepare", *corpus, "name=none", "cluster=here")
    assert done.code == 0, done.text
    unit = desk.submit("orphan", "data.sources=[{path: data/none}]", "after=[none]")
    desk.wait_until_gone(unit)
    assert not (unit / "logs").exists()
    line = reason_in_status(desk, "orphan")
    assert "cancelled" in line and "none failed" in line
    assert "nowhere.txt" in reason_in_status(desk, "none")


def test_a_sweep_is_an_array_with_one_table(desk: Desk) -> None:
    words = ["optim.lr=1e-3,1e-2,1e-1", "-m", "throttle=2"]
    root = desk.submit("sweep", *words, nodes=1)
    desk.wait_until_gone(root)
    text = desk.call("status", "run=sweep", sites=False).text
    assert text.count("finished") >= 6, text
    ranking = [line.split() for line in text.split("optim.lr")[1].splitlines()[1:4]]
    losses = [float(cells[4]) for cells in ranking]
    assert losses == sorted(losses) and {cells[0] for cells in ranking} == {"000", "001", "002"}
    assert "3 finished" in desk.call("status", sites=False).text


@pytest.mark.parametrize("number", [0, 1])
def test_one_run_of_a_sweep_goes_on_alone(desk: Desk, number: int) -> None:
    """A stop of one task requeues that one; Slurm gives the last task of an array the number of the whole."""
    slowly(desk)
    root = desk.submit("pair", "optim.lr=1e-3,1e-2", "-m", "budget.steps=60", "checkpoint.every_steps=1000", nodes=1)
    units = [root / "000", root / "001"]
    for unit in units:
        desk.wait_for_step(unit, 5)
    (job,) = read_submission(root).job_ids()
    desk.cluster.call("scancel", "--signal=USR1", "--batch", f"{job}_{number}")
    desk.wait(lambda: len(desk.history(units[number]).ends) == 1, "the stop")
    desk.cluster.mend()
    for unit in units:
        desk.wait_finished(unit)
    assert len(nodes_of(desk, units[number])) == 2 and len(nodes_of(desk, units[1 - number])) == 1


@pytest.mark.parametrize("name", ["two words", "it's", "größe-模型"])
def test_odd_names(desk: Desk, name: str) -> None:
    unit = desk.submit(name, nodes=1)
    desk.wait_finished(unit)
    assert (unit / "FINISHED").exists()


def test_a_bad_configuration_submits_nothing(desk: Desk) -> None:
    done = desk.call("submit", "pretrain", "model=gpt2_tiny", "model.num_heads=7", "run.name=bad", "cluster=here")
    assert done.code == 93 and "model.num_heads=7" in done.text
    assert not (desk.folder / "runs").exists() and desk.cluster.queue() == []


def test_a_chain_of_jobs_without_requeue(desk: Desk) -> None:
    """Sites that forbid requeueing: the next job of the chain goes on, and those behind the end leave at once."""
    slowly(desk)
    chain = ["cluster.restarts.how=chain", "jobs=3", f"launch.time_limit_minutes={scaled(0.4)}", "checkpoint.every_steps=1000"]
    unit = desk.submit("links", *chain, "budget.steps=100", f"watchdog.step_seconds={scaled(60)}")
    desk.wait(lambda: len(desk.history(unit).ends) == 1, "the first job's end")
    desk.cluster.mend()
    desk.wait_finished(unit)
    ends = settle(desk, unit)
    assert [end.state for end in ends] == ["stopped", "finished"]
    assert ends[0].reason == "the time limit is near"
    begins = [event for event in desk.history(unit).events if isinstance(event, Begin)]
    assert len({begin.job for begin in begins}) == 2 and all(begin.restarts == 0 for begin in begins)


@pytest.mark.timeout(900)
def test_a_run_longer_than_its_limit(desk: Desk) -> None:
    """One job after another, each of a minute, until it is done; to the bit the run without a limit."""
    for node in ("n1", "n2", "n3", "n4"):
        desk.cluster.break_node(node, "slow:2.0")
    words = [f"budget.steps={LIMITED_STEPS}", "monitor=default", "monitor.wandb.mode=offline", "checkpoint.every_steps=1000"]
    limited = desk.submit("limited", *words, "cluster.time_limit_minutes=1", "cluster.warning_seconds=1")
    desk.wait_finished(limited, 800.0)
    desk.cluster.mend()
    whole = desk.submit("whole", *words)
    desk.wait_finished(whole)
    ends = desk.history(limited).ends
    begins = [event for event in desk.history(limited).events if isinstance(event, Begin)]
    used_seconds = sum(end.time - begin.time for begin, end in zip(begins, ends, strict=True))
    assert used_seconds > 5 * 60, "it needs five times its limit"
    assert len(ends) >= 5 and {end.state for end in ends[:-1]} == {"stopped"}
    assert differences(whole, limited) == []
    sent = wandb_history(limited)
    assert len(sent) == 1, "one run in W&B"
    (rows,) = sent.values()
    assert [row["train/step"] for row in rows] == list(range(1, LIMITED_STEPS + 1)), "every step once"
    tokens = [row["train/tokens"] for row in rows]
    assert tokens == sorted(set(tokens)), "the axis rises"


def wandb_history(run_dir: Path) -> dict[str, list[dict]]:
    """What a sync of the offline files would send, by run id: the rows of the training steps in order."""
    from wandb.proto.wandb_internal_pb2 import Record

    found: dict[str, list[dict]] = {}
    for path in sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb")):
        for data in log_records(path.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            row = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            if "train/loss" in row:
                found.setdefault(path.stem.removeprefix("run-"), []).append(row)
    return found


def log_records(content: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format behind W&B's own header: blocks of 32 KiB; checksum, length, kind."""
    place, parts = 7, b""
    while place + 7 <= len(content):
        if (left := -place % 32768) and left < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            yield parts
            parts = b""
