"""The cluster that all tests of this folder share, and `longhaul` as its users call it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from slurm.history import Begin, End, History, read_history
from slurm.submission import read_submission
from tests.integration.runs import WORDS
from tests.slurm.cluster import NODES, Cluster, missing_programs
from tests.timeouts import scaled

REPOSITORY = Path(__file__).parents[2]
SITES = {
    "here": "scheduler: slurm\n",
    "urgent": "scheduler: slurm\npartition: urgent\n",
    "this_machine": "scheduler: local\n",
}
# One core a rank wherever it runs, so that sums come in the same order; nodes that share a machine are not compared.
COMMON = """\
cpu_bind: null
cpus_per_task: 1
tasks_per_node: {tasks}
time_limit_minutes: 10
warning_seconds: 60
preflight: {{min_matmul_share: 0.0, min_bandwidth_share: 0.0, timeout_seconds: {patience}}}
"""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if missing := missing_programs():
        pytest.skip(f"{', '.join(missing)}: not installed; apt-get install slurm-wlm munge")
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@dataclass(frozen=True)
class Called:
    """A call of the command."""

    code: int
    text: str


@dataclass
class Desk:
    """A folder to work in, and the command."""

    cluster: Cluster
    folder: Path
    corpus: Path

    def call(self, *words: str, sites: bool = True) -> Called:
        """`longhaul WORDS`."""
        command = [
            sys.executable,
            "-P",
            "-m",
            "tools.cli",
            *words,
            *([f"--config-dir={self.folder / 'sites'}"] if sites else []),
        ]
        environment = {**self.cluster.environment, "PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=scaled(120))
        return Called(code=done.returncode, text=done.stdout + done.stderr)

    def submit(self, name: str, *words: str, site: str = "here", nodes: int = 2) -> Path:
        """Submit a pretraining run; its folder."""
        done = self.submit_call(name, *words, site=site, nodes=nodes)
        assert done.code == 0, done.text
        return self.folder / "runs" / name

    def submit_call(self, name: str, *words: str, site: str = "here", nodes: int = 2) -> Called:
        """The call that submits a pretraining run."""
        own = [f"data.sources=[{{path: {self.corpus}}}]", f'run.name="{name}"', f"cluster={site}", f"nodes={nodes}"]
        given = [word for word in WORDS if not word.startswith("launch.device")]
        return self.call("submit", "pretrain", *given, *own, *words)

    def history(self, unit: Path) -> History:
        return read_history(unit)

    def wait(self, condition: Callable[[], object], what: str, seconds: float = 150.0) -> None:
        """Wait until something holds."""
        deadline = time.monotonic() + scaled(seconds)
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"{what}: not within {scaled(seconds):g} s\n{self.story()}")
            time.sleep(0.2)

    def wait_for_step(self, unit: Path, step: int, attempt: int = 1) -> None:
        """Wait until an attempt has done a step."""
        path = unit / "metrics.jsonl"

        def reached() -> bool:
            lines = path.read_text().splitlines() if path.exists() else []
            return any(f'"attempt": {attempt}, "step": {step},' in line for line in lines)

        self.wait(reached, f"step {step} of attempt {attempt}")

    def wait_until_gone(self, root: Path, seconds: float = 200.0) -> None:
        """Wait until none of its jobs waits or runs."""
        jobs = read_submission(root).job_ids()
        self.wait(lambda: not {*jobs} & {job.partition("_")[0] for job in self.cluster.queue()}, f"the end of {jobs}", seconds)

    def wait_finished(self, unit: Path, seconds: float = 200.0) -> None:
        """Wait until a unit is done; a stop for good is a failure at once."""

        def done() -> bool:
            history = read_history(unit)
            assert history.stopped is None, f"{history.stopped}\n{self.story()}"
            return history.last_end is not None and history.last_end.action == "done"

        self.wait(done, f"{unit} was finished", seconds)

    def story(self) -> str:
        """What the jobs have said, for a person who reads a failure."""
        paths = sorted([*self.folder.glob("runs/**/slurm/*.out"), *self.folder.glob("runs/**/slurm/history.jsonl")])
        paths += sorted([*self.folder.glob("runs/**/srun.log"), *self.folder.glob("runs/**/rank-00000.log")])
        parts = [f"{path}:\n{path.read_text(errors='replace')[-3000:]}" for path in paths]
        return "\n".join([self.cluster.call("squeue"), *parts])


@pytest.fixture
def desk(cluster: Cluster, tmp_path: Path, corpus: Path) -> Iterator[Desk]:
    yield from desks(cluster, tmp_path, corpus)


def desks(cluster: Cluster, folder: Path, corpus: Path, tasks: int = 1) -> Iterator[Desk]:
    """A desk that leaves no job behind."""
    (folder / "sites" / "cluster").mkdir(parents=True)
    for name, text in SITES.items():
        (folder / "sites" / "cluster" / f"{name}.yaml").write_text(text + COMMON.format(tasks=tasks, patience=scaled(60.0)))
    desk = Desk(cluster=cluster, folder=folder, corpus=corpus)
    cluster.wait_until_idle()
    try:
        yield desk
    finally:
        cluster.mend()
        for root in _roots(folder):
            jobs = [job for job in read_submission(root).job_ids() if not job.startswith("local")]
            if jobs:
                subprocess.run(["scancel", "--signal=KILL", "--full", *jobs], env=cluster.environment, capture_output=True)
                subprocess.run(["scancel", *jobs], env=cluster.environment, capture_output=True)


def _roots(folder: Path) -> Sequence[Path]:
    return [path.parents[1] for path in folder.glob("runs/**/slurm/submission.json")]


def settle(desk: Desk, unit: Path) -> list[End]:
    """The ends of a unit, when it has no job any more."""
    desk.wait_until_gone(unit)
    return desk.history(unit).ends


def nodes_of(desk: Desk, unit: Path) -> list[tuple[str, ...]]:
    """Nodes of every attempt."""
    return [event.nodes for event in desk.history(unit).events if isinstance(event, Begin)]


def slowly(desk: Desk) -> None:
    """Have every step take long enough to be met."""
    for node in NODES:
        desk.cluster.break_node(node, f"slow:{scaled(0.2)}")
