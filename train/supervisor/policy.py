"""What the supervisor decides: forward a signal, end a group, name the outcome of an attempt, start another one.

Ranks leave with 0, 85 or 93 (see train/outcome.py); any other code, or a signal nobody asked for, is a crash. The
`outcome.json` that rank 0 writes decides about the attempt, exit codes only where it is missing: ranks that are cut
off while they leave together give mixed codes. No torch here.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from conf.errors import UserError
from train.outcome import ExitCode, Outcome, State, attempt_folder, claim_attempt, read_outcome, write_outcome
from train.supervisor.console import LogStream, last_lines, say
from train.supervisor.ranks import RankGroup

_POLL_SECONDS = 0.02
_BACKOFF_LIMIT_SECONDS = 300.0
_ORDERLY = frozenset({ExitCode.FINISHED, ExitCode.RESUMABLE, ExitCode.DO_NOT_RESTART})


@dataclass(frozen=True, kw_only=True)
class Restarts:
    """How a crash is answered: by a new attempt, `most` times in a row, after `backoff_seconds`, doubled each time.

    They count from the start again once `progress()` gives another value than before.
    """

    most: int = 0
    backoff_seconds: float = 5.0
    progress: Callable[[], object] = lambda: None


NEVER = Restarts()


def supervise(
    command: Sequence[str],
    *,
    processes: int,
    run_dir: Path,
    restarts: Restarts = NEVER,
    grace_seconds: float = 10.0,
    leave_seconds: float = 120.0,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Run `command` as `processes` ranks until it finishes, stops, refuses or has crashed too often.

    Crashes are answered by new attempts as `restarts` says. When a rank
    crashes the others get SIGTERM and, `grace_seconds` later, SIGKILL. When a rank leaves in good order the others
    get `leave_seconds` to follow. `environment` replaces the inherited one. Call it from the main thread, in a
    process that has no other.

    Returns 0, 85, 93 or 1. Raises UserError when the command cannot be started.
    """
    if processes < 1:
        raise UserError(f"launch.processes={processes}: must be at least 1")
    base = dict(os.environ if environment is None else environment)
    base.setdefault("LONGHAUL_STARTED", repr(time.time()))  # a time limit counts from here, whatever attempt it is
    with _Signals() as signals:
        in_a_row, reached = 0, restarts.progress()
        while True:
            number = claim_attempt(run_dir)
            attempt = _Attempt(run_dir, number, signals=signals, grace_seconds=grace_seconds)
            attempt.run(command, processes=processes, environment=base, leave_seconds=leave_seconds)
            outcome = attempt.outcome()
            if (now := restarts.progress()) != reached:
                in_a_row, reached = 0, now
            again = outcome.state == "crashed" and in_a_row < restarts.most and not signals.stop_requested
            delay_seconds = min(restarts.backoff_seconds * 2**in_a_row, _BACKOFF_LIMIT_SECONDS)
            if again:
                outcome = replace(outcome, next=f"Nothing: the supervisor tries again after {delay_seconds:g} s.")
            attempt.tell(outcome)
            if not again or not signals.sleep(delay_seconds):
                return int(outcome.exit_code)
            in_a_row += 1
            say(f"restart {in_a_row} of {restarts.most}")


def run_attempt(
    command: Sequence[str],
    *,
    processes: int,
    run_dir: Path,
    attempt: int,
    grace_seconds: float = 10.0,
    leave_seconds: float = 120.0,
) -> int:
    """Run `command` as the `processes` ranks of `attempt`, which the caller has claimed; returns 0, 85, 93 or 1.

    For a caller that decides about the next attempt itself; otherwise as `supervise`.
    """
    with _Signals() as signals:
        the_attempt = _Attempt(run_dir, attempt, signals=signals, grace_seconds=grace_seconds)
        the_attempt.run(command, processes=processes, environment=os.environ, leave_seconds=leave_seconds)
        outcome = the_attempt.outcome()
        the_attempt.tell(outcome)
        return int(outcome.exit_code)


