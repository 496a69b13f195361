"""One rank: read config.yaml, join the group, run the stage, leave with the others. The only reader of rank variables.

Started by the supervisor (or by srun) as `python -P -m train.rank RUN_FOLDER`.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.compose import read_config
from conf.errors import UserError
from train.attempt import Attempt
from train.checkpoint.manifest import write_durably
from train.config.runs import RUNS
from train.config.settings import RunSettings
from train.health.watchdog import HANG_FILE, Watchdog
from train.host import host_name
from train.outcome import ExitCode, Outcome, State, attempt_folder, write_crash_note, write_outcome
from train.precision import Resolved, agreed, resolve_precision

if TYPE_CHECKING:  # it brings torch, which a rank that is refused need not wait for
    from train.parallel import ParallelContext

REPORT_SECONDS = 30.0  # of a hang: the stacks of all ranks are gathered first
NEXT = {
    "finished": "export it (longhaul export checkpoint={run}) or sample from it (longhaul generate checkpoint={run})",
    "stopped": "run the same command again: it goes on from here",
    "refused": "mend what the reason names, then run the same command again",
    "crashed": "read the logs beside this file; the run goes on from its newest checkpoint",
}
OF_LABELS = "export it (longhaul export checkpoint={run}) or measure it (longhaul evaluate checkpoint={run})"


def main(arguments: list[str]) -> int:
    """Run this rank to its end; returns its exit code."""
    started, run_dir = time.time(), Path(arguments[0])
    faulthandler.enable()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")  # optional packages that are not needed
    attempt = int(os.environ.get("LONGHAUL_ATTEMPT", "1"))
    try:
        config = read_config(RUNS, run_dir / "config.yaml")
        limit = config.launch.time_limit_minutes
        ends_at = None if limit is None else float(os.environ.get("LONGHAUL_STARTED", started)) + 60 * limit
        watchdog = watch(config, run_dir, attempt)
        own = Attempt(run_dir=run_dir, number=attempt, started=started, ends_at=ends_at, watchdog=watchdog)
        outcome = run(config, own)
    except UserError as error:
        print(f"longhaul: {error}", file=sys.stderr, flush=True)
        outcome = outcome_of(run_dir, attempt, "refused", str(error))
    except Exception as error:  # whatever it is, the outcome has to be written before the process ends
        traceback.print_exc()
        if told_by_the_watchdog(attempt_folder(run_dir, attempt)):
            return int(ExitCode.CRASHED)
        outcome = outcome_of(run_dir, attempt, "crashed", f"{type(error).__name__}: {error}")
        write_crash_note(run_dir, attempt, rank=own_rank(), error=outcome.reason)
    if own_rank() == 0:
        write_outcome(run_dir, outcome)
    sys.stdout.flush()
    sys.stderr.flush()
    return int(outcome.exit_code)


def told_by_the_watchdog(folder: Path) -> bool:
    """Whether this rank fell because another one hung, and the outcome says so; the watchdog is given the time to write it."""
    deadline = time.monotonic() + REPORT_SECONDS
    while (folder / HANG_FILE).exists() and time.monotonic() < deadline:
        if (folder / "outcome.json").exists():
            return True
        time.sleep(0.05)
    return False


def own_rank() -> int:
    """Number of this rank, as the supervisor or srun gave it."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def outcome_of(run_dir: Path, attempt: int, state: State, reason: str, **more: Any) -> Outcome:
    """The outcome, with what to do next."""
    return Outcome(attempt=attempt, state=state, reason=reason, next=NEXT[state].format(run=run_dir), **more)


def watch(config: RunSettings, run_dir: Path, attempt: int) -> Watchdog:
    """Begin to watch this rank; when ranks hang, one of them writes the outcome."""

    def write(summary: str, hosts: Sequence[str]) -> None:
        write_outcome(run_dir, outcome_of(run_dir, attempt, "crashed", summary, suspects=tuple(dict.fromkeys(hosts))))

    return Watchdog(
        config.watchdog,
        folder=attempt_folder(run_dir, attempt),
        rank=own_rank(),
        world_size=int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1"))),
        leave=write,
    )


def run(config: RunSettings, attempt: Attempt) -> Outcome:
    """Run the stage on this rank."""
    import torch.distributed as dist

    from train.parallel import start_rank
    from train.stages.training import note_in_run, train

    context = start_rank(
        config.launch.device,
        config.launch.collective_timeout_seconds,
        tensor_parallel=config.parallel.tensor,
        sequence_parallel=config.parallel.sequence_parallel,
    )
    record = json.loads((attempt.run_dir / "run.json").read_text(encoding="utf-8"))
    hosts = context.gather_to_all(host_name())
    attempt.watchdog.connect(context.store, hosts)
    precision = settle_precision(config, context, hosts)
    if context.is_first:
        note_in_run(attempt.run_dir, precision=precision.precision, precision_reason=precision.reason)
    ending, step = train(replace(config, precision=precision.precision), context, attempt, run=record, why=precision.reason)
    attempt.watchdog.close()
    if context.is_first and ending.state == "finished":
        end = {"step": step} | ({} if ending.patience is None else {"patience": ending.patience})
        write_durably(attempt.run_dir / "FINISHED", json.dumps(end).encode() + b"\n")
    context.barrier()  # ranks leave together, so that no launcher sees one of them missing
    dist.destroy_process_group()
    state: State = "refused" if ending.state in ("diverged", "unsaved") else ending.state
    outcome = outcome_of(attempt.run_dir, attempt.number, state, ending.reason, step=step, on_purpose=ending.on_purpose)
    if state == "finished" and config.model.labels:  # it writes no text that one could sample
        return replace(outcome, next=OF_LABELS.format(run=attempt.run_dir))
    return outcome


def settle_precision(config: RunSettings, context: ParallelContext, hosts: Sequence[str]) -> Resolved:
    """What the run computes in; all ranks together. Raises UserError on all of them where they answer differently."""
    found = resolve_precision(config.precision, context.device.type)
    agreed(list(zip(hosts, context.gather_to_all(found.precision), strict=True)))
    return found


def leave(code: int) -> None:
    """End the process at once: libraries' exit handlers (process groups, uploads) may hang or fail; all that must last is."""
    os._exit(code if code in set(ExitCode) else ExitCode.CRASHED)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
