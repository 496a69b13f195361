"""Starts small process groups for tests: a forkserver with the heavy libraries loaded, gloo over a file, a short timeout.

The first group pays for the imports once; later ones start in well under a second and leave nothing behind.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from tests.timeouts import scaled

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["tests.preloaded"])


def ensure_server() -> None:
    """Start the server from the repository's folder, where it finds what it is to load; elsewhere it would go without."""
    with contextlib.chdir(Path(__file__).parents[1]):
        multiprocessing.forkserver.ensure_running()


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any, timeout_seconds: float = 120.0) -> list[Any]:
    """Run `function(context, *arguments)` on `world_size` CPU ranks; returns their results by rank.

    `function` must be importable. The first failure is raised here with the rank's traceback. Forked and ended, a rank costs
    0.05 CPU seconds: ranks that live on from test to test would save no more, and hand on what a function has changed.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    timeout_seconds = scaled(timeout_seconds)
    ensure_server()
    with tempfile.TemporaryDirectory() as folder:
        queue = FORKSERVER.SimpleQueue()
        ranks = [
            FORKSERVER.Process(
                target=_rank_main,
                args=(function, rank, world_size, f"{folder}/store", timeout_seconds, queue, arguments),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            results: dict[int, Any] = {}
            for _ in ranks:
                rank, value, failure = _receive(queue, ranks, timeout_seconds)
                if failure:
                    raise AssertionError(f"rank {rank} of {world_size} failed:\n{failure}")
                results[rank] = pickle.loads(value)
            return [results[rank] for rank in range(world_size)]
        finally:
            for process in ranks:
                process.join(scaled(5.0))
                if process.is_alive():
                    process.kill()
                    process.join()


def _receive(queue: Any, ranks: list[Any], timeout_seconds: float) -> tuple[int, bytes, str]:
    """Next report of a rank; fails when none comes in time or a rank dies without one."""
    waited = 0.0
    while not queue._reader.poll(0.1):
        waited += 0.1
        dead = [rank for rank, process in enumerate(ranks) if process.exitcode not in (None, 0)]
        if dead and not queue._reader.poll(0.5):
            raise AssertionError(f"ranks {dead} died with exit codes {[ranks[rank].exitcode for rank in dead]}")
        if waited > timeout_seconds:
            raise AssertionError(f"no rank reported within {timeout_seconds:.0f} s")
    return queue.get()


def _rank_main(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    store_path: str,
    timeout_seconds: float,
    queue: Any,
    arguments: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    from train.parallel import ParallelContext

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    try:
        store = dist.FileStore(store_path, world_size)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_seconds)
        )
        context = ParallelContext(rank=rank, world_size=world_size, local_rank=rank, device=torch.device("cpu"), store=store)
        value = function(context, *arguments)
        queue.put((rank, pickle.dumps(value), ""))  # by value: shared tensors would die with the rank
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:  # every failure of a rank has to reach the test
        queue.put((rank, b"", traceback.format_exc()))
        os._exit(1)
