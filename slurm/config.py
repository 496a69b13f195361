"""Settings of `longhaul submit`: the site, how much of it a job takes, and what happens when a job ends."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from conf.errors import ConfigError

MAX_CHAIN = 1000
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET = re.compile(r"(key|token|secret|password|passwd|credential)s?$", re.IGNORECASE)
_PLAIN = re.compile(r"[A-Za-z0-9_.,:@/+=&|*()\[\]-]+")  # what a site's own names are made of


@dataclass(frozen=True, kw_only=True)
class VariableConfig:
    name: str
    """Of the environment variable."""
    value: str
    """Taken as it stands; the shell expands nothing in it."""
    reason: str
    """Why it is set; stands beside it in the job script."""

    def __post_init__(self) -> None:
        problems = []
        if not _VARIABLE.fullmatch(self.name):
            problems.append(f"name={self.name!r}: must be a variable's name, such as NCCL_DEBUG")
        elif _SECRET.search(self.name):
            problems.append(
                f"name={self.name}: looks like a secret, and scripts are kept with the run; export it in your shell, from "
                "where Slurm takes it along"
            )
        if not self.reason.strip():
            problems.append(f"reason='': say why {self.name or 'the variable'} is set; whoever reads the script will ask")
        problems += [f"{name}: must be one line" for name in ("value", "reason") if _is_broken(getattr(self, name))]
        _raise_if(problems)


@dataclass(frozen=True, kw_only=True)
class ContainerConfig:
    kind: Literal["none", "pyxis", "apptainer"] = "none"
    """none: the Python that submits runs the job; pyxis: srun starts enroot containers; apptainer: `apptainer exec`."""
    image: str | None = None
    """Image file or address."""
    mounts: tuple[str, ...] = ()
    """Folders that the container sees, SOURCE:TARGET or one path for both; those of the runs, of the data and of the submission
    must be among them."""
    python: str = "python"
    """Python within the container, with Longhaul's requirements installed."""

    def __post_init__(self) -> None:
        problems = []
        if self.kind != "none" and not self.image:
            problems.append(f"image=null: kind={self.kind} needs an image")
        if self.kind == "none" and self.image:
            problems.append(f"kind=none: image={self.image} would not be used; choose pyxis or apptainer")
        problems += [
            f"mounts={mount!r}: must be one line without commas" for mount in self.mounts if "," in mount or _is_broken(mount)
        ]
        problems += [f"{name}: must be one line" for name in ("image", "python") if _is_broken(getattr(self, name) or "")]
        _raise_if(problems)


@dataclass(frozen=True, kw_only=True)
class RestartsConfig:
    how: Literal["requeue", "chain"] = "requeue"
    """requeue: a job that was stopped goes back into the queue; chain: `jobs` jobs are submitted one behind the other, for
    sites that forbid requeueing."""
    chain_by: Literal["singleton", "afterany"] = "singleton"
    """What holds the next job of a chain back: singleton, a job of the same name; afterany, the one before it."""
    most_crashes: int = 10
    """How many crashed attempts are followed by another one, in all."""
    without_progress: int = 3
    """After so many attempts in a row without a newer checkpoint the run stops, with a report."""

    def __post_init__(self) -> None:
        problems = []
        if self.most_crashes < 0:
            problems.append(f"most_crashes={self.most_crashes}: must not be negative")
        if self.without_progress < 1:
            problems.append(f"without_progress={self.without_progress}: must be at least 1")
        _raise_if(problems)


