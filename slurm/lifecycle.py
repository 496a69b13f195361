"""What follows the end of an attempt. `python -m slurm.lifecycle begin | judge | end | stop | wait`, called by the job script.

The script starts things and asks here what to do next; this reads `outcome.json` of the attempt, and the history of the unit.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from conf.compose import read_config
from conf.errors import UserError
from slurm.decision import LOST_NODE, Decision, Situation, decide, first_fallen, suspects_of
from slurm.history import CANCEL_FILE, Action, Begin, End, History, add_event, listed, read_history
from slurm.preflight import TOKEN_FILE
from slurm.submission import Submission, read_submission, root_of
from slurm.verdict import PREFLIGHT_FOLDER, judge, read_reports
from train.checkpoint.manifest import published, step_of
from train.config.runs import RUNS
from train.launch import get_ready
from train.outcome import (
    ExitCode,
    Outcome,
    State,
    attempt_folder,
    claim_attempt,
    last_attempt,
    read_crash_notes,
    read_outcome,
    write_outcome,
)

CONFIG_FILE = Path("slurm") / "config.yaml"
REPORT_FILE = Path("slurm") / "stopped.txt"
WAIT_SECONDS = 2.0
LATE_SECONDS = 35.0  # network file systems believe for half a minute that a file is not there
BY_SIGNAL = frozenset({128 + signal.SIGTERM, 128 + signal.SIGUSR1})


# --- the verbs of the script ------------------------------------------------------------------------------------------


def begin(unit: Path, *, job: str, restarts: int, nodes: Sequence[str]) -> int | None:
    """Begin an attempt: its number, None when the unit is finished.

    Raises UserError when nothing may follow: it was stopped for good, or the configuration no longer fits.
    """
    close_lost(unit)
    history = read_history(unit)
    submission = read_submission(root_of(unit))
    if history.is_done and not _is_training(unit):
        print(f"{unit} is finished", file=sys.stderr)
        return None
    if (unit / CANCEL_FILE).exists():
        raise UserError(f"{unit}: was cancelled; longhaul resume goes on with it")
    if (stop := history.stopped) is not None:
        raise UserError(f"{unit}: stopped for good at attempt {stop.attempt}: {stop.reason}")
    idle = history.num_without_progress()
    attempt: int | None = None
    problem = ""
    if idle >= submission.restarts.without_progress:
        problem = f"{idle} attempts in a row have left no newer checkpoint"
    elif (crashes := history.num_crashes()) > submission.restarts.most_crashes:
        problem = f"{crashes} crashes are more than cluster.restarts.most_crashes={submission.restarts.most_crashes}"
    if not problem and _is_training(unit):
        with contextlib.redirect_stdout(sys.stderr):
            try:
                ready = get_ready(read_config(RUNS, unit / CONFIG_FILE), elsewhere=submission.scheduler == "slurm")
            except UserError as error:
                attempt = _start(unit, job=job, restarts=restarts, nodes=nodes)
                _refuse(unit, attempt, str(error))
                raise
        if ready is None:
            if not history.is_done:  # it had ended without the time to say so
                reason = "its budget is used up"
                add_event(unit, _end_of(unit, last_attempt(unit), "finished", reason, action="done"))
            return None
    attempt = _start(unit, job=job, restarts=restarts, nodes=nodes)
    if problem:
        _refuse(unit, attempt, problem)
        raise UserError(f"{unit}: {problem}; {unit / REPORT_FILE} tells what they met")
    return attempt


def _start(unit: Path, *, job: str, restarts: int, nodes: Sequence[str]) -> int:
    attempt = claim_attempt(unit)
    folder = attempt_folder(unit, attempt) / PREFLIGHT_FOLDER
    folder.mkdir()
    (folder / TOKEN_FILE).touch()  # what every node has to see; before any of them looks
    add_event(unit, Begin(attempt=attempt, job=job, restarts=restarts, nodes=tuple(nodes), newest=newest_step(unit)))
    return attempt


def _refuse(unit: Path, attempt: int, reason: str) -> None:
    outcome = Outcome(attempt=attempt, state="refused", reason=reason, next="Mend what the reason names, then longhaul resume.")
    write_outcome(unit, outcome)
    add_event(unit, _end_of(unit, attempt, "refused", reason, action="stop"))
    write_report(unit)


def _end_of(unit: Path, attempt: int, state: str, reason: str, *, action: Action, suspects: tuple[str, ...] = ()) -> End:
    return End(attempt=attempt, state=state, reason=reason, action=action, newest=newest_step(unit), suspects=tuple(suspects))


def stop(unit: Path, reason: str) -> None:
    """Nothing follows the last attempt, for a reason that the script has met behind its end."""
    history = read_history(unit)
    before = history.last_end
    state, attempt = (before.state, before.attempt) if before else ("lost", last_attempt(unit))
    whole = f"{before.reason}; {reason}" if before else reason
    add_event(unit, _end_of(unit, attempt, state, whole, action="stop"))
    write_report(unit)


def close_lost(unit: Path) -> None:
    """Give the attempt before an end, where nobody was left to write one: its node failed, or the script was killed."""
    history = read_history(unit)
    if (lost := history.open) is None:
        return
    outcome = read_outcome(unit, lost.attempt)
    state, reason = "lost", f"attempt {lost.attempt} on {listed(lost.nodes)} was cut off: a node failed, or the job was killed"
    if outcome is not None:
        state, reason = outcome.state, f"{outcome.reason}; then the job was ended"
    suspects: tuple[str, ...] = ()
    if state in ("lost", "crashed"):
        found = [match[1] for line in _srun_lines(unit, lost.attempt) if (match := LOST_NODE.search(line))]
        suspects = tuple(dict.fromkeys(found)) or (outcome.suspects if outcome else ())
    action: Action = "leave"
    if outcome is not None and outcome.state == "finished":
        action = "done"
    elif outcome is not None and (outcome.state == "refused" or outcome.on_purpose):
        action = "stop"
    add_event(unit, _end_of(unit, lost.attempt, state, reason, action=action, suspects=suspects))


def judge_nodes(unit: Path, attempt: int, nodes: Sequence[str], code: int) -> int:
    """0 when all nodes are fit; otherwise write down what is wrong, and 1. `code`: how the checks themselves ended."""
    submission = read_submission(root_of(unit))
    folder = attempt_folder(unit, attempt) / PREFLIGHT_FOLDER
    if code == 0:  # every node has written; a network file system may show it late
        await_that(lambda: {*nodes} <= {*read_reports(folder)}, LATE_SECONDS)
    reports = read_reports(folder)
    if code != 0 and (not reports or code in BY_SIGNAL):
        said = _lines(attempt_folder(unit, attempt) / "srun.log")[-1:]
        reason = "the check of the nodes " + (f"failed: {said[0]}" if said else f"ended with code {code}")
        state: State = "stopped" if code in BY_SIGNAL else "crashed"
        if state == "stopped":
            reason = "a signal arrived while the nodes were checked"
        write_outcome(unit, Outcome(attempt=attempt, state=state, reason=reason, next="Nothing: another attempt follows."))
        return 1
    verdict = judge(reports, nodes, submission.preflight, gpus=submission.gpus_per_node)
    if verdict.is_fit:
        return 0
    unfit = [f"{node}: {', '.join(problems)}" for node, problems in sorted(verdict.unfit.items())]
    reason = "unfit: " + "; ".join([*unfit, *verdict.general])
    print(f"longhaul: {reason}", file=sys.stderr)
    outcome = Outcome(
        attempt=attempt,
        state="crashed",
        reason=reason,
        next="Nothing: another attempt goes on without these nodes, where there are others.",
        suspects=tuple(sorted(verdict.unfit)),
    )
    write_outcome(unit, outcome)
    return 1


def await_that(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether something comes to hold in time."""
    deadline = time.monotonic() + seconds
    while not (holds := condition()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return holds


def end(unit: Path, attempt: int, *, code: int, asked: str, now: Situation) -> list[str]:
    """Decide about `attempt` and write it down; the words that the script acts upon.

    `code` is the launcher's exit code, `asked` the signal that the script had passed on. Of `now` everything but the state
    and its reason.
    """
    submission = read_submission(root_of(unit))
    if code != 0 and not asked and now.job_runs and submission.nodes > 1:  # another node may have written it
        await_that(lambda: read_outcome(unit, attempt) is not None, LATE_SECONDS)
    outcome = read_outcome(unit, attempt)
    if outcome is None:
        outcome = _by_code(unit, attempt, code, asked)
        with contextlib.suppress(OSError):  # a full disk: the next one finds an attempt without an outcome
            write_outcome(unit, outcome)
    suspects: tuple[str, ...] = ()
    is_unfit = outcome.reason.startswith("unfit: ")
    if is_unfit:
        suspects = outcome.suspects
    elif outcome.state == "crashed":
        lines, notes = _srun_lines(unit, attempt), read_crash_notes(unit, attempt)
        suspects = suspects_of(outcome, notes, lines, tasks=submission.tasks)
        if not outcome.suspects and notes:
            first = notes[0]
            outcome = replace(outcome, reason=f"rank {first.rank} on {first.host}: {first.error}")
        elif not outcome.suspects and (fallen := first_fallen(lines)) is not None:
            outcome = replace(outcome, reason=f"a task on {fallen[0]}: {fallen[1]}")
    state = "unfit" if is_unfit else outcome.state
    is_cancelled = (unit / CANCEL_FILE).exists()
    now = replace(
        now,
        state=state,
        reason=outcome.reason + ("; cancelled by `longhaul cancel`" if is_cancelled else ""),
        on_purpose=outcome.on_purpose or is_cancelled,
        superseded=last_attempt(unit) > attempt,
        is_only_machine=submission.scheduler == "local",
    )
    ended = _end_of(unit, attempt, state, now.reason, action="again", suspects=suspects)
    history = read_history(unit)
    decision = decide(now, History((*history.events, ended)), submission.restarts)
    print(f"longhaul: attempt {attempt} {state}: {decision.reason}", file=sys.stderr)
    try:
        add_event(unit, replace(ended, action=decision.action, reason=decision.reason))
        if decision.action == "stop" and not now.on_purpose:
            write_report(unit)
    except OSError as error:  # what was decided has to happen all the same
        print(f"longhaul: {error.filename}: cannot be written ({error.strerror})", file=sys.stderr)
    return _words(decision, replace(outcome, on_purpose=now.on_purpose), history, submission)


def _words(decision: Decision, outcome: Outcome, history: History, submission: Submission) -> list[str]:
    if decision.action == "done":
        return ["exit", str(int(ExitCode.FINISHED))]
    if decision.action == "stop":
        code = ExitCode.RESUMABLE if outcome.on_purpose else ExitCode.DO_NOT_RESTART
        return ["exit", str(int(code))]
    if decision.action == "leave":
        return ["exit", str(int(outcome.exit_code))]
    exclude = listed(decision.exclude)
    if submission.scheduler == "local":
        crashes = history.current.num_crashes()
        return ["requeue", exclude, "0" if outcome.state == "stopped" else str(min(60, 2**crashes))]
    if submission.restarts.how == "chain":
        begun = history.open
        return ["next", exclude, *(submission.jobs_behind(begun.job) if begun else ())]
    return ["requeue", exclude]


def _by_code(unit: Path, attempt: int, code: int, asked: str) -> Outcome:
    """The outcome of what wrote none; its last line usually says why."""
    states: dict[int, State] = {
        int(ExitCode.FINISHED): "finished",
        int(ExitCode.RESUMABLE): "stopped",
        int(ExitCode.DO_NOT_RESTART): "refused",
    }
    state = states.get(code, "crashed")
    lines = _lines(attempt_folder(unit, attempt) / "rank-00000.log")
    reason = f"exit code {code}" + (f": {lines[-1]}" if lines and state in ("refused", "crashed") else "")
    fallen = first_fallen(_srun_lines(unit, attempt)) is not None or read_crash_notes(unit, attempt)
    if asked and state in ("crashed", "finished"):  # it was not begun, or had no time to answer
        state, reason = "stopped", f"SIG{asked} arrived before it was ready to save"
    elif code in BY_SIGNAL and not fallen:  # the scheduler's own
        state, reason = "stopped", "a signal arrived before it was ready to save"
    return Outcome(attempt=attempt, state=state, reason=reason, next="Read the log beside this file.")


def write_report(unit: Path) -> None:
    """Write what the last attempts met, for the person who has to find out."""
    history = read_history(unit)
    begins = {event.attempt: event for event in history.events if isinstance(event, Begin)}
    lines = [f"{unit} goes on no more by itself. What its last attempts met:"]
    for ended in history.ends[-5:]:
        begun = begins.get(ended.attempt)
        where = f" on {listed(begun.nodes)}, job {begun.job}" if begun else ""
        lines.append(f"\nattempt {ended.attempt}{where}: {ended.state}; newest checkpoint: {_shown(ended.newest)}")
        lines.append(f"  {ended.reason}")
        lines += [f"  suspect: {node}" for node in ended.suspects]
        for log in _culprits(unit, ended.attempt):
            tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-8:]
            lines += [f"  the end of {log}:", *(f"    | {line}" for line in tail)]
    lines += ["", "When the cause is mended: longhaul resume run=" + read_submission(root_of(unit)).name]
    (unit / REPORT_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _culprits(unit: Path, attempt: int) -> list[Path]:
    folder = attempt_folder(unit, attempt)
    notes = read_crash_notes(unit, attempt)
    logs = [folder / f"rank-{note.rank:05d}.log" for note in notes[:1]] or [folder / "rank-00000.log"]
    return [log for log in logs if log.exists()]


def _shown(step: int | None) -> str:
    return "-" if step is None else f"step {step:,}"


def wait_for(roots: Sequence[Path]) -> None:
    """Return when all these submissions are finished. Raises UserError as soon as one has failed."""
    for root in roots:
        while not (states := read_submission(root).unit_states()).finished:
            gone = [str(unit) for _, _, unit in read_submission(root).units() if (unit / CANCEL_FILE).exists()]
            if states.failed or gone:
                why = states.failed or f"{gone[0]} was cancelled"
                raise UserError(f"{root.name} failed, so what comes after it is not begun: {why}")
            time.sleep(WAIT_SECONDS)


def newest_step(unit: Path) -> int | None:
    """Step of the newest checkpoint, 0 for none; None for a unit that does not train."""
    if not _is_training(unit):
        return None
    folders = published(unit / "checkpoints")
    return step_of(folders[-1]) if folders else 0


def _is_training(unit: Path) -> bool:
    return (unit / CONFIG_FILE).exists()


def _srun_lines(unit: Path, attempt: int) -> list[str]:
    return _lines(attempt_folder(unit, attempt) / "srun.log")


def _lines(path: Path) -> list[str]:
    """The lines of a log that hold something; none where there is no log."""
    try:
        return [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    except OSError:
        return []


def main(arguments: Sequence[str]) -> int:
    """Answer the script: words on stdout, everything for a person on stderr."""
    parser = argparse.ArgumentParser(prog="slurm.lifecycle")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("begin", "judge", "end"):
        one = verbs.add_parser(verb)
        one.add_argument("unit", type=Path)
        if verb != "begin":
            one.add_argument("attempt", type=int)
        if verb != "end":
            one.add_argument("--nodes", default="")
    verbs.choices["begin"].add_argument("--job", required=True)
    verbs.choices["begin"].add_argument("--restarts", type=int, default=0)
    for name, default in (("--code", "0"), ("--asked", ""), ("--state", "RUNNING"), ("--usable", ""), ("--needed", "1")):
        verbs.choices["end"].add_argument(name, default=default)
    verbs.choices["judge"].add_argument("--code", type=int, default=0)
    stopping = verbs.add_parser("stop")
    stopping.add_argument("unit", type=Path)
    stopping.add_argument("reason")
    verbs.add_parser("wait").add_argument("roots", type=Path, nargs="+")
    given = parser.parse_args(arguments)
    try:
        if given.verb == "begin":
            attempt = begin(given.unit, job=given.job, restarts=given.restarts, nodes=_names(given.nodes))
            print("" if attempt is None else attempt)
        elif given.verb == "judge":
            return judge_nodes(given.unit, given.attempt, _names(given.nodes), given.code)
        elif given.verb == "stop":
            stop(given.unit, given.reason)
        elif given.verb == "wait":
            wait_for(given.roots)
        else:
            now = Situation(
                state="",
                reason="",
                job_runs=given.state in ("RUNNING", ""),  # a controller that does not answer has decided nothing
                usable=_names(given.usable),
                needed=int(given.needed),
            )
            print(*end(given.unit, given.attempt, code=int(given.code), asked=given.asked, now=now))
    except UserError as error:
        print(f"longhaul: {error}", file=sys.stderr)
        return int(ExitCode.DO_NOT_RESTART)
    return 0


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
