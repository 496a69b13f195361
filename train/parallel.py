"""ParallelContext: which rank this is, on which device, and with which ranks it shares a model or splits the data.

Tensor-parallel ranks are neighbours (0..t-1 hold one model), data-parallel ranks are t apart: megatron-core's order.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from conf.errors import UserError

ReadT = TypeVar("ReadT")


_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1  # of glibc's malloc.h


@dataclass(frozen=True, kw_only=True)
class TensorRanks:
    """The ranks that hold one model together; `rank` is this one's place among the `size` of them.

    `sequence_parallel`: between the split layers each rank holds its own rows of the hidden states, not all of them.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    sequence_parallel: bool = False


ALONE = TensorRanks()


@dataclass(frozen=True, kw_only=True)
class ParallelContext:
    """This rank's place. Handed down as an argument; nobody else asks for ranks."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    tensor: TensorRanks = ALONE
    data_group: Any = field(default=None, repr=False)
    """Process group of the ranks that hold the same slice of the model; None: all ranks."""
    store: dist.Store = field(default_factory=dist.HashStore, repr=False)
    """Key-value store of all ranks, for what no collective is to wait for; any thread may use it."""

    @property
    def data_rank(self) -> int:
        """Position among the data-parallel ranks."""
        return self.rank // self.tensor.size

    @property
    def data_parallel(self) -> int:
        """Number of data-parallel ranks."""
        return self.world_size // self.tensor.size

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

    def sum_over_data(self, values: Tensor) -> Tensor:
        """Sum `values` over the data-parallel ranks, in place."""
        if self.data_parallel > 1:
            dist.all_reduce(values, group=self.data_group)
        return values

    def from_first(self, value: object) -> object:
        """The first rank's `value` (plain data) on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def read_once(self, read: Callable[[], ReadT]) -> ReadT:
        """What `read` gives on the first rank (plain data), on every rank: a thousand that look for every file of a corpus are
        a storm for the file system. What stands against it is raised as UserError on every rank."""
        found, problem = None, None
        if self.is_first:
            try:
                found = read()
            except (UserError, OSError) as error:
                problem = str(error)
        box: Any = self.from_first((found, problem))
        found, problem = box
        if problem is not None:
            raise UserError(problem)
        return found

    def gather_to_all(self, value: object) -> list:
        """Every rank's `value` (plain data), by rank, on every rank."""
        if self.world_size == 1:
            return [value]
        box: list = [None] * self.world_size
        dist.all_gather_object(box, value)
        return box

    def sum_over_ranks(self, values: Sequence[float]) -> list:
        """The sum of each of the `values` over all ranks; all must ask with equally many.

        Integers are added as int64, which wraps, anything else as float64.
        """
        if self.world_size == 1:
            return list(values)
        whole = all(isinstance(value, int) for value in values)
        sums = torch.tensor(list(values), dtype=torch.int64 if whole else torch.float64, device=self.device)
        dist.all_reduce(sums)
        return sums.tolist()

    def post(self, key: str, value: bytes) -> None:
        """Put `value` on the board that all ranks can read, from any thread."""
        self.store.set(key, value)

    def take_down(self, key: str) -> None:
        """Remove `key` from the board, from any thread; one that is not there is no error."""
        self.store.delete_key(key)

    def posted(self, key: str, *, is_over: Callable[[], bool] = lambda: False) -> bytes | None:
        """Wait until a rank has posted `key`, from any thread; None when `is_over` before."""
        pause = 0.002
        while not self.store.check([key]):
            if is_over():
                return None
            time.sleep(pause)
            pause = min(2 * pause, 0.1)  # of thousands of ranks, none may ask all the time
        return self.store.get(key)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()

    @property
    def mpu(self) -> DeepSpeedView | None:
        """The groups in the words of DeepSpeed; None when all ranks are data-parallel, which is what it assumes."""
        return DeepSpeedView(self) if self.tensor.size > 1 else None


