"""The job script, rendered: readable, every value quoted for the shell, nothing secret in it."""

from __future__ import annotations

import hashlib
import math
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.errors import UserError
from slurm.config import ClusterConfig
from slurm.snapshot import CODE

UNIT, TASK = "\0unit", "\0task"  # no word of a command line can be one of them
TEMPLATE = Path(__file__).with_name("job.sbatch.j2")
_LINE = 100  # letters of the options of a command
_WAIT_SECONDS = 60  # for the other ranks, when one has left
_HEADER_UNSAFE = re.compile(r'["\\%`$]|[\x00-\x1f\x7f]')


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one script runs."""

    stage: str
    """Name of the script."""
    name: str
    """Of the run."""
    root: Path
    """The run's folder; a full path."""
    directory: Path
    """From which it was submitted."""
    units: Sequence[str]
    """As in `Stage.units`; more than one make an array."""
    command: Sequence[str]
    """Words behind `python -P` that a rank runs; UNIT and TASK, also behind `name=`, are the unit's folder and number."""
    local_command: Sequence[str]
    """The same where no srun starts the ranks."""
    nodes: int
    ranks_per_node: int
    trains: bool
    """Whether its ranks meet each other, and are worth a check of their nodes."""
    local_ranks: int = 1
    """Ranks that one task starts by itself: it has the cores of so many."""
    gpus: int = 0
    """GPUs of a job that does not train; one that trains has all of its nodes."""
    throttle: int | None = None
    after: Sequence[str] = ()
    """Folders of runs to wait for, where no scheduler does it."""


def check_name(what: str, text: str) -> None:
    """Raises UserError where Slurm's headers cannot hold a name or a path."""
    bad = _HEADER_UNSAFE.search(text)
    if bad:
        raise UserError(
            f"{what}={text!r}: holds {bad.group()!r}, which sbatch does not take in names and paths; spaces, letters of any "
            "script and apostrophes are fine"
        )


def render(job: Job, cluster: ClusterConfig) -> str:
    """The text of the script. Raises UserError for names that Slurm cannot hold."""
    import jinja2

    check_name("run.name", job.name)
    check_name("folder", str(job.root))
    check_name("folder", str(job.directory))
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"quote": quote, "wrapped": wrapped, "comment": lambda text: " ".join(str(text).split())}
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(_values(job, cluster))
    return re.sub(r"\n{3,}", "\n\n", text)


def quote(text: object) -> str:
    """One word of the shell; with commas it is quoted too, as they look like separators in an array."""
    quoted = shlex.quote(str(text))
    return f"'{quoted}'" if "," in quoted and not quoted.startswith("'") else quoted


def wrapped(flags: Sequence[str], indent: int) -> str:
    """Options of a command, over as many lines as they need."""
    lines = [""]
    for flag in map(quote, flags):
        if len(lines[-1]) + len(flag) > _LINE:
            lines.append("")
        lines[-1] += f" {flag}" if lines[-1] else flag
    return f" \\\n{' ' * indent}".join(lines)


def _values(job: Job, cluster: ClusterConfig) -> dict[str, Any]:
    slurm = cluster.scheduler == "slurm"
    container = cluster.container
    is_array = len(job.units) > 1
    root = shlex.quote(str(job.root))
    unit = root
    if is_array:
        stem = str(Path(job.units[0]).parent)
        below = "" if stem == "." else f"{shlex.quote(stem)}/"
        unit = f'{root}/{below}$(printf %03d "$SLURM_ARRAY_TASK_ID")'
    elif job.units[0]:
        unit = f"{root}/{shlex.quote(job.units[0])}"
    return {
        "title": f"Run {job.name!r}, stage {job.stage}.",
        "name": job.name,
        "options": _options(job, cluster, is_array=is_array) if slurm else [],
        "cluster": cluster,
        "container": container,
        "container_flags": _container_flags(cluster, job.directory),
        "python": sys.executable if container.kind == "none" else container.python,
        "slurm": slurm,
        "directory": str(job.directory),
        "unit": unit,
        "code": str(job.root / "slurm" / CODE),
        "after": list(job.after),
        "rendezvous": slurm and job.trains,
        "preflight": job.trains and cluster.preflight.enabled,
        "chain": cluster.restarts.how == "chain",
        "node_flags": _node_flags(job, cluster),
        "rank_flags": _rank_flags(job, cluster),
        "job_id": '"${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"' if is_array else '"$SLURM_JOB_ID"',
        "excluded": _excluded_by_site(cluster),
        "replaceable": cluster.reservation is None and (cluster.constraint is None or "|" not in cluster.constraint),
        "with_features": _with_features(cluster.constraint),
        "command": _command(job.command if slurm else job.local_command),
        "local_log": "launcher.log" if job.trains else "rank-00000.log",
    }


