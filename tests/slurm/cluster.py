"""A real Slurm cluster of four nodes on this machine: Debian's daemons, in a folder and on ports of its own."""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from tests.timeouts import scaled

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch")
NODES = ("n1", "n2", "n3", "n4")
FAULTY = Path(__file__).with_name("faulty")
START_SECONDS = 30.0
SECONDS = {"lost": 6.0, "kill": 10.0, "grace": 30.0}
"""Until a node that is silent is down, a job that is to end is killed, and one that is preempted; on a slow machine more."""

CONF = """\
ClusterName=longhaul
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
TaskProlog={folder}/task-prolog.sh
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout={lost}
KillWait={kill}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,sched_min_interval=0
NodeName=n[1-4] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[4]}] Sockets=1 CoresPerSocket=4 \
ThreadsPerCore=1 RealMemory=4000
PartitionName=main Nodes=n[1-4] Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime={grace}
PartitionName=urgent Nodes=n[1-4] MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""
# What a file in `faults` says is exported to the tasks of the node of its name.
PROLOG = """\
#!/bin/bash
fault={folder}/faults/$SLURMD_NODENAME
[ -e "$fault" ] || exit 0
echo "export LONGHAUL_TEST_FAULT=$(cat "$fault")"
echo "export PYTHONPATH={faulty}:$PYTHONPATH"
"""


def missing_programs() -> list[str]:
    """What would have to be installed."""
    places = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    return [name for name in PROGRAMS if shutil.which(name, path=places) is None]


class Cluster:
    """Daemons that are children of this process; `environment` makes Slurm's commands talk to them and to nobody else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]),
        }
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start everything and wait until all nodes are idle."""
        for name in ("state", "spool", "faults"):
            (self.folder / name).mkdir(parents=True)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o600)
        values = {"folder": self.folder, "host": socket.gethostname(), "user": getpass.getuser(), "ports": free_ports(5)}
        seconds = {name: round(scaled(value)) for name, value in SECONDS.items()}
        (self.folder / "slurm.conf").write_text(CONF.format(**values, **seconds))
        prolog = self.folder / "task-prolog.sh"
        prolog.write_text(PROLOG.format(folder=self.folder, faulty=FAULTY))
        prolog.chmod(0o755)
        place = f"--socket={self.folder}/munge.socket"
        files = [f"--{kind}-file={self.folder}/munge.{kind}" for kind in ("key", "pid", "log", "seed")]
        self._run("munged", "--foreground", "--force", place, *files)
        self._await(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._run("slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        self.wait_until_idle()

    def wait_until_idle(self) -> None:
        """Wait until no node has anything to do."""
        self._await(lambda: self.node_states() == dict.fromkeys(NODES, "idle"), "the nodes")

    def start_node(self, node: str) -> None:
        """Start the daemon of a node."""
        self._run("slurmd", "-D", "-N", node, name=node)

    def kill_node(self, node: str) -> None:
        """SIGKILL to the node's daemon: the controller sees a node that does not answer, its tasks go on."""
        self._daemons[node].kill()
        self._daemons[node].wait()

    def bring_back(self, node: str) -> None:
        """End what a killed node still runs, and start it again."""
        for process in self._processes():
            if process.name() != "slurmd" and process.environ().get("SLURMD_NODENAME") == node:
                with contextlib.suppress(psutil.Error):
                    process.kill()
        self.start_node(node)
        self._await(lambda: self.node_states().get(node) == "idle", node)

    def break_node(self, node: str, fault: str) -> None:
        """From now on tasks of this node meet a fault; see faulty/sitecustomize.py."""
        (self.folder / "faults" / node).write_text(fault)

    def mend(self) -> None:
        """Take all faults away."""
        for path in (self.folder / "faults").iterdir():
            path.unlink()

    def call(self, *words: str) -> str:
        """Output of one of Slurm's commands."""
        return subprocess.run(
            words, env=self.environment, capture_output=True, text=True, timeout=scaled(60), check=True
        ).stdout

    def node_states(self) -> Mapping[str, str]:
        """State of every node."""
        try:
            lines = self.call("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %t").split("\n")
        except subprocess.CalledProcessError:
            return {}
        return dict(line.split() for line in lines if line)

    def job_state(self, job: str) -> str:
        """State of a job, as scontrol knows it; empty for one it has forgotten."""
        try:
            text = self.call("scontrol", "show", "job", "-o", job)
        except subprocess.CalledProcessError:
            return ""
        return next(word.partition("=")[2] for word in text.split() if word.startswith("JobState="))

    def queue(self) -> list[str]:
        """Ids of the jobs that wait or run."""
        return self.call("squeue", "--noheader", "--format=%i").split()

    def stop(self) -> None:
        """End every job and every daemon of this cluster; leave nothing behind."""
        with contextlib.suppress(subprocess.SubprocessError):
            for job in self.queue():
                self.call("scancel", "--signal=KILL", "--full", job)
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
        for process in self._processes():
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)

    def _processes(self) -> list[psutil.Process]:
        """Whatever runs with this cluster's configuration, but for the tests themselves."""
        own = str(self.folder / "slurm.conf")
        return [
            process
            for process in psutil.process_iter(["environ"])
            if (process.info["environ"] or {}).get("SLURM_CONF") == own and process.pid != os.getpid()
        ]

    def _run(self, program: str, *words: str, name: str | None = None) -> None:
        with (self.folder / f"{name or program}.log").open("ab") as log:
            self._daemons[name or program] = subprocess.Popen(
                [program, *words], env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def _await(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + scaled(START_SECONDS)
        while not condition():
            if time.monotonic() > deadline:
                logs = "\n".join(f"{path}:\n{path.read_text()[-1500:]}" for path in sorted(self.folder.glob("*.log")))
                raise AssertionError(f"{what}: not ready within {scaled(START_SECONDS):g} s\n{logs}")
            time.sleep(0.1)


def free_ports(count: int) -> Sequence[int]:
    """So many free ports in a row, below those that the kernel hands out by itself."""
    for first in range(7000 + os.getpid() % 500 * 10, 14000, count):
        try:
            for port in range(first, first + count):
                with socket.create_server(("127.0.0.1", port)):
                    pass
        except OSError:
            continue
        return range(first, first + count)
    raise AssertionError("no free ports")
