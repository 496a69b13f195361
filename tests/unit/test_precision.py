"""`precision=auto` on faked machines: a table of CPUs, of variables that restrict them, and of GPUs."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import pytest
import torch

from conf.errors import UserError
from train.precision import NATIVE_BF16, WITHOUT_BF16, Cpu, agreed, bf16_on_cpu, expected_precision, resolve_precision

MILAN = Cpu(machine="x86_64", flags=frozenset({"fma", "avx2"}))
ICE_LAKE = Cpu(machine="x86_64", flags=frozenset({"avx2", "avx512f", "avx512_vnni"}))
GENOA = Cpu(machine="x86_64", flags=frozenset({"avx2", "avx512f", "avx512_bf16"}))
SAPPHIRE_RAPIDS = Cpu(machine="x86_64", flags=frozenset({"avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16"}))
ALTRA = Cpu(machine="aarch64", flags=frozenset({"fp", "asimd", "asimddp"}))
GRAVITON_3 = Cpu(machine="aarch64", flags=frozenset({"asimd", "sve", "bf16", "svebf16"}))
MAC = Cpu(machine="arm64", flags=frozenset())

CASES: list[tuple[Cpu, dict[str, str], bool, str]] = [
    (MILAN, {}, False, "only emulates"),
    (ICE_LAKE, {}, False, "only emulates"),
    (GENOA, {}, True, "avx512_bf16"),
    (SAPPHIRE_RAPIDS, {}, True, "amx_bf16"),
    (ALTRA, {}, False, "only emulates"),
    (GRAVITON_3, {}, True, "svebf16"),
    (MAC, {}, False, "only emulates"),
    (GENOA, {"ATEN_CPU_CAPABILITY": "avx2"}, False, "ATEN_CPU_CAPABILITY=avx2"),
    (GENOA, {"ATEN_CPU_CAPABILITY": "default"}, False, "ATEN_CPU_CAPABILITY=default"),
    (GENOA, {"ATEN_CPU_CAPABILITY": "avx512"}, True, "avx512_bf16"),
    (SAPPHIRE_RAPIDS, {"ONEDNN_MAX_CPU_ISA": "AVX2"}, False, "ONEDNN_MAX_CPU_ISA=AVX2"),
    (SAPPHIRE_RAPIDS, {"DNNL_MAX_CPU_ISA": "AVX512_CORE_VNNI"}, False, "DNNL_MAX_CPU_ISA=AVX512_CORE_VNNI"),
    (SAPPHIRE_RAPIDS, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, True, "amx_bf16"),
    (SAPPHIRE_RAPIDS, {"ONEDNN_MAX_CPU_ISA": "ALL"}, True, "amx_bf16"),
    (SAPPHIRE_RAPIDS, {"MKL_ENABLE_INSTRUCTIONS": "AVX2"}, False, "MKL_ENABLE_INSTRUCTIONS=AVX2"),
    (SAPPHIRE_RAPIDS, {"MKL_ENABLE_INSTRUCTIONS": "AVX512"}, True, "amx_bf16"),
    (GRAVITON_3, {"ONEDNN_MAX_CPU_ISA": "ADVSIMD"}, False, "ONEDNN_MAX_CPU_ISA=ADVSIMD"),
    (GRAVITON_3, {"ATEN_CPU_CAPABILITY": "default"}, False, "ATEN_CPU_CAPABILITY=default"),
    (MILAN, {"ATEN_CPU_CAPABILITY": "avx512"}, False, "only emulates"),  # a variable gives a CPU nothing
]


@pytest.mark.parametrize(("cpu", "environment", "native", "reason"), CASES)
def test_what_a_cpu_multiplies(cpu: Cpu, environment: dict[str, str], native: bool, reason: str) -> None:
    found, why = bf16_on_cpu(cpu, environment)
    assert found is native and reason in why


def on(monkeypatch: pytest.MonkeyPatch, cpu: Cpu, **environment: str) -> None:
    """This machine has that CPU, and none of the variables but `environment`."""
    for variable in WITHOUT_BF16:
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(Cpu, "of_this_machine", staticmethod(lambda: cpu))


def test_auto_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, GENOA)
    assert resolve_precision("auto", "cpu").precision == "bf16"
    on(monkeypatch, GENOA, ATEN_CPU_CAPABILITY="avx2")
    assert resolve_precision("auto", "cpu").precision == "fp32"
    on(monkeypatch, MILAN)
    assert str(resolve_precision("auto", "cpu")) == "fp32 (auto: this CPU only emulates bf16)"


@pytest.mark.parametrize("asked", ["bf16", "fp32", "fp8"])
def test_what_is_asked_for_by_name_is_done(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, MILAN)
    for device in ("cpu", "cuda"):
        assert str(resolve_precision(asked, device)) == f"{asked} (as asked)"


@pytest.mark.parametrize(("has", "expected", "words"), [(True, "bf16", "A100 multiplies bf16"), (False, "fp32", "has no bf16")])
def test_auto_on_a_gpu(has: bool, expected: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return has or including_emulation  # a V100 says yes where emulation counts

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100" if has else "Tesla V100")
    found = resolve_precision("auto", "cuda")
    assert found.precision == expected and words in found.reason


def test_what_a_launcher_expects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this machine's CPU it knows the answer; of GPUs and of other machines what is usual, and says that they decide."""
    on(monkeypatch, GENOA)
    assert expected_precision("auto", "cpu", elsewhere=False).precision == "bf16"
    assert str(expected_precision("auto", "cpu", elsewhere=True)) == "fp32 (auto: bf16 on nodes whose CPUs multiply it)"
    for elsewhere in (False, True):
        assert str(expected_precision("auto", "cuda", elsewhere=elsewhere)).startswith("bf16 (auto: fp32 on GPUs without bf16")
        assert str(expected_precision("fp32", "cuda", elsewhere=elsewhere)) == "fp32 (as asked)"


def test_ranks_agree_or_refuse() -> None:
    agreed([("a", "bf16"), ("a", "bf16"), ("b", "bf16")])
    with pytest.raises(UserError, match=re.escape("precision=auto: is bf16 on a and fp32 on c, and ranks must compute in one")):
        agreed([("a", "bf16"), ("b", "bf16"), ("c", "fp32")])


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx512_bf16\n\nprocessor\t: 1\nflags\t\t: fpu avx512_bf16\n", {"fpu", "avx512_bf16"}),
        ("processor\t: 0\nFeatures\t: fp asimd svebf16\n\nprocessor\t: 1\nFeatures\t: fp asimd\n", {"fp", "asimd"}),
        ("", set()),
    ],
)  # fmt: skip
def test_cpuinfo(text: str, flags: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """x86-64, big and little cores of aarch64 (what all of them have), and a system that says nothing."""
    monkeypatch.setattr(Path, "read_text", lambda self, **_: text)
    assert Cpu.of_this_machine().flags == flags


def test_this_machine_is_read_as_the_kernel_shows_it() -> None:
    """Against torch, which asks the CPU itself and does not see the variables."""
    if platform.machine() != "x86_64":
        pytest.skip("torch tells of bf16 on x86-64 alone")
    native = bf16_on_cpu(environment={})[0]
    assert native == bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    assert set(NATIVE_BF16) == {"x86_64", "aarch64"}
