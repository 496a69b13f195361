"""The measurement behind `longhaul bench attention`.

Queries, keys and values are cut out of one tensor, as the model's are, and the gradient goes back into it: what it costs a
kernel to read and to give them so is part of what a layer pays.

Shapes: B sequences, S positions, T = B x S tokens, K key-value heads, G queries for each, D head size.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tools.bench_attention import BenchConfig
from train.inference.load import resolve_device, resolve_dtype
from train.model.attention import BACKENDS, Attend, Needs, choose, obstacle


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Median times of one backend, and its relative errors against float64 on the first sequence."""

    forward_ms: float
    both_ms: float
    output_error: float
    gradient_error: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was measured."""

    device: str
    dtype: str
    auto: str
    forward_flops: int
    """Two products of the scores that are not masked; a backward pass is counted as twice that."""
    timings: dict[str, Timing]
    cannot: dict[str, str]
    """Why the others are not there, by name."""


def measure(config: BenchConfig) -> Report:
    """Run the backends round by round.

    Raises UserError when a backend asked for by name cannot do this.
    """
    device = resolve_device(config.device)
    needs = Needs(
        num_heads=config.heads,
        kv_heads=config.kv_heads or config.heads,
        head_size=config.head_size,
        sequence_length=config.sequence_length,
        packed=config.documents is not None,
        window=config.window,
        scale=config.head_size**-0.5,
        softcap=config.softcap,
        dtype=resolve_dtype(config.dtype, device),
        device=device,
    )
    cannot = {} if config.backends else {name: why for name in BACKENDS if (why := obstacle(name, needs))}
    names = [choose(name, needs).name for name in config.backends]
    names = names or [name for name in BACKENDS if name not in cannot and name != "reference"]
    bounds, rows_TKGD = inputs(config, needs)
    attends = {name: bind(name, needs, bounds, config.batch * config.sequence_length) for name in names}
    direction = torch.randn_like(cut(rows_TKGD)[0])

    def forward(attend: Attend) -> None:
        with torch.no_grad():
            attend(*cut(rows_TKGD))

    def both(attend: Attend) -> None:
        torch.autograd.grad(attend(*cut(rows_TKGD)), rows_TKGD, direction)

    seconds = {name: ([], []) for name in names}
    for round_number in range(config.repeats + 1):
        for name, attend in attends.items():
            times = [seconds_of(lambda job=job, attend=attend: job(attend), device) for job in (forward, both)]
            if round_number:  # the first round compiles, loads and allocates
                for found, spent in zip(seconds[name], times, strict=True):
                    found.append(spent)
    timings = {}
    for name in names:
        output_error, gradient_error = errors(name, needs, bounds, rows_TKGD)
        forward_ms, both_ms = (statistics.median(found) * 1e3 for found in seconds[name])
        timings[name] = Timing(forward_ms=forward_ms, both_ms=both_ms, output_error=output_error, gradient_error=gradient_error)
    return Report(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        dtype=str(needs.dtype).removeprefix("torch."),
        auto=choose("auto", needs).name,
        forward_flops=4 * visible_pairs(needs, bounds) * needs.num_heads * needs.head_size,
        timings=timings,
        cannot=cannot,
    )


def inputs(config: BenchConfig, needs: Needs) -> tuple[Tensor, Tensor]:
    """Document bounds; random queries, keys and values as a layer's product gives them: [T, K, G + 2, D]."""
    generator = torch.Generator().manual_seed(0)
    length, total = config.sequence_length, config.batch * config.sequence_length
    bounds = [total]
    for first in range(0, total, length):
        inner = torch.randperm(length - 1, generator=generator)[: (config.documents or 1) - 1] + first + 1
        bounds += [first, *inner.tolist()]
    shape = (total, needs.kv_heads, needs.num_heads // needs.kv_heads + 2, needs.head_size)
    rows_TKGD = torch.randn(shape, generator=generator).to(needs.device, needs.dtype).requires_grad_()
    return torch.tensor(sorted(bounds), dtype=torch.int32, device=needs.device), rows_TKGD


def cut(rows_TKGD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values: each [T, heads, D]."""
    return rows_TKGD[:, :, :-2].flatten(1, 2), rows_TKGD[:, :, -2], rows_TKGD[:, :, -1]


def bind(name: str, needs: Needs, bounds: Tensor, num_tokens: int) -> Attend:
    """A backend with what it reads of the documents."""
    layout = BACKENDS[name].lay_out(needs, bounds, num_tokens)
    return Attend(backend=BACKENDS[name], needs=needs, layout=layout)


def seconds_of(job: Callable[[], None], device: torch.device) -> float:
    """Time from call to result."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    job()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def errors(name: str, needs: Needs, bounds: Tensor, rows_TKGD: Tensor) -> tuple[float, float]:
    """Relative errors of output and gradient; on one sequence, since float64 holds all its scores."""
    length = needs.sequence_length
    found = []
    for each, dtype in ((name, needs.dtype), ("reference", torch.float64)):
        first_SKGD = rows_TKGD[:length].detach().to(dtype).requires_grad_()
        output = bind(each, replace(needs, dtype=dtype), bounds.clamp(max=length), length)(*cut(first_SKGD))
        direction = torch.linspace(-1, 1, output.numel(), dtype=torch.float64, device=output.device).view_as(output)
        found.append((output, *torch.autograd.grad(output, first_SKGD, direction.to(output.dtype))))
    output_error, gradient_error = (
        ((ours.double() - exact).norm() / exact.norm()).item() for ours, exact in zip(*found, strict=True)
    )
    return output_error, gradient_error


def visible_pairs(needs: Needs, bounds: Tensor) -> int:
    """Pairs of a query and a key that it may look at."""
    total = 0
    for length in bounds.diff().tolist():
        window = min(needs.window or length, length)
        total += window * length - window * (window - 1) // 2
    return total
