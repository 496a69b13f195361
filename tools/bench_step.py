"""`longhaul bench step`: the whole training loop, its bare step, DeepSpeed alone and Hugging Face, in turns in one process.

Machines are noisy and shared, so the ways are interleaved block by block and ratios are taken inside each round: the
median of the rounds counts. The last line is JSON.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from conf.errors import ConfigError, UserError
from data_pipeline.config import DataConfig, SourceConfig
from tools.bench_saves import add_stalls, measure_saves
from train.attempt import Attempt
from train.config.kernels import KernelsConfig
from train.config.model import ModelConfig
from train.config.monitor import MonitorConfig, WandbConfig
from train.config.pretrain import PretrainConfig
from train.config.training import (
    BatchConfig,
    BudgetConfig,
    CheckpointConfig,
    EvaluateConfig,
    LaunchConfig,
    OptimConfig,
    ParallelConfig,
    Precision,
    RunConfig,
)
from train.precision import resolve_precision

FAR = 10**9  # a budget of steps that no bench reaches
PEAK_WORK = 3e12  # FLOP, for which a CPU's peak is measured for 0.3 s: each round has one


@dataclass(frozen=True, kw_only=True)
class StepBenchConfig:
    model: ModelConfig
    """Shape of the model."""
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    """How the arithmetic is carried out; this verb compiles unless told otherwise."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the state lies on the ranks."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer."""
    precision: Precision = "auto"
    """As in `longhaul pretrain`."""
    data: str = "data/stdlib"
    """Folder of a prepared corpus; its tokenizer must fit into model.vocab_size."""
    sequence_length: int = 256
    """Tokens of one sequence."""
    document_mask: bool = False
    """Keep documents apart; off by default, since the peer does not."""
    micro_batch: int = 8
    """Sequences that one rank runs at a time."""
    micro_batches: int = 1
    """Micro-batches of one step."""
    processes: int = 1
    """Ranks, all on this machine."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What to compute on; auto: CUDA when this machine has it."""
    peer: Literal["none", "hf"] = "none"
    """Also run Hugging Face's Llama of the same shape: sdpa, autocast, fused AdamW, eager and compiled; on one rank."""
    rounds: int = 8
    """Times that every way is run."""
    block_steps: int = 5
    """Steps of one turn; the first of them, which finds the caches full of another's data, is not counted."""
    saves: int = 0
    """Also save so many checkpoints on the way, and measure what the steps around them lose."""
    trace: bool = False
    """Also profile three steps of the loop: a trace that Perfetto reads, and a table of the collectives."""
    trace_file: str = "trace.json"
    """Where the first rank's trace goes."""

    def __post_init__(self) -> None:
        problems = []
        for name in ("sequence_length", "micro_batch", "micro_batches", "processes", "rounds"):
            if getattr(self, name) < 1:
                problems.append(f"{name}={getattr(self, name)}: must be at least 1")
        if self.saves < 0:
            problems.append(f"saves={self.saves}: must not be negative; 0 saves nothing")
        if self.block_steps < 2:
            problems.append(
                f"block_steps={self.block_steps}: must be at least 2, since the first step of a turn is not counted"
            )
        if self.model.vocab_size is None:
            problems.append("model.vocab_size=null: give the size of the vocabulary to compute with")
        if self.peer == "hf" and self.processes > 1:
            problems.append(f"processes={self.processes}: the peer runs on one rank; use processes=1 or peer=none")
        fixed = {"family": "llama", "bias": False, "dropout": 0.0}
        for name, value in fixed.items() if self.peer == "hf" else ():
            if getattr(self.model, name) != value:
                problems.append(
                    f"model.{name}={getattr(self.model, name)}: the peer is a Llama, which has {value}; use peer=none"
                )
        if problems:
            raise ConfigError(problems)


def run(config: StepBenchConfig) -> int:
    """Time, print, and end with a line of JSON (on rank 0).

    Raises UserError for a corpus that is not there or does not fit.
    """
    from train.companions import ranks
    from train.inference.load import resolve_device

    device = resolve_device(config.device)
    config = replace(config, precision=resolve_precision(config.precision, device.type).precision)
    parallel = config.parallel
    layout = {"tensor_parallel": parallel.tensor, "sequence_parallel": parallel.sequence_parallel}
    with (
        ranks(config.processes, device.type, **layout) as context,
        tempfile.TemporaryDirectory() as folder,
        _quiet_unless(context.is_first),
    ):
        report = measure(config, context, Path(folder))
    if context.is_first:
        print(json.dumps(report))
    return 0


@contextmanager
def _quiet_unless(speaks: bool) -> Iterator[None]:
    """Only the first rank talks."""
    if speaks:
        yield
        return
    with Path("/dev/null").open("w") as nowhere:
        before, sys.stdout = sys.stdout, nowhere
        try:
            yield
        finally:
            sys.stdout = before