def _options(job: Job, cluster: ClusterConfig, *, is_array: bool) -> list[str]:
    logs = f"{job.root}/slurm/{job.stage}-" + ("%A_%a.out" if is_array else "%j.out")
    place = hashlib.sha256(str(job.root).encode()).hexdigest()[:6]  # singletons of two projects must not wait for each other
    options = [
        f'--job-name="{job.name}/{job.stage} {place}"',
        f'--chdir="{job.directory}"',
        f'--output="{logs}"',
        "--open-mode=append",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={job.ranks_per_node}",
        f"--time={cluster.time_limit_minutes}",
        f"--signal=B:USR1@{cluster.warning_seconds}",
        "--no-requeue" if cluster.restarts.how == "chain" else "--requeue",
    ]
    for name in ("account", "partition", "qos", "constraint", "reservation"):
        if (value := getattr(cluster, name)) is not None:
            options.append(f'--{name}="{value}"')
    if gpus := cluster.gpus_per_node if job.trains else job.gpus:
        options.append(f"--gpus-per-node={gpus}")
    if cluster.cpus_per_task:
        options.append(f"--cpus-per-task={_cores(job, cluster)}")
    if cluster.memory_gb_per_node:
        options.append(f"--mem={round(cluster.memory_gb_per_node * 1024)}M")
    if is_array:
        throttle = f"%{job.throttle}" if job.throttle else ""
        options.append(f"--array=0-{len(job.units) - 1}{throttle}")
    return [*options, *cluster.options]


def _excluded_by_site(cluster: ClusterConfig) -> str:
    """Nodes that the user's own options leave out, to be put behind others."""
    given = [option.partition("=")[2] for option in cluster.options if option.startswith("--exclude=")]
    return ",".join(given)


def _with_features(constraint: str | None) -> str:
    """Filter of sinfo's lines: names of the nodes that have all features of a constraint."""
    wanted = [word for word in re.split(r"[&,()]", constraint or "") if word]
    tests = " && ".join(f'("," $2 ",") ~ ",{word},"' for word in wanted)
    return f"awk '{tests + ' ' if tests else ''}{{ print $1 }}'"


def _container_flags(cluster: ClusterConfig, directory: Path) -> list[str]:
    container = cluster.container
    mounts = [mount if ":" in mount else f"{mount}:{mount}" for mount in container.mounts]
    if container.kind == "pyxis":
        flags = [f"--container-image={container.image}", "--no-container-mount-home", f"--container-workdir={directory}"]
        return [*flags, *([f"--container-mounts={','.join(mounts)}"] if mounts else [])]
    if container.kind == "apptainer":
        flags = ["--nv"] if cluster.gpus_per_node else []
        return [*flags, *(word for mount in mounts for word in ("--bind", mount)), f"--pwd={directory}", str(container.image)]
    return []


def _node_flags(job: Job, cluster: ClusterConfig) -> list[str]:
    """Of srun, for one task on every node."""
    # Where one task never ends, such as behind a dead mount, the others do by themselves, and then the step.
    wait = f"--wait={math.ceil(cluster.preflight.timeout_seconds)}"
    flags = [f"--nodes={job.nodes}", f"--ntasks={job.nodes}", "--ntasks-per-node=1", wait]
    if cluster.cpus_per_task:
        flags.append(f"--cpus-per-task={_cores(job, cluster)}")
    return flags


def _cores(job: Job, cluster: ClusterConfig) -> int:
    return (cluster.cpus_per_task or 1) * job.local_ranks


def _rank_flags(job: Job, cluster: ClusterConfig) -> list[str]:
    """Of srun, for the ranks. One that fails ends all: the others could only wait for it."""
    flags = [
        f"--nodes={job.nodes}",
        f"--ntasks={job.nodes * job.ranks_per_node}",
        f"--ntasks-per-node={job.ranks_per_node}",
        "--kill-on-bad-exit=1",
        f"--wait={_WAIT_SECONDS}",
        "--open-mode=append",
    ]
    if cluster.cpus_per_task:
        flags.append(f"--cpus-per-task={_cores(job, cluster)}")
    flags += [f"--cpu-bind={cluster.cpu_bind}"] if cluster.cpu_bind else []
    flags += [f"--mem-bind={cluster.memory_bind}"] if cluster.memory_bind else []
    binds_gpus = cluster.gpu_bind and job.local_ranks == 1  # a task of several ranks has to see the GPUs of all
    return flags + ([f"--gpu-bind={cluster.gpu_bind}"] if binds_gpus else [])


def _command(words: Sequence[str]) -> str:
    places = {UNIT: '"$unit"', TASK: '"$SLURM_ARRAY_TASK_ID"'}
    return " ".join(_word(word, places) for word in words)


def _word(word: str, places: dict[str, str]) -> str:
    for place, variable in places.items():
        if word == place:
            return variable
        if word.endswith(f"={place}"):
            return shlex.quote(word.removesuffix(place)) + variable
    return shlex.quote(word)
