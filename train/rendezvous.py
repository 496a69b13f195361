"""Where the ranks of a run meet: the key-value store behind the process group. Loads torch only when it is opened."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import MutableMapping
from datetime import timedelta
from typing import TYPE_CHECKING

from conf.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import TCPStore

_BACKLOG = 4096  # every rank of a large job may connect before rank 0 accepts; the kernel caps it at somaxconn


class RendezvousError(RuntimeError):
    """The ranks did not meet."""


def open_store(
    rank: int,
    world_size: int,
    *,
    timeout_seconds: float = 600.0,
    bind_seconds: float = 20.0,
    environment: MutableMapping[str, str] | None = None,
) -> TCPStore:
    """Open the store that `init_process_group(store=..., rank=..., world_size=...)` takes.

    Rank 0 serves it: on the socket in LONGHAUL_STORE_FD, which the supervisor bound before it started any rank, or,
    under srun, on MASTER_PORT bound here; a port that is still busy is asked for again for `bind_seconds`, as the
    attempt before may be leaving. `timeout_seconds` bounds the wait for the ranks and each later wait for a key.

    Raises UserError for a missing or wrong MASTER_ADDR or MASTER_PORT, RendezvousError for a busy port or ranks that did not
    come: another attempt has another port and may have other nodes.
    """
    from torch.distributed import DistError, TCPStore

    environment = os.environ if environment is None else environment
    host, port = _address(environment)
    listen_fd = _listening_socket(environment, port, bind_seconds) if rank == 0 else None
    try:
        return TCPStore(
            host,
            port,
            world_size,
            is_master=rank == 0,
            timeout=timedelta(seconds=timeout_seconds),
            master_listen_fd=listen_fd,
        )
    except DistError as error:
        raise RendezvousError(
            f"rank {rank}: no rendezvous of {world_size} ranks at {host}:{port} within {timeout_seconds:g} s "
            f"({str(error).splitlines()[0]}); look for a rank that failed to start, or a firewall"
        ) from error


def _address(environment: MutableMapping[str, str]) -> tuple[str, int]:
    host, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
    if not host or not port:
        raise UserError(
            f"MASTER_ADDR={host} MASTER_PORT={port}: both must be set; start ranks by `longhaul` or by the job script"
        )
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"MASTER_PORT={port}: must be a port number from 1 to 65535")
    return host, int(port)


def _listening_socket(environment: MutableMapping[str, str], port: int, bind_seconds: float) -> int:
    """A listening socket for the store, as a descriptor that the store will own."""
    # Taken out: a process that rank 0 starts must not believe that it has the socket too.
    inherited = environment.pop("LONGHAUL_STORE_FD", None)
    if inherited is not None:
        descriptor = int(inherited)
        os.set_inheritable(descriptor, False)
        return descriptor
    deadline = time.monotonic() + bind_seconds
    while True:
        try:
            return _bind(port)
        except OSError as error:
            if time.monotonic() >= deadline:
                raise RendezvousError(
                    f"MASTER_PORT={port}: cannot be bound on {socket.gethostname()} ({error.strerror}); "
                    "another job may use it: choose another port"
                ) from None
        time.sleep(0.2)


def _bind(port: int) -> int:
    """Listen on `port` of every interface, IPv6 and IPv4: the other nodes come by whatever MASTER_ADDR resolves to."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG).detach()
    return socket.create_server(("", port), backlog=_BACKLOG).detach()
