"""What each verb asks of the cluster: its words checked, its jobs, its folder. Submits nothing and writes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from conf.compose import compose, read_config, validate
from conf.errors import ConfigError, UserError
from data_pipeline.config import PrepareConfig
from slurm.config import SubmitConfig
from slurm.lifecycle import CONFIG_FILE
from slurm.script import TASK, UNIT, Job
from slurm.snapshot import OWN_CONFIG
from slurm.submission import Submission
from train.config.export import ExportConfig
from train.config.finetune import FinetuneConfig
from train.config.hf_import import ImportConfig
from train.config.runs import RUNS
from train.config.settings import RunSettings
from train.evaluate import checks
from train.groundwork.finetuning import look_ahead
from train.initial import awaited_run, configure
from train.launch import check_elsewhere
from train.plan import make_plan

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
    configs: tuple[RunSettings, ...] = ()
    """Of its units, where they train."""
    resolved: object = None
    """The configuration of any other verb."""
    told: tuple[str, ...] = ()
    """What would happen, for a person."""


def _train(order: Order) -> Work:
    settings, verb = order.settings, order.verb
    if settings.parts > 1 or settings.name is not None:
        raise UserError(f"parts and name are not for {verb}: it is named by run.name=..., and split by nodes=...")
    configs = []
    told: list[str] = []
    awaited = _awaited(order)
    for words in order.combinations:
        config = _placed(_configured(order, words, awaited), settings)
        if order.dependencies:  # what it reads may not be there yet; the job itself checks as well
            told += _look_ahead(config, awaited)
        else:
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
        stage=verb,
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


def _awaited(order: Order) -> dict[Path, RunSettings]:
    """Settings of the runs that train and have to finish first, by their folders."""
    units = [unit for one in order.dependencies if one.verb in RUNS for _, _, unit in one.units()]
    return {unit.resolve(): read_config(RUNS, unit / CONFIG_FILE) for unit in units}


def _configured(order: Order, words: Sequence[str], awaited: Mapping[Path, RunSettings]) -> RunSettings:
    try:
        return configure(words, order.config_dir, stage=order.verb, awaited=awaited)
    except ConfigError:
        raise
    except UserError as error:
        if not order.dependencies:
            raise
        raise UserError(
            f"{error}. The model of the run is that checkpoint's, so it has to be there when the run is submitted, or to be "
            f"that of a run in after=[NAME]; submit {order.verb} once what comes before it has written one"
        ) from None


def _look_ahead(config: RunSettings, awaited: Mapping[Path, RunSettings]) -> list[str]:
    """What can be told of a run before those that it waits for have ended. Raises UserError for what does not fit already."""
    before = awaited_run(config.initial_checkpoint, awaited) if isinstance(config, FinetuneConfig) else None
    if before is None:
        return []
    begins = f"begins with      what {config.initial_checkpoint} has then; the job itself checks it"
    if (found := look_ahead(config, before)) is None:
        return [begins, "rows             are read when it begins: there is no tokenizer yet"]
    settled, lines = found
    make_plan(settled, settled.launch.processes)
    return [*lines, begins]


def _placed(config: RunSettings, settings: SubmitConfig) -> RunSettings:
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


def _evaluate(order: Order) -> Work:
    config = checks.configure(order.words, order.config_dir)
    _one_process(order)
    if order.dependencies:  # the model and the data may not be there yet; the job itself checks them
        checks.score_settings(config.task)
    else:
        checks.check(config)
    cluster, ranks = order.settings.cluster, config.processes
    on_gpus = cluster.scheduler == "slurm" and cluster.gpus_per_node > 0 and config.device != "cpu"
    if cluster.scheduler == "slurm" and not on_gpus and config.device == "cuda":
        raise UserError(f"device=cuda: cluster.gpus_per_node={cluster.gpus_per_node}; change one of them")
    if on_gpus and ranks > cluster.gpus_per_node:
        raise UserError(
            f"processes={ranks}: a rank needs a GPU of its own, and a node has cluster.gpus_per_node={cluster.gpus_per_node}; "
            f"use processes={cluster.gpus_per_node}"
        )
    model = Path(config.checkpoint or config.hf or "").name
    work = _plain(order, order.settings.name or f"evaluate-{model}-{config.task.name}", config)
    return replace(work, jobs=(replace(work.jobs[0], local_ranks=ranks, gpus=ranks if on_gpus else 0),))


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
    **dict.fromkeys(RUNS, _train),
    "prepare": _prepare,
    "import": _import,
    "export": _export,
    "evaluate": _evaluate,
}


def _one_node(order: Order) -> None:
    if order.settings.nodes > 1:
        raise UserError(f"nodes={order.settings.nodes}: {order.verb} is one process; use nodes=1")


def _refuse_fields(words: Sequence[str], names: Sequence[str], why: str) -> None:
    for word in words:
        if word.lstrip("+").partition("=")[0] in names:
            raise UserError(f"{word}: {why}; leave it out")
