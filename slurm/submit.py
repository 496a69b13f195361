"""`longhaul submit VERB ...`: check first, keep everything the job needs in the run's folder, render the script, submit it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from conf.compose import compose, validate, write_config
from conf.errors import UserError
from conf.schema import nearest, shown
from conf.sweep import named_combinations
from slurm.config import SubmitConfig
from slurm.history import CANCEL_FILE, Resume, add_event, read_history
from slurm.lifecycle import CONFIG_FILE, REPORT_FILE, close_lost
from slurm.scheduler import Scheduler, SlurmScheduler, scheduler_of
from slurm.script import render
from slurm.snapshot import take_snapshot
from slurm.submission import SUBMISSION_FILE, Stage, Submission, read_submission
from slurm.work import MAKERS, Order, Work
from train.config.runs import RUNS
from train.outcome import STOP_FILE

VERBS = tuple(MAKERS)


def submit(words: Sequence[str], config_dir: str | None = None) -> int:
    """The command's entry. Raises UserError before anything is written or submitted when something does not fit."""
    return _submit(words, config_dir, sweeps=False)


def sweep(words: Sequence[str], config_dir: str | None = None) -> int:
    """`-m`: all combinations of the values as one array job."""
    return _submit(words, config_dir, sweeps=True)


def _submit(words: Sequence[str], config_dir: str | None, *, sweeps: bool) -> int:
    verb, mine, rest = _split(words)
    if sweeps and verb not in RUNS:
        raise UserError(f"-m: a sweep is of {' or '.join(RUNS)}; submit {verb} takes one value for each setting")
    settings = validate(SubmitConfig, compose("submit", mine, config_dir))
    combinations = named_combinations(rest) if sweeps else [list(rest)]
    dependencies = [_dependency(name, settings, rest) for name in settings.after]
    order = Order(verb=verb, settings=settings, combinations=combinations, config_dir=config_dir, dependencies=dependencies)
    work = MAKERS[verb](order)
    scripts = [render(job, settings.cluster) for job in work.jobs]
    for line in work.told:
        print(line)
    if settings.dry_run:
        for job, script in zip(work.jobs, scripts, strict=True):
            print(f"\n----- {work.root / 'slurm' / job.stage}.sbatch\n{script}", end="")
        print(f"\nnothing was written or submitted; without dry_run=true {len(scripts)} script(s) are submitted")
        return 0
    scheduler = scheduler_of(settings.cluster.scheduler)
    refuse_if_active(work.root)
    _check_folder(work)
    try:
        stages = _write(work, scripts, verb, config_dir)
    except OSError as error:
        raise UserError(f"{error.filename or work.root}: cannot be written ({error.strerror})") from None
    submission = Submission(
        name=work.name,
        verb=verb,
        words=tuple(words),
        cluster=_cluster_name(mine),
        scheduler=settings.cluster.scheduler,
        tasks=work.jobs[0].nodes * work.jobs[0].ranks_per_node,
        nodes=work.jobs[0].nodes,
        gpus_per_node=settings.cluster.gpus_per_node,
        scratch=settings.cluster.scratch,
        stages=tuple(stages),
        after=tuple(str(one.root) for one in dependencies),
        preflight=settings.cluster.preflight,
        restarts=settings.cluster.restarts,
        folder=str(work.root),
        directory=str(Path.cwd()),
        chain=settings.jobs,
    )
    submission.write()
    reopen(submission, even_finished=True)
    send(submission, scheduler)
    return 0


def _write(work: Work, scripts: Sequence[str], verb: str, config_dir: str | None) -> list[Stage]:
    """Put everything that the jobs need into the run's folder."""
    take_snapshot(work.root / "slurm", config_dir)
    for unit, config in zip(work.jobs[0].units, work.configs, strict=False):
        (work.root / unit / "slurm").mkdir(parents=True, exist_ok=True)
        write_config(config, work.root / unit / CONFIG_FILE)
    if work.resolved is not None:
        write_config(work.resolved, work.root / "slurm" / f"{verb}.yaml")
    stages = []
    for job, script in zip(work.jobs, scripts, strict=True):
        (work.root / "slurm" / f"{job.stage}.sbatch").write_text(script, encoding="utf-8")
        stages.append(Stage(name=job.stage, units=tuple(job.units)))
    return stages


def reopen(submission: Submission, *, even_finished: bool) -> None:
    """Forget what was asked of its units before, and what counted against them."""
    for _, _, unit in submission.units():
        for name in (CANCEL_FILE, STOP_FILE, REPORT_FILE):
            (unit / name).unlink(missing_ok=True)
        close_lost(unit)
        history = read_history(unit)
        if history.events and (even_finished or not history.is_done):
            add_event(unit, Resume())


