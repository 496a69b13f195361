"""`longhaul pretrain` and `longhaul finetune`: compose and check once, write the run's folder, start the ranks. Torch-free."""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from conf.compose import as_yaml, read_config, write_config
from conf.errors import UserError
from conf.schema import shown
from train.checkpoint.manifest import published, read_manifest, write_durably
from train.config.changes import check_resume
from train.config.runs import RUNS
from train.config.settings import RunSettings
from train.groundwork import finetuning, pretraining
from train.groundwork.findings import Findings
from train.initial import configure, newest_whole
from train.model.philox import INITIALISATION
from train.outcome import ExitCode, last_attempt, read_outcome
from train.plan import RunPlan, describe, make_plan
from train.precision import Resolved, expected_precision
from train.provenance import check_deepspeed, git_commit, versions
from train.stoppable import Stopped, stoppable
from train.supervisor import Restarts, run_attempt, supervise

RANK_COMMAND = (sys.executable, "-P", "-m", "train.rank")


LOOK_INTO: dict[str, Callable[[Any], Findings]] = {"pretrain": pretraining.look_into, "finetune": finetuning.look_into}


def pretrain(overrides: Sequence[str], config_dir: str | None = None, rank_command: Sequence[str] = RANK_COMMAND) -> int:
    """`longhaul pretrain`; see `start`."""
    return start("pretrain", overrides, config_dir, rank_command)


def finetune(overrides: Sequence[str], config_dir: str | None = None, rank_command: Sequence[str] = RANK_COMMAND) -> int:
    """`longhaul finetune`; see `start`."""
    return start("finetune", overrides, config_dir, rank_command)


def start(stage: str, overrides: Sequence[str], config_dir: str | None, rank_command: Sequence[str] = RANK_COMMAND) -> int:
    """Check everything, then start or resume the run; returns the exit code of the run. A rank is `rank_command RUN_FOLDER`.

    Raises UserError before anything is written when the configuration, the corpus or the newest checkpoint do not fit.
    """
    try:
        with stoppable():
            config = configure(overrides, config_dir, stage=stage)
            if config.launch.dry_run:
                show(config)
                return ExitCode.FINISHED
            ready = get_ready(config)
    except Stopped as request:
        print(f"longhaul: stopped by {request} before anything was started; run the same command again", file=sys.stderr)
        return ExitCode.RESUMABLE
    if ready is None:
        return ExitCode.FINISHED
    config, run_dir = ready
    code = supervise(
        [*rank_command, str(run_dir)],
        processes=config.launch.processes,
        run_dir=run_dir,
        restarts=Restarts(
            most=config.launch.max_restarts,
            backoff_seconds=config.launch.backoff_seconds,
            progress=lambda: published(run_dir / "checkpoints")[-1:],
        ),
    )
    if code == ExitCode.FINISHED:
        outcome = read_outcome(run_dir, last_attempt(run_dir))
        print(f"finished         {run_dir}; next: {outcome.next if outcome else ''}")
    return code


def show(config: RunSettings) -> None:
    """Print the resolved configuration and what would be done with it, on whatever machine."""
    findings = settle(config, elsewhere=True)
    print(as_yaml(findings.config), end="")
    precision = _expected(findings.config, elsewhere=True)
    print(*plan_lines(_planned(findings, precision), findings, precision), sep="\n", flush=True)


def check_elsewhere(config: RunSettings) -> tuple[RunSettings, list[str]]:
    """Check a run for other machines against its corpus and its folder, and write nothing; the settled configuration, and
    lines that tell what would happen.

    Raises UserError when something does not fit, or the run is finished.
    """
    findings, done, lines = _check(config, elsewhere=True)
    if done:
        folder = run_folder(findings.config)
        raise UserError(f"{folder}: is finished; a longer budget or another run.name=... is needed for more")
    return findings.config, lines


def get_ready(config: RunSettings, *, elsewhere: bool = False) -> tuple[RunSettings, Path] | None:
    """Check everything and make the run's folder; the settled configuration and the folder, None when the run is finished.

    `elsewhere`: the ranks are started on other machines than this one.
    Raises UserError when the corpus, the newest checkpoint or the machine do not fit.
    """
    findings, done, lines = _check(config, elsewhere=elsewhere)
    run_dir = run_folder(findings.config)
    print(*lines, sep="\n", flush=True)
    if done:
        print(f"{run_dir} is finished: {done} is used up; nothing to do")
        return None
    findings.make_ready(run_dir)
    prepare_folder(run_dir, findings.config)
    return findings.config, run_dir


def _check(config: RunSettings, *, elsewhere: bool) -> tuple[Findings, str | None, list[str]]:
    """What was found, what a finished run has used up, and what is about to happen."""
    findings = settle(config, elsewhere=elsewhere)
    precision = _expected(findings.config, elsewhere=elsewhere)
    plan, run_dir = _planned(findings, precision), run_folder(findings.config)
    going_on = compare_with_newest(findings, run_dir) or findings.begin()
    done = used_up(run_dir, plan, patience=findings.config.evaluate.patience)
    return findings, done, [*plan_lines(plan, findings, precision), *([] if done else going_on)]


def run_folder(config: RunSettings) -> Path:
    """Folder of the run."""
    return Path(config.run.folder) / config.run.name


def _expected(config: RunSettings, *, elsewhere: bool) -> Resolved:
    return expected_precision(config.precision, config.launch.device, elsewhere=elsewhere)


def _planned(findings: Findings, precision: Resolved) -> RunPlan:
    processes = findings.config.launch.processes
    assert processes is not None, "settle fills it in"
    plan = make_plan(replace(findings.config, precision=precision.precision), processes)
    findings.check_plan(plan.total_samples)
    return plan