class DeepSpeedView:
    """A `ParallelContext` under the names by which DeepSpeed asks its `mpu`; megatron-core dropped some of them."""

    def __init__(self, context: ParallelContext) -> None:
        self._context = context

    def get_data_parallel_group(self) -> Any:
        """Ranks that ZeRO shards over."""
        return self._context.data_group

    def get_data_parallel_world_size(self) -> int:
        """Number of those ranks."""
        return self._context.data_parallel

    def get_data_parallel_rank(self) -> int:
        """This rank's place among them."""
        return self._context.data_rank

    def get_model_parallel_group(self) -> Any:
        """Ranks that hold one model together."""
        return self._context.tensor.group

    def get_model_parallel_world_size(self) -> int:
        """Number of those ranks."""
        return self._context.tensor.size

    def get_model_parallel_rank(self) -> int:
        """This rank's place among them."""
        return self._context.tensor.rank

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank


def single_process(device: str = "cpu") -> ParallelContext:
    """The context of a process on its own: no group, no environment."""
    return ParallelContext(rank=0, world_size=1, local_rank=0, device=torch.device(device))


def start_rank(
    device: str,
    timeout_seconds: float,
    *,
    joining_seconds: float | None = None,
    tensor_parallel: int = 1,
    sequence_parallel: bool = False,
) -> ParallelContext:
    """Join the group that the environment describes (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT).

    A rank started by srun has SLURM_PROCID, SLURM_NTASKS and SLURM_LOCALID in their place.
    `device` is "cpu" or "cuda". A collective that takes longer than `timeout_seconds` fails; so does the wait for the other
    ranks to come, or one that takes longer than `joining_seconds`.
    """
    from train.rendezvous import open_store

    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    world_size = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1")))
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    place = torch.device("cpu")
    if tensor_parallel > 1:
        # One hardware queue: kernels start in the order of the calls, so that a reduction overlaps the product after it.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if device == "cpu":
        keep_freed_memory()
        # A build for CUDA, which PyPI gives from Python 3.12 on, warns of a missing GPU when DeepSpeed or the compiler asks it
        # for the compiler of CUDA.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    if device == "cuda":
        alone = torch.cuda.device_count() == 1  # each task of a job may be shown nothing but its own
        place = torch.device("cuda", 0 if alone else local_rank)
        torch.cuda.set_device(place)
    store = open_store(rank, world_size, timeout_seconds=joining_seconds or timeout_seconds)
    store.set_timeout(
        timedelta(seconds=timeout_seconds)
    )  # NCCL asks it for a partner's address as late as the first collective
    dist.init_process_group(
        backend="nccl" if device == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_seconds),
    )
    return split_ranks(
        ParallelContext(rank=rank, world_size=world_size, local_rank=local_rank, device=place, store=store),
        tensor_parallel=tensor_parallel,
        sequence_parallel=sequence_parallel,
    )


def keep_freed_memory() -> None:
    """Let this process keep memory that is freed for what is allocated next, where the C library is glibc.

    Left alone it gives every block above 32 MiB back to the kernel at once, and the next step takes it page by page: a fifth
    of the CPU time of a head with its loss (1,024 tokens, 8,192 ids; 333,833 page faults in ten steps, 16,384 with this).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Before 2.35 it refuses more than 32 MiB. Where it takes none, the other setting alone would pin the threshold at 128 KiB.
    if mallopt is not None and (mallopt(_M_MMAP_THRESHOLD, 2**30) or mallopt(_M_MMAP_THRESHOLD, 2**25)):
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def leave_ranks() -> None:
    """Forget the group that this process has joined, if any, so that it can join another."""
    if not dist.is_initialized():
        return
    if "megatron.core.parallel_state" in sys.modules:  # split_ranks has told it of the groups
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def split_ranks(context: ParallelContext, *, tensor_parallel: int, sequence_parallel: bool = False) -> ParallelContext:
    """`context` with its ranks divided into tensor-parallel and data-parallel groups; all ranks together."""
    if tensor_parallel == 1:
        return context
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_parallel)
    if context.device.type == "cpu":
        # megatron-core makes its buffers on "the current CUDA device", also where there is none.
        torch.cuda.current_device = lambda: context.device
    return replace(
        context,
        tensor=TensorRanks(
            rank=parallel_state.get_tensor_model_parallel_rank(),
            size=tensor_parallel,
            group=parallel_state.get_tensor_model_parallel_group(),
            sequence_parallel=sequence_parallel,
        ),
        data_group=parallel_state.get_data_parallel_group(),
    )