def run_config(config: StepBenchConfig, folder: Path) -> PretrainConfig:
    """The run whose loop is measured: as a user's, but without an end, evaluation or checkpoints."""
    data_parallel = config.processes // config.parallel.tensor
    return PretrainConfig(
        run=RunConfig(name="bench", folder=str(folder)),
        model=config.model,
        data=DataConfig(
            sources=(SourceConfig(path=config.data),),
            sequence_length=config.sequence_length,
            document_mask=config.document_mask,
        ),
        batch=BatchConfig(sequences=config.micro_batch * config.micro_batches * data_parallel, micro_batch=config.micro_batch),
        budget=BudgetConfig(steps=FAR),
        optim=config.optim,
        parallel=config.parallel,
        kernels=config.kernels,
        precision=config.precision,
        checkpoint=CheckpointConfig(every_steps=None),
        evaluate=EvaluateConfig(every_steps=None, max_samples=0),
        monitor=MonitorConfig(wandb=WandbConfig(mode="disabled"), console_every_steps=FAR),
        launch=LaunchConfig(processes=config.processes),
    )


def measure(config: StepBenchConfig, context: Any, folder: Path) -> dict[str, Any]:
    """All ways in turns; the report."""
    from train.metrics.jsonl import read_metrics
    from train.model.flops import flops_per_token

    settings = run_config(config, folder)
    ways, trainer, metrics, peak = _ways(config, settings, context, folder)
    for way in ways.values():
        for _ in range(3):
            way()
    times: dict[str, list[list[float]]] = {name: [] for name in ways}
    rates: list[float] = []
    for number in range(config.rounds):
        rates.append(peak())
        first = number % len(ways)  # in another order each time, so that none always follows the same other
        for name in [*ways, *ways][first : first + len(ways)]:
            times[name].append(_block(ways[name], config.block_steps))
        print(f"round {number + 1}/{config.rounds}: " + ", ".join(f"{n} {_ms(t[-1])}" for n, t in times.items()), flush=True)
    saves = measure_saves(ways["loop"], trainer, config.saves) if config.saves else None
    trainer.saver.close()
    if config.trace:
        _trace(ways["loop"], Path(config.trace_file) if context.is_first else None)
    metrics.close("finished", "")
    tokens = settings.batch.sequences * config.sequence_length
    records = [r for r in read_metrics(folder / "metrics.jsonl") if r.get("kind") == "train"] if context.is_first else []
    flops = flops_per_token(config.model, config.sequence_length)
    report = make_report(times, rates, tokens=tokens, flops_per_token=flops, processes=config.processes)
    waits = [record["data_wait_seconds"] / record["step_seconds"] for record in records[3:]]
    report["data_wait_share"] = round(statistics.median(waits), 5) if waits else None
    report["peak_memory_gib"] = round(_peak_memory(context.device) / 2**30, 3)
    lines = describe(report)
    if saves is not None:
        report["saves"] = saves
        stalls = [float(r["checkpoint_stall_seconds"]) for r in records if "checkpoint_stall_seconds" in r]
        lines += add_stalls(report, stalls[1:]) if stalls[1:] else []
    for line in lines:
        print(line)
    return report


def make_report(
    times: dict[str, list[list[float]]],
    rates: list[float],
    *,
    tokens: int,
    flops_per_token: tuple[int, int],
    processes: int,
) -> dict[str, Any]:
    """Figures of each way, and the ratios between them: `times` are seconds by way, round and step, `rates` FLOP/s."""
    full, causal = flops_per_token
    steps_of = {name: sorted(seconds for block in rounds for seconds in block) for name, rounds in times.items()}
    fastest = tokens / min(statistics.median(steps) for steps in steps_of.values())
    # No way does more than the peak: the machine had others at work when its products were timed.
    peak, peak_causal = (max(max(rates) * processes, fastest * flops) for flops in (full, causal))
    report: dict[str, Any] = {"tokens_per_step": tokens, "matmul_tflops": round(peak / 1e12, 4), "ways": {}}
    for name, steps in steps_of.items():
        median = statistics.median(steps)
        report["ways"][name] = {
            "tokens_per_second": round(tokens / median, 1),
            "step_ms_p50": round(median * 1e3, 2),
            "step_ms_p95": round(steps[min(len(steps) - 1, int(0.95 * len(steps)))] * 1e3, 2),
            "tflops": round(tokens / median * full / 1e12, 4),
            "mfu": round(tokens / median * full / peak, 4),
            "mfu_causal": round(tokens / median * causal / peak_causal, 4),
        }

    def ratio(name: str, other: str) -> float:
        """Time of `name` over that of `other`: the median over the rounds."""
        pairs = zip(times[name], times[other], strict=True)
        return statistics.median(statistics.median(a) / statistics.median(b) for a, b in pairs)

    report["loop_overhead"] = round(ratio("loop", "step") - 1, 4)
    if "deepspeed" in times:
        report["wrapper_overhead"] = round(ratio("step", "deepspeed") - 1, 4)
    for name in times:
        if name.startswith("hf"):
            report[f"times_{name}"] = round(ratio(name, "loop"), 4)
    return report


