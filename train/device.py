"""What a device could do at best: the peak that model FLOPs utilisation is measured against."""

from __future__ import annotations

import time

import torch

from train.config.training import ComputePrecision

# Dense bf16 tensor-core peak in TFLOP/s, from the vendors' data sheets; the first name that fits counts.
GPU_BF16_TFLOPS = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("GH200", 989.0),
    ("H200", 989.0),
    ("H100 NVL", 835.0),
    ("H100 PCIe", 756.0),
    ("H100", 989.0),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("V100", 125.0),
)
SMALL_PRODUCT = 256  # 0.04 s in emulated bf16
FP32_SHARE = 0.5  # TF32 runs at half the bf16 rate on the cards above


def peak_flops(device: torch.device, precision: ComputePrecision) -> float | None:
    """Peak of one rank's device in FLOP/s: the data sheet's for a GPU (None: not known), measured for a CPU.

    That of bf16 for fp8 too, so that its utilisation shows what it gains.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        tflops = next((value for part, value in GPU_BF16_TFLOPS if part in name), None)
        return None if tflops is None else tflops * 1e12 * (FP32_SHARE if precision == "fp32" else 1.0)
    return measured_cpu_flops(torch.float32 if precision == "fp32" else torch.bfloat16)


def measured_cpu_flops(dtype: torch.dtype, *, size: int = 1024, repeats: int = 8) -> float:
    """FLOP/s of this process's threads on a square matrix product: the best of `repeats`, a second in all at most.

    Emulated bf16 gives 0.9 GFLOP/s: there smaller matrices tell, since eight products of 1,024 would take 19 s.
    """
    small = min(size, SMALL_PRODUCT)
    seconds = _best_seconds(dtype, small, repeats=2)
    while size > small and seconds * (size / small) ** 3 * repeats > 1.0:
        size //= 2
    return 2 * size**3 / _best_seconds(dtype, size, repeats)


def _best_seconds(dtype: torch.dtype, size: int, repeats: int) -> float:
    left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - started)
    return best
