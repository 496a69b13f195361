"""What was submitted: `slurm/submission.json` in a run's folder, and how its units stand."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from conf.compose import validate
from conf.errors import UserError
from slurm.config import PreflightConfig, RestartsConfig
from slurm.history import read_history
from train.checkpoint.manifest import write_durably

SUBMISSION_FILE = Path("slurm") / "submission.json"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One job script, and the jobs that were made of it."""

    name: str
    """Of the script, `slurm/NAME.sbatch`."""
    units: tuple[str, ...]
    """Folders of what it does, below the run's; "" is the run's own. Several make an array."""
    jobs: tuple[str, ...] = ()
    """Ids, in the order of the chain."""


@dataclass(frozen=True, kw_only=True)
class UnitStates:
    """How far the units of a submission are."""

    finished: bool
    failed: str
    """Why one of them is stopped for good; empty while none is."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """One `longhaul submit`."""

    name: str
    verb: str
    words: tuple[str, ...]
    """What was submitted, as it was written."""
    cluster: str
    """The site, as it was named."""
    scheduler: str
    tasks: int
    """Ranks of a job."""
    nodes: int
    gpus_per_node: int
    scratch: str
    """Disk of a node itself."""
    stages: tuple[Stage, ...]
    after: tuple[str, ...] = ()
    """Folders of the runs that had to finish first."""
    preflight: PreflightConfig
    restarts: RestartsConfig
    folder: str
    """The run's."""
    chain: int = 1
    """Jobs of a chain."""
    directory: str
    """From which it was submitted; its paths are meant from there."""
    time: float = field(default_factory=time.time)
    """Unix seconds."""

    @property
    def root(self) -> Path:
        """The run's folder."""
        return Path(self.folder)

    def units(self) -> Iterator[tuple[Stage, int, Path]]:
        """Every unit: its stage, its number within it, its folder."""
        for stage in self.stages:
            for number, unit in enumerate(stage.units):
                yield stage, number, self.root / unit

    def job_ids(self) -> tuple[str, ...]:
        """All its jobs."""
        return tuple(job for stage in self.stages for job in stage.jobs)

    def is_done(self, stage: Stage) -> bool:
        """Whether all units of a stage are."""
        return all(read_history(self.root / unit).is_done for unit in stage.units)

    def jobs_behind(self, job: str) -> tuple[str, ...]:
        """The jobs of a chain that come after `job`."""
        submitted = job.partition("_")[0]  # of an array its number
        for stage in self.stages:
            if submitted in stage.jobs:
                return stage.jobs[stage.jobs.index(submitted) + 1 :]
        return ()

    def unit_states(self) -> UnitStates:
        """How far its units are, by their histories."""
        histories = [(unit, read_history(unit)) for _, _, unit in self.units()]
        stops = [(unit, stop) for unit, history in histories if (stop := history.stopped) is not None]
        failed = f"{stops[0][0]}: {stops[0][1].reason}" if stops else ""
        return UnitStates(finished=all(history.is_done for _, history in histories), failed=failed)

    def write(self) -> None:
        """Keep it, whole or not at all."""
        path = self.root / SUBMISSION_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, json.dumps(asdict(self), indent=2).encode())


def read_submission(root: Path) -> Submission:
    """The submission of a run's folder. Raises UserError when there is none, or it cannot be read."""
    path = root / SUBMISSION_FILE
    try:
        return validate(Submission, json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{root}: was not submitted by `longhaul submit`; there is no {path}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def root_of(unit: Path) -> Path:
    """The run's folder that a unit belongs to: the nearest above, or its own, that was submitted.

    Raises UserError when there is none.
    """
    for folder in (unit, *unit.parents):
        if (folder / SUBMISSION_FILE).exists():
            return folder
    raise UserError(f"{unit}: belongs to nothing that was submitted")
