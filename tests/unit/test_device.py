"""The peak that MFU is a share of: by the name of a card, or measured on a CPU."""

from __future__ import annotations

import pytest
import torch

from train import device
from train.device import CARDS, card_peak, cpu_peak, measured_cpu_flops, peak_of, tf32_is_on

# As `torch.cuda.get_device_name` gives them, with bf16, TF32 and fp32 in TFLOP/s. Written down apart from the table.
NAMES = {
    "Tesla V100-SXM2-32GB": (15.7, 15.7, 15.7),
    "NVIDIA A10": (125, 62.5, 31.2),
    "NVIDIA A10G": (70, 35, 31.5),
    "NVIDIA A100-SXM4-80GB": (312, 156, 19.5),
    "NVIDIA A100-SXM4-40GB": (312, 156, 19.5),
    "A100-PCIE-40GB": (312, 156, 19.5),
    "NVIDIA A100 80GB PCIe": (312, 156, 19.5),
    "NVIDIA A800-SXM4-80GB": (312, 156, 19.5),
    "NVIDIA A800 80GB PCIe": (312, 156, 19.5),
    "NVIDIA L4": (121, 60, 30.3),
    "NVIDIA L40": (181, 90.5, 90.5),
    "NVIDIA L40S": (362, 183, 91.6),
    "NVIDIA H20": (148, 74, 44),
    "NVIDIA H20-3e": (148, 74, 44),
    "NVIDIA H100 80GB HBM3": (989, 494, 67),
    "NVIDIA H100 PCIe": (756, 378, 51),
    "NVIDIA H100 NVL": (835, 417, 60),
    "NVIDIA H200": (989, 494, 67),
    "NVIDIA H200 NVL": (835, 417, 60),
    "NVIDIA H800": (989, 494, 67),
    "NVIDIA H800 PCIe": (756, 378, 51),
    "NVIDIA GH200 480GB": (989, 494, 67),
    "NVIDIA GH200 144G HBM3e": (989, 494, 67),
    "NVIDIA B200": (2250, 1125, 75),
    "NVIDIA B300 SXM6 AC": (2250, 1125, 75),
    "NVIDIA GB200": (2500, 1250, 80),
    "NVIDIA GB300": (2500, 1250, 80),
}


def test_each_card_by_its_name() -> None:
    for name, (bf16, tf32, fp32) in NAMES.items():
        cases = (("bf16", True, bf16), ("fp8", False, 2 * bf16), ("fp32", True, tf32), ("fp32", False, fp32))
        for precision, has_tf32, tflops in cases:
            assert card_peak(name, precision, tf32=has_tf32).flops == pytest.approx(tflops * 1e12), (name, precision)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "is a part of a card"),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "is a part of a card"),
        ("NVIDIA A10-8Q", "is a part of a card"),
        ("GRID A100-10C", "is a part of a card"),
        ("NVIDIA A10M", "no card of the name 'NVIDIA A10M'"),
        ("NVIDIA B2000", "no card"),
        ("NVIDIA GB10", "no card"),
        ("NVIDIA GeForce RTX 4090", "no card"),
        ("AMD Instinct MI300X", "no card"),
    ],
)
def test_what_is_in_no_data_sheet_has_no_peak(name: str, reason: str) -> None:
    peak = card_peak(name, "bf16", tf32=False)
    assert peak.flops is None
    assert reason in str(peak) and "MFU is not reported" in str(peak)


def test_every_row_is_reached() -> None:
    """A row whose words another row hides would never count."""
    assert all(card_peak(f"NVIDIA {card.name}", "bf16", tf32=False).flops == card.bf16 * 1e12 for card in CARDS)


def test_fp32_of_a_gpu_is_at_the_rate_that_is_switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    gpu, matmul = torch.device("cuda"), torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision()
    peaks = []
    try:
        for setting in ("highest", "high", "medium", "highest"):
            torch.set_float32_matmul_precision(setting)
            peaks.append(peak_of(gpu, "fp32").flops)
        matmul.allow_tf32 = True
        assert tf32_is_on()
        matmul.allow_tf32 = False
        assert not tf32_is_on()
    finally:
        torch.set_float32_matmul_precision(before)
    assert peaks == [67e12, 494e12, 494e12, 67e12]
    assert str(peak_of(gpu, "bf16")).startswith("989 TFLOP/s a rank: NVIDIA H100 80GB HBM3, dense bf16")


class FakeCpu:
    """Multiplies at given rates, in its own time, and keeps which sizes it was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **rates: float) -> None:
        self.now, self.rates = 0.0, rates
        self.sizes: list[int] = []
        monkeypatch.setattr(torch.Tensor, "__matmul__", lambda left, right: self._multiply(left))

    def clock(self) -> float:
        return self.now

    def _multiply(self, left: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(left))
        rate = self.rates[str(left.dtype).removeprefix("torch.")]
        slowed = (2 if self.now < 0.5 else 1) + 100 / len(left)  # a core not yet at its highest clock; a small product
        self.now += 2 * len(left) ** 3 / rate * slowed
        return left


@pytest.mark.parametrize(
    ("rate", "largest", "share"), [(1e9, 512, 0.4), (1e10, 1024, 0.8), (1e11, 2048, 0.9), (1e13, 4096, 0.97)]
)
def test_a_peak_is_measured_on_sizes_that_fit_the_time(
    monkeypatch: pytest.MonkeyPatch, rate: float, largest: int, share: float
) -> None:
    cpu = FakeCpu(monkeypatch, float32=rate)
    found = measured_cpu_flops(torch.float32, seconds=1.0, clock=cpu.clock, busy_clock=cpu.clock)
    assert share * rate < found < rate
    assert max(cpu.sizes) == largest and 1.0 <= cpu.now < 2.0


def test_the_best_of_both_dtypes_where_bf16_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.9 and 200 GFLOP/s as on AVX2, 1,130 and 310 as with AMX."""
    asked: list[float] = []

    def measured(rates: dict[torch.dtype, float], precision: str) -> float:
        def rate_of(dtype: torch.dtype, *, seconds: float) -> float:
            asked.append(seconds)
            return rates[dtype]

        monkeypatch.setattr(device, "measured_cpu_flops", rate_of)
        return cpu_peak(precision, seconds=1.0)

    avx2 = {torch.bfloat16: 0.9e9, torch.float32: 200e9}
    amx = {torch.bfloat16: 1130e9, torch.float32: 310e9}
    found = [measured(rates, precision) for rates in (avx2, amx) for precision in ("bf16", "fp8", "fp32")]
    assert found == [200e9, 200e9, 200e9, 1130e9, 1130e9, 310e9]
    assert sum(asked) == 6.0, "no case takes longer than another"


def test_a_short_run_does_not_wait_for_an_exact_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    monkeypatch.setattr(device, "cpu_peak", lambda precision, *, seconds: asked.append(seconds) or 5e10)
    peaks = [peak_of(torch.device("cpu"), "fp32", work=work) for work in (1e6, 3e12, 1e18)]
    assert asked == pytest.approx([0.1, 0.3, 1.0])
    assert peaks[0].flops == 5e10 and str(peaks[0]).startswith("50 GFLOP/s a rank: the best of")


def test_this_cpu_has_a_peak() -> None:
    """In a tenth of a second, which emulated bf16 keeps to as well, and a CPU that others use; 1e7 is a product in Python."""
    assert min(measured_cpu_flops(dtype, seconds=0.1) for dtype in (torch.float32, torch.bfloat16)) > 1e7
