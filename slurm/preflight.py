"""What a node must show before the first step. `python -m slurm.preflight UNIT ATTEMPT`, one task on every node.

Each node measures itself, and its links to the others, and writes a report into the attempt's folder; slurm.verdict compares
them.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from conf.errors import UserError
from slurm.submission import read_submission, root_of
from slurm.verdict import PREFLIGHT_FOLDER, Gpu, Report
from train.host import host_name
from train.outcome import attempt_folder
from train.rendezvous import open_store

TOKEN_FILE = "token"
TOKEN_SECONDS = 90.0  # network file systems believe for half a minute and more that a file is not there
XID_HOURS = 24.0
_GPU_FIELDS = ("name", "driver_version", "memory.used", "ecc.errors.uncorrected.volatile.total")
_MATMUL_SIZE = {"cuda": 8192, "cpu": 512}
_MATMUL_SECONDS = 0.5
_MESSAGE_BYTES = {"cuda": 256 * 2**20, "cpu": 8 * 2**20}


def main(arguments: Sequence[str]) -> int:
    """Measure this node and write its report."""
    unit, attempt = Path(arguments[0]), int(arguments[1])
    submission = read_submission(root_of(unit))
    folder = attempt_folder(unit, attempt) / PREFLIGHT_FOLDER
    number, nodes = int(os.environ.get("SLURM_PROCID", "0")), int(os.environ.get("SLURM_NTASKS", "1"))
    limit = submission.preflight.timeout_seconds
    overdue = threading.Timer(limit, lambda: os._exit(1))  # whatever hangs: a driver, a mount, another node
    overdue.daemon = True
    overdue.start()
    began = time.monotonic()
    with_gpus = submission.gpus_per_node > 0
    device = "cuda" if with_gpus else "cpu"
    report = Report(
        node=host_name(),
        free_memory_gb=free_memory_gb(),
        free_disk_gb=free_disk_gb([Path(submission.scratch), unit]),
        sees_shared_folder=await_file(folder / TOKEN_FILE, seconds=min(TOKEN_SECONDS, limit / 2)),
        gpus=read_gpus() if with_gpus else (),
        xids=read_xids() if with_gpus else (),
        link_problem="the links between the nodes were not measured in time",
    )
    report = replace(report, **measure(device))
    write_report(folder, report)  # before it meets the others, who may be missing
    links = measure_links(device, number, nodes, limit) if nodes > 1 else {}
    report = replace(report, **{"link_problem": "", **links}, seconds=round(time.monotonic() - began, 1))
    write_report(folder, report)
    print(json.dumps(asdict(report), indent=1))
    return 0


def write_report(folder: Path, report: Report) -> None:
    """Put the report where all are read, whole or not at all."""
    temporary = folder / f".{report.node}.tmp"
    temporary.write_text(json.dumps(asdict(report), indent=1))
    temporary.replace(folder / f"{report.node}.json")


def free_memory_gb() -> float:
    """Main memory that could be had."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 1e6


def free_disk_gb(folders: Sequence[Path]) -> dict[str, float]:
    """Free space by folder; 0 for one that is not there."""
    found = {}
    for folder in folders:
        try:
            found[str(folder)] = shutil.disk_usage(folder).free / 1e9
        except OSError:
            found[str(folder)] = 0.0
    return found


def await_file(path: Path, *, seconds: float) -> bool:
    """Whether the file appears in time; network file systems show it late."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if path.exists():
            return True
        time.sleep(0.05)
    return False


def read_gpus() -> tuple[Gpu, ...]:
    """The node's GPUs; none where the driver does not answer."""
    words = ["nvidia-smi", f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    if own := os.environ.get("CUDA_VISIBLE_DEVICES", ""):  # on a node that is shared, those of this task
        words.append(f"--id={own}")
    try:
        lines = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return ()
    gpus = []
    for line in lines:
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != len(_GPU_FIELDS):  # "No devices were found"
            continue
        name, driver, used, errors = cells
        gpus.append(Gpu(name=name, driver=driver, used_mb=_number(used), ecc_errors=int(_number(errors))))
    return tuple(gpus)


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:  # [N/A]
        return -1.0


def read_xids() -> tuple[int, ...]:
    """Numbers of the errors in the kernel's log; none where it may not be read."""
    try:
        done = subprocess.run(["dmesg"], capture_output=True, text=True, timeout=20, errors="replace")
        uptime_seconds = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, subprocess.SubprocessError):
        return ()
    if done.returncode:
        print("the kernel's log may not be read here, so no Xid is seen", file=sys.stderr)
        return ()
    return xids_in(done.stdout, since_seconds=uptime_seconds - XID_HOURS * 3600)


