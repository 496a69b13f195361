"""What follows the end of an attempt, as pure functions: another one or none, and which nodes it should not get."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from slurm.config import RestartsConfig
from slurm.history import Action, History, listed
from train.outcome import CrashNote, Outcome

_FAILED_TASK = re.compile(r"srun: error: (?P<node>\S+): tasks? [\d,-]+: (?P<what>.+)")
_EXITED = re.compile(r"Exited with exit code (\d+)")
MOST_TRIES_WITHOUT_STEPS = 30  # of what cannot show how far it is, such as an export
RENDEZVOUS = "RendezvousError"
LOST_NODE = re.compile(r"srun: error: Node failure on (\S+)")


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What follows, and why."""

    action: Action
    reason: str
    exclude: tuple[str, ...] = ()
    """Nodes that the next attempt should not get."""


@dataclass(frozen=True, kw_only=True)
class Situation:
    """The end of an attempt as the script found it."""

    state: str
    """As in `End.state`."""
    reason: str
    on_purpose: bool = False
    job_runs: bool = True
    """Whether the scheduler still counts the job as running; otherwise it has decided already, as after scancel."""
    superseded: bool = False
    """Whether a later attempt has begun."""
    is_only_machine: bool = False
    """Whether there is nowhere else to go."""
    usable: tuple[str, ...] = ()
    """Nodes of the partition that could take part; none where that is not known."""
    needed: int = 1


def decide(now: Situation, history: History, restarts: RestartsConfig) -> Decision:
    """What follows. `history` holds this end as its last."""
    if now.superseded:
        return Decision(action="leave", reason=f"{now.reason}; a later attempt has taken over")
    if now.state == "finished":
        return Decision(action="done", reason=now.reason)
    if now.state == "refused" or now.on_purpose:
        return Decision(action="stop", reason=now.reason)
    if not now.job_runs:
        return Decision(action="leave", reason=f"{now.reason}; the scheduler ended the job")
    idle = history.num_without_progress()
    if idle >= restarts.without_progress:
        return Decision(action="stop", reason=f"{now.reason}; {idle} attempts in a row have left no newer checkpoint")
    if now.state in ("crashed", "lost") and (crashes := history.num_crashes()) > restarts.most_crashes:
        why = f"{crashes} crashes are more than cluster.restarts.most_crashes={restarts.most_crashes}"
        return Decision(action="stop", reason=f"{now.reason}; {why}")
    if (tries := history.num_without_steps()) >= MOST_TRIES_WITHOUT_STEPS:
        return Decision(action="stop", reason=f"{now.reason}; {tries} attempts were not enough, give it a longer time limit")
    if now.state == "unfit":
        unfit = history.num_unfit()
        if now.is_only_machine or unfit >= restarts.without_progress:
            why = "there is no other machine" if now.is_only_machine else f"so it was for {unfit} attempts in a row"
            return Decision(action="stop", reason=f"{now.reason}; {why}")
    exclude = _excludable(history.suspects, now)
    if now.state == "unfit" and (left_in := sorted({*history.suspects} & {*now.usable} - {*exclude})):
        why = f"{len(now.usable)} nodes are usable, {now.needed} are needed, so that {listed(left_in)} cannot be left out"
        return Decision(action="stop", reason=f"{now.reason}; {why}")
    return Decision(action="again", reason=now.reason, exclude=exclude)


def _excludable(suspects: Sequence[str], now: Situation) -> tuple[str, ...]:
    """The latest suspects, as many as the partition can spare; those that are no longer usable cost nothing.

    None where it is not known what could take their place: a job that nothing can satisfy would wait for ever.
    """
    if not now.usable:
        return ()
    spare = max(0, len(now.usable) - now.needed)
    kept: list[str] = []
    for node in reversed(suspects):
        if node not in now.usable:
            kept.append(node)
        elif spare:
            kept.append(node)
            spare -= 1
    return tuple(reversed(kept))


def suspects_of(
    outcome: Outcome | None, notes: Sequence[CrashNote], srun_lines: Sequence[str], *, tasks: int
) -> tuple[str, ...]:
    """Nodes that seem to have caused a crash.

    The watchdog's word counts first, then a node that failed, a rank that a signal ended, the rank that fell first. Where all
    ranks fell by the same error it is the program's fault, or the data's, and no node's.
    """
    if outcome is not None and outcome.suspects:
        return outcome.suspects
    lost = [match[1] for line in srun_lines if (match := LOST_NODE.search(line))]
    if lost:
        return tuple(dict.fromkeys(lost))
    fallen = first_fallen(srun_lines)
    if fallen is not None:
        code = _EXITED.search(fallen[1])
        if code is None or int(code[1]) > 128:
            return fallen[:1]
    notes = [note for note in notes if not note.error.startswith(RENDEZVOUS)]  # those waited for somebody else
    if not notes or (len(notes) >= tasks > 1 and len({note.error for note in notes}) == 1):
        return ()
    return (notes[0].host,)


def first_fallen(srun_lines: Sequence[str]) -> tuple[str, str] | None:
    """(node, how) of the first task that failed, in srun's words."""
    for line in srun_lines:
        failed = _FAILED_TASK.search(line)
        if failed is not None and not failed["what"].startswith(("Terminated", "User defined signal 1")):
            return failed["node"], failed["what"]
    return None
