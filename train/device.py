"""What a device could do at best: the peak that model FLOPs utilisation is measured against."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from train.config.training import ComputePrecision


@dataclass(frozen=True)
class Card:
    """A GPU by the words of its name, with its dense rates in TFLOP/s. All cards with fp8 have it at twice the bf16 rate."""

    name: str
    bf16: float
    tf32: float
    fp32: float
    """Outside of the tensor cores."""


# From NVIDIA's data sheets, without sparsity. Of the cards whose words are all in a device's name the one with most counts.
CARDS = (
    Card("V100", 15.7, 15.7, 15.7),  # has neither bf16 nor TF32
    Card("A10", 125.0, 62.5, 31.2),
    Card("A10G", 70.0, 35.0, 31.5),
    Card("A30", 165.0, 82.0, 10.3),
    Card("A40", 149.7, 74.8, 37.4),
    Card("A100", 312.0, 156.0, 19.5),
    Card("A800", 312.0, 156.0, 19.5),
    Card("L4", 121.0, 60.0, 30.3),
    Card("L40", 181.0, 90.5, 90.5),
    Card("L40S", 362.0, 183.0, 91.6),
    Card("H20", 148.0, 74.0, 44.0),
    Card("H100", 989.0, 494.0, 67.0),  # SXM, whose name is "NVIDIA H100 80GB HBM3"
    Card("H100 PCIe", 756.0, 378.0, 51.0),
    Card("H100 NVL", 835.0, 417.0, 60.0),
    Card("H200", 989.0, 494.0, 67.0),
    Card("H200 NVL", 835.0, 417.0, 60.0),
    Card("H800", 989.0, 494.0, 67.0),
    Card("H800 PCIe", 756.0, 378.0, 51.0),
    Card("GH200", 989.0, 494.0, 67.0),
    Card("B200", 2250.0, 1125.0, 75.0),
    Card("GB200", 2500.0, 1250.0, 80.0),
    Card("B300", 2250.0, 1125.0, 75.0),
    Card("GB300", 2500.0, 1250.0, 80.0),
)
PART_OF_A_CARD = re.compile(r"\bMIG\b|\bGRID\b|-\d+[ABCQ]$")  # "... MIG 1g.10gb", and virtual GPUs: "NVIDIA A10-8Q"

SIZES = (256, 512, 1024, 2048, 4096)
LONGEST_SECONDS, SHORTEST_SECONDS = 1.0, 0.1
ORDINARY_CPU_FLOPS = 1e11  # a core or two


@dataclass(frozen=True)
class Peak:
    """Of one rank's device."""

    flops: float | None
    """FLOP/s; None: not known."""
    source: str
    """Where the number is from, human-readable."""

    def __str__(self) -> str:
        if self.flops is None:
            return f"not known: {self.source}; MFU is not reported"
        rate = f"{self.flops / 1e12:,.5g} TFLOP/s" if self.flops >= 1e12 else f"{self.flops / 1e9:,.3g} GFLOP/s"
        return f"{rate} a rank: {self.source}"


def peak_of(device: torch.device, precision: ComputePrecision, *, work: float = float("inf")) -> Peak:
    """The data sheet's peak for a GPU, a measured one for a CPU; a run of `work` FLOP measures for about 1 % of its time."""
    if device.type == "cuda":
        return card_peak(torch.cuda.get_device_name(device), precision, tf32=tf32_is_on())
    seconds = min(LONGEST_SECONDS, max(SHORTEST_SECONDS, 0.01 * work / ORDINARY_CPU_FLOPS))
    return Peak(cpu_peak(precision, seconds=seconds), "the best of matrix products that were timed on this CPU")


def card_peak(device_name: str, precision: ComputePrecision, *, tf32: bool) -> Peak:
    """The peak of a GPU by its name; `tf32`: what fp32 products are computed in."""
    words = set(re.findall(r"\w+", device_name.upper()))
    fitting = [card for card in CARDS if words.issuperset(card.name.upper().split())]
    if not fitting:
        return Peak(None, f"train/device.py has no card of the name {device_name!r}")
    if PART_OF_A_CARD.search(device_name):
        return Peak(None, f"{device_name!r} is a part of a card")
    card = max(fitting, key=lambda card: len(card.name.split()))
    kind = "TF32" if tf32 else "fp32 without TF32"
    tflops, kind = {
        "bf16": (card.bf16, "bf16"),
        "fp8": (2 * card.bf16, "fp8"),
        "fp32": (card.tf32 if tf32 else card.fp32, kind),
    }[precision]
    return Peak(tflops * 1e12, f"{device_name}, dense {kind}, by its data sheet")


def tf32_is_on() -> bool:
    """Whether this process multiplies fp32 matrices in TF32 on its GPU, by whichever of torch's settings."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"  # `allow_tf32` raises where this newer one was set


def cpu_peak(precision: ComputePrecision, *, seconds: float) -> float:
    """FLOP/s of this process's threads in the best dtype that a run of `precision` can be computed in.

    A CPU without bf16 instructions emulates bf16's product at a hundredth of the speed of fp32, but its other kernels turn
    bf16 into fp32 first: what it could do at best is what it does in fp32. One rank measures while the others wait, so where
    ranks share what a core has, the peak is rather too high, and the share too low.
    """
    dtypes = (torch.float32,) if precision == "fp32" else (torch.bfloat16, torch.float32)
    return max(measured_cpu_flops(dtype, seconds=seconds / len(dtypes)) for dtype in dtypes)


def measured_cpu_flops(
    dtype: torch.dtype,
    *,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    busy_clock: Callable[[], float] = time.thread_time,
) -> float:
    """FLOP/s of the best square matrix product of `dtype`: the largest size and the best one in turns for so long.

    A core needs a while to reach its highest clock, and which size is best depends on caches and threads. A size follows where
    the one before takes an eighth of the time at most: 2,048 in emulated bf16 takes 19 s. A product counts with the time that
    this thread, which has an equal part of it, was at work: where others had the cores (a load of 12 on two of them) the time
    on the wall gave 0.4 GFLOP/s instead of 160.
    """
    until = clock() + seconds
    factors: list[torch.Tensor] = []
    rates: list[float] = []
    while not factors or clock() < until:
        if len(factors) < len(SIZES) and (not factors or 2 * len(factors[-1]) ** 3 / rates[-1] <= seconds / 8):
            factors.append(torch.ones(SIZES[len(factors)], SIZES[len(factors)], dtype=dtype))
            rates.append(0.0)
        for index in {len(rates) - 1, rates.index(max(rates))}:
            factor = factors[index]
            for number in range(3):  # the first prepares the kernel, and finds the caches full of another's data
                if number and clock() >= until:
                    break
                started = busy_clock()
                factor @ factor
                rates[index] = max(rates[index], 2 * len(factor) ** 3 / max(busy_clock() - started, 1e-9))
    return max(rates)
