"""What follows the end of an attempt: the decision for every kind of end, and who is suspected."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from conf.errors import UserError
from slurm.config import PreflightConfig, RestartsConfig
from slurm.decision import Decision, Situation, decide, suspects_of
from slurm.history import CANCEL_FILE, Action, Begin, End, Event, History, Resume, add_event, read_history
from slurm.lifecycle import CONFIG_FILE, begin, close_lost, end, judge_nodes, main, newest_step
from slurm.preflight import write_report
from slurm.submission import Stage, Submission
from slurm.verdict import Report
from train.outcome import CrashNote, Outcome, State, attempt_folder, claim_attempt, write_crash_note, write_outcome

NODES = ("n1", "n2", "n3", "n4")
RESTARTS = RestartsConfig(most_crashes=4, without_progress=3)
CRASH = Situation(state="crashed", reason="it fell", usable=NODES, needed=2)


def ended(attempt: int, state: str = "crashed", *, newest: int | None = 0, suspects: tuple[str, ...] = ()) -> End:
    return End(attempt=attempt, state=state, reason="", action="again", newest=newest, suspects=suspects)


def begun(attempt: int, newest: int | None = 0) -> Begin:
    return Begin(attempt=attempt, job="7", nodes=("n1", "n2"), newest=newest)


def past(*events: Event) -> History:
    return History(events)


@pytest.mark.parametrize(
    ("now", "action"),
    [
        (replace(CRASH, state="finished"), "done"),
        (replace(CRASH, state="refused"), "stop"),
        (replace(CRASH, state="stopped"), "again"),
        (replace(CRASH, state="stopped", on_purpose=True), "stop"),
        (replace(CRASH, state="stopped", job_runs=False), "leave"),
        (replace(CRASH, state="finished", job_runs=False), "done"),
        (CRASH, "again"),
        (replace(CRASH, superseded=True), "leave"),
        (replace(CRASH, state="refused", superseded=True), "leave"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.state}",
)
def test_each_state_has_its_action(now: Situation, action: Action) -> None:
    assert decide(now, past(begun(1), ended(1, newest=5)), RESTARTS).action == action


def test_attempts_without_progress_end_the_run() -> None:
    events = [begun(1), ended(1, newest=10)]
    for attempt in (2, 3):
        events += [begun(attempt, 10), ended(attempt, newest=10)]
    assert decide(CRASH, past(*events), RESTARTS).action == "again"
    events += [begun(4, 10), ended(4, "stopped", newest=10)]
    decision = decide(replace(CRASH, state="stopped"), past(*events), RESTARTS)
    assert decision.action == "stop" and "3 attempts in a row have left no newer checkpoint" in decision.reason


def test_progress_is_counted_anew_behind_a_checkpoint_and_behind_a_person() -> None:
    idle = [event for attempt in (1, 2, 3) for event in (begun(attempt), ended(attempt))]
    assert past(*idle).num_without_progress() == 3
    assert past(*idle, begun(4), ended(4, newest=5)).num_without_progress() == 0
    assert past(*idle, Resume(), begun(4), ended(4)).num_without_progress() == 1
    assert past(*idle[:4], begun(3), ended(3, "unfit")).num_without_progress() == 2, "it was not given the chance"


def test_what_has_no_steps_is_not_judged_by_them() -> None:
    events = [event for attempt in range(1, 20) for event in (begun(attempt, None), ended(attempt, "stopped", newest=None))]
    assert decide(replace(CRASH, state="stopped"), past(*events), RESTARTS).action == "again"


def test_crashes_have_a_budget() -> None:
    events = [event for attempt in range(1, 6) for event in (begun(attempt, attempt), ended(attempt, newest=attempt + 1))]
    assert decide(CRASH, past(*events[:-2]), RESTARTS).action == "again"
    decision = decide(CRASH, past(*events), RESTARTS)
    assert decision.action == "stop" and "5 crashes are more than cluster.restarts.most_crashes=4" in decision.reason


@pytest.mark.parametrize(
    ("suspects", "usable", "excluded"),
    [
        (("n2",), NODES, ("n2",)),
        (("n2", "n3"), NODES, ("n2", "n3")),
        (("n2", "n3", "n4"), NODES, ("n3", "n4")),
        (("n2", "n3"), ("n1", "n3", "n4"), ("n2", "n3")),
        (("n2",), ("n1", "n2"), ()),
        (("n2",), ("n1",), ("n2",)),
        (("n2",), (), ()),
    ],
    ids=["one", "all to spare", "the latest", "one is down already", "none to spare", "too few anyway", "not known"],
)
def test_suspects_are_left_out_as_long_as_there_are_others(
    suspects: tuple[str, ...], usable: tuple[str, ...], excluded: tuple[str, ...]
) -> None:
    history = past(begun(1), ended(1, newest=3, suspects=suspects))
    assert decide(replace(CRASH, usable=usable), history, RESTARTS) == Decision(
        action="again", reason="it fell", exclude=excluded
    )


def test_an_unfit_node_that_cannot_be_replaced_ends_the_run() -> None:
    history = past(begun(1), ended(1, "unfit", suspects=("n2",)))
    decision = decide(replace(CRASH, state="unfit", usable=("n1", "n2")), history, RESTARTS)
    assert decision.action == "stop" and "n2 cannot be left out" in decision.reason


def test_unfit_nodes_do_not_go_on_for_ever() -> None:
    events = [event for attempt in (1, 2, 3) for event in (begun(attempt), ended(attempt, "unfit"))]
    unfit = replace(CRASH, state="unfit")
    assert decide(unfit, past(*events[:4]), RESTARTS).action == "again"
    assert decide(unfit, past(*events), RESTARTS).action == "stop"
    alone = decide(replace(unfit, is_only_machine=True, usable=()), past(*events[:2]), RESTARTS)
    assert alone.action == "stop" and "there is no other machine" in alone.reason


NOTES = [
    CrashNote(rank=1, host="n2", time=1.0, error="RuntimeError: broken"),
    CrashNote(rank=0, host="n1", time=2.0, error="RuntimeError: connection closed by peer"),
]
HANG = Outcome(attempt=1, state="crashed", reason="hung", next="", suspects=("n4",))


@pytest.mark.parametrize(
    ("outcome", "notes", "lines", "suspected"),
    [
        (HANG, NOTES, [], ("n4",)),
        (None, NOTES, ["srun: error: Node failure on n3"], ("n3",)),
        (None, NOTES, ["srun: error: n3: task 2: Killed"], ("n3",)),
        (None, NOTES, ["srun: error: n3: task 2: Exited with exit code 137"], ("n3",)),
        (None, [], ["srun: error: n3: tasks 2-3: Segmentation fault", "srun: error: n1: task 0: Terminated"], ("n3",)),
        (None, NOTES, ["srun: error: n1: task 0: Exited with exit code 1"], ("n2",)),
        (None, [], ["srun: error: n1: task 0: Exited with exit code 1"], ()),
        (None, [replace(note, error="ValueError: bad word") for note in NOTES], [], ()),
        (None, [], [], ()),
        (None, [replace(NOTES[1], error="RendezvousError: no rendezvous of 2 ranks")], [], ()),
    ],
    ids=[
        "watchdog",
        "node",
        "killed",
        "killed, as a code",
        "fault",
        "first note",
        "no note",
        "all alike",
        "nothing known",
        "nobody came",
    ],
)
def test_who_is_suspected(
    outcome: Outcome | None, notes: list[CrashNote], lines: list[str], suspected: tuple[str, ...]
) -> None:
    assert suspects_of(outcome, notes, lines, tasks=2) == suspected


# --- on files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """A submitted run of a verb without steps."""
    Submission(
        name="one", verb="export", words=("export",), cluster="here", scheduler="slurm", tasks=1, nodes=1, gpus_per_node=0,
        scratch="/tmp", stages=(Stage(name="export", units=("",), jobs=("7", "8", "9")),), preflight=PreflightConfig(),
        restarts=RESTARTS, folder=str(tmp_path), directory=str(tmp_path),
    ).write()  # fmt: skip
    return tmp_path


RUNNING = Situation(state="", reason="", usable=NODES, needed=1)


def one_attempt(unit: Path, code: int, *, asked: str = "", now: Situation = RUNNING) -> list[str]:
    attempt = begin(unit, job="7", restarts=0, nodes=["n1"])
    assert attempt is not None
    return end(unit, attempt, code=code, asked=asked, now=now)


@pytest.mark.parametrize(
    ("code", "asked", "words"),
    [
        (0, "", ["exit", "0"]),
        (85, "", ["requeue", "-"]),
        (85, "USR1", ["requeue", "-"]),
        (93, "", ["exit", "93"]),
        (1, "", ["requeue", "-"]),
        (143, "TERM", ["requeue", "-"]),
    ],
)
def test_an_exit_code_decides_where_there_is_no_outcome(unit: Path, code: int, asked: str, words: list[str]) -> None:
    assert one_attempt(unit, code, asked=asked) == words


def test_a_signal_that_nobody_had_passed_on_is_a_stop(unit: Path) -> None:
    """Preemption with a time of grace signals the ranks alone, perhaps before they could listen."""
    attempt = begin(unit, job="7", restarts=0, nodes=["n1"])
    assert attempt is not None
    log = attempt_folder(unit, attempt) / "srun.log"
    log.write_text("srun: error: n1: tasks 0-3: Terminated\n")
    end(unit, attempt, code=143, asked="", now=RUNNING)
    last = read_history(unit).last_end
    assert last is not None and last.state == "stopped"
    attempt = begin(unit, job="7", restarts=1, nodes=["n1"])
    assert attempt is not None
    (attempt_folder(unit, attempt) / "srun.log").write_text(
        "srun: error: n1: task 1: Exited with exit code 1\nsrun: error: n1: task 0: Terminated\n"
    )
    end(unit, attempt, code=143, asked="", now=RUNNING)
    last = read_history(unit).last_end
    assert last is not None and last.state == "crashed", "one fell, and srun ended the others"


def test_a_controller_that_does_not_answer_has_decided_nothing(unit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert begin(unit, job="7", restarts=0, nodes=["n1"]) == 1
    capsys.readouterr()
    assert main(["end", str(unit), "1", "--code", "85", "--state", ""]) == 0
    assert capsys.readouterr().out == "requeue -\n"


def test_a_requeue_that_is_not_permitted_is_told(unit: Path) -> None:
    one_attempt(unit, 85)
    assert main(["stop", str(unit), "scontrol would not requeue job 7"]) == 0
    stop = read_history(unit).stopped
    assert stop is not None and "scontrol would not requeue job 7" in stop.reason
    assert (unit / "slurm/stopped.txt").exists()


@pytest.mark.parametrize(
    ("state", "on_purpose", "action"),
    [("finished", False, "done"), ("refused", False, "stop"), ("stopped", True, "stop"), ("stopped", False, "leave")],
)
def test_an_outcome_without_a_decision_counts_all_the_same(unit: Path, state: State, on_purpose: bool, action: Action) -> None:
    """The script was killed between the two."""
    assert begin(unit, job="7", restarts=0, nodes=["n1"]) == 1
    write_outcome(unit, Outcome(attempt=1, state=state, reason="why", next="", on_purpose=on_purpose))
    close_lost(unit)
    last = read_history(unit).last_end
    assert last is not None and last.action == action


def test_checks_that_a_signal_ended_condemn_nobody(unit: Path) -> None:
    assert begin(unit, job="7", restarts=0, nodes=["n1", "n2"]) == 1
    assert judge_nodes(unit, 1, ["n1", "n2"], code=143) == 1
    assert end(unit, 1, code=1, asked="", now=RUNNING) == ["requeue", "-"]
    last = read_history(unit).last_end
    assert last is not None and (last.state, last.suspects) == ("stopped", ())


def test_a_node_that_does_not_report_is_the_one_that_is_unfit(unit: Path) -> None:
    """The others waited for it in vain, until their own time was over: their reports are there, but not whole."""
    assert begin(unit, job="7", restarts=0, nodes=["n1", "n2", "n3"]) == 1
    for node in ("n1", "n3"):
        report = Report(
            node=node, free_memory_gb=9.0, free_disk_gb={"/tmp": 9.0}, sees_shared_folder=True, software="x",
            link_problem="not measured in time",
        )  # fmt: skip
        write_report(attempt_folder(unit, 1) / "preflight", report)
    assert judge_nodes(unit, 1, ["n1", "n2", "n3"], code=1) == 1
    assert end(unit, 1, code=1, asked="", now=RUNNING) == ["requeue", "n2"]
    last = read_history(unit).last_end
    assert last is not None and (last.state, last.suspects) == ("unfit", ("n2",)) and "has not reported" in last.reason


def test_lost_attempts_have_a_budget_too(unit: Path) -> None:
    """The scheduler requeues by itself what its nodes lose; nobody else is left to count."""
    for attempt in range(1, RESTARTS.most_crashes + 2):
        assert begin(unit, job="7", restarts=attempt - 1, nodes=["n1"]) == attempt
    with pytest.raises(UserError, match="5 crashes are more than"):
        begin(unit, job="7", restarts=9, nodes=["n1"])


def test_what_never_ends_is_given_up(unit: Path) -> None:
    words = [one_attempt(unit, 138, asked="USR1") for _ in range(30)]
    assert words[:-1] == [["requeue", "-"]] * 29 and words[-1] == ["exit", "93"]


def test_checks_that_never_began_tell_why(unit: Path) -> None:
    assert begin(unit, job="7", restarts=0, nodes=["n1", "n2"]) == 1
    (attempt_folder(unit, 1) / "srun.log").write_text("srun: error: Unable to create step: no such image\n")
    assert judge_nodes(unit, 1, ["n1", "n2"], code=1) == 1
    assert end(unit, 1, code=1, asked="", now=RUNNING) == ["requeue", "-"]
    last = read_history(unit).last_end
    assert last is not None and last.state == "crashed" and "no such image" in last.reason and last.suspects == ()


def test_an_outcome_counts_more_than_the_code(unit: Path) -> None:
    """srun makes 143 of 85 when one rank leaves before the others."""
    attempt = begin(unit, job="7", restarts=0, nodes=["n1"])
    assert attempt is not None
    write_outcome(unit, Outcome(attempt=attempt, state="stopped", reason="the time limit is near", next="", step=7))
    assert end(unit, attempt, code=143, asked="", now=RUNNING) == ["requeue", "-"]
    last = read_history(unit).last_end
    assert last is not None and (last.state, last.reason) == ("stopped", "the time limit is near")


def test_a_crash_is_told_by_the_rank_that_fell_first(unit: Path) -> None:
    attempt = begin(unit, job="7", restarts=0, nodes=["n1", "n2"])
    assert attempt is not None
    write_crash_note(unit, attempt, rank=3, error="OSError: no such device")
    write_crash_note(unit, attempt, rank=0, error="RuntimeError: connection closed")
    end(unit, attempt, code=1, asked="", now=RUNNING)
    last = read_history(unit).last_end
    assert last is not None and "rank 3 on " in last.reason and "OSError: no such device" in last.reason


def test_nothing_follows_a_refusal_until_a_person_resumes(unit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one_attempt(unit, 93)
    with pytest.raises(UserError, match="stopped for good at attempt 1"):
        begin(unit, job="8", restarts=0, nodes=["n1"])
    assert main(["begin", str(unit), "--job", "8"]) == 93
    assert capsys.readouterr().out == "", "the script reads a number from there"
    assert "longhaul resume run=" in (unit / "slurm/stopped.txt").read_text()
    add_event(unit, Resume())
    assert begin(unit, job="8", restarts=0, nodes=["n1"]) == 2


def test_a_finished_unit_is_not_begun_again(unit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one_attempt(unit, 0)
    assert begin(unit, job="8", restarts=0, nodes=["n1"]) is None
    capsys.readouterr()
    assert main(["begin", str(unit), "--job", "8"]) == 0
    assert capsys.readouterr().out == "\n"


def test_a_cancelled_unit_stays_so(unit: Path) -> None:
    attempt = begin(unit, job="7", restarts=0, nodes=["n1"])
    assert attempt is not None
    (unit / CANCEL_FILE).touch()
    assert end(unit, attempt, code=85, asked="TERM", now=RUNNING) == ["exit", "85"]
    last = read_history(unit).last_end
    assert last is not None and last.action == "stop" and "cancelled by" in last.reason
    with pytest.raises(UserError, match="was cancelled"):
        begin(unit, job="8", restarts=0, nodes=["n1"])


def test_a_job_that_the_scheduler_ended_is_left_to_it(unit: Path) -> None:
    assert one_attempt(unit, 85, now=replace(RUNNING, job_runs=False)) == ["exit", "85"]
    assert begin(unit, job="7", restarts=1, nodes=["n2"]) == 2, "it may have been requeued"


def test_an_attempt_without_an_end_is_given_one(unit: Path) -> None:
    """The script was killed with its node."""
    first = begin(unit, job="7", restarts=0, nodes=["n1", "n2"])
    assert first == 1
    (attempt_folder(unit, first) / "srun.log").write_text("srun: error: Node failure on n2\n")
    assert begin(unit, job="7", restarts=1, nodes=["n1", "n3"]) == 2
    lost = read_history(unit).ends[0]
    assert (lost.state, lost.action, lost.suspects) == ("lost", "leave", ("n2",)) and "n1,n2 was cut off" in lost.reason


def test_an_attempt_that_was_left_behind_decides_nothing(unit: Path) -> None:
    attempt = begin(unit, job="7", restarts=0, nodes=["n1"])
    assert attempt is not None
    claim_attempt(unit)
    assert end(unit, attempt, code=93, asked="", now=RUNNING) == ["exit", "93"]
    last = read_history(unit).last_end
    assert last is not None and last.action == "leave"


def test_a_chain_names_the_jobs_behind(unit: Path) -> None:
    from slurm.submission import read_submission

    replace(read_submission(unit), restarts=RestartsConfig(how="chain")).write()
    attempt = begin(unit, job="8_3", restarts=0, nodes=["n1"])
    assert attempt is not None
    assert end(unit, attempt, code=85, asked="", now=RUNNING) == ["next", "-", "9"]


def test_a_line_that_was_cut_off_is_left_out(unit: Path) -> None:
    one_attempt(unit, 85)
    path = unit / "slurm/history.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert len(read_history(unit).events) == 1
    add_event(unit, Resume())
    assert len(read_history(unit).events) == 2, "a new line begins behind it"


def test_steps_are_of_runs_that_train(tmp_path: Path) -> None:
    assert newest_step(tmp_path) is None
    (tmp_path / CONFIG_FILE).parent.mkdir()
    (tmp_path / CONFIG_FILE).touch()
    assert newest_step(tmp_path) == 0