class _Signals:
    """Signals sent to the supervisor, noted by the handler and acted upon by the loop."""

    _FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.pending: list[signal.Signals] = []
        self.forwarded: set[signal.Signals] = set()
        self.interrupts = 0
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        for number in self._FORWARDED:
            self._previous[number] = signal.signal(number, self._note)
        # A closed terminal asks for a stop like SIGTERM; under nohup it is ignored, and stays so.
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            self._previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.pending.append(signal.Signals(number))
        self.interrupts += number == signal.SIGINT

    @property
    def stop_requested(self) -> bool:
        """Whether anyone asked for a stop; SIGUSR1 is Slurm's usual warning before the time limit."""
        return bool(self.forwarded or self.pending)

    def sleep(self, seconds: float) -> bool:
        """Wait; False when a signal arrived meanwhile."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.pending:
            time.sleep(_POLL_SECONDS)
        return not self.pending


class _Attempt:
    """One attempt: the ranks from start to end, and the verdict."""

    def __init__(self, run_dir: Path, number: int, *, signals: _Signals, grace_seconds: float) -> None:
        self._run_dir = run_dir
        self._number = number
        self._signals = signals
        self._grace_seconds = grace_seconds
        self._group = RankGroup(attempt_folder(run_dir, number))
        self._left_at: float | None = None
        self._kill_at: float | None = None
        self._crashed_rank: int | None = None
        self._recorded_before_crash: Outcome | None = None

    def run(self, command: Sequence[str], *, processes: int, environment: Mapping[str, str], leave_seconds: float) -> None:
        """Start the ranks and return when none is left."""
        stream = LogStream(self._group.log_path(0))
        try:
            own = {**environment, "LONGHAUL_ATTEMPT": str(self._number)}
            self._group.start(command, processes=processes, environment=own)
            while True:
                self._forward_signals()
                for rank, code in self._group.poll().items():
                    self._note_exit(rank, code)
                stream.pump()
                if not self._group.alive:
                    break
                self._end_when_due(leave_seconds)
                time.sleep(_POLL_SECONDS)
        finally:
            self._group.sweep()
            stream.close()

    def _forward_signals(self) -> None:
        while self._signals.pending:
            number = self._signals.pending.pop(0)
            if self._signals.interrupts > 1:
                say("second interrupt: killing the ranks")
                self._group.kill()
                self._signals.forwarded.add(signal.SIGINT)
                continue
            sent = signal.SIGTERM if number == signal.SIGHUP else number
            say(f"{number.name}: asking the ranks to save and stop; interrupt again to kill them")
            self._group.send(sent)
            self._signals.forwarded.add(sent)

    def _note_exit(self, rank: int, code: int) -> None:
        self._left_at = self._left_at or time.monotonic()
        if code in _ORDERLY or rank in self._group.ended_by_us or self._crashed_rank is not None:
            return
        self._crashed_rank = rank
        self._recorded_before_crash = self._recorded()
        if self._group.alive:
            say(f"rank {rank} {_in_words(code)}: ending the other ranks")

    def _end_when_due(self, leave_seconds: float) -> None:
        now = time.monotonic()
        if self._kill_at is not None:
            if now >= self._kill_at:
                self._group.kill()
            return
        overdue = self._left_at is not None and now >= self._left_at + leave_seconds
        if overdue and self._crashed_rank is None:
            say(f"ranks {_listed(self._group.alive)} did not follow within {leave_seconds:g} s: ending them")
        if overdue or self._crashed_rank is not None:
            self._group.end()
            self._kill_at = now + self._grace_seconds

    def tell(self, outcome: Outcome) -> None:
        """Write the verdict down, and say it unless all went well."""
        try:
            write_outcome(self._run_dir, outcome)
        except OSError as error:  # a full disk must not hide the exit code, which says the same
            say(f"{attempt_folder(self._run_dir, self._number)}: outcome.json could not be written ({error.strerror})")
        if outcome.state != "finished":
            self._show_crash()
            say(f"attempt {self._number} {outcome.state}: {outcome.reason}")
            say(outcome.next)

    def _show_crash(self) -> None:
        """The end of the log of the rank that crashed first, if one did."""
        if self._crashed_rank is None:
            return
        path = self._group.log_path(self._crashed_rank)
        lines = last_lines(path, 20)
        say(f"the last {len(lines)} lines of {path}:" if lines else f"{path} is empty")
        for line in lines:
            say(f"  | {line}")

    def _recorded(self) -> Outcome | None:
        try:
            return read_outcome(self._run_dir, self._number)
        except UserError as error:
            say(str(error))
            return None

    def outcome(self) -> Outcome:
        """The verdict: the recorded outcome where it can be believed, otherwise what the exit codes say."""
        codes = {str(rank): code for rank, code in sorted(self._group.codes.items())}
        recorded = self._recorded()
        if recorded is not None and not self._is_echo(recorded) and not self._is_consequence(recorded):
            return replace(recorded, rank_codes=codes)
        state, reason = self._by_codes()
        return Outcome(
            attempt=self._number,
            state=state,
            reason=reason,
            next=_NEXT[state],
            step=recorded.step if recorded else None,
            rank_codes=codes,
        )

    def _is_echo(self, recorded: Outcome) -> bool:
        """Whether `recorded` is rank 0's answer to the SIGTERM we sent because another rank had crashed.

        It then says "stopped", in good faith, but nobody asked for a stop: the crash is what happened.
        """
        return (
            recorded.state == "stopped"
            and self._crashed_rank is not None
            and self._recorded_before_crash is None
            and not self._signals.stop_requested
        )

    def _is_consequence(self, recorded: Outcome) -> bool:
        """Whether `recorded` is rank 0's complaint that another rank was lost, which a signal had ended."""
        own = {rank: code for rank, code in self._group.codes.items() if rank not in self._group.ended_by_us}
        return recorded.state == "crashed" and own.get(0, 0) >= 0 and any(code < 0 for code in own.values())

    def _by_codes(self) -> tuple[State, str]:
        forwarded = self._signals.forwarded
        if self._signals.interrupts > 1 and self._group.ended_by_us:
            return "crashed", "killed by a second interrupt before it had saved"
        own = {rank: code for rank, code in self._group.codes.items() if rank not in self._group.ended_by_us}
        bad = {rank: code for rank, code in own.items() if code not in _ORDERLY}
        # The default reaction to a signal means that it came before training was ready to save: nothing is lost.
        default_codes = {sign * number + base for number in forwarded for sign, base in ((-1, 0), (1, 128))}
        if bad and all(code in default_codes for code in bad.values()):
            names = ", ".join(sorted(number.name for number in forwarded))
            return "stopped", f"{names} arrived before training was ready to save"
        if bad:
            rank = self._crashed_rank if self._crashed_rank in bad else next(iter(bad))
            return "crashed", f"rank {rank} {_in_words(bad[rank])}; its log is {self._group.log_path(rank)}"
        if ExitCode.DO_NOT_RESTART in own.values():
            return "refused", f"exit code {int(ExitCode.DO_NOT_RESTART)} without a record of why"
        if ExitCode.RESUMABLE in own.values():
            return "stopped", f"exit code {int(ExitCode.RESUMABLE)} without a record of why"
        if self._group.ended_by_us:
            return "crashed", f"ranks {_listed(self._group.ended_by_us)} hung while the others had left with code 0"
        return "finished", "every rank left with code 0"


_NEXT: dict[State, str] = {
    "finished": "Nothing.",
    "stopped": "Run the same command again: it resumes from the newest checkpoint.",
    "refused": "Read rank 0's log and mend the cause; running it again as it is would end the same way.",
    "crashed": "Read the log; the same command resumes from the newest checkpoint.",
}


def _in_words(code: int) -> str:
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def _listed(ranks: Sequence[int] | set[int]) -> str:
    return ", ".join(str(rank) for rank in sorted(ranks))