def xids_in(log: str, *, since_seconds: float) -> tuple[int, ...]:
    """Numbers of the Xid lines of a kernel log, each once, that are not older than `since_seconds` after the boot."""
    found = []
    for line in log.splitlines():
        _, marker, rest = line.partition("NVRM: Xid")
        cells = rest.partition("): ")[2].split(",")
        stamp = line.partition("]")[0].strip("[ ")
        is_old = stamp.replace(".", "", 1).isdigit() and float(stamp) < since_seconds
        if marker and not is_old and cells[0].strip().isdigit():
            found.append(int(cells[0]))
    return tuple(dict.fromkeys(found))


def measure(device: str) -> dict[str, Any]:
    """Fields of the report about the node alone that need torch. A measurement that fails is one of its problems."""
    fields: dict[str, Any] = {}
    try:
        import torch

        fields["software"] = f"Python {platform.python_version()}, torch {torch.__version__}"
        devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if device == "cuda" else ["cpu"]
        fields["matmul_tflops"] = tuple(round(matmul_tflops(one), 4) for one in devices)
    except (RuntimeError, OSError, ImportError) as error:
        fields["problems"] = (f"could not be measured: {_short(error)}",)
    return fields


def measure_links(device: str, number: int, nodes: int, timeout_seconds: float) -> dict[str, Any]:
    """Fields of the report that need the other nodes."""
    try:
        return _measure_links(device, number, nodes, timeout_seconds)
    except (RuntimeError, OSError, UserError) as error:
        return {"link_problem": f"the links between the nodes could not be measured: {_short(error)}"}


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def matmul_tflops(device: str) -> float:
    """Rate of a large product; the best of several, so that a moment of other load does not count."""
    import torch

    kind = device.partition(":")[0]
    size = _MATMUL_SIZE[kind]
    a_MM = torch.randn(size, size, device=device, dtype=torch.bfloat16 if kind == "cuda" else torch.float32)
    b_MM = a_MM.clone()
    best, deadline = float("inf"), time.monotonic() + _MATMUL_SECONDS
    while time.monotonic() < deadline:
        began = time.perf_counter()
        a_MM @ b_MM
        if kind == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best / 1e12


def _measure_links(device: str, number: int, nodes: int, timeout_seconds: float) -> dict[str, Any]:
    """Bandwidth of this node's links, and its clock's offset."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    store = open_store(number, nodes, timeout_seconds=timeout_seconds)
    backend, place = ("nccl", torch.device("cuda", 0)) if device == "cuda" else ("gloo", torch.device("cpu"))
    dist.init_process_group(backend, store=store, rank=number, world_size=nodes, timeout=timedelta(seconds=timeout_seconds))
    size = _MESSAGE_BYTES[device]
    message = torch.zeros(size // 4, device=place)
    best = 0.0
    for shift in (0, 1):  # neighbours, then the others: of a bad link one end is found out by its good one
        partner = _partner(number, nodes, shift)
        dist.barrier()
        if partner is not None:
            best = max(best, _exchange(message, number, partner))
    all_reduce = _all_reduce_gb_per_second(message, nodes)
    dist.barrier()
    clocks: list[float | None] = [None] * nodes
    dist.all_gather_object(clocks, time.time())
    dist.barrier()
    dist.destroy_process_group()
    known = [clock for clock in clocks if clock is not None]
    offset = clocks[number]
    assert offset is not None, "every node has sent its own"
    rates = {"bandwidth_gb_per_second": round(best, 4), "all_reduce_gb_per_second": round(all_reduce, 4)}
    return {**rates, "clock_offset_seconds": round(offset - statistics.median(known), 3)}


def _all_reduce_gb_per_second(message: Any, nodes: int) -> float:
    """Bus bandwidth as NCCL's tests count it: what each node has to send and receive, by the best time of four."""
    import torch
    import torch.distributed as dist

    best = float("inf")
    for _ in range(4):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(message)
        if message.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * (nodes - 1) / nodes * message.numel() * message.element_size() / best / 1e9


def _partner(number: int, nodes: int, shift: int) -> int | None:
    """With whom a node exchanges: pairs in a ring, moved by `shift`. None: it is left over."""
    place = (number - shift) % nodes
    other = place ^ 1
    if other >= nodes:  # the last of an odd number; it has a partner at the other shift
        return None
    return (other + shift) % nodes


def _exchange(message: Any, number: int, partner: int) -> float:
    """GB/s of sending and receiving a message at the same time; the best of four."""
    import torch
    import torch.distributed as dist

    inbox, best = torch.empty_like(message), float("inf")
    for _ in range(4):
        began = time.perf_counter()
        works = dist.batch_isend_irecv([dist.P2POp(dist.isend, message, partner), dist.P2POp(dist.irecv, inbox, partner)])
        for work in works:
            work.wait()
        if message.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return message.numel() * message.element_size() / best / 1e9


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