def send(submission: Submission, scheduler: Scheduler) -> None:
    """Submit its scripts, one stage behind the other, and keep the ids. What was submitted before a failure is taken back.

    Stages whose units are all done are left out.
    """
    sent: list[str] = []
    stages = [replace(stage, jobs=()) for stage in submission.stages]
    first = [job for folder in submission.after for job in _last_jobs(Path(folder), scheduler)]
    behind = first
    try:
        for place, stage in enumerate(stages):
            if submission.is_done(stage):
                continue
            script = submission.root / "slurm" / f"{stage.name}.sbatch"
            for link in range(submission.chain):
                if link and isinstance(scheduler, SlurmScheduler):
                    by = submission.restarts.chain_by
                    job = scheduler.submit_behind(script, previous=sent[-1], by=by, after=behind)
                else:
                    job = scheduler.submit(script, array=len(stage.units), after=behind)
                sent.append(job)
                stages[place] = replace(stages[place], jobs=(*stages[place].jobs, job))
                replace(submission, stages=tuple(stages)).write()  # what is submitted is known, whatever happens next
            behind = sent[-1:]
    except BaseException:
        with contextlib.suppress(UserError):
            scheduler.cancel(sent)
        raise
    for stage in stages:
        if not stage.jobs:
            print(f"done before      {stage.name}: nothing to do")
        else:
            of = f"an array of {len(stage.units)}, " if len(stage.units) > 1 else ""
            chain = f" and {len(stage.jobs) - 1} behind it" if len(stage.jobs) > 1 else ""
            print(f"submitted        {stage.name}: {of}job {stage.jobs[0]}{chain}")
    print(f"next             longhaul status run={shown(submission.name)}; longhaul logs run={shown(submission.name)}")


def refuse_if_active(root: Path) -> None:
    """Raises UserError when jobs of an earlier submission wait or run."""
    if not (root / SUBMISSION_FILE).exists():
        return
    before = read_submission(root)
    if before.unit_states().finished:
        return
    active = scheduler_of(before.scheduler).jobs(before.job_ids())
    if active:
        raise UserError(
            f"run={before.name}: job {', '.join(sorted(active))} waits or runs already; wait for it, or end it first with "
            f"longhaul cancel run={before.name}"
        )


# --- words and names --------------------------------------------------------------------------------------------------


def _split(words: Sequence[str]) -> tuple[str, list[str], list[str]]:
    """(verb, words of the submission, words of the verb)."""
    if not words or words[0] not in VERBS:
        given = words[0] if words else "(nothing)"
        raise UserError(f"{given}: cannot be submitted.{nearest(given, VERBS)} There is: longhaul submit {' | '.join(VERBS)}")
    own = {item.name for item in fields(SubmitConfig)}
    verb, rest = words[0], list(words[1:])
    shared = {"prepare": {"dry_run"}}.get(verb, set())  # of both: the submission's, which includes the verb's
    mine = [word for word in rest if _head(word) in own | shared]
    return verb, mine, [word for word in rest if word not in mine]


def _head(word: str) -> str:
    return word.lstrip("+~").partition("=")[0].partition(".")[0]


def _cluster_name(mine: Sequence[str]) -> str:
    return next((word.partition("=")[2] for word in reversed(mine) if word.startswith("cluster=")), "local")


def _dependency(name: str, settings: SubmitConfig, words: Sequence[str]) -> Submission:
    """The submission that `after` names. Raises UserError when there is none, or it has failed."""
    folders = [settings.folder, *(word.partition("=")[2] for word in words if word.startswith("run.folder="))]
    for folder in folders:
        root = Path(folder).resolve() / name
        if (root / SUBMISSION_FILE).exists():
            submission = read_submission(root)
            if failed := submission.unit_states().failed:
                raise UserError(f"after={name}: it has failed ({failed}); mend it and resume it first")
            return submission
    known = [path.parents[1].name for folder in folders for path in sorted(Path(folder).glob(f"*/{SUBMISSION_FILE}"))]
    raise UserError(f"after={name}: no such submission below {', '.join(folders)}.{nearest(name, known)}")


def _last_jobs(root: Path, scheduler: Scheduler) -> list[str]:
    """Jobs that have to end well before something behind `root` may begin; none when it is finished.

    Raises UserError when it is neither finished nor at work.
    """
    submission = read_submission(root)
    if submission.unit_states().finished:
        return []
    last = submission.stages[-1].jobs[-1:]
    if isinstance(scheduler, SlurmScheduler) and not scheduler.jobs(last):
        raise UserError(f"after={submission.name}: it is not finished, and has no job in the queue; resume it first")
    return list(last)


def _check_folder(work: Work) -> None:
    if work.root.exists() and not work.root.is_dir():
        raise UserError(f"{work.root}: is a file; choose another name")