def describe(report: dict[str, Any]) -> list[str]:
    """The report for a person."""
    lines = [f"{'':12} {'tokens/s':>10} {'TFLOP/s':>9} {'MFU':>7} {'causal':>7} {'p50 ms':>9} {'p95 ms':>9}"]
    for name, way in report["ways"].items():
        lines.append(
            f"{name:12} {way['tokens_per_second']:10,.0f} {way['tflops']:9.3f} {way['mfu']:7.1%} {way['mfu_causal']:7.1%} "
            f"{way['step_ms_p50']:9.2f} {way['step_ms_p95']:9.2f}"
        )
    lines.append(f"MFU is against {report['matmul_tflops']:.3f} TFLOP/s; attention counted in full, and causal")
    lines.append(f"the loop costs {report['loop_overhead']:+.1%} over its step")
    if "wrapper_overhead" in report:
        lines.append(f"the step costs {report['wrapper_overhead']:+.1%} over DeepSpeed alone")
    if report["data_wait_share"] is not None:
        lines.append(f"waiting for data takes {report['data_wait_share']:.3%} of a step")
    peers = {"times_hf": "Hugging Face eager", "times_hf_compiled": "Hugging Face compiled"}
    lines += [f"{report[key]:.2f} times as fast as {text}" for key, text in peers.items() if key in report]
    return lines


def _ways(
    config: StepBenchConfig, settings: PretrainConfig, context: Any, folder: Path
) -> tuple[dict[str, Callable[[], None]], Any, Any, Callable[[], float]]:
    """(one step of each way, the loop's trainer and metrics, what measures the peak of a rank in FLOP/s)."""

    from data_pipeline.facts import inspect_sources
    from train.device import peak_of
    from train.engine import BareEngine
    from train.metrics import Metrics, NullMetrics, RunIdentity
    from train.model.transformer import Reading, build_layers
    from train.plan import make_plan
    from train.stages.training import blueprint_of, build, optimizer_of

    facts = inspect_sources(settings.data)
    if facts.vocab_size > config.model.vocab_size:
        raise UserError(f"model.vocab_size={config.model.vocab_size}: the corpus has {facts.vocab_size} token ids; raise it")
    metrics: Any = NullMetrics()
    if context.is_first:
        identity = RunIdentity(
            name="bench", run_id="bench", wandb_id="bench", attempt=1, job_type="bench", group="bench",
            resolved_config={}, layout={}, notes="",
        )  # fmt: skip
        metrics = Metrics(settings.monitor, folder, identity, FAR)
    plan = make_plan(settings, context.world_size)
    trainer = build(settings, context, Attempt(run_dir=folder, number=1), metrics, plan=plan)
    loop = trainer.steps()
    held = [
        trainer.loader.micro_batch(list(range(index * config.micro_batch, (index + 1) * config.micro_batch)))
        for index in range(config.micro_batches)
    ]
    reading = Reading(sequence_length=config.sequence_length, document_mask=config.document_mask)
    bare = BareEngine(
        build_layers(blueprint_of(settings, context), reading),
        optimizer=optimizer_of(settings),
        parallel=config.parallel,
        precision=config.precision,
        micro_batch=config.micro_batch,
        context=context,
    )
    bare.initialise(config.model, seed=1)
    ways: dict[str, Callable[[], Any]] = {
        "loop": lambda: next(loop),
        "step": lambda: trainer.engine.train_step(held, lr=1e-4, step=0),
    }
    if config.micro_batches == 1:  # what DeepSpeed's documentation shows
        ways["deepspeed"] = lambda: bare.step(held[0])
    if config.peer == "hf":
        from tools.bench_peer import hugging_face_step

        for name, compiled in (("hf", False), ("hf_compiled", True)):
            ways[name] = hugging_face_step(config, context.device, compiled=compiled)
    return ways, trainer, metrics, lambda: peak_of(context.device, config.precision, work=PEAK_WORK).flops or float("nan")


def _block(way: Callable[[], Any], steps: int) -> list[float]:
    """Seconds of each step but the first."""
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        way()
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def _ms(seconds: list[float]) -> str:
    return f"{statistics.median(seconds) * 1e3:.1f} ms"


def _peak_memory(device: Any) -> float:
    """Most bytes that this process held: on the GPU, or in main memory."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def _trace(step: Callable[[], Any], path: Path | None) -> None:
    """Three steps, on the rank with a `path` under the profiler: a trace for Perfetto, and the collectives as a table."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) if path else nullcontext() as profiler:
        for _ in range(3):
            step()
    if not path:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    averages = profiler.key_averages()
    collectives = [event for event in averages if event.key.startswith(("gloo:", "nccl", "c10d::"))]

    def milliseconds(event: Any) -> float:
        return max(event.cpu_time_total, event.device_time_total) / 1e3

    print(f"trace of 3 steps: {path} (open it at ui.perfetto.dev)")
    print(f"{'collective':44} {'calls':>7} {'ms in all':>10}")
    for event in sorted(collectives, key=milliseconds, reverse=True):
        print(f"{event.key:44} {event.count:7} {milliseconds(event):10.2f}")
    if not collectives:
        print("none: one rank")
