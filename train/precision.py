"""What `precision=auto` is on a machine; nothing else asks. Nothing is timed, so a machine always gives the same answer.

bf16 where the hardware multiplies it, fp32 elsewhere. Two cores with AVX2 alone emulate bf16 at 0.9 GFLOP/s and reach 190 to
290 in fp32, and a training step takes 7 times as long; with AMX they reach 1,130 in bf16. What counts are the instructions of
the CPU, and the variables that keep PyTorch's libraries from them. Torch is imported only to ask a GPU.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from conf.errors import UserError
from train.config.training import ComputePrecision, Precision

NATIVE_BF16 = {"x86_64": ("amx_bf16", "avx512_bf16"), "aarch64": ("svebf16",)}
"""Machine -> the kernel's names of the instructions that multiply bf16."""
_ONEDNN = (
    "sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_mic", "avx512_mic_4ops", "avx512_core", "avx512_core_vnni",
    "advsimd",
)  # fmt: skip
WITHOUT_BF16 = {
    "ATEN_CPU_CAPABILITY": ("default", "avx2"),
    "ONEDNN_MAX_CPU_ISA": _ONEDNN,
    "DNNL_MAX_CPU_ISA": _ONEDNN,  # its older name
    "MKL_ENABLE_INSTRUCTIONS": ("sse4_2", "avx", "avx2", "avx2_e1"),
}
"""Variable -> its values that leave no instruction for bf16; what a library does not know, it does not follow.

Each of them asks for a CPU without such instructions, though one alone keeps only its own library from them.
"""


@dataclass(frozen=True, kw_only=True)
class Cpu:
    """What a CPU says of itself."""

    machine: str
    """x86_64, aarch64, ..."""
    flags: frozenset[str]
    """Instruction sets, by the names of the Linux kernel; none on other systems."""

    @staticmethod
    def of_this_machine() -> Cpu:
        """Read from /proc/cpuinfo, where there is one."""
        try:
            lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            lines = []
        # "flags" on x86-64, "Features" on aarch64. Where cores differ, what all of them have counts.
        found = [set(line.partition(":")[2].split()) for line in lines if line.startswith(("flags", "Features"))]
        return Cpu(machine=platform.machine(), flags=frozenset(set.intersection(*found) if found else ()))


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """The precision to compute in, and why."""

    precision: ComputePrecision
    reason: str

    def __str__(self) -> str:
        return f"{self.precision} ({self.reason})"


def bf16_on_cpu(cpu: Cpu | None = None, environment: Mapping[str, str] | None = None) -> tuple[bool, str]:
    """Whether the CPU multiplies bf16, and why, in words. None: this machine, and the environment of this process."""
    cpu = cpu or Cpu.of_this_machine()
    environment = os.environ if environment is None else environment
    native = [flag for flag in NATIVE_BF16.get(cpu.machine, ()) if flag in cpu.flags]
    if not native:
        return False, "this CPU only emulates bf16"
    for variable, values in WITHOUT_BF16.items():
        value = environment.get(variable, "")
        if (value if variable == "ATEN_CPU_CAPABILITY" else value.lower()) in values:  # the others take capitals too
            return False, f"{variable}={value} restricts this CPU to instructions without bf16"
    return True, f"this CPU multiplies bf16 natively, {native[0]}"


def resolve_precision(asked: Precision, device: Literal["cpu", "cuda"]) -> Resolved:
    """The precision for a process that computes on `device` of this machine."""
    if asked != "auto":
        return Resolved(precision=asked, reason="as asked")
    if device == "cpu":
        native, reason = bf16_on_cpu()
        return Resolved(precision="bf16" if native else "fp32", reason=f"auto: {reason}")
    import torch

    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return Resolved(
        precision="bf16" if native else "fp32",
        reason=f"auto: {torch.cuda.get_device_name()} {'multiplies' if native else 'has no'} bf16",
    )


def expected_precision(asked: Precision, device: Literal["auto", "cpu", "cuda"], *, elsewhere: bool) -> Resolved:
    """As `resolve_precision`, as far as a launcher without torch can tell; the ranks, wherever they run, have the last word."""
    if asked != "auto" or (device == "cpu" and not elsewhere):
        return resolve_precision(asked, "cpu")
    if device == "cpu":
        return Resolved(precision="fp32", reason="auto: bf16 on nodes whose CPUs multiply it")
    return Resolved(precision="bf16", reason="auto: fp32 on GPUs without bf16, those before Ampere")


def agreed(answers: list[tuple[str, ComputePrecision]]) -> None:
    """Check that the ranks, (host, precision) each, compute in one precision. Raises UserError that names two hosts."""
    host, first = answers[0]
    for other, precision in answers[1:]:
        if precision != first:
            raise UserError(
                f"precision=auto: is {first} on {host} and {precision} on {other}, and ranks must compute in one; give "
                f"precision=fp32 or precision=bf16 by name, or nodes of one kind"
            )