@dataclass(frozen=True, kw_only=True)
class PreflightConfig:
    enabled: bool = True
    """Check every node before the first step."""
    timeout_seconds: float = 300.0
    """After this a node that has not reported counts as bad."""
    min_free_memory_gb: float = 2.0
    """Of a node's main memory."""
    min_free_disk_gb: float = 2.0
    """On the scratch disk and where the run is kept."""
    max_clock_skew_seconds: float = 2.0
    """Between a node's clock and the median of all."""
    min_matmul_share: float = 0.8
    """Of the median rate of all devices; a device below is slow."""
    min_bandwidth_share: float = 0.5
    """Of the median bandwidth of all nodes; a node whose best link is below is badly connected."""
    min_bandwidth_gb_per_second: float = 0.0
    """Of a node's best link; 0: only the comparison counts, which two nodes do not allow."""
    min_all_reduce_gb_per_second: float = 0.0
    """Bus bandwidth of an all-reduce over all nodes; 0 only reports it."""
    max_ecc_errors: int = 0
    """Uncorrected memory errors of a GPU since the driver was loaded."""

    def __post_init__(self) -> None:
        problems = []
        for name in ("timeout_seconds", "max_clock_skew_seconds"):
            if getattr(self, name) <= 0:
                problems.append(f"{name}={getattr(self, name)}: must be above 0")
        for name in ("min_free_memory_gb", "min_free_disk_gb", "min_bandwidth_gb_per_second", "min_all_reduce_gb_per_second"):
            if getattr(self, name) < 0:
                problems.append(f"{name}={getattr(self, name)}: must not be negative")
        if self.max_ecc_errors < 0:
            problems.append(f"max_ecc_errors={self.max_ecc_errors}: must not be negative; 0 tolerates none")
        for name in ("min_matmul_share", "min_bandwidth_share"):
            if not 0 <= getattr(self, name) < 1:
                problems.append(f"{name}={getattr(self, name)}: must be from 0 to below 1; 0 switches the check off")
        _raise_if(problems)


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    scheduler: Literal["slurm", "local"] = "slurm"
    """slurm: jobs are submitted with sbatch; local: the same script runs on this machine, in the background."""
    account: str | None = None
    """--account of sbatch."""
    partition: str | None = None
    """--partition of sbatch; null: the cluster's default."""
    qos: str | None = None
    """--qos of sbatch."""
    constraint: str | None = None
    """--constraint of sbatch: features that the nodes must have."""
    reservation: str | None = None
    """--reservation of sbatch."""
    options: tuple[str, ...] = ()
    """Further options of sbatch, one a line, such as --exclusive or --mail-type=FAIL."""
    time_limit_minutes: int = 1440
    """Of one job; a run may take any number of them."""
    warning_seconds: int = 300
    """So long before the limit the ranks are told to save and stop."""
    gpus_per_node: int = 0
    """0: a cluster of CPUs."""
    tasks_per_node: int | None = None
    """Ranks of a node; null: one per GPU, or one on a CPU."""
    cpus_per_task: int | None = None
    """Cores of a rank; null: what the cluster gives."""
    memory_gb_per_node: float | None = None
    """Memory of a job on each node; null: what the cluster gives."""
    cpu_bind: str | None = "cores"
    """--cpu-bind of srun; null: what the cluster does."""
    memory_bind: str | None = None
    """--mem-bind of srun; local keeps a rank's memory beside its cores."""
    gpu_bind: str | None = None
    """--gpu-bind of srun; null: a rank sees all GPUs of its node and takes its own, so that NCCL can use the links between
    them."""
    modules: tuple[str, ...] = ()
    """Loaded by `module load`, after a purge."""
    setup: tuple[str, ...] = ()
    """Lines of shell that the script runs before anything else, such as: source /opt/site/env.sh."""
    container: ContainerConfig = field(default_factory=ContainerConfig)
    """Image that the ranks run in."""
    environment: tuple[VariableConfig, ...] = ()
    """Variables of the interconnect and of libraries, each with its reason."""
    rendezvous_suffix: str = ""
    """Put behind the first node's name, where the fast network has names of its own."""
    scratch: str = "/tmp"
    """Disk of a node itself, for the caches of compilers."""
    restarts: RestartsConfig = field(default_factory=RestartsConfig)
    """What follows the end of a job."""
    preflight: PreflightConfig = field(default_factory=PreflightConfig)
    """What a node must show before it takes part."""

    def __post_init__(self) -> None:
        problems = self._number_problems()
        for name in ("account", "partition", "qos", "constraint", "reservation", "cpu_bind", "memory_bind", "gpu_bind"):
            value = getattr(self, name)
            if value is not None and not _PLAIN.fullmatch(value):
                problems.append(f"{name}={value!r}: must be one word; null leaves it out")
        problems += [
            f"options={option!r}: must be one option of sbatch on one line, such as --exclusive"
            for option in self.options
            if not option.startswith("-") or _is_broken(option)
        ]
        problems += [f"modules={name!r}: must be one word" for name in self.modules if not _PLAIN.fullmatch(name)]
        problems += [f"setup={line!r}: must be one line" for line in self.setup if _is_broken(line)]
        names = [variable.name for variable in self.environment]
        problems += [
            f"environment: {name} is given twice" for name in sorted({name for name in names if names.count(name) > 1})
        ]
        if not self.scratch.startswith("/") or _is_broken(self.scratch):
            problems.append(f"scratch={self.scratch!r}: must be a full path")
        if self.rendezvous_suffix and not re.fullmatch(r"[A-Za-z0-9.-]+", self.rendezvous_suffix):
            problems.append(f"rendezvous_suffix={self.rendezvous_suffix!r}: must be part of a host's name, such as -ib0")
        if self.scheduler == "local" and self.restarts.how == "chain":
            problems.append("restarts.how=chain: a machine without Slurm has no queue to chain jobs in; use requeue")
        _raise_if(problems)

    def _number_problems(self) -> list[str]:
        problems = []
        if self.time_limit_minutes < 1:
            problems.append(f"time_limit_minutes={self.time_limit_minutes}: must be at least 1, which is Slurm's grain")
        elif not 0 < self.warning_seconds < 60 * self.time_limit_minutes:
            problems.append(
                f"warning_seconds={self.warning_seconds}: must be above 0 and below the limit of "
                f"time_limit_minutes={self.time_limit_minutes}"
            )
        if self.gpus_per_node < 0:
            problems.append(f"gpus_per_node={self.gpus_per_node}: must not be negative; 0 is a cluster of CPUs")
        for name in ("tasks_per_node", "cpus_per_task"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"{name}={value}: must be at least 1; null leaves it to the cluster")
        if self.tasks_per_node is not None and 0 < self.gpus_per_node < self.tasks_per_node:
            problems.append(
                f"tasks_per_node={self.tasks_per_node}: a rank needs a GPU of its own, gpus_per_node={self.gpus_per_node}; "
                "null takes one rank per GPU"
            )
        if self.memory_gb_per_node is not None and self.memory_gb_per_node <= 0:
            problems.append(f"memory_gb_per_node={self.memory_gb_per_node}: must be above 0; null leaves it to the cluster")
        return problems

    @property
    def ranks_per_node(self) -> int:
        """Ranks of a node."""
        return self.tasks_per_node or self.gpus_per_node or 1


