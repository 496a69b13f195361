"""What a node must show before the first step. `python -m slurm.preflight UNIT ATTEMPT`, one task on every node.

Each node measures itself, and its links to the others, and writes a report into the attempt's folder; `judge` compares them.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from conf.errors import UserError
from slurm.config import PreflightConfig
from slurm.submission import read_submission, root_of
from train.host import host_name
from train.outcome import attempt_folder
from train.rendezvous import open_store

PREFLIGHT_FOLDER = "preflight"
TOKEN_FILE = "token"
BAD_XIDS = frozenset({48, 62, 63, 64, 74, 79, 92, 94, 95, 119, 120, 140})  # memory, link, bus, firmware
_GPU_FIELDS = ("name", "driver_version", "memory.used", "ecc.errors.uncorrected.volatile.total")
_MATMUL_SIZE = {"cuda": 8192, "cpu": 512}
_MATMUL_SECONDS = 0.5
_MESSAGE_BYTES = {"cuda": 256 * 2**20, "cpu": 8 * 2**20}
_BUSY_MEMORY_MB = 2000  # of a GPU that somebody else is using


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU, as the driver shows it."""

    name: str
    driver: str
    used_mb: float
    ecc_errors: int
    """Uncorrected; -1 where it counts none."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a node found."""

    node: str
    free_memory_gb: float
    free_disk_gb: Mapping[str, float]
    """By folder."""
    sees_shared_folder: bool
    gpus: tuple[Gpu, ...] = ()
    xids: tuple[int, ...] = ()
    """Errors that the driver has logged."""
    matmul_tflops: tuple[float, ...] = ()
    """By device."""
    bandwidth_gb_per_second: float | None = None
    """Of the best link to another node; None with one node."""
    clock_offset_seconds: float | None = None
    """Against the median of all."""
    software: str = ""
    """Versions that have to be the same on all nodes."""
    problems: tuple[str, ...] = ()
    """Measurements that failed."""
    seconds: float = 0.0
    """How long it took."""


def judge(reports: Mapping[str, Report], nodes: Sequence[str], config: PreflightConfig, *, gpus: int) -> dict[str, list[str]]:
    """The nodes that are unfit, with what is wrong with each. Every node has to have reported."""
    found: dict[str, list[str]] = {node: [] for node in nodes}
    for node in nodes:
        report = reports.get(node)
        if report is None:
            found[node].append("has not reported: it did not start, hung, or does not see the run's folder")
            continue
        found[node] += _own_problems(report, config, gpus=gpus)
    present = [reports[node] for node in nodes if node in reports]
    for node, problems in _among_peers(present, config).items():
        found[node] += problems
    return {node: problems for node, problems in found.items() if problems}


def _own_problems(report: Report, config: PreflightConfig, *, gpus: int) -> list[str]:
    problems = list(report.problems)
    if not report.sees_shared_folder:
        problems.append("does not see what the first node wrote into the run's folder")
    if report.free_memory_gb < config.min_free_memory_gb:
        problems.append(f"{report.free_memory_gb:.1f} GB of memory are free, {config.min_free_memory_gb:g} are asked for")
    for folder, free in report.free_disk_gb.items():
        if free < config.min_free_disk_gb:
            problems.append(f"{free:.1f} GB of disk are free at {folder}, {config.min_free_disk_gb:g} are asked for")
    if len(report.gpus) < gpus:
        problems.append(f"{len(report.gpus)} of {gpus} GPUs are there")
    for number, gpu in enumerate(report.gpus):
        if gpu.ecc_errors > config.max_ecc_errors:
            problems.append(f"GPU {number} has {gpu.ecc_errors} uncorrected memory errors")
        if gpu.used_mb > _BUSY_MEMORY_MB:
            problems.append(f"GPU {number} is in use by somebody else ({gpu.used_mb / 1000:.1f} GB)")
    bad = sorted(set(report.xids) & BAD_XIDS)
    if bad:
        problems.append(f"the driver has logged Xid {', '.join(map(str, bad))}")
    if report.clock_offset_seconds is not None and abs(report.clock_offset_seconds) > config.max_clock_skew_seconds:
        problems.append(f"its clock is off by {report.clock_offset_seconds:+.1f} s")
    return problems


