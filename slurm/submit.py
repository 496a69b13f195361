"""`longhaul submit VERB ...`: check first, keep everything the job needs in the run's folder, render the script, submit it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from conf.compose import compose, validate, write_config
from conf.errors import UserError
from conf.schema import nearest, shown
from conf.sweep import named_combinations
from data_pipeline.config import PrepareConfig
from slurm.config import SubmitConfig
from slurm.history import CANCEL_FILE, Resume, add_event, read_history
from slurm.lifecycle import CONFIG_FILE, REPORT_FILE, close_lost
from slurm.scheduler import Scheduler, SlurmScheduler, scheduler_of
from slurm.script import TASK, UNIT, Job, render
from slurm.snapshot import OWN_CONFIG, take_snapshot
from slurm.submission import SUBMISSION_FILE, Stage, Submission, read_submission
from train.config.export import ExportConfig
from train.config.hf_import import ImportConfig
from train.config.pretrain import PretrainConfig
from train.initial import configure
from train.launch import check_elsewhere
from train.outcome import STOP_FILE

VERBS = ("pretrain", "prepare", "import", "export")
PHASES = ("read", "choose", "encode", "publish")  # of a preparation in parts; the first and the third are arrays


@dataclass(frozen=True, kw_only=True)
class Order:
    """What was asked for."""

    verb: str
    settings: SubmitConfig
    combinations: Sequence[Sequence[str]]
    """Words of the verb; several for a sweep."""
    config_dir: str | None
    dependencies: Sequence[Submission]
    """What has to finish first."""

    @property
    def words(self) -> Sequence[str]:
        """Words of the verb, where there is no sweep."""
        return self.combinations[0]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a verb asks of the cluster, checked."""

    name: str
    root: Path
    jobs: tuple[Job, ...]
    """One behind the other."""
    configs: tuple[PretrainConfig, ...] = ()
    """Of its units, where they train."""
    resolved: object = None
    """The configuration of any other verb."""
    told: tuple[str, ...] = ()
    """What would happen, for a person."""


def submit(words: Sequence[str], config_dir: str | None = None) -> int:
    """The command's entry. Raises UserError before anything is written or submitted when something does not fit."""
    return _submit(words, config_dir, sweeps=False)


def sweep(words: Sequence[str], config_dir: str | None = None) -> int:
    """`-m`: all combinations of the values as one array job."""
    return _submit(words, config_dir, sweeps=True)


def _submit(words: Sequence[str], config_dir: str | None, *, sweeps: bool) -> int:
    verb, mine, rest = _split(words)
    if sweeps and verb != "pretrain":
        raise UserError(f"-m: a sweep is of pretrain; submit {verb} takes one value for each setting")
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


# --- what each verb asks of the cluster -------------------------------------------------------------------------------


def _pretrain(order: Order) -> Work:
    settings = order.settings
    if settings.parts > 1 or settings.name is not None:
        raise UserError("parts and name are not for pretrain: it is named by run.name=..., and split by nodes=...")
    configs = []
    told: list[str] = []
    for words in order.combinations:
        config = _placed(configure(words, order.config_dir), settings)
        if not order.dependencies:  # otherwise what it reads may not be there yet; the job itself checks as well
            config, lines = check_elsewhere(config)
            told += lines
        configs.append(config)
    folders = [Path(config.run.folder).resolve() / config.run.name for config in configs]
    is_sweep = len(configs) > 1
    root = folders[0].parent if is_sweep else folders[0]
    units = tuple(f"{number:03d}" for number in range(len(configs))) if is_sweep else ("",)
    if is_sweep and folders != [root / unit for unit in units]:
        raise UserError("run.name: the runs of a sweep are numbered below one name; give run.name one value")
    job = Job(
        stage="pretrain",
        name=str(Path(configs[0].run.name).parent if is_sweep else configs[0].run.name),
        root=root,
        directory=Path.cwd(),
        units=units,
        command=["-m", "train.rank", UNIT],
        local_command=["-m", "train.launch", UNIT],
        nodes=settings.nodes,
        ranks_per_node=settings.cluster.ranks_per_node,
        trains=True,
        throttle=settings.throttle,
        after=[str(one.root) for one in order.dependencies],
    )
    return Work(name=job.name, root=root, jobs=(job,), configs=tuple(configs), told=tuple(told))


