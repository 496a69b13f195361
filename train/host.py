"""The name of this machine, as the launcher knows it."""

from __future__ import annotations

import os
import socket


def host_name() -> str:
    """Slurm's name of this node within a job, which may differ from the machine's own; that one anywhere else."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