def _among_peers(reports: Sequence[Report], config: PreflightConfig) -> dict[str, list[str]]:
    """What only the comparison with the others shows."""
    found: dict[str, list[str]] = {report.node: [] for report in reports}
    kinds = {
        report.node: (tuple(sorted({(gpu.name, gpu.driver) for gpu in report.gpus})), report.software) for report in reports
    }
    if len(set(kinds.values())) > 1:
        usual = statistics.mode(kinds.values())
        for node, kind in kinds.items():
            if kind != usual:
                found[node].append(f"has {_kind(kind)}, the others have {_kind(usual)}")
    rates = [rate for report in reports for rate in report.matmul_tflops]
    middle = statistics.median(rates) if rates else 0.0
    for report in reports:
        for number, rate in enumerate(report.matmul_tflops):
            if rate < config.min_matmul_share * middle:
                found[report.node].append(f"device {number} multiplies at {rate:.2f} TFLOP/s, the median is {middle:.2f}")
    links = {report.node: link for report in reports if (link := report.bandwidth_gb_per_second) is not None}
    usual_link = statistics.median(links.values()) if links else 0.0
    for node, link in links.items():
        if link < config.min_bandwidth_share * usual_link:
            found[node].append(f"its best link carries {link:.2f} GB/s, the median is {usual_link:.2f}")
    return found


def _kind(kind: tuple[tuple[tuple[str, str], ...], str]) -> str:
    gpus, software = kind
    return ", ".join([*(f"{name} with driver {driver}" for name, driver in gpus), software])


def read_reports(folder: Path) -> dict[str, Report]:
    """The reports that are there and whole, by node."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            raw = json.loads(path.read_text(encoding="utf-8"))
            gpus = tuple(Gpu(**gpu) for gpu in raw.pop("gpus"))
            lists = {name: tuple(value) for name, value in raw.items() if isinstance(value, list)}
            report = Report(**{**raw, **lists}, gpus=gpus)
            found[report.node] = report
    return found


# --- measuring --------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """Measure this node and write its report."""
    unit, attempt = Path(arguments[0]), int(arguments[1])
    submission = read_submission(root_of(unit))
    folder = attempt_folder(unit, attempt) / PREFLIGHT_FOLDER
    number, nodes = int(os.environ.get("SLURM_PROCID", "0")), int(os.environ.get("SLURM_NTASKS", "1"))
    began = time.monotonic()
    if number == 0:
        (folder / TOKEN_FILE).write_text(host_name())
    with_gpus = submission.gpus_per_node > 0
    report = Report(
        node=host_name(),
        free_memory_gb=free_memory_gb(),
        free_disk_gb=free_disk_gb([Path(submission.scratch), unit]),
        sees_shared_folder=await_file(folder / TOKEN_FILE, seconds=submission.preflight.timeout_seconds / 10),
        gpus=read_gpus() if with_gpus else (),
        xids=read_xids() if with_gpus else (),
    )
    report = replace(report, **measure("cuda" if with_gpus else "cpu", number, nodes, submission.preflight.timeout_seconds))
    report = replace(report, seconds=round(time.monotonic() - began, 1))
    temporary = folder / f".{report.node}.tmp"
    temporary.write_text(json.dumps(asdict(report), indent=1))
    temporary.replace(folder / f"{report.node}.json")
    print(json.dumps(asdict(report), indent=1))
    return 0


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
    try:
        lines = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return ()
    gpus = []
    for line in lines:
        name, driver, used, errors = (cell.strip() for cell in line.split(","))
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
        text = subprocess.run(["dmesg"], capture_output=True, text=True, timeout=20, errors="replace").stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return xids_in(text)


def xids_in(log: str) -> tuple[int, ...]:
    """Numbers of the Xid lines of a kernel log, each once."""
    found = []
    for line in log.splitlines():
        _, marker, rest = line.partition("NVRM: Xid")
        cells = rest.partition("): ")[2].split(",")
        if marker and cells[0].strip().isdigit():
            found.append(int(cells[0]))
    return tuple(dict.fromkeys(found))


def measure(device: str, number: int, nodes: int, timeout_seconds: float) -> dict[str, Any]:
    """Fields of the report that need torch: rates, links, clocks. A measurement that fails is one of its problems."""
    try:
        import torch

        software = f"Python {platform.python_version()}, torch {torch.__version__}"
        fields: dict[str, Any] = {"software": software}
        devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if device == "cuda" else ["cpu"]
        fields["matmul_tflops"] = tuple(round(matmul_tflops(one), 4) for one in devices)
        if nodes > 1:
            fields |= _measure_links(device, number, nodes, timeout_seconds)
    except (RuntimeError, OSError, ImportError, UserError) as error:
        return {"problems": (f"could not be measured: {' '.join(str(error).split())[:300]}",)}
    return fields


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
    dist.barrier()
    clocks: list[float | None] = [None] * nodes
    dist.all_gather_object(clocks, time.time())
    dist.barrier()
    dist.destroy_process_group()
    known = [clock for clock in clocks if clock is not None]
    offset = clocks[number]
    assert offset is not None, "every node has sent its own"
    return {"bandwidth_gb_per_second": round(best, 4), "clock_offset_seconds": round(offset - statistics.median(known), 3)}


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