def plan_only(overrides: Sequence[str], config_dir: str | None = None) -> int:
    """`longhaul plan`: the resolved configuration and the plan, nothing started."""
    return pretrain([*overrides, "launch.dry_run=true"], config_dir)


def settle(config: RunSettings, *, elsewhere: bool = False) -> Findings:
    """Look into the data, and fill in what follows from it and from the machine: vocabulary, device, processes.

    `elsewhere`: the run is for another machine; its GPUs are taken on trust.
    Raises UserError when the data does not fit the model, CUDA is asked for and absent, or DeepSpeed is too old.
    """
    if not elsewhere:
        check_deepspeed()
    findings = LOOK_INTO[config.stage](config)
    gpus = visible_gpus()
    device = config.launch.device
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    if device == "cuda" and not gpus and not elsewhere:
        raise UserError("launch.device=cuda: no NVIDIA GPU is visible on this machine; use launch.device=cpu")
    processes = config.launch.processes or (gpus if device == "cuda" else 1) or 1
    if device == "cuda" and processes > gpus and not elsewhere:
        raise UserError(f"launch.processes={processes}: this machine shows {gpus} GPUs; a rank needs one of its own")
    launch = replace(config.launch, device=device, processes=processes)
    return replace(findings, config=replace(findings.config, launch=launch))


def visible_gpus() -> int:
    """NVIDIA GPUs that a process started here would see, without importing torch."""
    cards = Path("/proc/driver/nvidia/gpus")
    count = len(list(cards.iterdir())) if cards.is_dir() else len(list(Path("/dev").glob("nvidia[0-9]*")))
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return count if chosen is None else min(count, len([part for part in chosen.split(",") if part.strip()]))


def plan_lines(plan: RunPlan, findings: Findings, precision: Resolved) -> list[str]:
    """What is about to happen, human-readable."""
    return [
        f"run              {run_folder(findings.config)}",
        *describe(plan, findings.config, precision=str(precision), train_tokens=findings.train_tokens),
        *findings.lines,
    ]


def used_up(run_dir: Path, plan: RunPlan, *, patience: int | None) -> str | None:
    """What the run has used up already, for a person: its budget, or its patience; None: it is not finished."""
    path = run_dir / "FINISHED"
    try:
        end = json.loads(path.read_text(encoding="utf-8"))
        if end["step"] >= plan.total_steps:
            return f"its budget of {plan.total_steps:,} steps"
        is_patient = patience is None or end.get("patience", 0) < patience
        return None if is_patient else f"its patience of {patience} evaluations"
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check run.folder and run.name") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{path}: does not hold the step of the run's end; remove it to go on from the newest checkpoint"
        ) from None


def compare_with_newest(findings: Findings, run_dir: Path) -> list[str]:
    """What is resumed and what has changed since, as lines for a person; nothing for a run without a checkpoint.

    A checkpoint that is damaged is passed over here; the ranks verify all of it, and set it aside.
    Raises UserError when the newest other one has another model or other data, or there is none, before anything starts.
    """
    newest, damaged = newest_whole(run_dir / "checkpoints")
    if newest is None:
        if damaged:
            raise UserError(
                f"{run_dir}: no checkpoint can be used, all are left as they are ({'; '.join(damaged)}); put one back from a "
                f"copy, or start another run with run.name=..."
            )
        return []
    before, config = read_config(RUNS, newest / "config.yaml"), findings.config
    if config.precision == "auto":  # the ranks settle it, and tell when it is another one than before
        config = replace(config, precision=before.precision)
    recorded = check_resume(before, config, str(newest))
    if read_manifest(newest).data_fingerprint != findings.fingerprint:
        raise UserError(findings.other_data(str(newest)))
    changed = [f"changed          {change.field}: {shown(change.before)} -> {shown(change.after)}" for change in recorded]
    passed_over = [f"damaged          {problem}" for problem in damaged]
    return [*passed_over, f"resuming from    {newest}", *changed]


def prepare_folder(run_dir: Path, config: RunSettings) -> None:
    """Make the run's folder: config.yaml, and run.json with the ids that last as long as the run."""
    try:
        (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        path = run_dir / "run.json"
        record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        record.setdefault("run_id", f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}")
        record.setdefault("wandb_id", secrets.token_hex(8))
        record.setdefault("created", time.time())
        if not published(run_dir / "checkpoints"):
            record["initialisation"] = INITIALISATION
        record |= {
            "verb": config.stage,
            "git_commit": git_commit(),
            "versions": {"python": sys.version.split()[0], **versions()},
            "processes": config.launch.processes,
            "zero": config.parallel.zero,
            "attempts": last_attempt(run_dir) + 1,
        }
        write_durably(path, json.dumps(record, indent=2).encode())
        write_config(config, run_dir / "config.yaml")
    except OSError as error:
        raise UserError(f"{error.filename or run_dir}: cannot be written ({error.strerror})") from None


def main(arguments: Sequence[str]) -> int:
    """`python -m train.launch RUN_FOLDER`: the ranks of one attempt, which the caller has claimed, on this machine."""
    run_dir = Path(arguments[0])
    config = read_config(RUNS, run_dir / "config.yaml")
    assert config.launch.processes is not None, "the written configuration is settled"
    attempt = int(os.environ["LONGHAUL_ATTEMPT"])
    return run_attempt([*RANK_COMMAND, str(run_dir)], processes=config.launch.processes, run_dir=run_dir, attempt=attempt)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
