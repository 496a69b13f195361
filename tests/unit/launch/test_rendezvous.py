"""The rendezvous store: through the supervisor's socket, on a port of its own, and what it says when it cannot."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from conf.errors import UserError
from tests.timeouts import scaled
from train.rendezvous import RendezvousError, open_store

REPOSITORY = Path(__file__).resolve().parents[3]

RANK = """
import os, sys
import torch, torch.distributed as dist
from train.rendezvous import RendezvousError, open_store
rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
store = open_store(rank, world_size, timeout_seconds=30)
assert "LONGHAUL_STORE_FD" not in os.environ
dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
value = torch.tensor([rank + 1.0])
dist.all_reduce(value)
dist.destroy_process_group()
print("sum", value.item())
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def rank_environment(port: int, rank: int) -> dict[str, str]:
    place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {**os.environ, **place, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def test_two_supervised_ranks_reduce(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    program = (
        "import sys; from pathlib import Path; from train.supervisor import supervise; run = Path(sys.argv[1]);"
        "sys.exit(supervise([sys.executable, str(run / 'rank.py')], processes=2, run_dir=run))"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=scaled(60)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "sum 3.0\n"


def test_two_ranks_started_by_somebody_else_reduce() -> None:
    port = free_port()
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK], env=rank_environment(port, rank), stdout=subprocess.PIPE)
        for rank in range(2)
    ]
    try:
        assert [rank.communicate(timeout=scaled(60))[0] for rank in ranks] == [b"sum 3.0\n", b"sum 3.0\n"]
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({}, "MASTER_ADDR=None MASTER_PORT=None"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "http"}, "MASTER_PORT=http: must be a port number"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "70000"}, "MASTER_PORT=70000: must be a port number"),
    ],
)
def test_a_wrong_address_is_named(environment: dict[str, str], text: str) -> None:
    with pytest.raises(UserError, match=text):
        open_store(0, 1, environment=environment)


def test_a_busy_port_is_named() -> None:
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as other:
        port = other.getsockname()[1]
        with pytest.raises(RendezvousError, match=f"MASTER_PORT={port}: cannot be bound"):
            open_store(0, 1, bind_seconds=0.3, environment={"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})


def test_ranks_that_do_not_come_are_reported() -> None:
    with pytest.raises(RendezvousError, match="no rendezvous of 2 ranks"):
        open_store(0, 2, timeout_seconds=1.0, environment={"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())})
