"""ParallelContext: which rank this is, on which device, and the seeds that follow from it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ParallelContext:
    """This rank's place. Handed down as an argument; nobody else asks for ranks."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def data_rank(self) -> int:
        """Position among the data-parallel ranks."""
        return self.rank

    @property
    def data_parallel(self) -> int:
        """Number of data-parallel ranks."""
        return self.world_size

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

    def sum_over_data(self, values: Tensor) -> Tensor:
        """Sum `values` over the data-parallel ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def any_rank(self, flag: bool) -> bool:
        """Whether `flag` is set on at least one rank; all ranks must ask."""
        if self.world_size == 1:
            return flag
        count = torch.tensor([int(flag)], dtype=torch.int32, device=self.device)
        dist.all_reduce(count, op=dist.ReduceOp.MAX)
        return bool(count.item())

    def from_first(self, value: object) -> object:
        """The first rank's `value` (plain data) on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather_to_all(self, value: object) -> list:
        """Every rank's `value` (plain data), by rank, on every rank."""
        if self.world_size == 1:
            return [value]
        box: list = [None] * self.world_size
        dist.all_gather_object(box, value)
        return box

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()


def single_process(device: str = "cpu") -> ParallelContext:
    """The context of a process on its own: no group, no environment."""
    return ParallelContext(rank=0, world_size=1, local_rank=0, device=torch.device(device))


def start_rank(device: str, timeout_seconds: float) -> ParallelContext:
    """Join the group that the environment describes (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT).

    A rank started by srun has SLURM_PROCID, SLURM_NTASKS and SLURM_LOCALID in their place.
    `device` is "cpu" or "cuda". A collective that takes longer than `timeout_seconds` fails.
    """
    from train.rendezvous import open_store

    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    world_size = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1")))
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    place = torch.device("cpu")
    if device == "cuda":
        place = torch.device("cuda", local_rank)
        torch.cuda.set_device(place)
    store = open_store(rank, world_size, timeout_seconds=timeout_seconds)
    dist.init_process_group(
        backend="nccl" if device == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_seconds),
    )
    return ParallelContext(rank=rank, world_size=world_size, local_rank=local_rank, device=place)