def _placed(config: PretrainConfig, settings: SubmitConfig) -> PretrainConfig:
    """The configuration with what follows from the cluster. Raises UserError where both say something else."""
    cluster, launch = settings.cluster, config.launch
    processes = settings.nodes * cluster.ranks_per_node
    if launch.processes not in (None, processes):
        raise UserError(
            f"launch.processes={launch.processes}: nodes={settings.nodes} with {cluster.ranks_per_node} ranks each make "
            f"{processes}; leave it out, or change nodes or cluster.tasks_per_node"
        )
    device = launch.device
    if cluster.scheduler == "slurm":
        device = "cuda" if cluster.gpus_per_node else "cpu"
        if launch.device not in ("auto", device):
            raise UserError(f"launch.device={launch.device}: cluster.gpus_per_node={cluster.gpus_per_node}; change one of them")
    limit = launch.time_limit_minutes or (float(cluster.time_limit_minutes) if cluster.scheduler == "slurm" else None)
    return replace(config, launch=replace(launch, processes=processes, device=device, time_limit_minutes=limit, max_restarts=0))


def _prepare(order: Order) -> Work:
    settings = order.settings
    config = validate(PrepareConfig, compose("prepare", order.words, order.config_dir))
    _refuse_fields(order.words, ("phase", "part", "parts"), "submit gives it to each job of the array")
    _one_node(order)
    if settings.parts > 1 and settings.cluster.scheduler == "local":
        raise UserError(f"parts={settings.parts}: on one machine `prepare` uses all cores by itself; use parts=1")
    name = settings.name or f"prepare-{config.output_folder.name}"
    if settings.parts == 1:
        return _plain(order, name, config)
    jobs = []
    for phase in PHASES:
        array = phase in ("read", "encode")
        units = tuple(f"{phase}/{part:03d}" for part in range(settings.parts)) if array else (phase,)
        more = [f"phase={phase}", *([f"part={TASK}", f"parts={settings.parts}"] if array else [])]
        jobs.append(replace(_plain_job(order, name, more), stage=phase, units=units, throttle=settings.throttle))
    return Work(name=name, root=jobs[0].root, jobs=tuple(jobs), resolved=config)


def _import(order: Order) -> Work:
    config = validate(ImportConfig, compose("import", order.words, order.config_dir))
    _one_process(order)
    out = Path(config.out or config.hf).name
    return _plain(order, order.settings.name or f"import-{out}", config)


def _one_process(order: Order) -> None:
    _one_node(order)
    if order.settings.parts > 1:
        raise UserError(f"parts={order.settings.parts}: only prepare is done in parts; leave it out")


def _export(order: Order) -> Work:
    config = validate(ExportConfig, compose("export", order.words, order.config_dir))
    _one_process(order)
    if not order.dependencies and not Path(config.checkpoint).exists():
        raise UserError(f"checkpoint={config.checkpoint}: no such folder; where another run makes it, add after=[NAME]")
    out = Path(config.out).name if config.out else Path(config.checkpoint).name
    return _plain(order, order.settings.name or f"export-{out}", config)


def _plain(order: Order, name: str, config: object) -> Work:
    """One process of the command line."""
    job = _plain_job(order, name)
    return Work(name=name, root=job.root, jobs=(job,), resolved=config)


def _plain_job(order: Order, name: str, more: Sequence[str] = ()) -> Job:
    root = Path(order.settings.folder).resolve() / name
    own = [f"--config-dir={root / 'slurm' / OWN_CONFIG}"] if order.config_dir else []
    command = ["-m", "tools.cli", order.verb, *order.words, *more, *own]
    return Job(
        stage=order.verb,
        name=name,
        root=root,
        directory=Path.cwd(),
        units=("",),
        command=command,
        local_command=command,
        nodes=1,
        ranks_per_node=1,
        trains=False,
        after=[str(one.root) for one in order.dependencies],
    )


MAKERS: dict[str, Callable[[Order], Work]] = {
    "pretrain": _pretrain,
    "prepare": _prepare,
    "import": _import,
    "export": _export,
}


def _one_node(order: Order) -> None:
    if order.settings.nodes > 1:
        raise UserError(f"nodes={order.settings.nodes}: {order.verb} is one process; use nodes=1")


def _refuse_fields(words: Sequence[str], names: Sequence[str], why: str) -> None:
    for word in words:
        if word.lstrip("+").partition("=")[0] in names:
            raise UserError(f"{word}: {why}; leave it out")


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
