"""A command that runs on several ranks of this machine and is watched at the terminal: this process is rank 0, the
others are copies of its command line, silent and gone when it ends.

Long runs are the supervisor's; this is for commands of a minute, such as generation with a model that one GPU cannot hold.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from conf.errors import UserError
from train.parallel import ParallelContext, start_rank

_TIMEOUT_SECONDS = 600.0
_GRACE_SECONDS = 10.0  # a companion that has nothing left to do leaves at once


@contextmanager
def ranks(size: int, device: str, *, tensor_parallel: int = 1, sequence_parallel: bool = False) -> Iterator[ParallelContext]:
    """The context of this rank among `size` ranks of one process group, `tensor_parallel` of them to a model.

    Raises UserError when a companion fails, with the end of what it said.
    """

    def join() -> ParallelContext:
        layout = {"tensor_parallel": tensor_parallel, "sequence_parallel": sequence_parallel}
        return start_rank(device, _TIMEOUT_SECONDS, **layout)

    if "RANK" in os.environ:  # one of the copies
        yield join()
        return
    with socket.create_server(("127.0.0.1", 0), backlog=128) as store, tempfile.TemporaryFile() as said:
        os.environ.update(
            WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.getsockname()[1]), RANK="0", LOCAL_RANK="0"
        )
        if "OMP_NUM_THREADS" not in os.environ:
            threads = max(1, len(os.sched_getaffinity(0)) // size)
            os.environ["OMP_NUM_THREADS"] = str(threads)
            torch.set_num_threads(
                threads
            )  # torch is imported here and took all cores: two ranks of two cores took 204 s, not 35
        companions = [
            subprocess.Popen(
                sys.orig_argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(1, size)
        ]
        os.environ["LONGHAUL_STORE_FD"] = str(os.dup(store.fileno()))
        try:
            yield join()
            for companion in companions:
                companion.wait(_GRACE_SECONDS)
        except RuntimeError as error:  # a collective that lost its partner
            if any(companion.poll() for companion in companions):
                said.seek(0)
                last = said.read().decode(errors="replace")[-2000:]
                raise UserError(f"a rank of {size} failed:\n{last}") from error
            raise
        finally:
            for companion in companions:
                companion.kill()
                companion.wait()
