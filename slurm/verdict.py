"""What the nodes of a job have reported of themselves, compared: which of them are unfit, and why."""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from slurm.config import PreflightConfig

PREFLIGHT_FOLDER = "preflight"
BAD_XIDS = frozenset({48, 62, 64, 74, 79, 92, 94, 95, 119, 120, 140})  # memory, link, bus, firmware
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
    all_reduce_gb_per_second: float | None = None
    """Bus bandwidth of an all-reduce over all nodes; the same on each."""
    clock_offset_seconds: float | None = None
    """Against the median of all."""
    software: str = ""
    """Versions that have to be the same on all nodes."""
    problems: tuple[str, ...] = ()
    """Measurements of its own that failed."""
    link_problem: str = ""
    """Why its links were not measured; one node that is missing is enough for that on all."""
    seconds: float = 0.0
    """How long it took."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Which nodes are unfit, with what is wrong with each; and what is wrong and no node's fault."""

    unfit: Mapping[str, list[str]]
    general: tuple[str, ...] = ()

    @property
    def is_fit(self) -> bool:
        """Whether the run may begin."""
        return not self.unfit and not self.general


def judge(reports: Mapping[str, Report], nodes: Sequence[str], config: PreflightConfig, *, gpus: int) -> Verdict:
    """Compare the nodes. Every one has to have reported; links count where all nodes took part in measuring them."""
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
    unfit = {node: problems for node, problems in found.items() if problems}
    return Verdict(unfit=unfit, general=() if unfit else tuple(_general_problems(present, config)))


def _general_problems(reports: Sequence[Report], config: PreflightConfig) -> list[str]:
    """What is wrong with all of them together."""
    problems = sorted({report.link_problem for report in reports if report.link_problem})[:1]
    rates = [rate for report in reports if (rate := report.all_reduce_gb_per_second) is not None]
    if rates and min(rates) < config.min_all_reduce_gb_per_second:
        wanted = f"{config.min_all_reduce_gb_per_second:g} are asked for"
        problems.append(f"an all-reduce over all nodes moves {min(rates):.2f} GB/s, {wanted}")
    return problems


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
    reports = [report for report in reports if not report.problems]
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
        elif link < config.min_bandwidth_gb_per_second:
            wanted = f"{config.min_bandwidth_gb_per_second:g} are asked for"
            found[node].append(f"its best link carries {link:.2f} GB/s, {wanted}")
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
