"""`longhaul bench attention`: every backend of attention that runs here, side by side on one shape.

Interleaved, so that what else the machine does hits all alike: medians of forward, and of forward and backward together;
the rate that they make of the scores which are not masked; the error against float64. The last line is JSON.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

from conf.errors import ConfigError
from train.config.kernels import AttentionName


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    sequence_length: int = 256
    """Positions of a sequence."""
    batch: int = 8
    """Sequences at a time."""
    heads: int = 6
    """Query heads."""
    kv_heads: int | None = None
    """Key-value heads; null: as many as query heads."""
    head_size: int = 64
    """Width of a head."""
    window: int | None = None
    """Tokens that a query sees at most, itself included; null: all before it."""
    softcap: float | None = None
    """Bound on the scores; null: none."""
    documents: int | None = None
    """Documents packed into each sequence, of random lengths; null: sequences that are not packed."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """What is computed in; auto: bf16 where the GPU or the CPU multiplies it, fp32 elsewhere."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where; auto is CUDA when this machine has it."""
    backends: tuple[AttentionName, ...] = ()
    """Names of kernels.attention; empty: all that run here but the reference."""
    repeats: int = 20
    """Times that each is run and timed; one more run comes before and is not counted."""

    def __post_init__(self) -> None:
        problems = []
        for name in ("sequence_length", "batch", "heads", "kv_heads", "head_size", "window", "documents", "repeats"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"{name}={value}: must be at least 1")
        if not problems and self.kv_heads is not None and self.heads % self.kv_heads:
            problems.append(f"kv_heads={self.kv_heads}: must divide heads={self.heads}")
        if self.documents is not None and self.documents > self.sequence_length:
            problems.append(f"documents={self.documents}: must not exceed sequence_length={self.sequence_length}")
        if self.softcap is not None and self.softcap <= 0:
            problems.append(f"softcap={self.softcap}: must be above 0; null is none")
        if "auto" in self.backends:
            problems.append("backends: auto is no backend of its own; name those to time, or leave it empty for all")
        if problems:
            raise ConfigError(problems)


def run(config: BenchConfig) -> int:
    """Time, print a table, and end with a line of JSON.

    Raises UserError when a backend asked for by name cannot do this.
    """
    from tools.attention_timing import Timing, measure  # torch: seconds, and --help needs none of it

    report = measure(config)
    for name, reason in report.cannot.items():
        print(f"{name:<16} not here: {reason}")
    packed = f", {config.documents} documents in each" if config.documents else ""
    print(
        f"\n{config.batch} x {config.sequence_length} tokens{packed}, {report.dtype} on {report.device}; * is what auto takes"
    )
    print(f"{'backend':<16} {'forward ms':>11} {'TFLOP/s':>8} {'both ms':>11} {'TFLOP/s':>8} {'error':>9} {'gradient':>9}")

    def rate(milliseconds: float, passes: int) -> float:
        return passes * report.forward_flops / milliseconds / 1e9

    def line(name: str, timing: Timing) -> str:
        mark = "*" if name == report.auto else ""
        return (
            f"{name + mark:<16} {timing.forward_ms:>11.3f} {rate(timing.forward_ms, 1):>8.3f} {timing.both_ms:>11.3f} "
            f"{rate(timing.both_ms, 3):>8.3f} {timing.output_error:>9.1e} {timing.gradient_error:>9.1e}"
        )

    for name, timing in sorted(report.timings.items(), key=lambda item: item[1].both_ms):
        print(line(name, timing))
    figures = {
        name: {
            "forward_ms": significant(timing.forward_ms),
            "both_ms": significant(timing.both_ms),
            "forward_tflops": significant(rate(timing.forward_ms, 1)),
            "both_tflops": significant(rate(timing.both_ms, 3)),
            "output_error": timing.output_error,
            "gradient_error": timing.gradient_error,
        }
        for name, timing in report.timings.items()
    }
    print(json.dumps({"device": report.device, "auto": report.auto, "backends": figures, "cannot": report.cannot}))
    return 0


def significant(value: float) -> float:
    """Four significant digits: a rate on a slow machine must not become 0."""
    return float(f"{value:.4g}")
