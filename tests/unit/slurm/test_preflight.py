"""Which nodes are unfit: one fault each, on reports as nodes write them; and what this machine measures of itself."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from slurm.config import PreflightConfig
from slurm.preflight import _partner, free_disk_gb, free_memory_gb, matmul_tflops, xids_in
from slurm.verdict import Gpu, Report, judge, read_reports

GPU = Gpu(name="NVIDIA H200", driver="570.86", used_mb=4.0, ecc_errors=0)
GOOD = Report(
    node="n1",
    free_memory_gb=500.0,
    free_disk_gb={"/tmp": 900.0, "/runs": 10_000.0},
    sees_shared_folder=True,
    gpus=(GPU, GPU),
    matmul_tflops=(700.0, 690.0),
    bandwidth_gb_per_second=40.0,
    clock_offset_seconds=0.01,
    software="Python 3.11.2, torch 2.13.0",
)
NODES = ("n1", "n2", "n3", "n4")
CONFIG = PreflightConfig()


def reports(**changes: object) -> dict[str, Report]:
    """Four good nodes, but for what is changed on n3."""
    found = {node: replace(GOOD, node=node) for node in NODES}
    return found | {"n3": replace(found["n3"], **changes)}  # type: ignore[arg-type]


def test_good_nodes_are_fit() -> None:
    assert judge(reports(), NODES, CONFIG, gpus=2).is_fit


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"free_memory_gb": 1.0}, "1.0 GB of memory are free, 2 are asked for"),
        ({"free_disk_gb": {"/tmp": 0.5, "/runs": 99.0}}, "0.5 GB of disk are free at /tmp, 2 are asked for"),
        ({"sees_shared_folder": False}, "does not see what the first node wrote"),
        ({"gpus": (GPU,)}, "1 of 2 GPUs are there"),
        ({"gpus": (GPU, replace(GPU, ecc_errors=3))}, "GPU 1 has 3 uncorrected memory errors"),
        ({"gpus": (replace(GPU, used_mb=30_000.0), GPU)}, "GPU 0 is in use by somebody else (30.0 GB)"),
        ({"gpus": (GPU, replace(GPU, name="NVIDIA H100"))}, "has NVIDIA H100 with driver 570.86"),
        ({"gpus": (replace(GPU, driver="550.1"),) * 2}, "with driver 550.1"),
        ({"software": "Python 3.12.1, torch 2.13.0"}, "Python 3.12.1"),
        ({"xids": (13, 79)}, "the driver has logged Xid 79"),
        ({"clock_offset_seconds": -7.25}, "its clock is off by -7.2 s"),
        ({"matmul_tflops": (700.0, 300.0)}, "device 1 multiplies at 300.00 TFLOP/s, the median is"),
        ({"bandwidth_gb_per_second": 3.0}, "its best link carries 3.00 GB/s, the median is 40.00"),
        ({"problems": ("could not be measured: CUDA error",)}, "could not be measured: CUDA error"),
    ],
)
def test_one_fault_names_its_node(changes: dict, said: str) -> None:
    found = judge(reports(**changes), NODES, CONFIG, gpus=2).unfit
    assert list(found) == ["n3"] and len(found["n3"]) == 1
    assert said in found["n3"][0]


def test_a_node_without_a_report_is_unfit() -> None:
    silent = {node: report for node, report in reports().items() if node != "n2"}
    assert list(judge(silent, NODES, CONFIG, gpus=2).unfit) == ["n2"]


NOT_MET = {"link_problem": "could not be measured: no rendezvous of 4 ranks", "bandwidth_gb_per_second": None}


@pytest.mark.parametrize("missing", [{}, {"n2": replace(GOOD, node="n2", problems=("could not be measured: CUDA error",))}])
def test_one_node_that_does_not_join_is_no_fault_of_the_others(missing: dict[str, Report]) -> None:
    """It is silent, or broken before it came to the links: the others wait for it in vain, and are fit."""
    found = {node: replace(GOOD, node=node, **NOT_MET) for node in NODES if node != "n2"} | missing  # type: ignore[arg-type]
    assert list(judge(found, NODES, CONFIG, gpus=2).unfit) == ["n2"]


def test_links_that_cannot_be_measured_are_nobodys_fault() -> None:
    found = {node: replace(GOOD, node=node, **NOT_MET) for node in NODES}  # type: ignore[arg-type]
    verdict = judge(found, NODES, CONFIG, gpus=2)
    assert not verdict.is_fit and verdict.unfit == {} and "no rendezvous" in verdict.general[0]


def test_an_all_reduce_below_what_is_asked_for_is_nobodys_fault() -> None:
    found = {node: replace(report, all_reduce_gb_per_second=3.0) for node, report in reports().items()}
    assert judge(found, NODES, CONFIG, gpus=2).is_fit
    verdict = judge(found, NODES, replace(CONFIG, min_all_reduce_gb_per_second=100.0), gpus=2)
    assert verdict.unfit == {} and "an all-reduce over all nodes moves 3.00 GB/s, 100 are asked for" in verdict.general[0]


def test_two_nodes_have_a_bandwidth_to_reach_of_their_own() -> None:
    slow = {node: replace(GOOD, node=node, bandwidth_gb_per_second=1.0) for node in NODES[:2]}
    assert judge(slow, NODES[:2], CONFIG, gpus=2).is_fit, "there is nothing to compare with"
    strict = replace(CONFIG, min_bandwidth_gb_per_second=10.0)
    assert list(judge(slow, NODES[:2], strict, gpus=2).unfit) == ["n1", "n2"]


def test_programs_that_fail_are_no_fault_of_the_node() -> None:
    assert judge(reports(xids=(13, 31)), NODES, CONFIG, gpus=2).is_fit, "Xid 13 and 31 are of the program"


def test_a_gpu_that_counts_no_memory_errors_has_none() -> None:
    assert judge(reports(gpus=(replace(GPU, ecc_errors=-1),) * 2), NODES, CONFIG, gpus=2).is_fit


def test_reports_come_back_whole(tmp_path: Path) -> None:
    (tmp_path / "n1.json").write_text(json.dumps(asdict(GOOD)))
    (tmp_path / "n2.json").write_text('{"node": "n2", "gpus": [')
    assert read_reports(tmp_path) == {"n1": GOOD}


def test_xids_of_a_kernel_log() -> None:
    log = (
        "[1.0] NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.\n"
        "[2.0] NVRM: loading NVIDIA UNIX x86_64 Kernel Module  570.86\n"
        "[3.0] NVRM: Xid (PCI:0000:86:00): 13, pid=77, name=python, Graphics Exception\n"
    )
    assert xids_in(log, since_seconds=-5.0) == (79, 13)
    assert xids_in(log, since_seconds=2.0) == (13,), "the other is long ago"


@pytest.mark.parametrize("nodes", range(2, 9))
def test_every_node_has_a_partner_and_each_is_the_others(nodes: int) -> None:
    met: dict[int, set[int]] = {number: set() for number in range(nodes)}
    for shift in (0, 1):
        partners = [_partner(number, nodes, shift) for number in range(nodes)]
        for number, partner in enumerate(partners):
            if partner is not None:
                assert partners[partner] == number != partner
                met[number].add(partner)
    assert all(met.values())
    if nodes > 2:
        assert sum(len(partners) == 2 for partners in met.values()) >= nodes - 2, "a bad link shows at one end only"


def test_this_machine_can_be_measured(tmp_path: Path) -> None:
    assert 0.01 < free_memory_gb() < 100_000
    found = free_disk_gb([tmp_path, tmp_path / "missing"])
    assert found[str(tmp_path)] > 0.0 and found[str(tmp_path / "missing")] == 0.0
    assert matmul_tflops("cpu") > 1e-4