@dataclass(frozen=True, kw_only=True)
class SubmitConfig:
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """The site: conf/cluster, or your own by --config-dir."""
    nodes: int = 1
    """Nodes of a job."""
    jobs: int = 1
    """Length of a chain, with cluster.restarts.how=chain: how many jobs are submitted at once."""
    after: tuple[str, ...] = ()
    """Names of runs that have to finish first; where one fails this one is cancelled."""
    parts: int = 1
    """Of `submit prepare`: jobs of the array that reads, and of the one that encodes."""
    throttle: int | None = None
    """How many jobs of an array run at the same time; null: as many as there is room for."""
    name: str | None = None
    """Name of the run for verbs that have no run.name; null: the verb and the name of what it makes."""
    folder: str = "runs"
    """Folder in which such a run keeps its scripts and logs; pretrain and finetune have run.folder."""
    dry_run: bool = False
    """Print the script and what would happen; write and submit nothing."""

    def __post_init__(self) -> None:
        problems = []
        for name in ("nodes", "parts"):
            if getattr(self, name) < 1:
                problems.append(f"{name}={getattr(self, name)}: must be at least 1")
        if not 1 <= self.jobs <= MAX_CHAIN:
            problems.append(f"jobs={self.jobs}: must be from 1 to {MAX_CHAIN}")
        if self.jobs > 1 and self.cluster.restarts.how != "chain":
            problems.append(f"jobs={self.jobs}: only a chain has several; add cluster.restarts.how=chain, or leave it out")
        if self.throttle is not None and self.throttle < 1:
            problems.append(f"throttle={self.throttle}: must be at least 1; null sets no limit")
        if self.cluster.scheduler == "local" and self.nodes > 1:
            problems.append(f"nodes={self.nodes}: cluster.scheduler=local is one machine; use nodes=1, or another cluster")
        _raise_if(problems)


def _is_broken(text: str) -> bool:
    return any(ord(letter) < 32 or letter == "\x7f" for letter in text)


def _raise_if(problems: Sequence[str]) -> None:
    if problems:
        raise ConfigError(list(problems))
