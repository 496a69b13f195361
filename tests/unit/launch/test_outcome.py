"""Outcome files and the numbering of attempts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conf.errors import UserError
from train.outcome import (
    ExitCode,
    Outcome,
    attempt_folder,
    claim_attempt,
    last_attempt,
    read_crash_notes,
    read_outcome,
    write_crash_note,
    write_outcome,
)


def test_round_trip_keeps_every_field(tmp_path: Path) -> None:
    outcome = Outcome(
        attempt=3,
        state="stopped",
        reason="SIGUSR1",
        next="Run again.",
        step=70,
        on_purpose=True,
        suspects=("n3", "n1"),
        rank_codes={"0": 85, "1": -9},
    )
    path = write_outcome(tmp_path, outcome)
    assert read_outcome(tmp_path, 3) == outcome
    assert json.loads(path.read_text())["exit_code"] == 85
    assert [file.name for file in path.parent.iterdir()] == ["outcome.json"], "no temporary file is left"


def test_each_state_has_its_code() -> None:
    codes = {
        state: Outcome(attempt=1, state=state, reason="", next="").exit_code
        for state in ("finished", "stopped", "refused", "crashed")
    }
    assert codes == {
        "finished": ExitCode.FINISHED,
        "stopped": ExitCode.RESUMABLE,
        "refused": ExitCode.DO_NOT_RESTART,
        "crashed": ExitCode.CRASHED,
    }
    assert [int(code) for code in codes.values()] == [0, 85, 93, 1]


def test_missing_outcome_is_none(tmp_path: Path) -> None:
    assert read_outcome(tmp_path, 1) is None


@pytest.mark.parametrize("text", ["{", "[]", '{"state": "fine"}', '{"state": "crashed"}'])
def test_an_outcome_that_is_none_names_its_file(tmp_path: Path, text: str) -> None:
    attempt_folder(tmp_path, 1).mkdir(parents=True)
    (attempt_folder(tmp_path, 1) / "outcome.json").write_text(text)
    with pytest.raises(UserError, match=r"attempt-01.outcome\.json"):
        read_outcome(tmp_path, 1)


def test_fields_of_a_newer_version_are_passed_over(tmp_path: Path) -> None:
    path = write_outcome(tmp_path, Outcome(attempt=1, state="crashed", reason="r", next="n"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "weather": "rain"}))
    outcome = read_outcome(tmp_path, 1)
    assert outcome is not None and outcome.state == "crashed"


def test_attempts_count_past_gaps_and_strangers(tmp_path: Path) -> None:
    assert last_attempt(tmp_path) == 0
    assert claim_attempt(tmp_path) == 1
    attempt_folder(tmp_path, 107).mkdir()
    (tmp_path / "logs" / "attempt-x").mkdir()
    (tmp_path / "logs" / "notes.txt").touch()
    assert claim_attempt(tmp_path) == 108
    assert attempt_folder(tmp_path, 108).is_dir()


def test_notes_of_crashed_ranks_come_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    folder = attempt_folder(tmp_path, claim_attempt(tmp_path))
    for rank, error in ((3, "RuntimeError: first"), (0, "RuntimeError: second")):
        write_crash_note(tmp_path, 1, rank=rank, error=error)
    (folder / "crash-00009.json").write_text('{"rank": 9')  # the disk filled up
    notes = read_crash_notes(tmp_path, 1)
    assert [(note.rank, note.host, note.error) for note in notes] == [
        (3, "n7", "RuntimeError: first"),
        (0, "n7", "RuntimeError: second"),
    ]
    write_crash_note(tmp_path / "gone", 1, rank=0, error="nowhere to write")
