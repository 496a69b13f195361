"""The only place that talks to Slurm's commands, and to processes of this machine in their place."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from conf.errors import UserError

_TIMEOUT_SECONDS = 60
_ONE_AFTER_ANOTHER = """
trap 'asked=1; kill -USR1 "$child"' TERM USR1
for index in $(seq 0 "$1"); do
    [ -z "${asked:-}" ] || exit 85
    SLURM_ARRAY_TASK_ID=$index bash "$2" & child=$!
    while kill -0 "$child" 2> /dev/null; do wait "$child"; code=$?; done
    [ "$code" = 0 ] || failed=$code
done
exit "${failed:-0}"
"""
_COLUMNS = "%i|%T|%r|%N|%S"


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as the scheduler shows it."""

    id: str
    state: str
    """As Slurm writes it: PENDING, RUNNING, COMPLETING ..."""
    reason: str = ""
    """Why it waits."""
    nodes: str = ""
    start: str = ""
    """When it began, or is expected to."""


class Scheduler(Protocol):
    """Takes scripts and runs them."""

    def submit(self, script: Path, *, array: int = 1, after: Sequence[str] = ()) -> str:
        """Take a script; the id of its job. It waits until the jobs `after` have finished well."""

    def jobs(self, ids: Sequence[str]) -> Mapping[str, Job]:
        """Those of `ids` that wait or run."""

    def end_of(self, job: str) -> str:
        """How a job ended, in the scheduler's words; empty where nobody remembers."""

    def signal(self, ids: Sequence[str], number: signal.Signals) -> None:
        """Send a signal to what the jobs run."""

    def cancel(self, ids: Sequence[str]) -> None:
        """End jobs, and take those that wait out of the queue."""


class SlurmScheduler:
    """Slurm, by its command line."""

    def __init__(self) -> None:
        if shutil.which("sbatch") is None:
            raise UserError(
                "cluster.scheduler=slurm: sbatch is not installed here; submit from a login node of the cluster, or use "
                "cluster=local to run on this machine"
            )

    def submit(self, script: Path, *, array: int = 1, after: Sequence[str] = ()) -> str:
        words = ["sbatch", "--parsable"]
        if after:
            words += [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"]
        answer = _call([*words, str(script)])
        return answer.strip().split(";")[0]  # ID;CLUSTER where there are several clusters

    def submit_behind(self, script: Path, *, previous: str, by: str, after: Sequence[str] = ()) -> str:
        """Take the next job of a chain, which waits for `after` as its first one does."""
        parts = [f"afterok:{':'.join(after)}"] if after else []
        parts.append("singleton" if by == "singleton" else f"afterany:{previous}")
        words = ["sbatch", "--parsable", f"--dependency={','.join(parts)}", *(["--kill-on-invalid-dep=yes"] if after else [])]
        return _call([*words, str(script)]).strip().split(";")[0]

    def jobs(self, ids: Sequence[str]) -> Mapping[str, Job]:
        if not ids:
            return {}
        return {own: job for own, job in self.queue().items() if own in ids or own.partition("_")[0] in ids}

    def queue(self) -> Mapping[str, Job]:
        """All jobs of the user that wait or run."""
        found: dict[str, Job] = {}
        # A job that has gone makes squeue fail when it is asked for by its id, so all of the user's are read.
        for line in _call(["squeue", "--noheader", "--me", "--array", f"--format={_COLUMNS}"]).splitlines():
            own, state, reason, nodes, start = line.split("|")
            found[own] = Job(id=own, state=state, reason=reason, nodes=nodes, start="" if start == "N/A" else start)
        return found

    def end_of(self, job: str) -> str:
        """How a job ended, in Slurm's words (TIMEOUT, NODE_FAIL, OUT_OF_MEMORY ...); empty where nobody remembers."""
        with contextlib.suppress(UserError):
            words = dict(word.split("=", 1) for word in _call(["scontrol", "show", "job", "-o", job]).split() if "=" in word)
            return words.get("JobState", "")
        with contextlib.suppress(UserError):  # only where the site keeps accounts
            options = ["--noheader", "--parsable2", "--allocations", "--format=State", f"--jobs={job}"]
            return _call(["sacct", *options]).partition("\n")[0].strip()
        return ""

    def signal(self, ids: Sequence[str], number: signal.Signals) -> None:
        for one in ids:
            with contextlib.suppress(UserError):  # it has ended meanwhile
                _call(["scancel", "--batch", f"--signal={number.name.removeprefix('SIG')}", one])

    def cancel(self, ids: Sequence[str]) -> None:
        if ids:
            _call(["scancel", *ids])


class LocalScheduler:
    """This machine: a job is a process in the background, its id `local-HOST-PID-START`."""

    def submit(self, script: Path, *, array: int = 1, after: Sequence[str] = ()) -> str:
        if array > 1:
            words = ["bash", "-c", _ONE_AFTER_ANOTHER, "bash", str(array - 1), str(script)]
        else:
            words = ["bash", str(script)]
        with (script.parent / f"{script.stem}.out").open("ab") as log:
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        return f"local-{socket.gethostname()}-{process.pid}-{_start_ticks(process.pid)}"

    def jobs(self, ids: Sequence[str]) -> Mapping[str, Job]:
        for one in ids:
            if (host := one.removeprefix("local-").rsplit("-", 2)[0]) != socket.gethostname():
                raise UserError(f"job {one}: runs on {host}, and can be looked after there alone")
        return {one: Job(id=one, state="RUNNING", nodes=socket.gethostname()) for one in ids if _pid(one) is not None}

    def end_of(self, job: str) -> str:
        """Nobody remembers how a process ended."""
        return ""

    def signal(self, ids: Sequence[str], number: signal.Signals) -> None:
        for one in ids:
            if (pid := _pid(one)) is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def cancel(self, ids: Sequence[str]) -> None:
        """Kill the script and its launcher; the ranks do not outlive that one."""
        for one in ids:
            if (pid := _pid(one)) is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)


def scheduler_of(kind: str) -> Scheduler:
    """The scheduler of a site. Raises UserError where it is not installed."""
    return SlurmScheduler() if kind == "slurm" else LocalScheduler()


def _pid(job: str) -> int | None:
    """Process of a local job, if it is still the same one."""
    _, pid, ticks = job.rsplit("-", 2)
    return int(pid) if ticks and _start_ticks(int(pid)) == ticks else None


def _start_ticks(pid: int) -> str:
    """When a process began, in the kernel's count; empty for one that is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    fields = text.rpartition(")")[2].split()
    return "" if fields[0] == "Z" else fields[19]


def _call(words: Sequence[str]) -> str:
    """Output of a command of Slurm. Raises UserError with what it said when it fails.

    What a job has in its environment is left out: a submission from within one would inherit its bindings.
    """
    own = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_") or name == "SLURM_CONF"}
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, env=own)
    except OSError as error:
        raise UserError(f"{words[0]}: cannot be run ({error.strerror})") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{words[0]}: no answer within {_TIMEOUT_SECONDS} s; is the cluster's controller up?") from None
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise UserError(f"{words[0]}: {said}")
    return done.stdout
